/**
 * Is every event told, in the order of `revision` and under one id, to a receiver that refuses 30 % of the messages,
 * accepts some and never says so, and is killed every few seconds? And when the webhook service and Redis are, too?
 *
 *   npm run bench -- webhooks-flaky [--events 10000] [--refs 2000] [--rate 250] [--speed 2000] [--kill]
 *
 * The clock of retries runs `--speed` times as fast, so that 75 hours pass in two minutes; the receiver, the network
 * and Redis are real. Events happen at `--rate` a second, each the next revision of a ref chosen at random. `--kill`
 * ends the webhook service by SIGKILL every 10 s and Redis, which writes each command to disk before it answers, every
 * 30 s. The receiver writes down what it accepts before it answers: that file is what is judged.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { cpus, loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { createDeliveryLog, type Delivery } from '../packages/shared/src/event-log.ts';
import { eventsChannel, type JobData, jobEventId } from '../packages/shared/src/events.ts';
import { deadLetterPrefix } from '../packages/shared/src/object-keys.ts';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { maxAttempts } from '../services/webhook/src/messages.ts';
import { jobEnded, startWebhookService } from '../services/webhook/src/testing/running.ts';
import { seeded } from './tracks/make-tracks.ts';

const { values } = parseArgs({
  options: {
    events: { type: 'string', default: '10000' },
    refs: { type: 'string', default: '2000' },
    rate: { type: 'string', default: '250' },
    speed: { type: 'string', default: '2000' },
    kill: { type: 'boolean', default: false },
  },
});
const [count, refs, rate, speed] = [values.events, values.refs, values.rate, values.speed].map(Number) as [
  ...[number, number, number, number],
];
const refuses = 0.3;
const hangs = 0.03;
const timeoutSeconds = 1;
const tenant = 'acme';
const random = seeded(1);
/** Long after the last attempt of what happened last. */
const patienceMs = 20 * 60_000;

interface Line {
  readonly at: number;
  readonly id: string;
  readonly end: 'refused' | 'accepted' | 'silent';
  readonly body?: string;
}

const directory = await mkdtemp(path.join(tmpdir(), 'as-bench-webhooks-'));
const file = path.join(directory, 'received.jsonl');
const loadBefore = loadavg()[0]!;
await using running = await startWebhookService(
  {
    WEBHOOK_CLOCK_SPEED: String(speed),
    WEBHOOK_TIMEOUT_SECONDS: String(timeoutSeconds),
    LOG_LEVEL: 'error',
  },
  { appendOnly: true },
);
const redis = connectRedisForWorker(running.server.url);
const kills = { receiver: 0, service: 0, redis: 0 };
const peak = { redis: 0, service: 0, lag: 0, outstanding: 0 };
let over = false;
let receiver: ChildProcess;
let port = 0;
await startReceiver();
try {
  await run();
} catch (error) {
  console.error(error);
  process.exitCode = 1;
} finally {
  over = true;
  receiver!.kill('SIGKILL');
  redis.disconnect();
  await rm(directory, { recursive: true, force: true });
}

