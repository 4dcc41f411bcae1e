/**
 * Is a catalogue answered the same when the services are killed all the time?
 *
 *   npm run bench -- chaos-catalogue DIRECTORY [tracks] [directory of made tracks] [seed]
 *
 * Makes so many tracks (default 3,000) out of the recordings in DIRECTORY, one in a hundred of them no good, and sends
 * one manifest over them: most lie in a source bucket, one in ten on a web server, one in twenty was uploaded. It is
 * worked out once in peace, and once while a service chosen at random, Redis and the model's process included, is
 * ended by SIGKILL every few seconds. Both must answer every row alike, and leave nothing behind. Then the manifest is
 * sent again: of what was answered no object may be read. What failed is tried again, and what lies behind a URL has no
 * version by which it would be known.
 */
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { createBatchRecords } from '../packages/shared/src/batch-records.ts';
import { openStorage } from '../packages/shared/src/open-storage.ts';
import type { BatchResource } from '../services/api/src/schemas.ts';
import {
  type Caller,
  type Catalogue,
  isOver,
  openCaller,
  openCatalogue,
  openEgress,
} from '../test/chaos/catalogue.ts';
import { answersOf, differences, type Heard, wrongAfter } from '../test/chaos/invariants.ts';
import { childrenOf } from '../test/processes.ts';
import { type ServiceName, type System, startSystem } from '../test/system.ts';
import { makeTracks, seeded } from './tracks/make-tracks.ts';

const [recordings, countText = '3000', cache = path.join(tmpdir(), 'as-chaos-tracks'), seedText = '1'] =
  process.argv.slice(2);
if (recordings === undefined)
  throw new Error('npm run bench -- chaos-catalogue DIRECTORY [tracks] [cache] [seed]');
const count = Number(countText);
const random = seeded(Number(seedText));

const victims = ['api', 'feeder', 'fetch', 'decoder', 'inference', 'webhook', 'model', 'redis'] as const;
type Victim = (typeof victims)[number];

console.log(
  `tracks                ${count}, made in ${await timed(async () => void (await makeTracks(recordings, cache, count)))}`,
);
const tracks = await makeTracks(recordings, cache, count);
await using catalogue = await openCatalogue(tracks);

let failed = false;
const calm = await run('without kills', false);
const storm = await run('with kills', true);
const differing = differences(calm.answers, storm.answers);
report('rows that differ', differing);
console.log(
  `  in the last decimal ${differences(calm.answers, storm.answers, 0).length - differing.length} (rounding: which windows share a batch)`,
);
console.log(`throughput            ${rate(calm.seconds)} rows/s without kills, ${rate(storm.seconds)} with`);
if (failed) process.exitCode = 1;

async function run(
  title: string,
  withKills: boolean,
): Promise<{ answers: Map<string, Heard>; seconds: number }> {
  await using system = await startSystem({
    env: { ...openEgress, LOG_LEVEL: 'info', RECONCILE_SECONDS: '2', RECONCILE_AFTER_SECONDS: '10' },
  });
  const storage = openStorage(pathToFileURL(path.join(system.directory, 'objects')).href);
  await using caller = await openCaller(system, catalogue, 'catalogue', storage);
  console.log(`\n${title}`);
  const killing = withKills ? startKilling(system) : undefined;
  const from = performance.now();
  const { id } = await caller.submit();
  const accepted = (performance.now() - from) / 1_000;
  const done = await caller.when(id, isOver, 4 * 3_600_000);
  const seconds = (performance.now() - from) / 1_000;
  const kills = await killing?.stop();
  console.log(`  accepted            ${accepted.toFixed(1)} s`);
  console.log(`  finished            ${seconds.toFixed(1)} s, ${rate(seconds)} rows/s`);
  console.log(`  counts              ${JSON.stringify(done.counts)}`);
  console.log(`  verdicts            ${JSON.stringify(done.verdicts)}`);
  if (kills) {
    const total = [...kills.values()].reduce((sum, n) => sum + n, 0);
    console.log(
      `  kills               ${total}: ${[...kills].map(([victim, n]) => `${victim} ${n}`).join(', ')}`,
    );
    console.log(`  repetitions         ${await repetitions(system)}`);
  }
  report('  breaches', await wrongAfter(60_000, caller, [caller.accepted]));
  const answers = await answersFor(caller, id);
  console.log(`  failed rows         ${JSON.stringify(failures(answers))}`);
  await again(system, caller, catalogue, answers);
  return { answers, seconds };
}

