/**
 * How does a batch of a million rows go through everything but decoding and the model, and what does it cost? In the
 * middle of it, how long do others wait: another tenant's single uploads, and 500 releases of the same tenant?
 *
 *   npm run bench -- catalogue [rows] [stub workers] [concurrency of each]
 *
 * Rows name objects of a registered bucket by key and ETag; nobody reads them, since decoder and model are stubs.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { createJobRecords } from '../packages/shared/src/job-records.ts';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { createTenants } from '../packages/shared/src/tenants.ts';
import type { BatchResource } from '../services/api/src/schemas.ts';
import { sine, wav } from '../test/audio.ts';
import { formOf, type Job } from '../test/client.ts';
import { startRedis } from '../test/redis.ts';
import { startSystem } from '../test/system.ts';

const rows = Number(process.argv[2] ?? 10_000);
const workers = Number(process.argv[3] ?? 1);
const concurrency = Number(process.argv[4] ?? 64);
const releases = 500;

// As `npm start` and most deployments run it.
await using server = await startRedis({ appendOnly: true, args: ['--appendfsync', 'everysec'] });
await using system = await startSystem({
  redisUrl: server.url,
  without: ['decoder', 'inference', 'fetch'],
  env: { LOG_LEVEL: 'warn', EGRESS_ALLOW: '127.0.0.1', RECONCILE_SECONDS: '15' },
});
const stubs = await Promise.all(Array.from({ length: workers }, startStub));
const redis = connectRedisForWorker(server.url);
let refusals = 0;
try {
  await run();
} catch (error) {
  console.error(error);
  process.exitCode = 1;
} finally {
  redis.disconnect();
  for (const stub of stubs) stub.kill('SIGTERM');
}

async function run(): Promise<void> {
  const tenants = createTenants(redis);
  const [catalogue, other] = [
    await tenants.createKey('catalogue', 'bench'),
    await tenants.createKey('other', 'bench'),
  ];
  await call(catalogue.key, 'PUT', '/v1/sources/music?verify=false', {
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ bucket: 'music', endpoint: 'http://127.0.0.1:9', region: 'us-east-1' }),
  });
  const pids = {
    api: system.pid('api'),
    feeder: system.pid('feeder'),
    redis: server.pid,
    ...Object.fromEntries(stubs.map(({ pid }, n) => [`stub${n + 1}`, pid!])),
  };
  const cpuBefore = await cpuOf(pids);
  const peak: Record<string, number> = {};
  let redisPeak = 0;
  let watching = true;
  let told = performance.now();
  let progress = 0;
  const from = performance.now();
  const watch = (async () => {
    while (watching) {
      for (const [name, pid] of Object.entries(pids))
        peak[name] = Math.max(peak[name] ?? 0, await residentMegabytes(pid));
      const used = Number(/^used_memory:(\d+)/m.exec(await redis.info('memory'))?.[1]) / 1e6;
      redisPeak = Math.max(redisPeak, used);
      if (performance.now() - told > 30_000) {
        told = performance.now();
        const memory = Object.entries(pids).map(
          async ([name, pid]) => `${name} ${(await residentMegabytes(pid)).toFixed(0)} MB`,
        );
        console.error(
          `  ${seconds(from).toFixed(0)} s: ${progress} rows, Redis's data ${used.toFixed(1)} MB, ${(await Promise.all(memory)).join(', ')}`,
        );
      }
      await sleep(500);
    }
  })();

  const batch = await submit(catalogue.key, 'backfill', rows, 'track');
  const accepted = seconds(from);
  const uploads = uploadNowAndThen(other.key, () => watching);
  const half = await when(catalogue.key, batch.id, ({ counts }) => {
    progress = counts.completed;
    return progress >= rows * 0.4;
  });
  const atHalf = seconds(from);
  const releasedAt = Date.now();
  const release = await submit(catalogue.key, 'release', releases, 'release');
  const released = await when(catalogue.key, release.id, ({ state }) => state === 'completed');
  const done = await when(catalogue.key, batch.id, ({ state, counts }) => {
    progress = counts.completed;
    return state === 'completed';
  });
  const finished = seconds(from);
  watching = false;
  await watch;
  const waits = await uploads;
  const cpu = await cpuOf(pids);

  const exportFrom = performance.now();
  const exported = await fetch(`${system.url}${done.links.results}`, { headers: bearer(catalogue.key) });
  let [bytes, lines] = [0, 0];
  for await (const chunk of exported.body as unknown as AsyncIterable<Uint8Array>) {
    bytes += chunk.length;
    for (const byte of chunk) if (byte === 10) lines += 1;
  }
  const exportSeconds = seconds(exportFrom);
  const rowWaits = await waitsOf(catalogue.key, released, releasedAt);
  const left = await keysLeft();
  const records = createJobRecords(redis, { resultSeconds: 1 });

  console.log(`rows                      ${rows} (${workers} stub worker(s), concurrency ${concurrency})`);
  console.log(`accepted                  ${accepted.toFixed(1)} s, ${(rows / accepted).toFixed(0)} rows/s`);
  console.log(
    `finished                  ${finished.toFixed(1)} s, ${(rows / (finished - accepted)).toFixed(0)} rows/s`,
  );
  console.log(`  first 40 %              ${atHalf.toFixed(1)} s (${half.counts.completed} rows)`);
  console.log(`counts                    ${JSON.stringify(done.counts)}`);
  console.log(
    `exported                  ${lines} rows, ${(bytes / 1e6).toFixed(1)} MB, ${exportSeconds.toFixed(1)} s (${exported.status})`,
  );
  console.log(`500 releases, same tenant ${quantiles(rowWaits)} from the request to the result`);
  console.log(
    `uploads, another tenant   ${quantiles(waits)} from the request to the result (${waits.length}); ${refusals} answers of 503 or 429 in all`,
  );
  console.log(
    `peak of Redis's data      ${redisPeak.toFixed(1)} MB; keys left ${left}, open ${await records.countOpen('catalogue')}`,
  );
  console.log(`Redis, per row            ${await commandsPerRow()}`);
  for (const [name, megabytes] of Object.entries(peak))
    console.log(
      `${name.padEnd(10)} peak resident ${megabytes.toFixed(0).padStart(5)} MB, CPU ${(((cpu[name]! - cpuBefore[name]!) * 1e3) / rows).toFixed(2)} ms/row`,
    );
  if (done.counts.completed !== rows || lines !== rows) process.exitCode = 1;

  /** What Redis itself counted: calls and microseconds of the dearest commands. */
  async function commandsPerRow(): Promise<string> {
    const info = await redis.info('commandstats');
    const found = [...info.matchAll(/^cmdstat_(\S+?):calls=(\d+),usec=(\d+)/gm)].map(
      ([, name, calls, usec]) => ({
        name: name!,
        calls: Number(calls) / rows,
        usec: Number(usec) / rows,
      }),
    );
    const sum = (of: 'calls' | 'usec') => found.reduce((all, command) => all + command[of], 0);
    const dearest = found.sort((a, b) => b.usec - a.usec).slice(0, 6);
    return `${sum('calls').toFixed(1)} calls, ${sum('usec').toFixed(0)} us (${dearest
      .map(({ name, calls, usec }) => `${name} ${calls.toFixed(1)} calls ${usec.toFixed(0)} us`)
      .join(', ')})`;
  }

  async function submit(key: string, of: string, count: number, name: string): Promise<BatchResource> {
    function* manifest() {
      const lines: string[] = [];
      for (let n = 0; n < count; n += 1) {
        lines.push(
          `{"audio":"s3://music/${name}/${String(n).padStart(7, '0')}.mp3","etag":"${n.toString(16).padStart(32, '0')}","size":9600000,"ref":"${name}-${n}","declaredGenre":"Jazz"}\n`,
        );
        if (lines.length === 500) yield lines.splice(0).join('');
      }
      yield lines.join('');
    }
    return call(key, 'POST', `/v1/batches?class=${of}`, {
      headers: { 'content-type': 'application/x-ndjson' },
      body: Readable.toWeb(Readable.from(manifest())) as unknown as BodyInit,
      duplex: 'half',
    } as RequestInit);
  }

  async function uploadNowAndThen(key: string, on: () => boolean): Promise<number[]> {
    const audio = wav([sine({ seconds: 2, hz: 300, sampleRate: 8_000 })], { sampleRate: 8_000 });
    const waits: number[] = [];
    while (on()) {
      const at = performance.now();
      const response = await fetch(`${system.url}/v1/jobs`, {
        method: 'POST',
        body: formOf(audio, { name: 'a.wav' }),
        headers: bearer(key),
      });
      if (response.status !== 202) {
        await response.arrayBuffer();
        refusals += 1;
        await sleep(1_000);
        continue;
      }
      const job = (await response.json()) as Job;
      for (;;) {
        const now = (await call(key, 'GET', `/v1/jobs/${job.id}`)) as unknown as Job;
        if (now.state === 'completed') break;
        await sleep(20);
      }
      waits.push(seconds(at));
      await sleep(Math.max(1_000, Math.min(5_000, rows / 200)));
    }
    return waits;
  }
}

