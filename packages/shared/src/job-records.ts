/**
 * The job records: the authority over what has happened to a job. Everything that changes a record goes through
 * {@link JobRecords.commit}, one atomic step in Redis (`commit.lua`).
 */
import { readFileSync } from 'node:fs';
import type { Redis } from 'ioredis';
import { eventsChannel, type JobData, jobData, jobEventId } from './events.ts';
import { type JobRecord, jobRecordSchema } from './job.ts';
import { rowIndex } from './manifest.ts';
import { type BatchRow, type JobState, openStates } from './pipeline.ts';
import { withRedis } from './redis.ts';
import type { ModelDescription } from './serving.ts';

/** Channel on which every commit and every sign of progress is told; see {@link JobChange}. */
export const changesChannel = 'as:changes';

/** What subscribers hear. A hint to read the record, never a source of truth. */
export interface JobChange {
  tenant: string;
  jobId: string;
  state: JobState;
  generation: number;
  version: number;
  /** Only for signs of progress within a state: 0..1. */
  fraction?: number;
}

/** @returns undefined for a message that is none of ours: anybody on this Redis can publish. */
export function parseJobChange(message: string): JobChange | undefined {
  try {
    const change = JSON.parse(message) as JobChange | null;
    return typeof change?.jobId === 'string' ? change : undefined;
  } catch {
    return undefined;
  }
}

export interface JobRef {
  readonly tenant: string;
  readonly jobId: string;
  readonly generation: number;
  /** Of a row: its batch's counters move in the same step. */
  readonly batch?: BatchRow | undefined;
}

/** Names a record for a commit. */
export function refOf(record: Pick<JobRecord, 'tenant' | 'id' | 'generation' | 'batch'>): JobRef {
  const { tenant, id, generation, batch } = record;
  return { tenant, jobId: id, generation, batch };
}

export interface CommitStep {
  readonly from: readonly JobState[];
  readonly to: JobState;
  readonly set?: Partial<Pick<JobRecord, 'audio' | 'decoded' | 'outcome' | 'error' | 'timings'>>;
  readonly add?: Partial<
    Record<'fetchStarts' | 'decodeStarts' | 'inferenceStarts' | 'crashes' | 'redecodes', number>
  >;
  readonly clear?: readonly ('decoded' | 'outcome' | 'error')[];
  /** Start over under the next generation: new queue ids, and every worker of this one is refused. */
  readonly raiseGeneration?: boolean;
  readonly events?: readonly JobEvent[];
}

/** Told when the step is done, and by nothing else; of a row only where its batch asks for that. */
export interface JobEvent {
  readonly type: 'job.completed' | 'job.failed' | 'job.cancelled';
  /** {@link jobData} of the record as it is after the step. */
  readonly data: Omit<JobData, 'resultUrl'>;
}

export interface CommitResult {
  /** `already`: this step, or one after it, was committed before in the same generation. */
  readonly outcome: 'committed' | 'already' | 'cancelled' | 'missing' | 'refused';
  readonly state: JobState | 'none';
  readonly generation: number;
  readonly version: number;
}

/** `queued` when not said otherwise. */
export type NewJobRecord = Omit<JobRecord, 'version' | 'updatedAt' | 'state'> & { state?: JobState };

/** A job on a URL waits for the fetch service, any other for a decoder. */
export function firstState(audio: JobRecord['audio']): JobState {
  return 'url' in audio ? 'pending' : 'queued';
}