/** The manifest once more: every answer is known. */
async function again(
  system: System,
  caller: Caller,
  { s3 }: Catalogue,
  before: Map<string, Heard>,
): Promise<void> {
  const readsBefore = await sourceReads(system);
  const requestsBefore = s3.requests.length;
  const from = performance.now();
  const { id } = await caller.submit();
  const batch: BatchResource = await caller.when(id, isOver, 3_600_000);
  const seconds = (performance.now() - from) / 1_000;
  const reads = await sourceReads(system);
  const read = s3.requests
    .slice(requestsBefore)
    .flatMap((line) => /^GET \/music\/([^?]+)/.exec(line)?.[1] ?? []);
  console.log(
    `  submitted again     ${seconds.toFixed(1)} s, ${rate(seconds)} rows/s; reused ${batch.counts.reused}`,
  );
  console.log(
    `    source reads      ${['GET', 'HEAD', 'LIST'].map((operation) => `${operation} ${readsBefore[operation] ?? 0} -> ${reads[operation] ?? 0}`).join(', ')}`,
  );
  console.log(`    objects read        ${read.length}: rows that had failed are tried again`);
  report(
    '    read in vain',
    read.filter((ref) => before.get(ref)?.state === 'completed'),
  );
  const known = new Map([...before].filter(([, { state }]) => state === 'completed'));
  const now = await answersFor(caller, id);
  report('    rows that differ', differences(known, new Map([...now].filter(([ref]) => known.has(ref)))));
  report('    breaches', await wrongAfter(60_000, caller, [caller.accepted]));
}

async function answersFor(caller: Caller, id: string): Promise<Map<string, Heard>> {
  const batch = await createBatchRecords(caller.redis, { resultSeconds: 1 }).get({
    tenant: caller.tenant,
    id,
  });
  return answersOf(caller.storage, batch!);
}

function failures(answers: ReadonlyMap<string, Heard>): Record<string, number> {
  const codes: Record<string, number> = {};
  for (const { error } of answers.values()) if (error) codes[error] = (codes[error] ?? 0) + 1;
  return codes;
}

function report(title: string, sentences: readonly string[]): void {
  console.log(`${title.padEnd(21)} ${sentences.length}`);
  for (const sentence of sentences.slice(0, 20)) console.log(`      ${sentence.slice(0, 600)}`);
  if (sentences.length > 0) failed = true;
}

async function sourceReads(system: System): Promise<Record<string, number>> {
  const sum: Record<string, number> = {};
  for (const name of ['feeder', 'decoder'] as const) {
    const metrics = await (await fetch(`${system.healthUrl(name)}/metrics`)).text();
    for (const [, operation, value] of metrics.matchAll(
      /^acousticsense_source_reads_total\{[^}]*operation="(\w+)"[^}]*\} (\d+)/gm,
    ))
      sum[operation!] = (sum[operation!] ?? 0) + Number(value);
  }
  return sum;
}

/** How often work was begun again, as the logs tell. */
async function repetitions(system: System): Promise<string> {
  const counts: Record<string, number> = {};
  for (const name of ['fetch', 'decoder', 'inference', 'api'] as const) {
    for (const { msg, starts } of await system.log(name)) {
      const what =
        msg === 'begun' && Number(starts) > 1
          ? `begun again (${name})`
          : /vanished|starting over|goes back|back to decode|committed before/.exec(String(msg))?.[0];
      if (what) counts[what] = (counts[what] ?? 0) + 1;
    }
  }
  return JSON.stringify(counts);
}

/** Ends one after the other by SIGKILL and starts it again, until it is stopped. */
function startKilling(system: System) {
  const kills = new Map<Victim, number>();
  const starting = new Map<ServiceName, Promise<void>>();
  let stopped = false;

  async function killOne(victim: Victim): Promise<void> {
    if (victim === 'redis') {
      await system.redis.stop('SIGKILL');
      await sleep(200 + 1_500 * random());
      await system.redis.start();
    } else if (victim === 'model') {
      if (starting.has('inference')) return;
      const children = await childrenOf(system.pid('inference')).catch(() => []);
      if (children.length === 0) return;
      for (const pid of children) process.kill(pid, 'SIGKILL');
    } else {
      // What is only just starting has nothing to lose.
      if (starting.has(victim)) return;
      await system.kill(victim);
      await sleep(200 + 1_500 * random());
      const start = system.start(victim).finally(() => starting.delete(victim));
      starting.set(victim, start);
      start.catch((error) => console.log(`      ${victim} did not start: ${error.message}`));
    }
    kills.set(victim, (kills.get(victim) ?? 0) + 1);
  }

  const running = (async () => {
    while (!stopped) {
      await sleep(2_000 + 4_000 * random());
      if (!stopped) await killOne(victims[Math.floor(random() * victims.length)]!);
    }
    await Promise.allSettled(starting.values());
  })();
  return {
    async stop(): Promise<Map<Victim, number>> {
      stopped = true;
      await running;
      return kills;
    },
  };
}

function rate(seconds: number): string {
  return (count / seconds).toFixed(1);
}

async function timed(work: () => Promise<void>): Promise<string> {
  const from = performance.now();
  await work();
  return `${((performance.now() - from) / 1_000).toFixed(1)} s`;
}
