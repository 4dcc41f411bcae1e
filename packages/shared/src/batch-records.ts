/**
 * The batches: like a job record, a batch changes only in atomic steps (`batch.lua`); its counters move with its
 * rows (`commit.lua`).
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import type { Redis } from 'ioredis';
import { type BatchRecord, type BatchState, batchRecordSchema } from './batch.ts';
import { keys, type Retention } from './job-records.ts';
import { type BadRow, chunkRows } from './manifest.ts';
import { timeOf } from './object-keys.ts';
import { withRedis } from './redis.ts';

export type NewBatch = Pick<
  BatchRecord,
  | 'id'
  | 'tenant'
  | 'name'
  | 'state'
  | 'origin'
  | 'class'
  | 'modelDigest'
  | 'modelName'
  | 'modelVersion'
  | 'profileHash'
  | 'selection'
  | 'presentation'
  | 'extras'
  | 'traceparent'
  | 'tensorsOf'
  | 'mapped'
  | 'force'
  | 'revision'
>;

export interface BatchRef {
  readonly tenant: string;
  readonly id: string;
}

export interface BatchResult {
  readonly outcome: 'done' | 'already' | 'refused' | 'missing';
  readonly state: BatchState | 'none';
}

/** What waits in an open chunk: one byte a row, see batch.lua. */
export type RowStates = string;

export interface BatchRecords {
  create(batch: NewBatch): Promise<void>;
  get(ref: BatchRef): Promise<BatchRecord | undefined>;
  /** Newest first. */
  list(tenant: string, limit: number, before?: number): Promise<string[]>;
  /** Batches that have not ended. */
  active(tenant: string): Promise<string[]>;
  /** A number that no earlier result of the tenant has: the revision of what is answered from now on. */
  nextRevision(tenant: string): Promise<number>;

  append(
    ref: BatchRef,
    step: { chunk: number; rows: number; bad: number; walked?: string; last?: boolean },
  ): Promise<BatchResult>;
  seal(
    ref: BatchRef,
    step: { bad: number; firstBad?: readonly BadRow[]; error?: { code: string; message: string } },
  ): Promise<BatchResult>;
  cancel(ref: BatchRef): Promise<BatchResult>;
  pause(ref: BatchRef): Promise<BatchResult>;
  resume(ref: BatchRef): Promise<BatchResult>;
  retry(ref: BatchRef, revision: number): Promise<BatchResult>;

  open(ref: BatchRef, step: { chunk: number; rows: number }): Promise<BatchResult>;
  reopen(ref: BatchRef, step: { chunk: number; states: RowStates; failed: number }): Promise<BatchResult>;
  skip(ref: BatchRef, step: { chunk: number }): Promise<BatchResult>;
  /** @param step.jobIds of all rows of the chunk: their records go in the same step. */
  close(
    ref: BatchRef,
    step: {
      chunk: number;
      jobIds: readonly string[];
      tally: Readonly<Record<string, number>>;
      event: Readonly<Record<string, unknown>>;
    },
  ): Promise<BatchResult>;
  cancelRows(ref: BatchRef, step: { chunk: number }): Promise<BatchResult>;

  /** @returns undefined when the chunk is not open. */
  rowStates(ref: BatchRef, chunk: number): Promise<RowStates | undefined>;
  /** Numbers of the open chunks, ascending. */
  openChunks(ref: BatchRef): Promise<number[]>;
  /** Chunks of this tenant whose rows have all ended and whose part is still to be written. */
  endedChunks(tenant: string): Promise<{ id: string; chunk: number }[]>;
  /** @param step.tell whether the event stream hears of it. */
  progress(ref: BatchRef, step: { rate: number; tell: boolean }): Promise<BatchResult>;
  /** Batches of this tenant that have ended and are still to be written into storage. */
  unsaved(tenant: string): Promise<string[]>;
  saved(ref: BatchRef): Promise<BatchResult>;
  /** Forgets a batch that has ended; when it was deleted is remembered for a year. */
  remove(ref: BatchRef, deletedAt: number): Promise<void>;
  /** As if it had never been: of a manifest that broke off. */
  forget(ref: BatchRef): Promise<void>;
  deletedAt(ref: BatchRef): Promise<number | undefined>;
}