export interface JobRecords {
  /**
   * @param record in which state it begins depends on what it is: {@link firstState}.
   * @param description of its model: needed of one that is completed from the start.
   * @returns `already` when the record exists, whatever its state, and for a row that was fed before; `refused` for a
   *   row whose batch does not run.
   */
  create(record: NewJobRecord, description?: ModelDescription): Promise<CommitResult>;
  get(tenant: string, jobId: string): Promise<JobRecord | undefined>;
  /** In one round trip, in their order. */
  getMany(tenant: string, jobIds: readonly string[]): Promise<(JobRecord | undefined)[]>;
  exists(tenant: string, jobId: string): Promise<boolean>;
  commit(ref: JobRef, step: CommitStep): Promise<CommitResult>;
  /** A commit, and the record as it is then; undefined when there is none. */
  commitAndRead(
    ref: JobRef,
    step: CommitStep,
  ): Promise<CommitResult & { readonly record: JobRecord | undefined }>;
  /** Tells subscribers how far a stage is; nothing is stored. */
  progress(ref: JobRef, state: JobState, version: number, fraction: number): Promise<void>;
  /** Removes a finished record. */
  remove(tenant: string, jobId: string): Promise<void>;
  /** Open jobs whose record has not changed since `before` (epoch ms), oldest first. */
  openSince(tenant: string, before: number, limit: number, offset?: number): Promise<string[]>;
  /** Jobs that have not finished; rows of batches are bounded otherwise, and not counted. */
  countOpen(tenant: string): Promise<number>;
  /** Events in Redis: those that are kept there on purpose, and those that nobody has put away yet. */
  countEvents(tenant: string): Promise<number>;
  /**
   * The oldest finished jobs (no rows of batches) beyond the `kept` newest, at most `limit`; what has expired is
   * forgotten first.
   */
  finishedBeyond(tenant: string, kept: number, limit: number): Promise<string[]>;
  tenants(): Promise<string[]>;
}

export interface Retention {
  /** Seconds that a finished record is kept. */
  readonly resultSeconds: number;
}

const script = readFileSync(new URL('commit.lua', import.meta.url), 'utf8');

type ScriptedRedis = Redis & {
  acousticsenseCommit(
    numberOfKeys: number,
    ...keysAndArgument: string[]
  ): Promise<[string, string, number, number, string[]]>;
};

/** Names of Redis keys: what one commit touches carries the tenant's hash tag. */
export const keys = {
  record: (tenant: string, jobId: string) => `as:{${tenant}}:job:${jobId}`,
  open: (tenant: string) => `as:{${tenant}}:open`,
  finished: (tenant: string) => `as:{${tenant}}:finished`,
  events: (tenant: string) => `as:{${tenant}}:events`,
  batch: (tenant: string, batchId: string) => `as:{${tenant}}:batch:${batchId}`,
  rows: (tenant: string, batchId: string, chunk: number) => `as:{${tenant}}:batch:${batchId}:rows:${chunk}`,
  batches: (tenant: string) => `as:{${tenant}}:batches`,
  /** Ids of batches that have not ended. */
  activeBatches: (tenant: string) => `as:{${tenant}}:active-batches`,
  /** When a batch was deleted (epoch ms). */
  deletedBatch: (tenant: string, batchId: string) => `as:{${tenant}}:deleted-batch:${batchId}`,
  revision: (tenant: string) => `as:{${tenant}}:revision`,
  /** `<batch id>/<chunk>` of chunks whose rows have all ended. */
  ended: (tenant: string) => `as:{${tenant}}:ended-chunks`,
  tenants: 'as:tenants',
};

/** Scalars are stored as they are, so that the script and a person can read them; the rest as JSON. */
const jsonFields = [
  'audio',
  'selection',
  'presentation',
  'callback',
  'extras',
  'batch',
  'decoded',
  'outcome',
  'error',
  'timings',
] as const;
const numberFields = [
  'generation',
  'version',
  'createdAt',
  'updatedAt',
  'revision',
  'fetchStarts',
  'decodeStarts',
  'inferenceStarts',
  'crashes',
  'redecodes',
] as const;

/**
 * Of a row, what never changes: one field of JSON. Each field of a hash takes some 75 bytes besides what it holds, and
 * the records of open chunks are what Redis is full of.
 */
const rowFacts = new Set<string>([
  'id',
  'tenant',
  'createdAt',
  'traceparent',
  'modelDigest',
  'modelName',
  'modelVersion',
  'profileHash',
  'class',
  'ref',
  'revision',
  'reused',
  'selection',
  'presentation',
  'extras',
] satisfies (keyof JobRecord)[]);

