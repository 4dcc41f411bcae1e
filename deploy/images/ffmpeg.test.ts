/**
 * The decoder's lean ffmpeg: what is in it is exactly what ffmpeg-formats.txt says, every format that is accepted
 * decodes with it as with the stock one, and what must never be read is not readable by it at all.
 *
 * ACOUSTICSENSE_FFMPEG_LEAN names a directory with its `ffmpeg` and `ffprobe` (deploy/images/build.sh ffmpeg makes
 * one); the machine's own ffmpeg makes the files.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { loadConfig } from '../../services/decoder/src/config.ts';
import { checkFfmpeg, createFfmpeg } from '../../services/decoder/src/ffmpeg.ts';
import { encode, song, ffmpeg as stockFfmpeg, writeWav } from '../../test/audio.ts';

const lean = process.env['ACOUSTICSENSE_FFMPEG_LEAN'];
const run = promisify(execFile);
const profile = { sampleRate: 22_050, channels: 'mean', resampler: 'soxr' } as const;
const patience = () => AbortSignal.timeout(30_000);

/** What the program `ffmpeg` takes along whatever it is configured with (5.1): none of them opens a file. */
const takenAlong = ['abuffer', 'buffer', 'abuffersink', 'buffersink', 'format', 'hflip', 'null', 'trim'];
takenAlong.push('transpose', 'vflip', 'rotate');

const name = "the decoder's lean ffmpeg";
if (lean === undefined) {
  test(name, { skip: 'ACOUSTICSENSE_FFMPEG_LEAN names no directory with one' }, () => {});
} else describe(name, () => testLean(path.resolve(lean)));

