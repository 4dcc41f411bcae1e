/**
 * A million events towards an endpoint that is dead: what does a live one notice, and what does Redis hold?
 *
 *   npm run bench -- webhooks-dead-endpoint [--events 1000000] [--rate 2000] [--dead hangs|refuses] [--probes 10]
 *
 * Tenant `flood` has a dead endpoint that subscribes to everything: it takes the connection and never answers, or there
 * is nobody at all. Two live endpoints are told of a batch that ended, so many times a second each: one of tenant
 * `calm`, and one of tenant `flood` itself, whose events lie behind the million in the same log. A third one belongs to
 * a webhook service and a Redis of their own, where nothing else ever happens: it is asked at the same moments, so that
 * what the machine is at besides is in all three. Measured is the time from the event to its arrival, in parts:
 *
 *   quiet      nothing else happens
 *   flood      events at `--rate` a second (a tenth of `--events`), nobody is told of them: what the load itself costs
 *   dead       `--events` at the same rate, and the dead endpoint is to be told of each
 *   backlog    nothing happens any more; almost all of it waits for the dead endpoint
 *
 * Afterwards: how fast an endpoint gets through a log of which it wants nothing, and how fast one is told that wants all.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { type AddressInfo, createServer as createTcpServer, type Socket } from 'node:net';
import { cpus, loadavg } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { compareCursors } from '../packages/shared/src/archived-log.ts';
import { eventExamples } from '../packages/shared/src/event-examples.ts';
import type { EventLog } from '../packages/shared/src/event-log.ts';
import type { StoredEvent } from '../packages/shared/src/events.ts';
import { createMessageQueues } from '../services/webhook/src/messages.ts';
import { startWebhookService } from '../services/webhook/src/testing/running.ts';

const { values } = parseArgs({
  options: {
    events: { type: 'string', default: '1000000' },
    rate: { type: 'string', default: '2000' },
    dead: { type: 'string', default: 'hangs' },
    probes: { type: 'string', default: '10' },
    seconds: { type: 'string', default: '30' },
  },
});
const [events, rate, probesPerSecond, quietSeconds] = [
  values.events,
  values.rate,
  values.probes,
  values.seconds,
].map(Number) as [number, number, number, number];
/** As EVENTS_WAITING_MOST has it. */
const waitingMost = 200_000;
const handedOver = Math.min(10_000, events);
/** Of processes that have just started; not counted. */
const warmUpMs = 10_000;

const parts = ['quiet', 'flood', 'dead', 'backlog'] as const;
type Part = (typeof parts)[number];
const lives = {
  reference: 'quiet system',
  calm: 'live, another tenant',
  flood: 'live, same tenant',
} as const;
type Live = keyof typeof lives;
let part: Part | undefined;
const probes = new Map<
  string,
  { readonly at: number; readonly part: Part | undefined; readonly of: Live; ms?: number }
>();
const peak: Record<Part, { redis: number; service: number; inRedis: number; load: number }> =
  Object.fromEntries(parts.map((one) => [one, { redis: 0, service: 0, inRedis: 0, load: 0 }])) as never;

await using running = await startWebhookService(
  { LOG_LEVEL: 'warn' },
  { appendOnly: true, appendFsync: 'everysec' },
);
await using reference = await startWebhookService(
  { LOG_LEVEL: 'warn' },
  { appendOnly: true, appendFsync: 'everysec' },
);
const { redis, storage, endpoints } = running;
const queues = createMessageQueues(redis);

let toldMany = 0;
const live = createServer(async (request, response) => {
  const chunks = await request.toArray().catch(() => undefined);
  if (chunks === undefined) return;
  const now = performance.now();
  const probe = probes.get(request.headers['webhook-id'] as string);
  if (probe && probe.ms === undefined) probe.ms = now - probe.at;
  if (!probe) toldMany += 1;
  response.writeHead(204).end();
});
const held = new Set<Socket>();
let attempted = 0;
const dead = createTcpServer((socket) => {
  attempted += 1;
  held.add(socket.on('error', () => {}).on('close', () => held.delete(socket)));
  // Read, and never answered.
  socket.resume();
});
const origins = await Promise.all([live, dead].map(listen));
const deadOrigin = values.dead === 'refuses' ? await nobody() : origins[1]!;

let over = false;
let probing = true;
try {
  await run();
} catch (error) {
  console.error(error);
  process.exitCode = 1;
} finally {
  over = true;
  await queues.close();
  for (const socket of held) socket.destroy();
  dead.close();
  live.closeAllConnections();
  live.close();
}

