import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { after, test } from 'node:test';
import { promisify } from 'node:util';
import { encode, ffmpeg, id3Picture, noise, sine, song, wav, writeWav } from '../../../test/audio.ts';
import { analyse, ffmpegOptions, fineProfile, openDirectory } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());

await writeWav(at.file('song.wav'), [song({ seconds: 40 })]);
await encode(at.file('song.wav'), at.file('song.mp3'), '-b:a', '192k');

/** Row with the most energy in one column. */
function loudestRow({ shape, data }: { shape: readonly number[]; data: Uint8Array }, column: number): number {
  const [rows, columns] = shape.slice(-2) as [number, number];
  let best = 0;
  for (let row = 0; row < rows; row += 1)
    if (data[row * columns + column]! > data[best * columns + column]!) best = row;
  return best;
}

test('a song becomes one window from its middle, a spectrogram of it, facts and no warning', async () => {
  const { tensor, spectrogram, windows, input, codes } = await analyse(at.file('song.mp3'));
  assert.deepEqual(tensor.shape, [1, 128, 128]);
  assert.equal(Math.max(...tensor.data), 255);
  const [window] = windows;
  assert.ok(Math.abs(window!.start - (40 - window!.end)) < 0.3, `${window!.start} to ${window!.end}`);
  assert.equal(window!.validFrames, 128);
  assert.ok(Math.abs(window!.dbAt255 - window!.dbAt0 - 70) < 1e-9);
  assert.equal(spectrogram.shape[0], 128);
  assert.ok(spectrogram.shape[1]! > 900 && spectrogram.shape[1]! <= 2000, `${spectrogram.shape}`);
  assert.equal(input.codec, 'mp3');
  assert.ok(Math.abs(input.duration - 40) < 0.1);
  assert.deepEqual(codes, []);
});

test('low frequencies lie in low rows, in the tensor and in the picture', async () => {
  await writeWav(at.file('sweep.wav'), [
    Float32Array.from([...sine({ hz: 200, seconds: 20 }), ...sine({ hz: 4000, seconds: 20 })]),
  ]);
  const { tensor, spectrogram } = await analyse(at.file('sweep.wav'));
  assert.ok(loudestRow(tensor, 10) < 12, `${loudestRow(tensor, 10)}`);
  assert.ok(loudestRow(tensor, 118) > 70);
  assert.ok(loudestRow(spectrogram, 10) < 12);
  assert.ok(loudestRow(spectrogram, spectrogram.shape[1]! - 10) > 70);
});

test('all windows, N windows and the middle one cut the same numbers from the same places', async () => {
  const of = { profile: fineProfile, start: 2, duration: 20 };
  const all = await analyse(at.file('song.mp3'), { ...of, windows: 'all' });
  const frames = 1 + Math.floor((20 * 22_050) / 512);
  assert.equal(all.windows.length, Math.ceil((frames - 128) / 64) + 1);
  assert.ok(Math.abs(all.windows.at(-1)!.end - 22) < 0.05, 'the last window is anchored to the end');
  const last = await analyse(at.file('song.mp3'), { ...of, windows: 2 });
  assert.deepEqual(last.windows, [all.windows[0], all.windows.at(-1)]);
  const size = 128 * 128;
  assert.deepEqual(last.tensor.data.subarray(0, size), all.tensor.data.subarray(0, size));
  assert.deepEqual(last.tensor.data.subarray(size), all.tensor.data.subarray(-size));
});

