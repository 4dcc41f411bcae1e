/**
 * What does the index of known answers cost for a catalogue of 3 million entries: bytes, time, memory, requests?
 *
 *   npm run bench -- answer-index [entries]
 *
 * Entries have two keys (one by ETag, one by content) and a ref, a thousand to a segment, written over three days. The
 * objects lie in a directory; requests are counted as S3 would be sent them (a list is one request a thousand
 * objects). Every reading is a process of its own, so that its peak of memory is its own.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { cpus, loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { pathToFileURL } from 'node:url';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { hash128 } from '@acousticsense/shared/answer-key';
import { openStorage } from '@acousticsense/shared/open-storage';
import type { Storage } from '@acousticsense/shared/storage';
import pino from 'pino';

const hour = 3_600_000;
const begun = Date.parse('2026-11-01T00:00:00Z');
const tenant = 'bench';
const perSegment = 1_000;
/** US dollars: S3 Standard, list prices of us-east-1, a thousand requests and a GB-month. Deleting is free. */
const prices = { put: 0.005, list: 0.005, get: 0.0004, gigabyteMonth: 0.023 };

const requests = { put: 0, get: 0, list: 0, delete: 0 };
const keysOf = (n: number) => [hash128(`etag ${n}`), hash128(`content ${n}`)];

function counted(storage: Storage): Storage {
  return {
    ...storage,
    put: (...given) => {
      requests.put += 1;
      return storage.put(...given);
    },
    get: (...given) => {
      requests.get += 1;
      return storage.get(...given);
    },
    read: (...given) => {
      requests.get += 1;
      return storage.read(...given);
    },
    delete: (key) => {
      requests.delete += 1;
      return storage.delete(key);
    },
    async *list(prefix) {
      let found = 0;
      for await (const object of storage.list(prefix)) {
        if (found % 1_000 === 0) requests.list += 1;
        found += 1;
        yield object;
      }
      if (found === 0) requests.list += 1;
    },
  };
}

const [mode = '', url = '', directory = '', time = '', entriesText = ''] = process.argv.slice(2);
if (mode === 'read') await read();
else await measure(Number(mode || 3_000_000));

/** A process that asks: catches up, then looks up a thousand keys and a ref. */
async function read(): Promise<void> {
  const entries = Number(entriesText);
  const index = open(url, directory, () => Number(time));
  const delay = monitorEventLoopDelay({ resolution: 1 });
  const baseRss = process.resourceUsage().maxRSS;
  delay.enable();
  const cpu = process.cpuUsage();
  const from = performance.now();
  await index.refresh(tenant);
  const refreshMs = performance.now() - from;
  delay.disable();
  const { user, system } = process.cpuUsage(cpu);
  const anywhere = () => Math.floor(Math.random() * entries);
  const timed = (keys: string[][]) =>
    keys.map((thousand) => {
      const began = performance.now();
      const found = index.find(tenant, thousand).filter(Boolean).length;
      return { ms: performance.now() - began, found };
    });
  const thousands = (keyOf: () => string) =>
    Array.from({ length: 20 }, () => Array.from({ length: 1_000 }, keyOf));
  const hits = timed(thousands(() => keysOf(anywhere())[Math.floor(Math.random() * 2)]!));
  const misses = timed(thousands(() => hash128(`unknown ${Math.random()}`)));
  if (hits.some(({ found }) => found !== 1_000) || misses.some(({ found }) => found > 0))
    throw new Error('wrong answers');
  const refsBegan = performance.now();
  for (let n = 0; n < 1_000; n += 1)
    if (!index.findRef(tenant, `ref ${anywhere()}`)) throw new Error('wrong answers');
  const refMs = (performance.now() - refsBegan) / 1_000;
  const files = await Promise.all(
    (await readdir(directory)).map(async (name) => (await stat(path.join(directory, name))).size),
  );
  const median = (of: { ms: number }[]) => of.map(({ ms }) => ms).sort((a, b) => a - b)[10]!;
  process.send!({
    refreshMs,
    cpuMs: (user + system) / 1_000,
    longestTurnMs: delay.max / 1e6,
    baseRss,
    peakRss: process.resourceUsage().maxRSS,
    requests,
    bytes: files.reduce((a, b) => a + b, 0),
    firstHitsMs: hits[0]!.ms,
    hitsMs: median(hits),
    missesMs: median(misses),
    refMs,
  });
  await index.close();
}

function open(on: string, at: string, now: () => number) {
  return createAnswerIndex({
    storage: counted(openStorage(on)),
    directory: at,
    log: pino({ level: 'warn' }),
    now,
  });
}

