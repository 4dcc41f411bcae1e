import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { encode, noise, sine, writeWav } from '../../../test/audio.ts';
import { type AudioFacts, createFfmpeg, type FfmpegOptions } from './ffmpeg.ts';
import { createPowerSpectrum } from './log-mel.ts';
import { movWithExternalTrack } from './testing/external-track.ts';
import { defaultProfile, ffmpegOptions, openDirectory, processesNaming } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());
const patience = () => AbortSignal.timeout(30_000);
const profile = defaultProfile;

async function readAll(
  file: string,
  {
    start = 0,
    options = ffmpegOptions,
    facts,
  }: { start?: number; options?: FfmpegOptions; facts?: AudioFacts } = {},
) {
  const ffmpeg = createFfmpeg(options);
  const known = facts ?? (await ffmpeg.probe(file, patience()));
  const { pcm, report } = ffmpeg.readMono(file, known, { profile, start }, patience());
  const chunks: Float32Array[] = [];
  for await (const chunk of pcm) chunks.push(chunk);
  const all = new Float32Array(chunks.reduce((length, chunk) => length + chunk.length, 0));
  let length = 0;
  for (const chunk of chunks) {
    all.set(chunk, length);
    length += chunk.length;
  }
  return { pcm: all, report, facts: known };
}

/** Strongest frequency around the middle, Hz. */
function pitch(pcm: Float32Array): number {
  const power = createPowerSpectrum(8192).transform(pcm, Math.floor(pcm.length / 2) - 4096);
  return (power.indexOf(Math.max(...power)) * profile.sampleRate) / 8192;
}

await writeWav(at.file('source.wav'), [sine({ hz: 987, seconds: 3 }), sine({ hz: 987, seconds: 3 })]);

for (const [name, container, codec, ...options] of [
  ['a.mp3', 'mp3', 'mp3'],
  ['a.flac', 'flac', 'flac'],
  ['vorbis.ogg', 'ogg', 'vorbis', '-c:a', 'libvorbis'],
  ['a.opus', 'ogg', 'opus'],
  ['a.m4a', 'mp4', 'aac'],
  ['alac.m4a', 'mp4', 'alac', '-c:a', 'alac'],
  ['a.aac', 'aac', 'aac'],
  ['a.aiff', 'aiff', 'pcm_s16be'],
  ['24.wav', 'wav', 'pcm_s24le', '-c:a', 'pcm_s24le'],
  ['192k.flac', 'flac', 'flac', '-ar', '192000', '-sample_fmt', 's32'],
  ['8k.wav', 'wav', 'pcm_s16le', '-ar', '8000', '-ac', '1'],
] as const) {
  test(`${name} (${codec}) decodes to the right pitch and length`, async () => {
    await encode(at.file('source.wav'), at.file(name), ...options);
    const { pcm, facts, report } = await readAll(at.file(name));
    assert.equal(facts.container.name, container);
    assert.equal(facts.codec, codec);
    assert.ok(Math.abs(pitch(pcm) - 987) < 3, `pitch ${pitch(pcm)}`);
    assert.ok(Math.abs(pcm.length / profile.sampleRate - 3) < 0.06, `${pcm.length / profile.sampleRate} s`);
    assert.deepEqual(
      { failed: report.failed, reachedEnd: report.reachedEnd, errorLines: report.errorLines },
      { failed: false, reachedEnd: true, errorLines: 0 },
    );
  });
}

for (const count of [1, 2, 3, 6, 8]) {
  test(`${count} channels become their exact mean`, async () => {
    const rate = profile.sampleRate;
    const channels = Array.from({ length: count }, (_, c) =>
      noise({ seconds: 0.5, sampleRate: rate, level: 0.9, seed: c + 1 }),
    );
    await writeWav(at.file(`${count}.wav`), channels, { sampleRate: rate, format: 'float32' });
    const { pcm, facts } = await readAll(at.file(`${count}.wav`));
    assert.equal(facts.channels, count);
    assert.equal(pcm.length, channels[0]!.length);
    let worst = 0;
    for (let n = 0; n < pcm.length; n += 1) {
      const mean = channels.reduce((total, channel) => total + channel[n]!, 0) / count;
      worst = Math.max(worst, Math.abs(pcm[n]! - mean));
    }
    assert.ok(worst < 1e-6, `off by ${worst}`);
  });
}

test('a start in the middle gives the same samples as reading everything', async () => {
  await writeWav(at.file('long.wav'), [noise({ seconds: 20 })]);
  for (const [name, ...options] of [
    ['seek.flac'],
    ['seek.mp3', '-q:a', '5'],
    ['seek.aac'],
    ['seek.m4a'],
  ] as const) {
    await encode(at.file('long.wav'), at.file(name), ...options);
    const whole = await readAll(at.file(name));
    const part = await readAll(at.file(name), { start: 12.5 });
    const offset = Math.round(12.5 * profile.sampleRate);
    let error = 0;
    let energy = 0;
    for (let n = 0; n < 5 * profile.sampleRate; n += 1) {
      error += (part.pcm[n]! - whole.pcm[offset + n]!) ** 2;
      energy += whole.pcm[offset + n]! ** 2;
    }
    assert.ok(
      error / energy < 1e-3,
      `${name}: ${(10 * Math.log10(error / energy)).toFixed(1)} dB of difference`,
    );
  }
});

