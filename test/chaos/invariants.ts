/**
 * What must hold of a system that has come to rest, whatever was killed on the way: everything that was accepted has
 * ended exactly once, everybody who listens was told exactly once, counters equal rows, and nothing is left over.
 */
import type { Redis } from 'ioredis';
import { type BatchRecord, decodePart, isEnded, type PartRow } from '../../packages/shared/src/batch.ts';
import { createBatchRecords } from '../../packages/shared/src/batch-records.ts';
import { createEventLog } from '../../packages/shared/src/event-log.ts';
import { verdicts } from '../../packages/shared/src/house-genres.ts';
import { type Timeline, timelineSchema } from '../../packages/shared/src/job.ts';
import { createJobRecords } from '../../packages/shared/src/job-records.ts';
import { chunkRows } from '../../packages/shared/src/manifest.ts';
import { partKey, timelineKey } from '../../packages/shared/src/object-keys.ts';
import { isFinished } from '../../packages/shared/src/pipeline.ts';
import type { Storage } from '../../packages/shared/src/storage.ts';

/** All that a tenant was ever accepted. */
export interface Accepted {
  readonly tenant: string;
  readonly batches: readonly string[];
  /** Single jobs. */
  readonly jobs?: readonly string[];
  readonly uploads?: readonly string[];
}

export interface Remains {
  readonly redis: Redis;
  readonly storage: Storage;
}

const retention = { resultSeconds: 3_600 };

/**
 * Waits until nothing is wrong any more: locks run out, the reconciler sweeps.
 * @returns what is still wrong at the end, a sentence each.
 */