const year = 365 * 24 * 3_600;

/** The job of a row: the same for everybody who works it out, so that feeding a row twice is one job. */
export function rowJobId(batchId: string, row: number): string {
  const digest = createHash('sha256').update(`${batchId}/${row}`).digest('hex');
  const time = batchId.slice(0, 13);
  const variant = ((Number.parseInt(digest[3]!, 16) & 0x3) | 0x8).toString(16);
  return `${time}-8${digest.slice(0, 3)}-${variant}${digest.slice(4, 7)}-${digest.slice(7, 19)}`;
}

/** Every chunk but the last is full. */
export function rowsOfChunk({ rows }: Pick<BatchRecord, 'rows'>, chunk: number): number {
  return Math.min(chunkRows, rows - chunk * chunkRows);
}

const script = readFileSync(new URL('batch.lua', import.meta.url), 'utf8');

type ScriptedRedis = Redis & {
  acousticsenseBatch(numberOfKeys: number, ...keysAndArgument: string[]): Promise<[string, string]>;
};

const jsonFields = ['origin', 'selection', 'presentation', 'extras', 'error', 'firstBad'] as const;
const textFields = new Set<string>([
  'id',
  'tenant',
  'name',
  'state',
  'class',
  'modelDigest',
  'modelName',
  'modelVersion',
  'profileHash',
  'traceparent',
  'tensorsOf',
  'walked',
]);
const flagFields = ['mapped', 'force', 'sealed'] as const;