test('samples that are no numbers become silence, are counted, and harm nothing else', async () => {
  const samples = sine({ hz: 440, seconds: 4, sampleRate: profile.sampleRate });
  samples[100] = Number.NaN;
  samples[20_000] = Number.POSITIVE_INFINITY;
  samples[20_001] = Number.NEGATIVE_INFINITY;
  await writeWav(at.file('nan.wav'), [samples], { sampleRate: profile.sampleRate, format: 'float32' });
  const { pcm, report } = await readAll(at.file('nan.wav'));
  assert.ok(pcm.every(Number.isFinite));
  assert.ok(report.sanitised >= 3, `${report.sanitised}`);
  for (let n = 60_000; n < 80_000; n += 1) assert.ok(Math.abs(pcm[n]! - samples[n]!) < 1e-5);
});

test('non-finite samples before a resampler harm only their neighbourhood', async () => {
  const samples = sine({ hz: 440, seconds: 4 });
  samples[40_000] = Number.NaN;
  await writeWav(at.file('nan44.wav'), [samples], { format: 'float32' });
  const { pcm, report } = await readAll(at.file('nan44.wav'));
  assert.ok(pcm.every(Number.isFinite));
  assert.ok(
    report.sanitised >= 1 && report.sanitised < profile.sampleRate / 2,
    `${report.sanitised} sanitised`,
  );
});

test('audio over the limit is refused however its header describes it', async () => {
  const options = { ...ffmpegOptions, maxDurationSeconds: 2 };
  await assert.rejects(readAll(at.file('source.wav'), { options }), { code: 'audio_too_long' });
});

test('a video without sound, a foreign codec and a broken header are told apart', async () => {
  const video = ['-f', 'lavfi', '-i', 'color=black:s=32x32:d=1'];
  await promisify(execFile)('ffmpeg', ['-v', 'error', ...video, '-c:v', 'mpeg4', at.file('mute.mp4')]);
  await encode(at.file('source.wav'), at.file('ac3.mp4'), '-c:a', 'ac3');
  await writeFile(at.file('broken.flac'), Buffer.concat([Buffer.from('fLaC'), Buffer.alloc(3000, 7)]));
  const moovless = (await readFile(at.file('a.m4a'))).subarray(0, 4000);
  await writeFile(at.file('moovless.m4a'), moovless);
  const probe = (name: string) => createFfmpeg(ffmpegOptions).probe(at.file(name), patience());
  await assert.rejects(probe('mute.mp4'), { code: 'no_audio_stream' });
  await assert.rejects(probe('ac3.mp4'), { code: 'unsupported_format' });
  await assert.rejects(probe('broken.flac'), { code: 'decode_failed' });
  await assert.rejects(probe('moovless.m4a'), { code: 'decode_failed' });
});

test('the sound of a video is taken', async () => {
  const inputs = ['-f', 'lavfi', '-i', 'testsrc=s=64x64:d=3', '-i', at.file('source.wav')];
  await promisify(execFile)('ffmpeg', [
    '-v',
    'error',
    ...inputs,
    '-c:v',
    'mpeg4',
    '-c:a',
    'aac',
    at.file('video.mp4'),
  ]);
  const { pcm, report } = await readAll(at.file('video.mp4'));
  assert.ok(Math.abs(pitch(pcm) - 987) < 3);
  assert.equal(report.errorLines, 0);
});

test('an ffmpeg that makes no progress is killed', async () => {
  const fifo = at.file('fifo');
  await promisify(execFile)('mkfifo', [fifo]);
  const facts = await createFfmpeg(ffmpegOptions).probe(at.file('a.mp3'), patience());
  const options = { ...ffmpegOptions, stallMs: 500 };
  await assert.rejects(readAll(fifo, { options, facts }), { code: 'decode_timeout' });
  assert.deepEqual(await processesNaming(fifo), []);
});

test('an ffmpeg that is over its budget is killed, a slow reader being no stall', async () => {
  await writeWav(at.file('minutes.wav'), [new Float32Array(44_100 * 120)]);
  const ffmpeg = createFfmpeg({ ...ffmpegOptions, stallMs: 400, budgetBaseMs: 1500, budgetPerMegabyteMs: 0 });
  const facts = await ffmpeg.probe(at.file('minutes.wav'), patience());
  const { pcm } = ffmpeg.readMono(at.file('minutes.wav'), facts, { profile }, patience());
  const begun = performance.now();
  await assert.rejects(
    async () => {
      for await (const _ of pcm) await sleep(600);
    },
    { code: 'decode_timeout', message: /longer than/ },
  );
  assert.ok(performance.now() - begun > 1400);
  assert.deepEqual(await processesNaming(at.file('minutes.wav')), []);
});