test('a window that is sought in a long file equals the one found by reading everything', async () => {
  await writeWav(at.file('long.wav'), [song({ seconds: 150, sampleRate: 22_050 })], { sampleRate: 22_050 });
  for (const name of ['long.flac', 'long.mp3']) {
    await encode(at.file('long.wav'), at.file(name));
    const sought = await analyse(at.file(name), { profile: fineProfile });
    const { start } = sought.windows[0]!;
    assert.ok(Math.abs(start - (150 - 2.97) / 2) < 0.3, `${start}`);
    const frame = Math.round((start * 22_050) / 512);
    const all = await analyse(at.file(name), {
      profile: { ...fineProfile, stepFrames: frame },
      windows: 'all',
    });
    assert.ok(Math.abs(all.windows[1]!.start - start) < 1e-6);
    const same = all.tensor.data.subarray(128 * 128, 2 * 128 * 128);
    const worst = sought.tensor.data.reduce(
      (most, value, i) => Math.max(most, Math.abs(value - same[i]!)),
      0,
    );
    assert.ok(worst <= (name.endsWith('flac') ? 1 : 12), `${name}: values differ by up to ${worst}`);
  }
});

test('several windows of a long file are sought one by one, and the picture is empty between', async () => {
  await ffmpeg('-f', 'lavfi', '-i', 'anoisesrc=d=1200:r=22050:a=0.2:seed=3', at.file('hours.flac'));
  const { windows, spectrogram, input } = await analyse(at.file('hours.flac'), { windows: 3 });
  assert.equal(windows.length, 3);
  assert.equal(windows[0]!.start, 0);
  assert.ok(windows[2]!.end > 1198 && windows[2]!.end <= 1200, `${windows[2]!.end}`);
  assert.equal(input.duration, 1200);
  const [rows, columns] = spectrogram.shape as [number, number];
  const filled = (column: number) =>
    Array.from({ length: rows }, (_, row) => spectrogram.data[row * columns + column]!).some((v) => v > 0);
  assert.ok(filled(2) && filled(columns >> 1) && !filled(columns >> 2));
});

test('scope track takes the reference from the whole range', async () => {
  const quiet = song({ seconds: 20, sampleRate: 22_050 }).map((sample) => sample * 0.01);
  await writeWav(
    at.file('crescendo.wav'),
    [Float32Array.from([...quiet, ...song({ seconds: 20, sampleRate: 22_050 })])],
    { sampleRate: 22_050 },
  );
  const track = await analyse(at.file('crescendo.wav'), {
    profile: { ...fineProfile, scope: 'track' },
    windows: 'all',
  });
  const references = new Set(track.windows.map(({ dbAt255 }) => dbAt255));
  assert.equal(references.size, 1);
  const window = await analyse(at.file('crescendo.wav'), { profile: fineProfile, windows: 'all' });
  assert.ok(Math.abs(window.windows[0]!.dbAt255 - (track.windows[0]!.dbAt255 - 40)) < 6);
  assert.ok(Math.max(...track.tensor.data.subarray(0, 128 * 128)) < 160);
});

test('short audio is looped and said to be short', async () => {
  await writeWav(at.file('short.wav'), [song({ seconds: 5 })]);
  const { tensor, windows, codes } = await analyse(at.file('short.wav'));
  const { validFrames } = windows[0]!;
  assert.equal(validFrames, 1 + Math.floor((5 * 22_050 - 2048) / 5168));
  for (let row = 0; row < 128; row += 1) {
    for (let column = validFrames; column < 128; column += 1) {
      assert.equal(tensor.data[row * 128 + column], tensor.data[row * 128 + (column % validFrames)]);
    }
  }
  assert.equal(windows[0]!.end, 5);
  assert.deepEqual(codes, ['too_short']);
});

test('a range is honoured, and one outside the audio is refused', async () => {
  const { input } = await analyse(at.file('song.mp3'), { start: 10, duration: 12 });
  assert.deepEqual([input.analysedStart, input.analysedEnd], [10, 22]);
  await assert.rejects(analyse(at.file('song.mp3'), { start: 41 }), { code: 'range_outside_audio' });
  await assert.rejects(analyse(at.file('song.mp3'), { start: 39.5 }), { code: 'audio_too_short' });
  await assert.rejects(analyse(at.file('song.mp3'), { start: 0, duration: 0.5 }), {
    code: 'audio_too_short',
  });
});