export function createBatchRecords(redis: Redis, retention: Retention): BatchRecords {
  redis.defineCommand('acousticsenseBatch', { lua: script });
  const scripted = redis as ScriptedRedis;

  async function run(
    { tenant, id }: BatchRef,
    op: string,
    step: { chunk?: number; jobIds?: readonly string[] } & Record<string, unknown> = {},
  ): Promise<BatchResult> {
    const { jobIds = [], ...rest } = step;
    const now = Date.now();
    const touched = [
      keys.batch(tenant, id),
      keys.activeBatches(tenant),
      keys.events(tenant),
      keys.ended(tenant),
      keys.rows(tenant, id, step.chunk ?? 0),
      ...jobIds.map((jobId) => keys.record(tenant, jobId)),
    ];
    const argument = JSON.stringify({
      op,
      id,
      now,
      iso: new Date(now).toISOString(),
      retention: retention.resultSeconds,
      eventsKept: retention.events,
      ...rest,
    });
    const [outcome, state] = await withRedis(() =>
      scripted.acousticsenseBatch(touched.length, ...touched, argument),
    );
    return { outcome, state } as BatchResult;
  }

  async function ended(tenant: string): Promise<[id: string, what: string][]> {
    const members = await withRedis(() => redis.smembers(keys.ended(tenant)));
    return members.map((member) => member.split('/') as [string, string]);
  }

  return {
    async create(batch) {
      const now = Date.now();
      const hash = toHash({ ...batch, createdAt: timeOf(batch.id).getTime(), updatedAt: now });
      await withRedis(() => redis.sadd(keys.tenants, batch.tenant));
      await withRedis(() =>
        redis
          .multi()
          .hset(keys.batch(batch.tenant, batch.id), hash)
          .zadd(keys.batches(batch.tenant), now, batch.id)
          .sadd(keys.activeBatches(batch.tenant), batch.id)
          .exec(),
      );
    },

    async get({ tenant, id }) {
      const hash = await withRedis(() => redis.hgetall(keys.batch(tenant, id)));
      return hash['state'] === undefined ? undefined : fromHash(hash);
    },

    list: (tenant, limit, before = Number.POSITIVE_INFINITY) =>
      withRedis(() =>
        redis.zrevrangebyscore(
          keys.batches(tenant),
          Number.isFinite(before) ? `(${before}` : '+inf',
          '-inf',
          'LIMIT',
          0,
          limit,
        ),
      ),
    active: (tenant) => withRedis(() => redis.smembers(keys.activeBatches(tenant))),
    nextRevision: (tenant) => withRedis(() => redis.incr(keys.revision(tenant))),

    append: (ref, step) => run(ref, 'append', step),
    seal: (ref, { bad, firstBad = [], error }) =>
      run(ref, 'seal', {
        bad,
        ...(firstBad.length > 0 ? { firstBad: JSON.stringify(firstBad) } : {}),
        ...(error ? { error: JSON.stringify(error) } : {}),
      }),
    cancel: (ref) => run(ref, 'cancel'),
    pause: (ref) => run(ref, 'pause'),
    resume: (ref) => run(ref, 'resume'),
    retry: (ref, revision) => run(ref, 'retry', { revision }),

    open: (ref, step) => run(ref, 'open', step),
    reopen: (ref, step) => run(ref, 'reopen', step),
    skip: (ref, step) => run(ref, 'skip', step),
    close: (ref, step) => run(ref, 'close', step),
    cancelRows: (ref, step) => run(ref, 'cancelRows', step),

    async rowStates({ tenant, id }, chunk) {
      return (await withRedis(() => redis.get(keys.rows(tenant, id, chunk)))) ?? undefined;
    },

    async openChunks({ tenant, id }) {
      const fields = await withRedis(() => redis.hkeys(keys.batch(tenant, id)));
      return fields
        .filter((field) => field.startsWith('left:'))
        .map((field) => Number(field.slice(5)))
        .sort((a, b) => a - b);
    },

    async endedChunks(tenant) {
      return (await ended(tenant))
        .filter(([, what]) => what !== 'batch')
        .map(([id, chunk]) => ({ id, chunk: Number(chunk) }));
    },
    progress: (ref, step) => run(ref, 'progress', step),
    async unsaved(tenant) {
      return (await ended(tenant)).filter(([, what]) => what === 'batch').map(([id]) => id);
    },
    saved: (ref) => run(ref, 'saved'),

    async remove({ tenant, id }, deletedAt) {
      await withRedis(() =>
        redis
          .multi()
          .set(keys.deletedBatch(tenant, id), deletedAt, 'EX', year)
          .del(keys.batch(tenant, id))
          .zrem(keys.batches(tenant), id)
          .srem(keys.activeBatches(tenant), id)
          .exec(),
      );
    },

    async forget({ tenant, id }) {
      await withRedis(() =>
        redis
          .multi()
          .del(keys.batch(tenant, id))
          .zrem(keys.batches(tenant), id)
          .srem(keys.activeBatches(tenant), id)
          .srem(keys.ended(tenant), `${id}/batch`)
          .exec(),
      );
    },

    async deletedAt({ tenant, id }) {
      const time = await withRedis(() => redis.get(keys.deletedBatch(tenant, id)));
      return time === null ? undefined : Number(time);
    },
  };
}

function toHash(fields: Record<string, unknown>): Record<string, string> {
  const json = new Set<string>(jsonFields);
  const hash: Record<string, string> = {};
  for (const [field, value] of Object.entries(fields)) {
    if (value !== undefined) hash[field] = json.has(field) ? JSON.stringify(value) : String(value);
  }
  return hash;
}

function fromHash(hash: Record<string, string>): BatchRecord {
  const faults: BatchRecord['faults'] = [];
  const record: Record<string, unknown> = { faults };
  for (const [field, text] of Object.entries(hash)) {
    if (field.startsWith('left:')) continue;
    if (field.startsWith('fault:')) {
      const { row, error } = JSON.parse(text) as { row: number; error: string };
      faults.push({ row, error: JSON.parse(error) });
      continue;
    }
    record[field] = textFields.has(field) ? text : Number(text);
  }
  for (const field of jsonFields) if (hash[field] !== undefined) record[field] = JSON.parse(hash[field]);
  for (const field of flagFields)
    if (hash[field] !== undefined) record[field] = ['true', '1'].includes(hash[field]);
  return batchRecordSchema.parse(record);
}