async function run(): Promise<void> {
  const only = { types: ['batch.completed' as const] };
  await running.endpoint(`${origins[0]}/calm`, only, 'calm');
  await running.endpoint(`${origins[0]}/flood`, only, 'flood');
  await reference.endpoint(`${origins[0]}/reference`, only, 'reference');
  const watching = watch();
  const asking = [probe('reference', reference.events), probe('calm'), probe('flood')];

  await sleep(warmUpMs);
  part = 'quiet';
  await sleep(quietSeconds * 1_000);
  part = 'flood';
  const control = await flood(Math.ceil(events / 10));
  await archived();
  const cpuBefore = await cpuOf();
  part = 'dead';
  const deadEndpoint = await running.endpoint(`${deadOrigin}/dead`, {}, 'flood');
  const from = performance.now();
  const flooded = await flood(events);
  await archived();
  const archivedSeconds = (performance.now() - from) / 1_000;
  const cpu = Object.fromEntries(
    Object.entries(await cpuOf()).map(([name, seconds]) => [name, round(seconds - cpuBefore[name]!)]),
  );
  part = 'backlog';
  const standingFrom = await cpuOf();
  await sleep(quietSeconds * 1_000);
  const standing = {
    ...(await memory()),
    cpu: round((((await cpuOf())['service']! - standingFrom['service']!) / quietSeconds) * 100),
  };
  probing = false;
  await Promise.all(asking);
  // What is late is waited for: a probe that never came is a fault, not a short latency.
  for (let n = 0; n < 600 && missing() > 0; n += 1) await sleep(100);
  over = true;
  await watching;
  const stored = await storedBytes();
  const outstanding = await queues.outstanding(deadEndpoint.id);
  const deadMegabytes = await megabytesOf(deadEndpoint.id);
  const { cursor: told, status } = (await endpoints.get('flood', deadEndpoint.id))!;
  const waits = await running.events.read('flood', told, 1);
  const passed = await passOver(deadEndpoint.createdAt);
  const delivered = await hand(handedOver);

  const latency = Object.fromEntries(
    (['reference', 'calm', 'flood'] as const).map((of) => [
      of,
      Object.fromEntries(parts.map((one) => [one, latencyOf(of, one)])),
    ]),
  ) as Record<Live, Record<Part, ReturnType<typeof latencyOf>>>;
  const figures = {
    events,
    rate,
    dead: values.dead,
    probesPerSecond,
    control,
    flooded,
    archivedSeconds: round(archivedSeconds),
    cpu,
    latency,
    missing: missing(),
    peak,
    standing,
    stored,
    deadEndpoint: {
      status,
      outstanding,
      attempted,
      waiting: waits.events.length > 0,
      megabytes: deadMegabytes,
    },
    passedOverPerSecond: Math.round(passed),
    deliveredPerSecond: Math.round(delivered),
  };

  row('machine', `${cpus().length} x ${cpus()[0]!.model}`);
  row(
    'events',
    `${events} at ${rate}/s wanted, ${flooded.perSecond}/s written (held back ${flooded.heldSeconds} s)`,
  );
  row(
    'dead endpoint',
    `${values.dead}: ${status}, ${outstanding} messages outstanding, which take ${deadMegabytes} MB of Redis, ${attempted} connections`,
  );
  for (const whose of ['reference', 'calm', 'flood'] as const) {
    for (const one of parts) {
      const { count, p50, p95, p99, worst } = latency[whose][one];
      row(
        one === parts[0] ? lives[whose] : '',
        `${one.padEnd(8)} ${ms(p50)} p50 ${ms(p95)} p95 ${ms(p99)} p99 ${ms(worst)} worst  (${count})`,
      );
    }
  }
  row('probes that never came', String(figures.missing));
  for (const one of parts)
    row(
      one === parts[0] ? 'at most' : '',
      `${one.padEnd(8)} Redis's data ${peak[one].redis} MB, events of the tenant in it ${peak[one].inRedis}, service ${peak[one].service} MB, load ${peak[one].load}`,
    );
  row(
    'backlog standing',
    `Redis's data ${standing.redis} MB, events of the tenant in it ${standing.inRedis}`,
  );
  row('storage', `${stored.objects} objects, ${stored.megabytes} MB`);
  row('all archived', `${figures.archivedSeconds} s after the first event`);
  row('CPU in dead', `${JSON.stringify(cpu)} s`);
  row('passed over', `${figures.passedOverPerSecond} events/s by an endpoint that wants none of them`);
  row(
    'delivered',
    `${figures.deliveredPerSecond} events/s to an endpoint that wants all (${handedOver}, 8 at once)`,
  );
  console.log(JSON.stringify(figures));
  if (figures.missing > 0 || !figures.deadEndpoint.waiting) process.exitCode = 1;
}

/** A batch ends, so many times a second, until {@link probing} ends. */
async function probe(of: Live, log: EventLog = running.events): Promise<void> {
  const example = eventExamples['batch.completed'];
  if (example.type !== 'batch.completed') throw new Error(example.type);
  const { resultUrl: _, ...data } = example.data;
  const event: StoredEvent = { ...example, data };
  const from = performance.now();
  for (let n = 0; probing; n += 1) {
    await sleep(Math.max(0, from + (n * 1_000) / probesPerSecond - performance.now()));
    const id = `evt_probe_${of}_${n}`;
    probes.set(id, { at: performance.now(), part, of });
    await log.append(of, { id, event });
  }
}