async function waitsOf(key: string, batch: BatchResource, from: number): Promise<number[]> {
  const text = await (await fetch(`${system.url}${batch.links.results}`, { headers: bearer(key) })).text();
  return text
    .split('\n')
    .filter(Boolean)
    .map((line) => (Date.parse((JSON.parse(line) as { finishedAt: string }).finishedAt) - from) / 1_000);
}

async function keysLeft(): Promise<number> {
  return redis.dbsize();
}

async function when(
  key: string,
  id: string,
  done: (batch: BatchResource) => boolean,
): Promise<BatchResource> {
  for (;;) {
    const batch = await call(key, 'GET', `/v1/batches/${id}`);
    if (done(batch)) return batch;
    if (['failed', 'cancelled'].includes(batch.state)) throw new Error(JSON.stringify(batch));
    await sleep(250);
  }
}

/** A machine at its limit may say 503 for a moment: a caller comes again, as it is told to. */
async function call(key: string, method: string, at: string, init: RequestInit = {}): Promise<BatchResource> {
  const ask = () =>
    fetch(`${system.url}${at}`, {
      method,
      ...init,
      headers: { ...bearer(key), ...(init.headers as Record<string, string>) },
    });
  let response = await ask();
  for (let tries = 0; method === 'GET' && response.status === 503 && tries < 30; tries += 1) {
    await response.arrayBuffer();
    refusals += 1;
    await sleep(1_000);
    response = await ask();
  }
  const body = await response.text();
  if (!response.ok) throw new Error(`${method} ${at}: ${response.status} ${body}`);
  return JSON.parse(body) as BatchResource;
}

