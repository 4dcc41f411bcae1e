/**
 * Does the decoder's memory grow with the length of a recording?
 *
 *   npm run bench -- decoder-memory [minutes ...]
 *
 * Recordings of 5 minutes, half an hour and 3 hours (44.1 kHz, stereo) as MP3 and FLAC go through the whole product with
 * `windows=all`, each by a fresh decoder. Memory is what the kernel counts as resident, of the decoder and its ffmpeg
 * together, at its highest; beside it that of the inference service and its child, and what the job holds in Redis.
 */
import { openAsBlob } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { ffmpeg } from '../test/audio.ts';
import { finished, type Job } from '../test/client.ts';
import { childrenOf } from '../test/processes.ts';
import { startSystem } from '../test/system.ts';

const given = process.argv.slice(2).map(Number);
const minutes = given.length > 0 ? given : [5, 30, 180];

const directory = await mkdtemp(path.join(tmpdir(), 'as-memory-'));
await using system = await startSystem({
  env: { LOG_LEVEL: 'warn', DECODE_BUDGET_SECONDS: '3600', MAX_UPLOAD_BYTES: String(2 ** 32) },
});
const redis = connectRedisForWorker(system.redis.url);
try {
  console.log(
    'recording        file MB  windows  seconds  decoder MB  + ffmpeg MB  inference MB  scratch MB  Redis bytes',
  );
  for (const ending of ['mp3', 'flac'] as const) {
    for (const length of minutes) await measure(ending, length);
  }
} finally {
  redis.disconnect();
  await rm(directory, { recursive: true, force: true });
}

async function measure(ending: 'mp3' | 'flac', length: number): Promise<void> {
  const file = path.join(directory, `${length}.${ending}`);
  await record(file, length * 60);
  await system.kill('decoder', 'SIGTERM');
  await system.start('decoder');
  const peak = { decoder: 0, both: 0, inference: 0, scratch: 0 };
  let watching = true;
  const watch = (async () => {
    while (watching) {
      const decoder = await residentMegabytes(system.pid('decoder'));
      peak.decoder = Math.max(peak.decoder, decoder);
      peak.both = Math.max(peak.both, decoder + (await ofChildren(system.pid('decoder'))));
      const inference = system.pid('inference');
      peak.inference = Math.max(
        peak.inference,
        (await residentMegabytes(inference)) + (await ofChildren(inference)),
      );
      peak.scratch = Math.max(peak.scratch, await scratchMegabytes());
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  })();
  const from = performance.now();
  const form = new FormData();
  form.append('windows', 'all');
  form.append('file', await openAsBlob(file), path.basename(file));
  const response = await fetch(`${system.url}/v1/jobs`, { method: 'POST', body: form });
  const sent = (await response.json()) as Job;
  if (response.status !== 202) throw new Error(JSON.stringify(sent));
  const job = await finished(system.url, sent.id, 3_600_000);
  const seconds = (performance.now() - from) / 1_000;
  watching = false;
  await watch;
  if (job.state !== 'completed') throw new Error(JSON.stringify(job.error));
  const bytes = await redis.memory('USAGE', `as:{default}:job:${job.id}`, 'SAMPLES', 0);
  const columns: [string | number, number][] = [
    [Math.round((await stat(file)).size / 1e6), 9],
    [job.result?.windows.length ?? 0, 9],
    [seconds.toFixed(0), 9],
    [peak.decoder.toFixed(0), 12],
    [peak.both.toFixed(0), 13],
    [peak.inference.toFixed(0), 14],
    [peak.scratch.toFixed(0), 12],
    [bytes ?? 0, 13],
  ];
  console.log(
    `${`${length} min ${ending}`.padEnd(15)}${columns.map(([value, width]) => String(value).padStart(width)).join('')}`,
  );
  await rm(file);
}

/** A minute of two tones that wander, over and over: cheap to make and to compress. */
async function record(file: string, seconds: number): Promise<void> {
  const wave = (hz: number, beat: number) =>
    `0.3*sin(2*PI*${hz}*t+40*sin(${beat}*t))+0.02*sin(2*PI*${7 * hz}*t)`;
  const source = `aevalsrc='${wave(220, 0.31)}|${wave(330, 0.23)}':s=44100:d=60`;
  const minute = path.join(directory, 'minute.wav');
  await ffmpeg('-f', 'lavfi', '-i', source, minute);
  const loop = ['-stream_loop', '-1', '-i', minute, '-t', String(seconds)];
  await ffmpeg(...loop, '-b:a', '128k', '-compression_level', '1', file);
}

async function residentMegabytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8').catch(() => '');
  return Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1_024;
}

async function ofChildren(pid: number): Promise<number> {
  const sizes = await Promise.all((await childrenOf(pid).catch(() => [])).map(residentMegabytes));
  return sizes.reduce((sum, size) => sum + size, 0);
}

async function scratchMegabytes(): Promise<number> {
  const scratch = path.join(system.directory, 'scratch');
  let sum = 0;
  for (const name of await readdir(scratch, { recursive: true }).catch(() => []))
    sum += (await stat(path.join(scratch, name)).catch(() => undefined))?.size ?? 0;
  return sum / 1e6;
}