async function run(): Promise<void> {
  const endpoint = await running.endpoint(`http://127.0.0.1:${port}/hook`);
  const [from, load] = [performance.now(), [loadBefore]];
  const background = [watch(load), every(5_000, killReceiver)];
  if (values.kill) background.push(every(10_000, killService), every(30_000, killRedis));

  const happened = await tell();
  const told = (performance.now() - from) / 1_000;
  const resent = await settled(endpoint.id, happened);
  const finished = (performance.now() - from) / 1_000;
  over = true;
  await Promise.all(background);
  if (receiver.exitCode === null && receiver.signalCode === null) receiver.kill('SIGKILL');

  const lines = await received();
  const accepted = lines.filter(({ end }) => end !== 'refused');
  const firsts = new Map<string, Line>();
  for (const line of accepted) if (!firsts.has(line.id)) firsts.set(line.id, line);
  const lost = [...happened.keys()].filter((id) => !firsts.has(id));
  const strangers = accepted.filter(({ id }) => !happened.has(id));
  // What was given up and is sent again has a link that opens for as long as any other.
  const bodyOf = ({ id, body }: Line) => (resent.has(id) ? body!.replace(/"resultUrl":"[^"]*"/, '') : body!);
  const differing = accepted.filter((line) => bodyOf(firsts.get(line.id)!) !== bodyOf(line));
  const { broken, afterDeath } = disorder(firsts, resent);
  const receipts = await receiptsOf();
  const perEvent = [...Map.groupBy(receipts, ({ eventId }) => eventId).values()].map(({ length }) => length);
  const latencies = [...firsts].map(([id, { at }]) => at - happened.get(id)!).sort((a, b) => a - b);

  const figures = {
    events: count,
    refs,
    rate,
    clockSpeed: speed,
    kills,
    toldSeconds: round(told),
    finishedSeconds: round(finished),
    receiver: {
      messages: lines.length,
      ...Object.fromEntries(
        [...Map.groupBy(lines, ({ end }) => end)].map(([end, { length }]) => [end, length]),
      ),
    },
    distinctAccepted: firsts.size,
    duplicates: accepted.length - firsts.size,
    receipts: {
      attempts: receipts.length,
      ...Object.fromEntries(
        [...Map.groupBy(receipts, ({ outcome, problem }) => problem ?? outcome)].map(([what, all]) => [
          what,
          all.length,
        ]),
      ),
    },
    attemptsPerEvent: Array.from({ length: Math.max(...perEvent) }, (_, n) => [
      n + 1,
      perEvent.filter((made) => made === n + 1).length,
    ]),
    deadLettersResent: resent.size,
    seconds: {
      p50: round(quantile(latencies, 0.5) / 1e3),
      p95: round(quantile(latencies, 0.95) / 1e3),
      p99: round(quantile(latencies, 0.99) / 1e3),
      worst: round(quantile(latencies, 1) / 1e3),
    },
    dispatcherLagSeconds: round(peak.lag),
    outstandingMost: peak.outstanding,
    redisMegabytes: round(peak.redis / 1e6),
    serviceMegabytes: Math.round(peak.service),
    wrong: {
      lost: lost.length,
      neverHappened: strangers.length,
      bodiesDiffer: differing.length,
      orderBroken: broken.length,
    },
    load: load.map(round),
  };

  row(
    'machine',
    `${cpus().length} x ${cpus()[0]!.model}, load ${load.map((one) => one.toFixed(1)).join('-')}`,
  );
  row('events', `${count} on ${refs} refs, ${rate}/s, clock x ${speed}, time limit ${timeoutSeconds} s`);
  row('killed', `receiver ${kills.receiver}, webhook service ${kills.service}, Redis ${kills.redis}`);
  row('time', `told in ${told.toFixed(0)} s, all accepted after ${finished.toFixed(0)} s`);
  row('at the receiver', JSON.stringify(figures.receiver));
  row('receipts', JSON.stringify(figures.receipts));
  row('attempts per event', figures.attemptsPerEvent.map(([n, all]) => `${n}: ${all}`).join(', '));
  row('accepted', `${firsts.size} events, ${figures.duplicates} duplicates`);
  row(
    'dead letters',
    `${resent.size}, sent again (${maxAttempts} attempts); told after a later revision: ${afterDeath.length}`,
  );
  row('event to acceptance', JSON.stringify(figures.seconds));
  row('dispatcher', `lag ${peak.lag.toFixed(1)} s at most, outstanding ${peak.outstanding} at most`);
  row('memory at most', `Redis's data ${figures.redisMegabytes} MB, service ${figures.serviceMegabytes} MB`);
  row('lost', String(lost.length));
  row('never happened', String(strangers.length));
  row('bodies differ', String(differing.length));
  row('order broken', String(broken.length));
  for (const sentence of [...lost.slice(0, 5), ...broken.slice(0, 5)]) console.log(`    ${sentence}`);
  console.log(JSON.stringify(figures));
  if (Object.values(figures.wrong).some((wrong) => wrong > 0)) process.exitCode = 1;
}

/** As `commit.lua`: what is repeated because its answer was lost happens once. @returns when each happened, epoch ms. */
async function tell(): Promise<Map<string, number>> {
  const happen = `
    if not redis.call('SET', KEYS[2], 1, 'NX') then return end
    redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'event', ARGV[2])
    redis.call('PUBLISH', ARGV[3], ARGV[4])`;
  const happened = new Map<string, number>();
  const revisions = new Map<number, number>();
  const from = performance.now();
  for (let n = 0; n < count; ) {
    const due = Math.min(count, Math.ceil(((performance.now() - from) / 1_000) * rate));
    const steps: Promise<unknown>[] = [];
    for (; n < due; n += 1) {
      const ref = Math.floor(random() * refs);
      const revision = (revisions.get(ref) ?? 0) + 1;
      revisions.set(ref, revision);
      const event = jobEnded({ ref: `track-${ref}`, revision });
      const id = jobEventId({ jobId: (event.data as JobData).jobId, generation: 1 }, event.type);
      happened.set(id, Date.now());
      steps.push(
        redis.eval(
          happen,
          2,
          ...[`as:{${tenant}}:events`, `bench:{${tenant}}:${id}`],
          ...[id, JSON.stringify(event), eventsChannel, tenant],
        ),
      );
    }
    // In their order: what comes later is not sent before these are answered.
    await Promise.all(steps);
    await sleep(20);
  }
  return happened;
}

/** Until all is accepted and nothing is under way. Messages that were given up are sent again. @returns their ids. */
async function settled(endpointId: string, happened: ReadonlyMap<string, number>): Promise<Set<string>> {
  const resent = new Set<string>();
  for (const until = performance.now() + patienceMs; performance.now() < until; await sleep(1_000)) {
    for await (const { key } of running.storage.list(deadLetterPrefix(tenant, endpointId))) {
      const letter = JSON.parse((await running.storage.read(key)).toString()) as {
        eventId: string;
        cursor: string;
      };
      const day = key.split('/').at(-2)!;
      if (resent.has(letter.eventId)) continue;
      resent.add(letter.eventId);
      await running.endpoints.addResends(tenant, endpointId, [
        { cursor: letter.cursor, eventId: letter.eventId, day },
      ]);
    }
    const { status } = (await running.endpoints.get(tenant, endpointId))!;
    if (status === 'disabled') await running.endpoints.enable(tenant, endpointId);
    const accepted = new Set((await received()).filter(({ end }) => end !== 'refused').map(({ id }) => id));
    const missing = [...happened.keys()].filter((id) => !accepted.has(id));
    const { outstanding } = await figuresOf();
    if (missing.length === 0 && outstanding === 0) return resent;
  }
  console.error('gave up waiting');
  return resent;
}

/** First acceptances of a lower revision after a higher one of the same ref. */
function disorder(firsts: ReadonlyMap<string, Line>, resent: ReadonlySet<string>) {
  const highest = new Map<string, number>();
  const found = { broken: [] as string[], afterDeath: [] as string[] };
  for (const { id, body } of firsts.values()) {
    const { ref, revision } = (JSON.parse(body!) as { data: { ref: string; revision: number } }).data;
    const before = highest.get(ref) ?? 0;
    if (revision < before)
      found[resent.has(id) ? 'afterDeath' : 'broken'].push(`${ref}: ${revision} after ${before} (${id})`);
    highest.set(ref, Math.max(before, revision));
  }
  return found;
}

async function received(): Promise<Line[]> {
  const text = await readFile(file, 'utf8').catch(() => '');
  return text
    .slice(0, text.lastIndexOf('\n') + 1)
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as Line);
}