test('a file that is longer than the limit is refused, a range of it is not', async () => {
  const options = { ...ffmpegOptions, maxDurationSeconds: 35 };
  for (const windows of ['middle', 'all'] as const) {
    await assert.rejects(analyse(at.file('song.mp3'), { options, windows }), { code: 'audio_too_long' });
  }
  const { codes } = await analyse(at.file('song.mp3'), { options, start: 3, duration: 32 });
  assert.deepEqual(codes, []);
});

interface BadInput {
  what: string;
  make: (file: string) => Promise<unknown>;
  /** The problem, or the warnings of an analysis that goes well. */
  expect: string | string[];
}

const badInputs: BadInput[] = [
  { what: 'an empty file', make: (file) => writeFile(file, ''), expect: 'empty_file' },
  { what: 'text', make: (file) => writeFile(file, 'la la la\n'.repeat(9999)), expect: 'not_audio' },
  {
    what: 'an MP3 cut in the middle',
    make: async (file) => writeFile(file, (await readFile(at.file('song.mp3'))).subarray(0, 400_000)),
    expect: ['partly_corrupt'],
  },
  {
    what: 'an MP3 with a damaged stretch',
    make: async (file) => {
      const bytes = await readFile(at.file('song.mp3'));
      await writeFile(file, bytes.fill(0x3c, 300_000, 420_000));
    },
    expect: ['partly_corrupt'],
  },
  {
    what: 'a WAV header that claims 4 GB',
    make: (file) => writeFile(file, wav([song({ seconds: 12 })], { claimedBytes: 0xff000000 })),
    expect: ['partly_corrupt'],
  },
  {
    what: 'a WAV that was written into a pipe',
    make: (file) => writeFile(file, wav([song({ seconds: 12 })], { claimedBytes: 0xffffffff })),
    expect: [],
  },
  { what: 'one sample', make: (file) => writeWav(file, [new Float32Array(1)]), expect: 'audio_too_short' },
  {
    what: 'a header without samples',
    make: (file) => writeWav(file, [new Float32Array(0)]),
    expect: 'audio_too_short',
  },
  {
    what: 'pure silence',
    make: (file) => writeWav(file, [new Float32Array(44_100 * 12)]),
    expect: ['silent'],
  },
  {
    what: '8 kHz mono',
    make: (file) => writeWav(file, [noise({ seconds: 12, sampleRate: 8000 })], { sampleRate: 8000 }),
    expect: ['low_passed'],
  },
  {
    what: '192 kHz 24 bit',
    make: (file) =>
      writeWav(file, [song({ seconds: 9, sampleRate: 192_000 })], { sampleRate: 192_000, format: 'pcm24' }),
    expect: [],
  },
  {
    what: '7.1 channels',
    make: (file) =>
      writeWav(
        file,
        Array.from({ length: 8 }, (_, c) => noise({ seconds: 9, seed: c + 1 })),
      ),
    expect: [],
  },
  {
    what: 'a float WAV with NaN and Inf',
    make: (file) => {
      const samples = song({ seconds: 12 });
      samples[1000] = Number.NaN;
      samples[200_000] = Number.NEGATIVE_INFINITY;
      return writeWav(file, [samples], { format: 'float32' });
    },
    expect: ['sanitised'],
  },
  {
    what: 'a clipped recording',
    make: (file) => writeWav(file, [song({ seconds: 12 }).map((sample) => sample * 8)]),
    expect: ['clipped'],
  },
  {
    what: 'an MP4 video with sound',
    make: (file) =>
      ffmpeg(
        '-f',
        'lavfi',
        '-i',
        'testsrc=s=64x64:d=20',
        '-i',
        at.file('song.wav'),
        '-shortest',
        '-f',
        'mp4',
        file,
      ),
    expect: [],
  },
  {
    what: 'a video without sound',
    make: (file) => ffmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=2', '-f', 'mp4', file),
    expect: 'no_audio_stream',
  },
  {
    what: 'Matroska',
    make: (file) => ffmpeg('-i', at.file('song.mp3'), '-c', 'copy', '-f', 'matroska', file),
    expect: 'unsupported_format',
  },
  {
    what: 'an HLS playlist',
    make: (file) => writeFile(file, '#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n'),
    expect: 'unsupported_format',
  },
  {
    what: '10 MB of cover art',
    make: async (file) =>
      writeFile(file, Buffer.concat([id3Picture(10 * 2 ** 20), await readFile(at.file('song.mp3'))])),
    expect: [],
  },
];