async function measure(entries: number): Promise<void> {
  const scratch = await mkdtemp(path.join(tmpdir(), 'as-bench-index-'));
  try {
    await report(entries, scratch);
  } finally {
    await rm(scratch, { recursive: true });
  }
}

async function report(entries: number, scratch: string): Promise<void> {
  const objects = pathToFileURL(path.join(scratch, 'objects')).href;
  let now = begun;
  const index = open(objects, path.join(scratch, 'writer'), () => now);
  const segments = Math.ceil(entries / perSegment);
  const writeSegment = (chunk: number) => {
    now = begun + Math.floor((chunk / segments) * 72 * hour);
    return index.writeSegment({
      tenant,
      batchId: '019ddd00-0000-7000-8000-000000000001',
      chunk,
      round: 0,
      entries: Array.from({ length: perSegment }, (_, row) => {
        const n = chunk * perSegment + row;
        return { row, revision: 1, finishedAt: now + row, ref: `ref ${n}`, keys: keysOf(n) };
      }),
    });
  };
  console.log(
    `${entries} entries, ${cpus().length} x ${cpus()[0]?.model}, load: ${loadavg()[0]!.toFixed(1)}\n`,
  );
  for (let chunk = 0; chunk < segments; chunk += 1) await writeSegment(chunk);
  const storage = openStorage(objects);
  const inStorage = async () =>
    (await Array.fromAsync(storage.list('index/'))).reduce((sum, { size }) => sum + size, 0);
  const bytes = await inStorage();
  const gigabytes = bytes / 1e9;
  console.log(`in storage            ${mega(bytes)} (${(bytes / entries).toFixed(0)} bytes an entry)`);
  console.log(`  a month             $${(gigabytes * prices.gigabyteMonth).toFixed(4)} (estimate)`);
  cost('  written by          ');

  const reader = (copy: string) => inProcess(objects, path.join(scratch, copy), now, entries);
  print('first start, from segments', await reader('copy'));
  print('again, nothing new', await reader('copy'));
  await writeSegment(segments);
  print('again, one new segment', await reader('copy'));

  now = begun + 6 * 24 * hour;
  Object.assign(requests, { put: 0, get: 0, list: 0, delete: 0 });
  const from = performance.now();
  const done = await index.compact(tenant);
  console.log(`\ncompaction            ${seconds(performance.now() - from)}: ${JSON.stringify(done)}`);
  cost('  by                  ');
  console.log(`in storage            ${mega(await inStorage())}`);
  print('first start, from merged objects', await reader('merged'));
  await index.close();
}

interface Reading {
  refreshMs: number;
  cpuMs: number;
  longestTurnMs: number;
  baseRss: number;
  peakRss: number;
  requests: typeof requests;
  bytes: number;
  firstHitsMs: number;
  hitsMs: number;
  missesMs: number;
  refMs: number;
}

async function inProcess(on: string, at: string, now: number, entries: number): Promise<Reading> {
  const child = spawn(
    process.execPath,
    [import.meta.filename, 'read', on, at, String(now), String(entries)],
    {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    },
  );
  const ended = once(child, 'exit');
  const [reading] = (await Promise.race([
    once(child, 'message'),
    ended.then(() => Promise.reject(new Error('the reading process failed'))),
  ])) as [Reading];
  await ended;
  return reading;
}

function print(what: string, reading: Reading): void {
  console.log(`\n${what}`);
  console.log(`  refresh             ${seconds(reading.refreshMs)}, CPU ${seconds(reading.cpuMs)}`);
  console.log(`  longest turn        ${reading.longestTurnMs.toFixed(0)} ms`);
  console.log(
    `  peak memory         ${mega(reading.peakRss * 1_024)}, before: ${mega(reading.baseRss * 1_024)}`,
  );
  console.log(`  SQLite on disk      ${mega(reading.bytes)}`);
  console.log(
    `  1,000 keys          hit ${reading.hitsMs.toFixed(1)} ms (the first ${reading.firstHitsMs.toFixed(1)}), miss ${reading.missesMs.toFixed(1)} ms`,
  );
  console.log(`  a ref               ${(reading.refMs * 1_000).toFixed(0)} us`);
  cost('  requests            ', reading.requests);
}

function cost(label: string, of = requests): void {
  const dollars = (of.put * prices.put + of.list * prices.list + of.get * prices.get) / 1_000;
  console.log(
    `${label}${of.put} PUT, ${of.get} GET, ${of.list} LIST, ${of.delete} DELETE: $${dollars.toFixed(4)} (estimate)`,
  );
}

function seconds(ms: number): string {
  return `${(ms / 1_000).toFixed(1)} s`;
}

function mega(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