async function receiptsOf(): Promise<Delivery[]> {
  const log = createDeliveryLog({ redis: running.redis, storage: running.storage });
  const all: Delivery[] = [];
  for (let after: string | undefined, more = true; more; ) {
    const page = await log.page(tenant, after, 1_000);
    all.push(...page.entries);
    ({ more, cursor: after } = page);
  }
  return all;
}

async function startReceiver(): Promise<void> {
  const script = path.join(import.meta.dirname, 'stubs/flaky-receiver.ts');
  receiver = fork(script, [file, String(port), String(refuses), String(hangs)]);
  [port] = (await once(receiver, 'message')) as [number];
}

async function killReceiver(): Promise<void> {
  const gone = once(receiver, 'exit');
  receiver.kill('SIGKILL');
  await gone;
  kills.receiver += 1;
  await sleep(200 + 800 * Math.random());
  await startReceiver();
}

async function killService(): Promise<void> {
  await running.stop('SIGKILL');
  kills.service += 1;
  await sleep(200 + 800 * Math.random());
  // Redis may be away at this moment: a service that finds none at its start ends.
  for (;;) {
    try {
      return await running.start();
    } catch {
      await sleep(500);
    }
  }
}

async function killRedis(): Promise<void> {
  await running.server.stop('SIGKILL');
  kills.redis += 1;
  await sleep(200 + 1_500 * Math.random());
  await running.server.start();
}

/** About every `ms`, one after the other, until it is over. */
async function every(ms: number, what: () => Promise<void>): Promise<void> {
  for (;;) {
    const until = performance.now() + ms * (0.75 + 0.5 * Math.random());
    while (performance.now() < until) {
      if (over) return;
      await sleep(100);
    }
    if (!over) await what();
  }
}

async function watch(load: number[]): Promise<void> {
  while (!over) {
    await sleep(500);
    load[1] = Math.max(load[1] ?? 0, loadavg()[0]!);
    const status = await readFile(`/proc/${running.pid}/status`, 'utf8').catch(() => '');
    peak.service = Math.max(peak.service, Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1_024);
    const info = await redis.info('memory');
    peak.redis = Math.max(peak.redis, Number(/^used_memory:(\d+)/m.exec(info)?.[1] ?? 0));
    const { lag, outstanding } = await figuresOf();
    peak.lag = Math.max(peak.lag, lag);
    peak.outstanding = Math.max(peak.outstanding, outstanding ?? 0);
  }
}

/** @returns no number outstanding while the service is away or does not lead. */
async function figuresOf(): Promise<{ lag: number; outstanding?: number }> {
  const text = await fetch(`${running.healthUrl}/metrics`, { signal: AbortSignal.timeout(5_000) })
    .then((response) => response.text())
    .catch(() => '');
  const value = (name: string) =>
    Number(new RegExp(`^acousticsense_webhook_${name}\\{[^}]*\\} (\\S+)`, 'm').exec(text)?.[1] ?? 0);
  return value('leads') === 1 ? { lag: value('lag_seconds'), outstanding: value('outstanding') } : { lag: 0 };
}

function row(title: string, text: string): void {
  console.log(`${title.padEnd(21)} ${text}`);
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}

/** @param sorted ascending. */
function quantile(sorted: readonly number[], q: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN;
}
