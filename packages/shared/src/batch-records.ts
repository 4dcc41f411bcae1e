/**
 * The batches: like a job record, a batch changes only in atomic steps (`batch.lua`); its counters move with its
 * rows (`commit.lua`).
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import type { ChainableCommander, Redis } from 'ioredis';
import { type BatchRecord, type BatchState, batchRecordSchema } from './batch.ts';
import { eventsChannel } from './events.ts';
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
> &
  /** `notify`: `batch` when absent. */
  Partial<Pick<BatchRecord, 'notify' | 'callback'>>;

export interface BatchRef {
  readonly tenant: string;
  readonly id: string;
}

export interface BatchResult {
  readonly outcome: 'done' | 'already' | 'refused' | 'missing';
  readonly state: BatchState | 'none';
}

/** What is to be done of a tenant's batches. */
export interface PendingBatches {
  /** Have not ended. */
  readonly active: readonly string[];
  /** Chunks whose rows have all ended and whose part is still to be written. */
  readonly chunks: readonly { readonly id: string; readonly chunk: number }[];
  /** Have ended and are still to be written into storage. */
  readonly unsaved: readonly string[];
}

/** What waits in an open chunk: one byte a row, see batch.lua. */
export type RowStates = string;

export interface BatchRecords {
  create(batch: NewBatch): Promise<void>;
  get(ref: BatchRef): Promise<BatchRecord | undefined>;
  /** Newest first. */
  list(tenant: string, limit: number, before?: number): Promise<string[]>;
  /** In one round trip, in their order. */
  getMany(refs: readonly BatchRef[]): Promise<(BatchRecord | undefined)[]>;
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

  open(ref: BatchRef, step: { chunk: number }): Promise<BatchResult>;
  /** @param step.states `.` of a row that is tried again, `k` of one that keeps its result; without a `.` it stays closed. */
  reopen(ref: BatchRef, step: { chunk: number; states: RowStates }): Promise<BatchResult>;
  /**
   * @param step.states what was found before the records were read; refused when it is not so any more.
   * @param step.jobIds of all rows of the chunk: their records go in the same step.
   */
  close(
    ref: BatchRef,
    step: {
      chunk: number;
      round: number;
      states: RowStates;
      jobIds: readonly string[];
      tally: Readonly<Record<string, number>>;
      /** How its rows ended. */
      part: Readonly<Record<'rows' | 'completed' | 'failed' | 'cancelled', number>>;
    },
  ): Promise<BatchResult>;
  cancelRows(ref: BatchRef, step: { chunk: number }): Promise<BatchResult>;

  /** @returns undefined when the chunk is not open. */
  rowStates(ref: BatchRef, chunk: number): Promise<RowStates | undefined>;
  /** Numbers of the open chunks, ascending. */
  openChunks(ref: BatchRef): Promise<number[]>;
  /** In one round trip, in their order. */
  pending(tenants: readonly string[]): Promise<PendingBatches[]>;
  /** @param step.tell whether the event stream hears of it. */
  progress(ref: BatchRef, step: { rate: number; tell: boolean }): Promise<BatchResult>;
  /** @param step.endedAt of the ending that was written; refused when there has been another one. */
  saved(ref: BatchRef, step: { endedAt: number }): Promise<BatchResult>;
  /**
   * Forgets a batch that has ended, or that nobody knows here any more; when it was deleted is remembered for a year,
   * the first time. Refused while it has not ended.
   */
  remove(ref: BatchRef, deletedAt: number): Promise<BatchResult>;
  /** As if it had never been: of a manifest that broke off. Refused while it has not ended. */
  forget(ref: BatchRef): Promise<BatchResult>;
  deletedAt(ref: BatchRef): Promise<number | undefined>;
}

/** The job of a row: the same for everybody who works it out, so that feeding a row twice is one job. */
export function rowJobId(batchId: string, row: number): string {
  const digest = createHash('sha256').update(`${batchId}/${row}`).digest('hex');
  const time = batchId.slice(0, 13);
  const variant = ((Number.parseInt(digest[3]!, 16) & 0x3) | 0x8).toString(16);
  return `${time}-8${digest.slice(0, 3)}-${variant}${digest.slice(4, 7)}-${digest.slice(7, 19)}`;
}

const script = readFileSync(new URL('batch.lua', import.meta.url), 'utf8');

type ScriptedRedis = Redis & {
  acousticsenseBatch(numberOfKeys: number, ...keysAndArgument: string[]): Promise<[string, string]>;
};

const jsonFields = [
  'origin',
  'selection',
  'presentation',
  'extras',
  'callback',
  'error',
  'firstBad',
] as const;
const textFields = new Set<string>([
  'id',
  'tenant',
  'name',
  'state',
  'class',
  'notify',
  'modelDigest',
  'modelName',
  'modelVersion',
  'profileHash',
  'traceparent',
  'tensorsOf',
  'walked',
]);
const flagFields = ['mapped', 'force', 'sealed'] as const;