function bearer(key: string): Record<string, string> {
  return { authorization: `Bearer ${key}` };
}

async function startStub(): Promise<ChildProcess> {
  const child = spawn(process.execPath, [path.join(import.meta.dirname, 'stubs/stage-workers.ts')], {
    env: {
      ...process.env,
      REDIS_URL: server.url,
      STORAGE_URL: `file://${system.directory}/objects`,
      STUB_CONCURRENCY: String(concurrency),
      LOG_LEVEL: 'error',
    },
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  });
  await new Promise<void>((resolve, reject) => {
    child.on('message', ({ type }: { type: string }) => type === 'ready' && resolve());
    child.once('exit', (code) => reject(new Error(`stub worker ended with ${code}`)));
  });
  return child;
}

async function residentMegabytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8').catch(() => '');
  return Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1_024;
}

/** Seconds of CPU, by process: proc(5), fields 14 and 15 of stat, in ticks of 1/100 s. */
async function cpuOf(pids: Record<string, number>): Promise<Record<string, number>> {
  const found: Record<string, number> = {};
  for (const [name, pid] of Object.entries(pids)) {
    const fields = (await readFile(`/proc/${pid}/stat`, 'utf8')).split(') ')[1]!.split(' ');
    found[name] = (Number(fields[11]) + Number(fields[12])) / 100;
  }
  return found;
}

function seconds(from: number): number {
  return (performance.now() - from) / 1_000;
}

function quantiles(values: number[]): string {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (q: number) =>
    (sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN).toFixed(2);
  return `median ${at(0.5)} s, 95th percentile ${at(0.95)} s, worst ${at(1)} s`;
}
