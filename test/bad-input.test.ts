/**
 * Bad and odd input through the whole pipeline: each a clear answer with a stable code, nothing lost, the next job
 * unaffected. What never reaches the decoder (no field, two files, cut connection, ...) is in api.test.ts.
 */
import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { encode, ffmpeg, id3Picture, sine, song, wav, writeWav } from './audio.ts';
import { finished, type Job, upload } from './client.ts';
import { type System, startSystem } from './system.ts';

interface Case {
  readonly what: string;
  readonly name: string;
  readonly make: () => Buffer | Promise<Buffer>;
  /** The problem's code, or that it is completed. */
  readonly expect: string;
  readonly warnings?: readonly string[];
  readonly check?: (job: Job) => void;
}

describe('bad input', () => {
  let system: System;
  let directory: string;
  let mp3: Buffer;
  let good: Buffer;

  before(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'as-bad-'));
    await writeWav(at('song.wav'), [song({ seconds: 20 })]);
    await encode(at('song.wav'), at('song.mp3'), '-b:a', '128k');
    mp3 = await readFile(at('song.mp3'));
    good = wav([song({ seconds: 10, seed: 5 })]);
    system = await startSystem();
  });
  after(async () => {
    await system?.stop();
    await rm(directory, { recursive: true, force: true });
  });

  const at = (name: string) => path.join(directory, name);
  const made = async (name: string, ...args: string[]) => {
    await ffmpeg(...args, at(name));
    return readFile(at(name));
  };
  const stereo = (left: Float32Array, channels: number) => Array.from({ length: channels }, () => left);

  const cases: Case[] = [
    {
      what: 'text named .mp3',
      name: 'notes.mp3',
      make: () => Buffer.from('Dear diary, today I wrote no music.\n'.repeat(200)),
      expect: 'not_audio',
    },
    { what: 'random bytes', name: 'noise.mp3', make: () => Buffer.alloc(50_000, 0x1b), expect: 'not_audio' },
    { what: 'one byte', name: 'a.wav', make: () => Buffer.from('R'), expect: 'not_audio' },
    {
      what: 'an MP3 cut in the middle',
      name: 'cut.mp3',
      make: () => mp3.subarray(0, Math.floor(mp3.length / 2)),
      expect: 'completed',
      warnings: ['partly_corrupt'],
      check: (job) => assert.ok(job.input!.analysedEnd < 11, String(job.input!.analysedEnd)),
    },
    {
      what: 'a WAV header that claims 4 GB',
      name: 'claims.wav',
      make: () => wav([song({ seconds: 12 })], { claimedBytes: 0xfffffff0 }),
      expect: 'completed',
    },
    {
      what: 'one sample',
      name: 'one.wav',
      make: () => wav([Float32Array.of(0.5)]),
      expect: 'audio_too_short',
    },
    {
      what: 'a WAV without samples',
      name: 'none.wav',
      make: () => wav([new Float32Array()]),
      expect: 'audio_too_short',
    },
    {
      what: 'three seconds',
      name: 'short.wav',
      make: () => wav([song({ seconds: 3 })]),
      expect: 'completed',
      warnings: ['too_short'],
    },
    {
      what: 'pure silence',
      name: 'silence.wav',
      make: () => wav([new Float32Array(44_100 * 12)]),
      expect: 'completed',
      warnings: ['silent'],
      check(job) {
        assert.deepEqual(job.result!.top, []);
        assert.equal(job.result!.uncertain, true);
        assert.ok(job.result!.windows.every(({ silent }) => silent));
      },
    },
    {
      what: '8 kHz mono',
      name: 'phone.wav',
      make: () => wav([song({ seconds: 12, sampleRate: 8_000 })], { sampleRate: 8_000 }),
      expect: 'completed',
      warnings: ['low_passed'],
      check: (job) => assert.equal(job.input!.sampleRate, 8_000),
    },
    {
      what: '192 kHz with 24 bits',
      name: 'studio.wav',
      make: () =>
        wav(stereo(song({ seconds: 9, sampleRate: 192_000 }), 2), { sampleRate: 192_000, format: 'pcm24' }),
      expect: 'completed',
      check: (job) => assert.deepEqual([job.input!.sampleRate, job.input!.codec], [192_000, 'pcm_s24le']),
    },
    {
      what: '7.1 channels',
      name: 'surround.wav',
      make: () => wav(stereo(song({ seconds: 9 }), 8)),
      expect: 'completed',
      check: (job) => assert.equal(job.input!.channels, 8),
    },
    {
      what: 'a float WAV with NaN and Inf',
      name: 'nan.wav',
      make() {
        const samples = song({ seconds: 10 });
        for (let n = 1_000; n < samples.length; n += 5_000)
          samples[n] = n % 3 ? Number.NaN : Number.POSITIVE_INFINITY;
        return wav([samples], { format: 'float32' });
      },
      expect: 'completed',
      warnings: ['sanitised'],
      check: (job) => assert.ok(Object.values(job.result!.probabilities).every(Number.isFinite)),
    },
    {
      what: 'an MP4 video with an audio track',
      name: 'clip.mp4',
      make: () =>
        made(
          'clip.mp4',
          '-f',
          'lavfi',
          '-i',
          'testsrc=d=10:s=64x64:r=5',
          '-i',
          at('song.wav'),
          '-shortest',
          '-c:v',
          'mpeg4',
          '-c:a',
          'aac',
        ),
      expect: 'completed',
      check: (job) => assert.equal(job.input!.codec, 'aac'),
    },
    {
      what: 'an MP4 video without audio',
      name: 'mute.mp4',
      make: () => made('mute.mp4', '-f', 'lavfi', '-i', 'testsrc=d=3:s=64x64:r=5', '-c:v', 'mpeg4'),
      expect: 'no_audio_stream',
    },
    {
      what: 'Matroska',
      name: 'clip.mka',
      make: () => made('clip.mka', '-i', at('song.wav'), '-t', '5', '-c:a', 'flac'),
      expect: 'unsupported_format',
    },
    {
      what: 'an HLS playlist that points at a local file',
      name: 'list.mp3',
      make: () =>
        Buffer.from('#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n'),
      expect: 'unsupported_format',
    },
    {
      what: 'an HLS playlist that points at an address',
      name: 'list.m3u8',
      make: () => Buffer.from('#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n'),
      expect: 'unsupported_format',
    },
    {
      what: 'a concat playlist',
      name: 'list.wav',
      make: () => Buffer.from("ffconcat version 1.0\nfile '/etc/passwd'\n"),
      expect: 'unsupported_format',
    },
    {
      what: 'an MP3 behind 10 MB of cover art',
      name: 'cover.mp3',
      make: () => Buffer.concat([id3Picture(10 << 20), mp3]),
      expect: 'completed',
      check: (job) => assert.ok(Math.abs(job.input!.duration - 20) < 1, String(job.input!.duration)),
    },
    {
      what: 'a start behind the end',
      name: 'song.wav',
      make: () => good,
      expect: 'range_outside_audio',
    },
  ];

  for (const { what, name, make, expect, warnings = [], check } of cases) {
    test(`${what}: ${expect}${warnings.length > 0 ? ` with ${warnings}` : ''}`, async () => {
      const fields: Record<string, string> = expect === 'range_outside_audio' ? { start: '60' } : {};
      const { id } = await upload(system.url, await make(), { name, fields });
      const job = await finished(system.url, id);
      if (expect === 'completed') {
        assert.equal(job.state, 'completed', JSON.stringify(job.error));
        const codes = job.warnings.map(({ code }) => code as string);
        for (const code of warnings) assert.ok(codes.includes(code), `warnings: ${codes}`);
        check?.(job);
      } else {
        assert.deepEqual([job.state, job.error?.code], ['failed', expect], JSON.stringify(job.error));
        assert.match(job.error!.message, /^[A-Z].{15,250}[.!]$/s, 'one readable sentence');
        assert.equal(job.error!.retryable, false);
      }
      const next = await finished(system.url, (await upload(system.url, good)).id);
      assert.equal(next.state, 'completed', 'the next job is unaffected');
    });
  }

  for (const [format, options] of [
    ['mp3', ['-b:a', '128k']],
    ['flac', []],
    ['ogg', ['-c:a', 'libvorbis']],
    ['opus', ['-c:a', 'libopus']],
    ['m4a', ['-c:a', 'aac']],
    ['aac', ['-c:a', 'aac']],
    ['aiff', []],
    ['wav', []],
  ] as const) {
    test(`${format} gets the same answer as the WAV it was made from`, async () => {
      await encode(at('song.wav'), at(`same.${format}`), ...options);
      const [reference, job] = await Promise.all(
        [at('song.wav'), at(`same.${format}`)].map(async (file) =>
          finished(
            system.url,
            (await upload(system.url, await readFile(file), { name: path.basename(file) })).id,
          ),
        ),
      );
      assert.equal(job!.state, 'completed', JSON.stringify(job!.error));
      assert.deepEqual(
        job!.warnings.filter(({ code }) => code === 'partly_corrupt'),
        [],
      );
      assert.ok(Math.abs(job!.input!.duration - 20) < 0.5, `${job!.input!.duration} s`);
      for (const [label, probability] of Object.entries(reference!.result!.probabilities)) {
        const difference = Math.abs(job!.result!.probabilities[label]! - probability);
        assert.ok(difference < 0.15, `${label}: ${difference} apart`);
      }
    });
  }

  test('a clipped recording is told so', async () => {
    const loud = sine({ hz: 300, seconds: 10, level: 3 }).map((sample) => Math.max(-1, Math.min(1, sample)));
    const job = await finished(system.url, (await upload(system.url, wav([loud]))).id);
    assert.ok(
      job.warnings.some(({ code }) => code === 'clipped'),
      JSON.stringify(job.warnings),
    );
  });
});