test('ffmpeg is gone when the signal aborts, when the reader leaves, and before that nothing is lost', async () => {
  const ffmpeg = createFfmpeg(ffmpegOptions);
  const file = at.file('minutes.wav');
  const facts = await ffmpeg.probe(file, patience());
  const controller = new AbortController();
  const reason = new Error('cancelled');
  await assert.rejects(async () => {
    for await (const _ of ffmpeg.readMono(file, facts, { profile }, controller.signal).pcm)
      controller.abort(reason);
  }, reason);
  assert.deepEqual(await processesNaming(file), []);

  for await (const _ of ffmpeg.readMono(file, facts, { profile }, patience()).pcm) break;
  assert.deepEqual(await processesNaming(file), []);
});

test('ffmpeg dies with the process that reads from it', async () => {
  const file = at.file('minutes.wav');
  const reader = spawn(process.execPath, [
    '--input-type=module-typescript',
    '--eval',
    `import { createFfmpeg } from '${new URL('ffmpeg.ts', import.meta.url)}';
     const ffmpeg = createFfmpeg(${JSON.stringify(ffmpegOptions)});
     const signal = new AbortController().signal;
     const facts = await ffmpeg.probe('${file}', signal);
     for await (const _ of ffmpeg.readMono('${file}', facts, { profile: ${JSON.stringify(profile)} }, signal).pcm) {
       console.log('reading');
       await new Promise((resolve) => setTimeout(resolve, 60_000));
     }`,
  ]);
  await once(reader.stdout, 'data');
  assert.equal(
    (await processesNaming(`file:${file}`)).filter((command) => command.startsWith('ffmpeg')).length,
    1,
  );
  reader.kill('SIGKILL');
  await once(reader, 'exit');
  for (let tries = 0; tries < 50 && (await processesNaming(file)).length > 0; tries += 1) await sleep(50);
  assert.deepEqual(await processesNaming(file), []);
});

const strace = await promisify(execFile)('strace', ['-V']).then(
  () => true,
  () => false,
);

test('playlists and external tracks are never opened', {
  skip: strace ? false : 'strace is not installed',
}, async () => {
  const target = at.file('secret.txt');
  await writeFile(target, 'root:x:0:0');
  const list = `#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://${target}\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXTINF:1,\nfile:///etc/passwd\n`;
  await writeFile(at.file('hls.mp3'), list);
  await writeFile(
    at.file('concat.mp3'),
    `ffconcat version 1.0\nfile '${target}'\nfile 'http://127.0.0.1:9/a.mp3'\n`,
  );
  await encode(at.file('source.wav'), at.file('plain.mov'), '-c:a', 'pcm_s16le');
  await writeFile(
    at.file('external.mov'),
    movWithExternalTrack(await readFile(at.file('plain.mov')), target),
  );
  const facts = await createFfmpeg(ffmpegOptions).probe(at.file('a.mp3'), patience());

  // The front end, which refuses them from their first bytes; then ffmpeg itself, given them in spite of that.
  const script = `
    import { createFfmpeg } from '${new URL('ffmpeg.ts', import.meta.url)}';
    const ffmpeg = createFfmpeg(${JSON.stringify(ffmpegOptions)});
    const signal = new AbortController().signal;
    const facts = ${JSON.stringify(facts)};
    for (const name of ${JSON.stringify(['hls.mp3', 'concat.mp3', 'external.mov'].map((name) => at.file(name)))}) {
      await ffmpeg.probe(name, signal).then(() => console.log('probed'), (error) => console.log(error.code));
      for (const demuxer of ['mp3', 'mov', 'wav', 'ogg', 'aac']) {
        const forced = { ...facts, channels: 1, container: { ...facts.container, demuxer } };
        const { pcm, report } = ffmpeg.readMono(name, forced, { profile: ${JSON.stringify(profile)} }, signal);
        let samples = 0;
        for await (const chunk of pcm) samples += chunk.length;
      }
    }`;
  const log = at.file('trace');
  const trace = ['-f', '-s', '4096', '-e', 'trace=open,openat,openat2,connect,sendto', '-o', log];
  const node = [process.execPath, '--input-type=module-typescript', '--eval', script];
  const { stdout } = await promisify(execFile)('strace', [...trace, ...node]);
  assert.deepEqual(stdout.trim().split('\n'), ['unsupported_format', 'unsupported_format', 'probed']);

  const calls = (await readFile(log, 'utf8')).split('\n');
  assert.ok(
    calls.some((call) => call.includes('external.mov')),
    'the trace sees what ffmpeg opens',
  );
  assert.deepEqual(
    calls.filter((call) => /secret\.txt|\/etc\/passwd|AF_INET/.test(call)),
    [],
  );
});

test('the external track of that test is one that ffmpeg would open if it were let', async () => {
  const file = at.file('external.mov');
  const log = at.file('trace2');
  const trace = ['-f', '-s', '4096', '-e', 'trace=open,openat', '-o', log];
  const open = [
    '-v',
    'error',
    '-enable_drefs',
    '1',
    '-use_absolute_path',
    '1',
    '-i',
    file,
    '-f',
    'null',
    '-',
  ];
  await promisify(execFile)('strace', [...trace, 'ffmpeg', ...open]).catch(() => {});
  assert.match(await readFile(log, 'utf8'), /secret\.txt/);
});
