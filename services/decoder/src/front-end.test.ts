import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { after, test } from 'node:test';
import { promisify } from 'node:util';
import { encode, ffmpeg, id3Picture, noise, sine, song, wav, writeWav } from '../../../test/audio.ts';
import { makeGoldenPcm } from './testing/golden-pcm.ts';
import { analyse, ccmusicProfile, ffmpegOptions, fineProfile, openDirectory } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());

await writeWav(at.file('song.wav'), [song({ seconds: 40 })]);
await encode(at.file('song.wav'), at.file('song.mp3'), '-b:a', '192k');

interface StretchedGolden {
  windowFrames: number;
  cases: { name: string; gains: number[]; frames: number; begin: number; windows: string[] }[];
}

const readGolden = async (name: string) =>
  JSON.parse(await readFile(new URL(`golden/${name}`, import.meta.url), 'utf8'));
const { sines, noise: goldenNoise } = await readGolden('log-mel.golden.json');
const stretched: StretchedGolden = await readGolden('stretched.golden.json');

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

for (const { name, gains, frames, begin, windows } of stretched.cases) {
  test(`stretched windows are those of librosa and matplotlib: ${name}`, async () => {
    const samples = (frames - 1) * 512;
    const third = Math.ceil(samples / 3);
    const pcm = makeGoldenPcm({ sines, noise: goldenNoise }, samples, 22_050).map(
      (sample, n) => sample * Math.fround(gains[Math.floor(n / third)]!),
    );
    await writeWav(at.file('golden.wav'), [pcm], { sampleRate: 22_050, format: 'float32' });
    const { windowFrames } = stretched;
    const profile = { ...ccmusicProfile, windowFrames, stepFrames: windowFrames };
    const ours = await analyse(at.file('golden.wav'), { profile, windows: 'all' });
    assert.deepEqual(ours.tensor.shape, [windows.length, 128, windowFrames]);
    assert.ok(Math.abs(ours.windows[0]!.start - (begin * 512) / 22_050) < 1e-6);
    const expected = Buffer.concat(windows.map((window) => Buffer.from(window, 'base64')));
    const difference = ours.tensor.data.map((value, i) => Math.abs(value - expected[i]!));
    // librosa computes in 32 bits: cells on the edge of a step fall to its other side.
    assert.ok(Math.max(...difference) <= 1, `up to ${Math.max(...difference)} levels`);
    const share = difference.filter((value) => value > 0).length / difference.length;
    assert.ok(share < 0.002, `${share} of the cells differ`);
  });
}

test('what 0 and 255 mean is true of a stretched window', async () => {
  const quiet = song({ seconds: 13, sampleRate: 22_050 }).map((sample) => sample * 0.01);
  const tail = new Float32Array(13 * 22_050);
  await writeWav(
    at.file('levels.wav'),
    [Float32Array.from([...song({ seconds: 13, sampleRate: 22_050 }), ...quiet, ...tail])],
    { sampleRate: 22_050, format: 'float32' },
  );
  const of = { windows: 'all', start: 0 } as const;
  const stretch = await analyse(at.file('levels.wav'), { profile: ccmusicProfile, ...of });
  const profile = { ...ccmusicProfile, stretch: 'none', quantisation: 'linear-uint8' } as const;
  const plain = await analyse(at.file('levels.wav'), { profile, ...of });
  const decibels = ({ windows, tensor }: typeof plain, at: number) => {
    const { dbAt0, dbAt255 } = windows[Math.floor(at / (128 * 491))]!;
    return dbAt0 + (tensor.data[at]! / 255) * (dbAt255 - dbAt0);
  };
  for (let i = 0; i < stretch.tensor.data.length; i += 1) {
    const apart = Math.abs(decibels(stretch, i) - decibels(plain, i));
    assert.ok(apart < 0.5, `cell ${i} is ${apart} dB off`);
  }
  assert.ok(stretch.windows[1]!.dbAt255 < stretch.windows[0]!.dbAt255 - 30);
  assert.ok(stretch.windows.every(({ dbAt0, dbAt255 }) => dbAt0 <= dbAt255));
});

test('ccmusic slices do not overlap, lie in the middle, and shorter audio than one is looped', async () => {
  const { windows, codes } = await analyse(at.file('song.mp3'), { profile: ccmusicProfile, windows: 'all' });
  assert.equal(windows.length, 3);
  const [first, second, third] = windows;
  assert.ok(Math.abs(second!.start - first!.end) < 1e-5 && Math.abs(third!.start - second!.end) < 1e-5);
  assert.ok(Math.abs(first!.start - (40 - third!.end)) < 0.07, `${first!.start} and ${third!.end}`);
  assert.deepEqual(codes, []);

  const short = { profile: ccmusicProfile, windows: 'all', start: 3, duration: 9 } as const;
  const looped = await analyse(at.file('song.mp3'), short);
  assert.equal(looped.windows.length, 1);
  const { validFrames } = looped.windows[0]!;
  assert.equal(validFrames, 1 + Math.floor((9 * 22_050) / 512));
  for (let cell = validFrames; cell < 491; cell += 1)
    assert.equal(looped.tensor.data[cell], looped.tensor.data[cell - validFrames]);
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

async function longNoise(minutes: number): Promise<string> {
  const file = at.file(`${minutes}.flac`);
  const source = `anoisesrc=d=${minutes * 60}:r=22050:a=0.2`;
  await ffmpeg('-f', 'lavfi', '-i', source, '-compression_level', '0', file);
  return file;
}

/** Peak memory, in MB, of a process that analyses all windows of the file. */
async function peakMemory(file: string, profile: string): Promise<number> {
  const script = new URL('testing/analyse.ts', import.meta.url).pathname;
  const { stdout } = await promisify(execFile)(process.execPath, [script, file, 'all', profile]);
  const { peakKb, shape } = JSON.parse(stdout) as { peakKb: number; shape: number[] };
  // The child reads its tensor back to report it: that part does grow.
  return peakKb / 1024 - (2 * shape.reduce((product, side) => product * side)) / 2 ** 20;
}

test('memory does not grow with the length of the file, in either scope', async () => {
  const [minutes5, minutes60] = [await longNoise(5), await longNoise(60)];
  for (const profile of ['fine', 'ccmusic']) {
    const [short, long] = [await peakMemory(minutes5, profile), await peakMemory(minutes60, profile)];
    const found = `${profile}: ${short.toFixed(0)} MB for 5 minutes, ${long.toFixed(0)} MB for 60`;
    assert.ok(long - short < 30, found);
  }
});