export async function wrongAfter(
  ms: number,
  remains: Remains,
  accepted: readonly Accepted[],
): Promise<string[]> {
  for (const end = Date.now() + ms; ; ) {
    const wrong = await whatIsWrong(remains, accepted);
    if (wrong.length === 0 || Date.now() >= end) return wrong;
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

/** @returns a sentence for each breach. */
export async function whatIsWrong(remains: Remains, accepted: readonly Accepted[]): Promise<string[]> {
  const wrong: string[] = [];
  const found = new Map<string, { batch: BatchRecord; rows: PartRow[] }>();
  const batchRecords = createBatchRecords(remains.redis, retention);
  const records = createJobRecords(remains.redis, retention);
  for (const { tenant, batches, jobs = [] } of accepted) {
    const events = await eventsOf(remains, tenant);
    for (const id of batches) {
      const batch = await batchRecords.get({ tenant, id });
      if (batch === undefined) {
        wrong.push(`batch ${id}: unknown`);
        continue;
      }
      const rows = await rowsOf(remains.storage, batch);
      found.set(id, { batch, rows });
      const say = (what: string) => wrong.push(`batch ${id}: ${what}`);
      countersEqualRows(batch, rows, say);
      toldOnce(batch, rows, events, say);
    }
    for (const id of jobs) {
      const record = await records.get(tenant, id);
      if (record === undefined || !isFinished(record.state))
        wrong.push(`job ${id}: ${record?.state ?? 'unknown'}`);
      else if (JSON.stringify(events.ofJobs.get(id)) !== JSON.stringify([`job.${record.state}`]))
        wrong.push(`job ${id}: it is ${record.state}, and told were ${events.ofJobs.get(id) ?? 'nothing'}`);
    }
  }
  wrong.push(...(await keysLeftOver(remains.redis, accepted)));
  wrong.push(...(await objectsLeftOver(remains.storage, accepted, found)));
  return wrong;
}

/** The rows of all parts that are written. */
async function rowsOf(
  storage: Storage,
  batch: Pick<BatchRecord, 'tenant' | 'id' | 'opened'>,
): Promise<PartRow[]> {
  const rows: PartRow[] = [];
  for (let chunk = 0; chunk < batch.opened; chunk += 1) {
    const key = partKey(batch.tenant, batch.id, chunk);
    if (await storage.stat(key)) rows.push(...decodePart(await storage.read(key)));
  }
  return rows;
}

/** All of a result that does not depend on when and where it was worked out. */
export interface Heard {
  readonly state: string;
  readonly error: string | undefined;
  readonly contentId: string | undefined;
  readonly warnings: string | undefined;
  readonly probabilities: readonly number[] | null | undefined;
  readonly windows: Timeline['probabilities'] | undefined;
  readonly verdict: string | undefined;
}

async function heardOf(storage: Storage, tenant: string, row: PartRow): Promise<Heard> {
  const { outcome, decoded, error, jobId, state, verdict } = row;
  let windows = outcome?.windows;
  if (outcome && windows === undefined) {
    const [batchId, chunk, at] = placeOf.get(row) ?? [];
    if (batchId === undefined) throw new Error('a row of no batch');
    const batch = { id: batchId, chunk: chunk!, row: at! };
    const text = await storage.read(timelineKey({ tenant, id: jobId, batch }));
    windows = timelineSchema.parse(JSON.parse(text.toString('utf8'))).probabilities;
  }
  return {
    state,
    error: error?.code,
    contentId: decoded?.contentId,
    warnings: decoded && JSON.stringify(decoded.warnings),
    probabilities: outcome?.probabilities,
    windows,
    verdict,
  };
}

const placeOf = new WeakMap<PartRow, [batchId: string, chunk: number, row: number]>();

/** By ref; every row must have one. */
export async function answersOf(
  storage: Storage,
  batch: Pick<BatchRecord, 'tenant' | 'id' | 'opened'>,
): Promise<Map<string, Heard>> {
  const answers = new Map<string, Heard>();
  for (const row of await rowsOf(storage, batch)) {
    placeOf.set(row, [batch.id, Math.floor(row.row / chunkRows), row.row % chunkRows]);
    answers.set(row.ref!, await heardOf(storage, batch.tenant, row));
  }
  return answers;
}

/**
 * Probabilities are stored with 6 decimals. With which other windows a window shares a batch decides in which order the
 * graph's sums are rounded, so the last decimal is not the same in every run; nothing else may differ.
 */
const roundingTolerance = 2e-6;

/** @returns a sentence for each ref whose answers differ by more than rounding does. */
export function differences(
  expected: ReadonlyMap<string, Heard>,
  actual: ReadonlyMap<string, Heard>,
  tolerance = roundingTolerance,
): string[] {
  return [...new Set([...expected.keys(), ...actual.keys()])].flatMap((ref) => {
    const [one, other] = [expected.get(ref), actual.get(ref)];
    return isSame(one, other, tolerance)
      ? []
      : [`${ref}: ${JSON.stringify(one)} became ${JSON.stringify(other)}`];
  });
}

function isSame(one: unknown, other: unknown, tolerance: number): boolean {
  if (typeof one === 'number' && typeof other === 'number') return Math.abs(one - other) <= tolerance;
  if (typeof one !== 'object' || typeof other !== 'object' || one === null || other === null)
    return one === other;
  const [a, b] = [Object.entries(one), Object.entries(other)];
  return (
    a.length === b.length &&
    a.every(([key, value], at) => b[at]![0] === key && isSame(value, b[at]![1], tolerance))
  );
}

function countersEqualRows(batch: BatchRecord, rows: readonly PartRow[], say: (what: string) => void): void {
  const { state, opened, closed, chunks } = batch;
  if (!isEnded(state)) say(`is ${state}`);
  if (closed !== opened || (state === 'completed' && opened !== chunks))
    say(`${opened} of ${chunks} chunks opened, ${closed} closed`);
  if (batch.waiting !== 0 || batch.open !== 0) say(`${batch.waiting} rows wait, ${batch.open} are open`);
  const { completed, failed, cancelled } = batch;
  if (batch.rows !== completed + failed + cancelled)
    say(`${batch.rows} rows, but ${completed} + ${failed} + ${cancelled} have ended`);
  // After a cancel the rows of chunks that were never opened have no part.
  const written = Math.min(batch.rows, opened * chunkRows);
  if (rows.length !== written) say(`${rows.length} rows are written, expected ${written}`);
  rows.forEach(({ row }, at) => {
    if (row !== at) say(`row ${row} stands in place of ${at}`);
  });
  const count = (test: (row: PartRow) => boolean) => rows.filter(test).length;
  for (const [name, counted, wanted] of [
    ['completed', count((row) => row.state === 'completed'), completed],
    ['failed', count((row) => row.state === 'failed'), failed],
    ['cancelled', count((row) => row.state === 'cancelled') + batch.rows - written, cancelled],
    ['reused', count((row) => row.reused === true), batch.reused],
    ...verdicts.map((verdict) => [verdict, count((row) => row.verdict === verdict), batch[verdict]] as const),
  ] as const) {
    if (counted !== wanted) say(`${counted} rows are ${name}, the counter says ${wanted}`);
  }
}

interface Told {
  /** Types, by `<batch id>/<row>`. */
  readonly ofRows: Map<string, string[]>;
  readonly ofJobs: Map<string, string[]>;
  /** By batch id: of ends, `batch.completed`; of parts, `results.part <chunk>`. */
  readonly ofBatches: Map<string, string[]>;
}

/** From storage and Redis: somebody may archive them meanwhile. */
async function eventsOf(remains: Remains, tenant: string): Promise<Told> {
  const told: Told = { ofRows: new Map(), ofJobs: new Map(), ofBatches: new Map() };
  const put = (map: Map<string, string[]>, key: string, type: string) =>
    map.set(key, [...(map.get(key) ?? []), type]);
  const { events } = await createEventLog(remains).read(tenant, undefined, 1e9);
  for (const { event } of events) {
    const { type, data } = event;
    if ('jobId' in data) {
      if (data.row === null) put(told.ofJobs, data.jobId, type);
      else put(told.ofRows, `${data.batchId}/${data.row}`, type);
    } else if ('part' in data) put(told.ofBatches, data.batchId, `${type} ${data.part.number}`);
    else if ('batchId' in data && type !== 'batch.progress') put(told.ofBatches, data.batchId, type);
  }
  return told;
}

function toldOnce(
  batch: BatchRecord,
  rows: readonly PartRow[],
  told: Told,
  say: (what: string) => void,
): void {
  for (const { row, state } of rows) {
    const types = told.ofRows.get(`${batch.id}/${row}`) ?? [];
    // Of a row that was cancelled before it became a job there is nothing to tell.
    const expected = state === 'cancelled' && types.length === 0 ? [] : [`job.${state}`];
    if (JSON.stringify(types) !== JSON.stringify(expected))
      say(`row ${row} is ${state}, and told were ${types.join(', ') || 'nothing'}`);
  }
  const written = Math.ceil(rows.length / chunkRows);
  const expected = [
    ...Array.from({ length: written }, (_, chunk) => `results.part ${chunk}`),
    `batch.${batch.state}`,
  ];
  const types = told.ofBatches.get(batch.id) ?? [];
  if (JSON.stringify([...types].sort()) !== JSON.stringify(expected.sort())) say(`told were ${types}`);
}

const uuid = '[0-9a-f]{8}-[0-9a-f-]{27}';
/** Of the service itself, and of a tenant whatever it has running. */
const lastingKeys = new RegExp(
  `^as:(tenants|api-keys|tenant-settings|source-tenants|workers|model:[0-9a-f]+|probe:\\d+|public-url|endpoint-tenants|webhook:lease|feeder:lease|reconciler:.*)$|^as:\\{[^}]+\\}:(events(?::archived)?|deliveries(?::archived)?|endpoints?(?::.*)?|batches|revision|sources|finished|idempotency:.*|used:\\w+|ref:\\w+|deleted-batch:${uuid})$`,
);

async function keysLeftOver(redis: Redis, accepted: readonly Accepted[]): Promise<string[]> {
  const wrong: string[] = [];
  const known = new Set(
    accepted.flatMap(({ tenant, batches, jobs = [] }) => [
      ...batches.map((id) => `as:{${tenant}}:batch:${id}`),
      ...jobs.map((id) => `as:{${tenant}}:job:${id}`),
    ]),
  );
  for await (const some of redis.scanStream({ count: 1_000 })) {
    for (const key of some as string[]) {
      if (key.startsWith('{as-')) {
        const reason = await whyLeftOver(redis, key);
        if (reason) wrong.push(`key ${key}: ${reason}`);
      } else if (!known.has(key) && !lastingKeys.test(key)) wrong.push(`key ${key} is left over`);
    }
  }
  for (const key of known) {
    if (!key.includes(':batch:')) continue;
    for (const field of await redis.hkeys(key))
      if (/^left:|^retryNext$/.test(field)) wrong.push(`field ${field} of ${key} is left over`);
  }
  return wrong;
}

/** Of BullMQ's keys: `{as-queue}:queue:rest`. */
async function whyLeftOver(redis: Redis, key: string): Promise<string | undefined> {
  const [, base, rest] = /^(\{as-[^}]+\}:[^:]+):(.*)$/.exec(key) ?? [];
  if (base === undefined || rest === undefined) return 'no name of a queue';
  if (rest.endsWith(':lock')) return 'a worker holds it';
  if (['wait', 'active', 'paused', 'delayed', 'prioritized', 'stalled'].includes(rest)) {
    // A marker of BullMQ in these is no job.
    const members = ['wait', 'active', 'paused'].includes(rest)
      ? await redis.lrange(key, 0, -1)
      : rest === 'stalled'
        ? await redis.smembers(key)
        : await redis.zrange(key, '0', '-1');
    const jobs = members.filter((member) => !member.startsWith('0:'));
    return jobs.length === 0 ? undefined : `${jobs.length} queue jobs are not done`;
  }
  if (rest === 'failed') return `${await redis.zcard(key)} queue jobs failed`;
  if (!new RegExp(`^${uuid}\\.\\d+$`).test(rest)) return undefined;
  const [completed, failed] = await Promise.all([
    redis.zscore(`${base}:completed`, rest),
    redis.zscore(`${base}:failed`, rest),
  ]);
  return completed === null && failed === null ? 'a queue job that no list holds' : undefined;
}

async function objectsLeftOver(
  storage: Storage,
  accepted: readonly Accepted[],
  found: ReadonlyMap<string, { batch: BatchRecord; rows: PartRow[] }>,
): Promise<string[]> {
  const wrong: string[] = [];
  const jobs = new Set(accepted.flatMap(({ tenant, jobs = [] }) => jobs.map((id) => `${tenant}/${id}`)));
  const uploads = new Set(
    accepted.flatMap(({ tenant, uploads = [] }) => uploads.map((id) => `${tenant}/${id}`)),
  );
  const tensors = new Set<string>();
  const all = new Set<string>();
  for await (const { key } of storage.list('')) {
    all.add(key);
    const parts = key.split('/');
    const [kind, second, third, fourth] = parts;
    if (kind === 'batches') {
      const of = found.get(fourth ?? '');
      const reason =
        of === undefined || of.batch.tenant !== third
          ? 'of no batch'
          : whyNotOf(of, parts.slice(4).join('/'));
      if (reason) wrong.push(`object ${key}: ${reason}`);
    } else if (kind === 'jobs') {
      if (!jobs.has(`${third}/${fourth}`)) wrong.push(`object ${key}: of no job`);
    } else if (kind === 'uploads') {
      if (!uploads.has(`${third}/${fourth!.split('.')[0]}`)) wrong.push(`object ${key}: of no upload`);
    } else if (kind === 'index') {
      const batchId = new RegExp(`^${uuid}`).exec(fourth ?? '')?.[0] ?? '';
      if (found.get(batchId)?.batch.tenant !== second) wrong.push(`object ${key}: of no batch`);
    } else if (kind === 'events' || kind === 'deliveries' || kind === 'dead-letters') {
      // Kept for as long as their retention says, whatever has ended.
      if (!accepted.some(({ tenant }) => tenant === second)) wrong.push(`object ${key}: of no tenant`);
    } else if (kind === 'tensors') {
      if (key.endsWith('.npy')) tensors.add(key.slice(0, -4));
    } else wrong.push(`object ${key}: of nothing that is known`);
  }
  // A tensor is a cache of its own age, whoever asked for it; but one without a sidecar nobody would find.
  for (const tensor of tensors)
    if (!all.has(`${tensor}.json`)) wrong.push(`tensor ${tensor}: without its sidecar`);
  return wrong;
}

/** @param name behind the prefix of the batch. */
function whyNotOf(
  { batch, rows }: { batch: BatchRecord; rows: readonly PartRow[] },
  name: string,
): string | undefined {
  if (['batch.json', 'model.json', 'mapping.json', 'bad-rows.jsonl'].includes(name)) return undefined;
  const chunk = Number(/^(?:chunks\/(\d{5})|part-(\d{5}))\.jsonl$/.exec(name)?.slice(1).find(Boolean));
  if (chunk < batch.chunks) return undefined;
  const [, jobId, file] = /^rows\/\d{5}\/([^/]+)\/(.+)$/.exec(name) ?? [];
  const row = rows.find((one) => one.jobId === jobId);
  if (row === undefined) return 'of no row';
  if (file === 'audio') return 'the fetched audio of a row that has ended';
  return row.state === 'completed' ? undefined : `of a row that is ${row.state}`;
}