async function flood(count: number, tenant = 'flood', perSecond = rate) {
  const child: ChildProcess = fork(
    path.join(import.meta.dirname, 'stubs/event-flood.ts'),
    [running.server.url, tenant, count, perSecond, waitingMost].map(String),
    { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] },
  );
  let news = { written: 0, last: '', heldMs: 0, ms: 0 };
  let toldAt = performance.now();
  child.on('message', (message: typeof news) => {
    news = message;
    if (performance.now() - toldAt < 30_000) return;
    toldAt = performance.now();
    console.error(`  ${part}: ${news.written} events, ${JSON.stringify(peak[part ?? 'quiet'])}`);
  });
  const [code] = await once(child, 'exit');
  if (code !== 0 || news.written !== count)
    throw new Error(`the flood ended with ${code} at ${news.written}`);
  return {
    written: count,
    seconds: round(news.ms / 1_000),
    perSecond: Math.round(count / (news.ms / 1_000)),
    heldSeconds: round(news.heldMs / 1_000),
  };
}

/** Until no more than is kept on purpose, and what makes no whole segment yet, lies in Redis. */
async function archived(): Promise<void> {
  while ((await running.events.length('flood')) > 12_000) await sleep(200);
}

/** Events a second that an endpoint passes that wants none of them: back to the first, and on to the last. */
async function passOver(since: number): Promise<number> {
  const { id } = await running.endpoint(`${origins[0]}/none`, { types: ['batch.failed'] }, 'flood');
  const last = (await running.events.last('flood'))!;
  await endpoints.disable('flood', id, 'operator');
  // What was being done with the old cursor is over.
  await sleep(2_000);
  await endpoints.setCursor('flood', id, `${since}-0`);
  await endpoints.enable('flood', id);
  const from = performance.now();
  while (compareCursors((await endpoints.get('flood', id))!.cursor!, last) < 0) await sleep(50);
  return events / ((performance.now() - from) / 1_000);
}

/** Events a second that an endpoint is told that wants all of them and answers at once. */
async function hand(count: number): Promise<number> {
  const { id } = await running.endpoint(`${origins[0]}/all`, { maxPerSecond: 1_000 }, 'many');
  await flood(count, 'many', 0);
  const from = performance.now();
  while (toldMany < count) await sleep(20);
  const perSecond = count / ((performance.now() - from) / 1_000);
  await endpoints.remove('many', id);
  return perSecond;
}

function missing(): number {
  return [...probes.values()].filter(({ ms }) => ms === undefined).length;
}

function latencyOf(of: Live, one: Part) {
  const sorted = [...probes.values()]
    .filter((probe) => probe.of === of && probe.part === one)
    .map(({ ms = Number.POSITIVE_INFINITY }) => ms)
    .sort((a, b) => a - b);
  const at = (q: number) =>
    round(sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN);
  return { count: sorted.length, p50: at(0.5), p95: at(0.95), p99: at(0.99), worst: at(1) };
}

async function memory() {
  const info = await redis.info('memory');
  const inRedis = await running.events.length('flood');
  const status = await readFile(`/proc/${running.pid}/status`, 'utf8');
  return {
    redis: round(Number(/^used_memory:(\d+)/m.exec(info)?.[1]) / 1e6),
    inRedis,
    service: Math.round(Number(/VmRSS:\s+(\d+)/.exec(status)?.[1]) / 1_024),
  };
}

async function watch(): Promise<void> {
  while (!over) {
    const most = peak[part ?? 'quiet'];
    for (const [name, value] of Object.entries({ ...(await memory()), load: round(loadavg()[0]!) }))
      most[name as keyof typeof most] = Math.max(most[name as keyof typeof most], value);
    await sleep(250);
  }
}

/** What Redis holds for one endpoint. */
async function megabytesOf(id: string): Promise<number> {
  let bytes = 0;
  for await (const keys of redis.scanStream({ match: `*${id}*`, count: 1_000 })) {
    for (const key of keys as string[])
      bytes += Number((await redis.call('MEMORY', 'USAGE', key, 'SAMPLES', '0')) ?? 0);
  }
  return round(bytes / 1e6);
}

async function storedBytes() {
  let [objects, bytes] = [0, 0];
  for await (const { size } of storage.list('')) {
    objects += 1;
    bytes += size;
  }
  return { objects, megabytes: round(bytes / 1e6) };
}

/** Seconds of CPU so far: proc(5), fields 14 and 15 of stat, in ticks of 1/100 s. */
async function cpuOf(): Promise<Record<string, number>> {
  const [service, server] = await Promise.all(
    [running.pid, running.server.pid].map(async (pid) => {
      const fields = (await readFile(`/proc/${pid}/stat`, 'utf8')).split(') ')[1]!.split(' ');
      return (Number(fields[11]) + Number(fields[12])) / 100;
    }),
  );
  return { service: service!, redis: server! };
}

async function listen(server: ReturnType<typeof createTcpServer>): Promise<string> {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** Where nobody listens. */
async function nobody(): Promise<string> {
  const server = createTcpServer();
  const origin = await listen(server);
  await new Promise((resolve) => server.close(resolve));
  return origin;
}

function row(title: string, text: string): void {
  console.log(`${title.padEnd(23)} ${text}`);
}

function ms(value: number): string {
  return `${value.toFixed(0).padStart(6)} ms`;
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}