for (const { what, make, expect } of badInputs) {
  test(`${what}: ${Array.isArray(expect) ? `analysed, ${expect.join(', ') || 'no warning'}` : expect}`, async () => {
    const file = at.file(`bad ${what.replaceAll(' ', '-')}.mp3`);
    await make(file);
    if (!Array.isArray(expect)) {
      await assert.rejects(analyse(file), { name: 'ProblemError', code: expect });
      return;
    }
    const { codes, tensor, windows, warnings } = await analyse(file);
    assert.deepEqual(codes, expect, JSON.stringify(warnings));
    assert.deepEqual(tensor.shape, [1, 128, 128]);
    for (const value of [windows[0]!.dbAt0, windows[0]!.dbAt255, windows[0]!.peakDbfs])
      assert.ok(Number.isFinite(value));
    if (expect.includes('silent')) assert.ok(windows[0]!.silent && tensor.data.every((value) => value === 0));
  });
}

test('a low-pass filter is found where it is, and music without one is not accused', async () => {
  await writeWav(at.file('noise.wav'), [noise({ seconds: 12 })]);
  await encode(at.file('noise.wav'), at.file('low.mp3'), '-b:a', '64k', '-cutoff', '5000');
  const { warnings } = await analyse(at.file('low.mp3'));
  assert.equal(warnings[0]?.code, 'low_passed');
  assert.ok(Math.abs(warnings[0]!.value! - 5000) < 600, `${warnings[0]!.value} Hz`);
  assert.deepEqual((await analyse(at.file('noise.wav'))).codes, []);
  // A slope of 12 dB an octave is how dark music sounds.
  await encode(at.file('noise.wav'), at.file('dark.wav'), '-af', 'lowpass=f=1500');
  assert.deepEqual((await analyse(at.file('dark.wav'))).codes, []);
});

test('silent windows are marked one by one', async () => {
  const samples = new Float32Array(22_050 * 24);
  samples.set(song({ seconds: 12, sampleRate: 22_050 }));
  await writeWav(at.file('half.wav'), [samples], { sampleRate: 22_050 });
  const { windows, codes } = await analyse(at.file('half.wav'), { profile: fineProfile, windows: 'all' });
  assert.equal(windows[0]!.silent, false);
  assert.equal(windows.at(-1)!.silent, true);
  assert.deepEqual(codes, ['silent']);
});

test('a cancelled analysis ends at once', async () => {
  const controller = new AbortController();
  const reason = new Error('cancelled');
  setTimeout(() => controller.abort(reason), 250);
  await assert.rejects(
    analyse(at.file('hours.flac'), {
      windows: 'all',
      profile: { ...fineProfile, hopLength: 64 },
      signal: controller.signal,
    }),
    reason,
  );
});

test('memory does not grow with the length of the file', async () => {
  const peak = async (minutes: number) => {
    const file = at.file(`${minutes}.flac`);
    await ffmpeg(
      '-f',
      'lavfi',
      '-i',
      `anoisesrc=d=${minutes * 60}:r=22050:a=0.2`,
      '-compression_level',
      '0',
      file,
    );
    const script = new URL('testing/analyse.ts', import.meta.url).pathname;
    const { stdout } = await promisify(execFile)(process.execPath, [script, file, 'all', 'fine']);
    const { peakKb, shape } = JSON.parse(stdout) as { peakKb: number; shape: number[] };
    // The child reads its tensor back to report it: that part does grow.
    return peakKb / 1024 - (2 * shape[0]! * 128 * 128) / 2 ** 20;
  };
  const short = await peak(5);
  const long = await peak(60);
  assert.ok(long - short < 30, `${short.toFixed(0)} MB for 5 minutes, ${long.toFixed(0)} MB for 60`);
});