function testLean(directory: string): void {
  const [program, prober] = [path.join(directory, 'ffmpeg'), path.join(directory, 'ffprobe')];
  const options = loadConfig({ FFMPEG_PATH: program, FFPROBE_PATH: prober }).ffmpeg;
  let scratch: string;
  const at = (name: string) => path.join(scratch, name);

  before(async () => {
    scratch = await mkdtemp(path.join(tmpdir(), 'lean-ffmpeg-'));
    await writeWav(at('song.wav'), [song({ seconds: 4 })]);
  });
  after(() => rm(scratch, { recursive: true, force: true }));

  async function samplesOf(file: string, using = options): Promise<Float32Array> {
    const ffmpeg = createFfmpeg(using);
    const facts = await ffmpeg.probe(file, patience());
    const { pcm, report } = ffmpeg.readMono(file, facts, { profile }, patience());
    const all: number[] = [];
    for await (const chunk of pcm) for (const sample of chunk) all.push(sample);
    assert.deepEqual(
      { failed: report.failed, reachedEnd: report.reachedEnd, errorLines: report.errorLines },
      { failed: false, reachedEnd: true, errorLines: 0 },
    );
    return Float32Array.from(all);
  }

  /** What the program itself lists, by ffmpeg's option of that name. */
  async function listed(kind: string): Promise<string[]> {
    const { stdout } = await run(program, ['-v', 'quiet', `-${kind}`]);
    const rows = stdout.split('\n').map((line) => /^ {1,2}[A-Z.|]{1,6} +([a-z0-9_,]+) /i.exec(line)?.[1]);
    return rows.filter((name) => name !== undefined && name !== '').map((name) => name!);
  }

  test('holds exactly the parts that are written down, and the resampler', async () => {
    const text = await readFile(path.join(import.meta.dirname, 'ffmpeg-formats.txt'), 'utf8');
    const written = (kind: string) =>
      text
        .split('\n')
        .flatMap((line) => (line.startsWith(`${kind} `) ? line.split(' ').slice(1) : []))
        .sort();
    const firstNames = async (kind: string) =>
      (await listed(kind)).map((names) => (names === 'mov,mp4,m4a,3gp,3g2,mj2' ? 'mov' : names)).sort();
    assert.deepEqual(await firstNames('demuxers'), written('demuxer'));
    assert.deepEqual(await listed('encoders'), ['pcm_f32le']);
    assert.deepEqual(await listed('muxers'), ['f32le']);
    // configure says mp3, the program mp3 and mp3float: both are written down.
    assert.deepEqual((await listed('decoders')).sort(), written('decoder'));
    const filters = await listed('filters');
    assert.deepEqual(
      written('filter').filter((name) => !filters.includes(name)),
      [],
    );
    assert.deepEqual(
      filters.filter((name) => !written('filter').includes(name) && !takenAlong.includes(name)),
      [],
    );
    const { stdout } = await run(program, ['-v', 'quiet', '-protocols']);
    assert.deepEqual([...stdout.matchAll(/^ {2}(\w+)$/gm)].map(([, name]) => name).sort(), [
      ...['file', 'file', 'pipe', 'pipe'],
    ]);
    await checkFfmpeg(options, 'soxr');
  });

  for (const [name, ...how] of [
    ['a.mp3'],
    ['mpeg1-layer2.mp3', '-c:a', 'mp2', '-f', 'mp2'],
    ['a.flac'],
    ['24.flac', '-sample_fmt', 's32', '-ar', '96000'],
    ['vorbis.ogg', '-c:a', 'libvorbis'],
    ['a.opus'],
    ['flac.ogg', '-c:a', 'flac'],
    ['a.aac'],
    ['a.m4a'],
    ['alac.m4a', '-c:a', 'alac'],
    ['pcm.mov', '-c:a', 'pcm_s16be'],
    ['ima.mov', '-c:a', 'adpcm_ima_qt'],
    ['a.aiff'],
    ['float.aiff', '-c:a', 'pcm_f32be'],
    ['a.wav'],
    ['8-bit.wav', '-c:a', 'pcm_u8'],
    ['24.wav', '-c:a', 'pcm_s24le'],
    ['32.wav', '-c:a', 'pcm_s32le'],
    ['float.wav', '-c:a', 'pcm_f32le'],
    ['double.wav', '-c:a', 'pcm_f64le'],
    ['alaw.wav', '-c:a', 'pcm_alaw'],
    ['mulaw.wav', '-c:a', 'pcm_mulaw'],
    ['ms.wav', '-c:a', 'adpcm_ms'],
    ['ima.wav', '-c:a', 'adpcm_ima_wav'],
  ] as const) {
    test(`decodes ${[name, ...how].join(' ')} to the samples of the stock one`, async () => {
      await encode(at('song.wav'), at(name), ...how);
      const [its, stock] = [await samplesOf(at(name)), await samplesOf(at(name), loadConfig({}).ffmpeg)];
      assert.ok(its.length > 3.9 * profile.sampleRate, `${its.length} samples`);
      assert.equal(its.length, stock.length);
      const worst = its.reduce((most, sample, n) => Math.max(most, Math.abs(sample - stock[n]!)), 0);
      assert.ok(worst < 1e-4, `off by ${worst}`);
    });
  }

  test('takes the sound of a video and passes over a cover picture', async () => {
    const picture = ['-f', 'lavfi', '-i', 'testsrc=s=64x64:d=4'];
    await stockFfmpeg(...picture, '-i', at('song.wav'), '-c:v', 'mpeg4', '-c:a', 'aac', at('video.mp4'));
    await stockFfmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=1', '-frames:v', '1', at('cover.png'));
    const covered = ['-map', '0', '-map', '1', '-c:v', 'copy', '-disposition:v', 'attached_pic'];
    await stockFfmpeg('-i', at('song.wav'), '-i', at('cover.png'), ...covered, at('covered.mp3'));
    for (const name of ['video.mp4', 'covered.mp3']) {
      const { length } = await samplesOf(at(name));
      assert.ok(length > 3.9 * profile.sampleRate, `${name}: ${length} samples`);
    }
  });

  test('a video without sound holds no audio stream', async () => {
    await stockFfmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=1', '-c:v', 'mpeg4', at('mute.mp4'));
    await assert.rejects(createFfmpeg(options).probe(at('mute.mp4'), patience()), {
      code: 'no_audio_stream',
    });
  });

  test('cannot open a playlist, a network address or a picture, even when told to', async () => {
    let asked = 0;
    const server = createServer((_request, response) => {
      asked += 1;
      response.end();
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/song.wav`;
    try {
      await writeFile(at('list.m3u8'), `#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n${url}\n`);
      await writeFile(at('list.ffconcat'), `ffconcat version 1.0\nfile '${at('song.wav')}'\n`);
      await stockFfmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=1', '-frames:v', '1', at('picture.png'));
      for (const [input, says] of [
        [['-i', url], /Protocol not found/],
        [['-f', 'hls', '-i', at('list.m3u8')], /Unknown input format: 'hls'/],
        [['-f', 'concat', '-i', at('list.ffconcat')], /Unknown input format: 'concat'/],
        [['-i', at('list.m3u8')], /Invalid data found/],
        [['-i', at('list.ffconcat')], /Invalid data found/],
        [['-i', at('picture.png')], /Invalid data found/],
        [['-f', 'lavfi', '-i', 'sine'], /Unknown input format: 'lavfi'/],
      ] as const) {
        const ends = run(program, ['-nostdin', '-v', 'error', ...input, '-f', 'f32le', 'pipe:1']);
        await assert.rejects(ends, ({ stderr }: { stderr: string }) => says.test(stderr), input.join(' '));
      }
      assert.equal(asked, 0);
    } finally {
      server.close();
    }
  });
}