export function createJobRecords(redis: Redis, retention: Retention): JobRecords {
  redis.defineCommand('acousticsenseCommit', { lua: script });
  const scripted = redis as ScriptedRedis;

  async function run(
    ref: JobRef,
    step: Omit<CommitStep, 'from' | 'set'> & { from: readonly string[]; set: Record<string, string> },
    tally: readonly string[] = [],
    read = false,
  ) {
    const { tenant, batch } = ref;
    const argument = JSON.stringify({
      jobId: ref.jobId,
      tenant: ref.tenant,
      now: Date.now(),
      generation: ref.generation,
      from: step.from,
      to: step.to,
      set: step.set,
      add: step.add ?? {},
      clear: step.clear ?? [],
      raise: step.raiseGeneration ?? false,
      retention: retention.resultSeconds,
      events: (step.events ?? []).map(({ type, data }) => ({
        id: jobEventId(ref, type),
        event: JSON.stringify({ type, timestamp: new Date().toISOString(), data }),
      })),
      eventsChannel,
      channel: changesChannel,
      ...(batch
        ? { batch: { ...batch, index: rowIndex(batch), round: roundOf(ref.generation), tally } }
        : {}),
      ...(read ? { read } : {}),
    });
    const touched = [keys.record(tenant, ref.jobId), keys.open(tenant), keys.events(tenant)];
    if (batch)
      touched.push(
        keys.batch(tenant, batch.id),
        keys.rows(tenant, batch.id, batch.chunk),
        keys.ended(tenant),
      );
    else touched.push(keys.finished(tenant));
    const [outcome, state, generation, version, fields] = await withRedis(() =>
      scripted.acousticsenseCommit(touched.length, ...touched, argument),
    );
    return { result: { outcome, state, generation, version } as CommitResult, fields };
  }

  return {
    async create(record, description) {
      const { tenant } = record;
      const { state: to = firstState(record.audio), ...fields } = record;
      const tally = record.reused ? ['reused'] : [];
      // Outside the atomic step, because it lies in another hash slot; sent before it, so that no record is unknown
      // to the reconciler. A tenant without jobs is harmless; a row's is known since its batch was made.
      const [, { result }] = await Promise.all([
        record.batch ? undefined : withRedis(() => redis.sadd(keys.tenants, tenant)),
        run(
          refOf(record),
          { from: ['none'], to, set: newHash(fields), events: endingOf(record, description) },
          tally,
        ),
      ]);
      return result;
    },

    async get(tenant, jobId) {
      const hash = await withRedis(() => redis.hgetall(keys.record(tenant, jobId)));
      return Object.keys(hash).length === 0 ? undefined : fromHash(hash);
    },

    async getMany(tenant, jobIds) {
      const pipeline = redis.pipeline();
      for (const jobId of jobIds) pipeline.hgetall(keys.record(tenant, jobId));
      const answers = (await withRedis(() => pipeline.exec())) ?? [];
      return answers.map(([error, hash]) => {
        if (error) throw error;
        const fields = hash as Record<string, string>;
        return Object.keys(fields).length === 0 ? undefined : fromHash(fields);
      });
    },

    async exists(tenant, jobId) {
      return (await withRedis(() => redis.exists(keys.record(tenant, jobId)))) === 1;
    },

    async commit(ref, step) {
      return (await run(ref, { ...step, set: toHash(step.set ?? {}) })).result;
    },

    async commitAndRead(ref, step) {
      const { result, fields } = await run(ref, { ...step, set: toHash(step.set ?? {}) }, [], true);
      return { ...result, record: fields.length === 0 ? undefined : fromHash(pairsOf(fields)) };
    },

    async progress({ tenant, jobId, generation, batch }, state, version, fraction) {
      if (batch) return;
      const change: JobChange = { tenant, jobId, generation, state, version, fraction };
      await withRedis(() => redis.publish(changesChannel, JSON.stringify(change)));
    },

    async remove(tenant, jobId) {
      await withRedis(() =>
        redis
          .multi()
          .del(keys.record(tenant, jobId))
          .zrem(keys.open(tenant), jobId)
          .zrem(keys.finished(tenant), jobId)
          .exec(),
      );
    },

    openSince: (tenant, before, limit, offset = 0) =>
      withRedis(() => redis.zrangebyscore(keys.open(tenant), '-inf', before, 'LIMIT', offset, limit)),

    async finishedBeyond(tenant, kept, limit) {
      const key = keys.finished(tenant);
      await withRedis(() =>
        redis.zremrangebyscore(key, '-inf', String(Date.now() - retention.resultSeconds * 1_000)),
      );
      const excess = (await withRedis(() => redis.zcard(key))) - kept;
      return excess <= 0 ? [] : withRedis(() => redis.zrange(key, 0, String(Math.min(excess, limit) - 1)));
    },

    async countOpen(tenant) {
      const [all, batches] = await withRedis(() =>
        Promise.all([redis.zcard(keys.open(tenant)), redis.smembers(keys.activeBatches(tenant))]),
      );
      const rows = await withRedis(() =>
        Promise.all(batches.map((id) => redis.hget(keys.batch(tenant, id), 'open'))),
      );
      // Read one after another: a row may end in between.
      return Math.max(
        0,
        rows.reduce((left, open) => left - Number(open ?? 0), all),
      );
    },

    countEvents: (tenant) => withRedis(() => redis.xlen(keys.events(tenant))),

    tenants: () => withRedis(() => redis.smembers(keys.tenants)),
  };
}

