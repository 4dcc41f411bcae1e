/**
 * How long does reading a batch's results take, and how much memory?
 *
 *   npm run bench -- results-reading [rows]
 *
 * A batch that has ended lies in a directory; an API process of its own serves it, and its peak of memory is asked of
 * the kernel after each question. Meanwhile another caller asks for single rows. Before them it reads a hundredth of the rows, so that what it needs anyway is known.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { cpus, loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { description, digest, heard, labels, storeBatch } from '../services/api/src/testing/catalogue.ts';
import { startRedis } from '../test/redis.ts';

const rows = Number(process.argv[2] ?? 1_000_000);
const directory = await mkdtemp(path.join(tmpdir(), 'as-bench-results-'));
await using server = await startRedis();
const redis = connectRedisForWorker(server.url);
await redis.set(`as:model:${digest}`, JSON.stringify(description));
const storageUrl = pathToFileURL(path.join(directory, 'objects')).href;
const storage = openStorage(storageUrl);

const answer = (row: number, shift: number) => ({
  declaredGenre: [labels[row % 6]!],
  outcome: heard(labels[(row * 7 + shift) % 6]!, 0.5 + ((row * 37 + shift) % 499) / 1_000),
});
const id = await storeBatch(storage, rows, (row) => answer(row, row % 10 === 0 ? 1 : 0));
// Another order, other answers to some: the worst that a comparison by ref can meet.
const other = await storeBatch(storage, rows, (row) => {
  const track = (row * 7_919) % rows;
  return { ref: `track-${track}`, ...answer(track, track % 9 === 0 ? 1 : 0) };
});

const child = spawn(
  process.execPath,
  [
    new URL('../services/api/src/testing/results-server.ts', import.meta.url).pathname,
    ...[server.url, storageUrl, path.join(directory, 'index')],
  ],
  { stdio: ['ignore', 'pipe', 'inherit'] },
);
try {
  const [line] = (await once(child.stdout, 'data')) as [Buffer];
  const url = line.toString().trim();
  const peak = async () => {
    const status = await readFile(`/proc/${child.pid}/status`, 'utf8');
    return Math.round(Number(/VmHWM:\s+(\d+)/.exec(status)![1]) / 1_024);
  };
  /** Seconds of CPU so far; the kernel counts hundredths. */
  const cpu = async () => {
    const fields = (await readFile(`/proc/${child.pid}/stat`, 'utf8')).split(') ')[1]!.split(' ');
    return (Number(fields[11]) + Number(fields[12])) / 100;
  };
  console.log(`${rows} rows; ${cpus().length} x ${cpus()[0]!.model}, load ${loadavg()[0]!.toFixed(1)}`);
  const batch = `/v1/batches/${id}`;
  for (const at of [
    `${batch}/results.jsonl?to=${Math.ceil(rows / 100)}`,
    `${batch}/results.jsonl`,
    `${batch}/results.csv`,
    `${batch}/audit`,
    `${batch}/audit?limit=100000`,
    `${batch}/diff?with=${id}&summary=true`,
    `${batch}/diff?with=${other}&summary=true`,
  ]) {
    const [from, cpuFrom] = [performance.now(), await cpu()];
    const others = askMeanwhile(`${url}${batch}/rows/0`);
    const response = await fetch(url + at);
    let bytes = 0;
    for await (const chunk of response.body!) bytes += chunk.length;
    const seconds = (performance.now() - from) / 1_000;
    const waits = await others.stop();
    console.log(
      [
        at.replace(id, 'ID').replace(id, 'ID').replace(other, 'OTHER').padEnd(50),
        `${response.status}`,
        `${seconds.toFixed(1)} s`.padStart(8),
        `${((await cpu()) - cpuFrom).toFixed(1)} s of CPU`.padStart(15),
        `${(bytes / 1e6).toFixed(1)} MB`.padStart(10),
        `peak of memory ${await peak()} MiB`,
        `others wait ${waits.p95.toFixed(0)} ms (95 %), ${waits.longest.toFixed(0)} at most`,
      ].join('  '),
    );
  }
} finally {
  child.kill();
  redis.disconnect();
  await rm(directory, { recursive: true, force: true });
}

/** Another caller asks for one row, twenty times a second. */
function askMeanwhile(address: string) {
  const waits: number[] = [];
  let going = true;
  const asking = (async () => {
    while (going) {
      const from = performance.now();
      await (await fetch(address)).arrayBuffer();
      waits.push(performance.now() - from);
      await sleep(50);
    }
  })();
  return {
    async stop() {
      going = false;
      await asking;
      waits.sort((a, b) => a - b);
      return { p95: waits[Math.floor(waits.length * 0.95)] ?? 0, longest: waits.at(-1) ?? 0 };
    },
  };
}