/** @param rowsAChunk of all chunks but the last; another number only where small chunks show more. */
export function createBatchRecords(redis: Redis, retention: Retention, rowsAChunk = chunkRows): BatchRecords {
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
      keys.batches(tenant),
      keys.deletedBatch(tenant, id),
      keys.rows(tenant, id, step.chunk ?? 0),
      ...jobIds.map((jobId) => keys.record(tenant, jobId)),
    ];
    const argument = JSON.stringify({
      op,
      id,
      now,
      iso: new Date(now).toISOString(),
      retention: retention.resultSeconds,
      tenant,
      eventsChannel,
      chunkRows: rowsAChunk,
      ...rest,
    });
    const [outcome, state] = await withRedis(() =>
      scripted.acousticsenseBatch(touched.length, ...touched, argument),
    );
    return { outcome, state } as BatchResult;
  }

  async function getMany(refs: readonly BatchRef[]): Promise<(BatchRecord | undefined)[]> {
    const pipeline = redis.pipeline();
    for (const { tenant, id } of refs) pipeline.hgetall(keys.batch(tenant, id));
    return (await answersOf<Record<string, string>>(pipeline)).map((hash) =>
      hash['state'] === undefined ? undefined : fromHash(hash),
    );
  }

  return {
    async create(batch) {
      const createdAt = timeOf(batch.id).getTime();
      const hash = toHash({ ...batch, createdAt, updatedAt: Date.now() });
      await withRedis(() => redis.sadd(keys.tenants, batch.tenant));
      await withRedis(() =>
        redis
          .multi()
          .hset(keys.batch(batch.tenant, batch.id), hash)
          .zadd(keys.batches(batch.tenant), createdAt, batch.id)
          .sadd(keys.activeBatches(batch.tenant), batch.id)
          .exec(),
      );
    },

    get: async (ref) => (await getMany([ref]))[0],
    getMany,

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
    close: (ref, step) => run(ref, 'close', step),
    cancelRows: (ref, step) => run(ref, 'cancelRows', step),

    async rowStates({ tenant, id }, chunk) {
      return (await withRedis(() => redis.get(keys.rows(tenant, id, chunk)))) ?? undefined;
    },

    openChunks: async (ref) => {
      const fields = await withRedis(() => redis.hkeys(keys.batch(ref.tenant, ref.id)));
      return openOf(fields);
    },

    async pending(tenants) {
      const pipeline = redis.pipeline();
      for (const tenant of tenants)
        pipeline.smembers(keys.activeBatches(tenant)).smembers(keys.ended(tenant));
      const answers = await answersOf<string[]>(pipeline);
      return tenants.map((_, at) => {
        const ended = answers[2 * at + 1]!.map((member) => member.split('/') as [string, string]);
        return {
          active: answers[2 * at]!,
          chunks: ended.flatMap(([id, what]) => (what === 'batch' ? [] : [{ id, chunk: Number(what) }])),
          unsaved: ended.flatMap(([id, what]) => (what === 'batch' ? [id] : [])),
        };
      });
    },

    progress: (ref, step) => run(ref, 'progress', step),
    saved: (ref, step) => run(ref, 'saved', step),
    remove: (ref, deletedAt) => run(ref, 'remove', { deletedAt }),
    forget: (ref) => run(ref, 'remove'),

    async deletedAt({ tenant, id }) {
      const time = await withRedis(() => redis.get(keys.deletedBatch(tenant, id)));
      return time === null ? undefined : Number(time);
    },
  };
}

/** @throws the first error that any of the commands answers. */
async function answersOf<Answer>(pipeline: ChainableCommander): Promise<Answer[]> {
  return withRedis(async () => {
    const answers = (await pipeline.exec()) ?? [];
    return answers.map(([error, answer]) => {
      if (error) throw error;
      return answer as Answer;
    });
  });
}

function toHash(fields: Record<string, unknown>): Record<string, string> {
  const json = new Set<string>(jsonFields);
  const hash: Record<string, string> = {};
  for (const [field, value] of Object.entries(fields)) {
    if (value !== undefined) hash[field] = json.has(field) ? JSON.stringify(value) : String(value);
  }
  return hash;
}

function openOf(fields: readonly string[]): number[] {
  const left = fields.filter((field) => field.startsWith('left:'));
  return left.map((field) => Number(field.slice(5))).sort((a, b) => a - b);
}

function fromHash(hash: Record<string, string>): BatchRecord {
  const record: Record<string, unknown> = {};
  const faults: [at: number, fault: BatchRecord['faults'][number]][] = [];
  for (const [field, text] of Object.entries(hash)) {
    const [of, number] = field.split(':');
    if (number === undefined) record[field] = textFields.has(field) ? text : Number(text);
    else if (of === 'fault') {
      const { row, error } = JSON.parse(text) as { row: number; error: string };
      faults.push([Number(number), { row, error: JSON.parse(error) }]);
    }
  }
  for (const field of jsonFields) if (hash[field] !== undefined) record[field] = JSON.parse(hash[field]);
  for (const field of flagFields)
    if (hash[field] !== undefined) record[field] = ['true', '1'].includes(hash[field]);
  return batchRecordSchema.parse({
    ...record,
    openChunks: openOf(Object.keys(hash)),
    faults: faults.sort(([a], [b]) => a - b).map(([, fault]) => fault),
  });
}