/**
 * Every round of tries of a batch's rows has generations of its own, with room for what starts over within it: queue
 * ids of an earlier round may still be taken.
 */
const generationsOfRound = 1_000;
export const firstGeneration = (round: number): number => round * generationsOfRound + 1;
const roundOf = (generation: number): number => Math.floor((generation - 1) / generationsOfRound);

/** What is told of a record that has ended when it is made. */
function endingOf(record: NewJobRecord, description: ModelDescription | undefined): JobEvent[] {
  const { state } = record;
  if (state !== 'completed' && state !== 'failed') return [];
  return [{ type: `job.${state}`, data: jobData(record, state, description) }];
}

/** Every state in which a job can still be cancelled or failed. */
export const anyOpenState: readonly JobState[] = openStates;

function toHash(fields: Partial<JobRecord>): Record<string, string> {
  const json = new Set<string>(jsonFields);
  const hash: Record<string, string> = {};
  for (const [field, value] of Object.entries(fields)) {
    if (value !== undefined) hash[field] = json.has(field) ? JSON.stringify(value) : String(value);
  }
  return hash;
}

function newHash(record: Partial<JobRecord>): Record<string, string> {
  if (record.batch === undefined) return toHash(record);
  const facts: Record<string, unknown> = {};
  const rest: Record<string, unknown> = {};
  for (const [field, value] of Object.entries(record)) {
    (rowFacts.has(field) ? facts : rest)[field] = value;
  }
  return { ...toHash(rest), facts: JSON.stringify(facts) };
}

/** Fields and values in turn, as a script gives a hash. */
function pairsOf(flat: readonly string[]): Record<string, string> {
  const hash: Record<string, string> = {};
  for (let at = 0; at < flat.length; at += 2) hash[flat[at]!] = flat[at + 1]!;
  return hash;
}

/** @throws when the hash is no record. */
function fromHash(hash: Record<string, string>): JobRecord {
  const { facts, ...fields } = hash;
  const record: Record<string, unknown> = { ...(facts === undefined ? {} : JSON.parse(facts)), ...fields };
  for (const field of jsonFields) if (hash[field] !== undefined) record[field] = JSON.parse(hash[field]);
  if (hash['reused'] !== undefined) record['reused'] = hash['reused'] === 'true';
  for (const field of numberFields) if (hash[field] !== undefined) record[field] = Number(hash[field]);
  return jobRecordSchema.parse(record);
}
