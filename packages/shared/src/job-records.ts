/**
 * The job records: the authority over what has happened to a job. Everything that changes a record goes through
 * {@link JobRecords.commit}, one atomic step in Redis (`commit.lua`).
 */
import { readFileSync } from 'node:fs';
import type { Redis } from 'ioredis';
import { type JobRecord, jobRecordSchema } from './job.ts';
import { type JobState, openStates } from './pipeline.ts';
import { withRedis } from './redis.ts';

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
}

export interface CommitStep {
  readonly from: readonly JobState[];
  readonly to: JobState;
  readonly set?: Partial<Pick<JobRecord, 'decoded' | 'outcome' | 'error' | 'timings'>>;
  readonly add?: Partial<Record<'decodeStarts' | 'inferenceStarts' | 'crashes' | 'redecodes', number>>;
  readonly clear?: readonly ('decoded' | 'outcome' | 'error')[];
  /** Start over under the next generation: new queue ids, and every worker of this one is refused. */
  readonly raiseGeneration?: boolean;
  readonly events?: readonly JobEvent[];
}

export interface JobEvent {
  readonly type: 'job.completed' | 'job.failed' | 'job.cancelled';
  readonly data?: Record<string, unknown>;
}

export interface CommitResult {
  /** `already`: this step, or one after it, was committed before in the same generation. */
  readonly outcome: 'committed' | 'already' | 'cancelled' | 'missing' | 'refused';
  readonly state: JobState | 'none';
  readonly generation: number;
  readonly version: number;
}

export interface JobRecords {
  /** @returns `already` when the record exists, whatever its state. */
  create(record: Omit<JobRecord, 'version' | 'updatedAt' | 'state'>): Promise<CommitResult>;
  get(tenant: string, jobId: string): Promise<JobRecord | undefined>;
  exists(tenant: string, jobId: string): Promise<boolean>;
  commit(ref: JobRef, step: CommitStep): Promise<CommitResult>;
  /** Tells subscribers how far a stage is; nothing is stored. */
  progress(ref: JobRef, state: JobState, version: number, fraction: number): Promise<void>;
  /** Removes a finished record. */
  remove(tenant: string, jobId: string): Promise<void>;
  /** Open jobs whose record has not changed since `before` (epoch ms), oldest first. */
  openSince(tenant: string, before: number, limit: number, offset?: number): Promise<string[]>;
  countOpen(tenant: string): Promise<number>;
  tenants(): Promise<string[]>;
}

export interface Retention {
  /** Seconds that a finished record is kept. */
  readonly resultSeconds: number;
  /** About how many events a tenant's stream keeps. */
  readonly events: number;
}

const script = readFileSync(new URL('commit.lua', import.meta.url), 'utf8');

type ScriptedRedis = Redis & {
  acousticsenseCommit(
    record: string,
    open: string,
    events: string,
    argument: string,
  ): Promise<[string, string, number, number]>;
};

const keys = {
  record: (tenant: string, jobId: string) => `as:{${tenant}}:job:${jobId}`,
  open: (tenant: string) => `as:{${tenant}}:open`,
  events: (tenant: string) => `as:{${tenant}}:events`,
  tenants: 'as:tenants',
};

/** Scalars are stored as they are, so that the script and a person can read them; the rest as JSON. */
const jsonFields = [
  'audio',
  'selection',
  'presentation',
  'extras',
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
  'decodeStarts',
  'inferenceStarts',
  'crashes',
  'redecodes',
] as const;

export function createJobRecords(redis: Redis, retention: Retention): JobRecords {
  redis.defineCommand('acousticsenseCommit', { numberOfKeys: 3, lua: script });
  const scripted = redis as ScriptedRedis;

  async function run(
    ref: JobRef,
    step: Omit<CommitStep, 'from' | 'set'> & { from: readonly string[]; set: Record<string, string> },
  ) {
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
      events: (step.events ?? []).map(({ type, data }) =>
        JSON.stringify({
          type,
          timestamp: new Date().toISOString(),
          jobId: ref.jobId,
          generation: ref.generation,
          ...data,
        }),
      ),
      eventsKept: retention.events,
      channel: changesChannel,
    });
    const [outcome, state, generation, version] = await withRedis(() =>
      scripted.acousticsenseCommit(
        keys.record(ref.tenant, ref.jobId),
        keys.open(ref.tenant),
        keys.events(ref.tenant),
        argument,
      ),
    );
    return { outcome, state, generation, version } as CommitResult;
  }

  return {
    async create(record) {
      // Outside the atomic step, because it lies in another hash slot; before it, so that no record is unknown
      // to the reconciler. A tenant without jobs is harmless.
      await withRedis(() => redis.sadd(keys.tenants, record.tenant));
      return run(
        { tenant: record.tenant, jobId: record.id, generation: record.generation },
        { from: ['none'], to: 'queued', set: toHash(record) },
      );
    },

    async get(tenant, jobId) {
      const hash = await withRedis(() => redis.hgetall(keys.record(tenant, jobId)));
      return Object.keys(hash).length === 0 ? undefined : fromHash(hash);
    },

    async exists(tenant, jobId) {
      return (await withRedis(() => redis.exists(keys.record(tenant, jobId)))) === 1;
    },

    commit: (ref, step) => run(ref, { ...step, set: toHash(step.set ?? {}) }),

    async progress(ref, state, version, fraction) {
      const change: JobChange = { ...ref, state, version, fraction };
      await withRedis(() => redis.publish(changesChannel, JSON.stringify(change)));
    },

    async remove(tenant, jobId) {
      await withRedis(() =>
        redis.multi().del(keys.record(tenant, jobId)).zrem(keys.open(tenant), jobId).exec(),
      );
    },

    openSince: (tenant, before, limit, offset = 0) =>
      withRedis(() => redis.zrangebyscore(keys.open(tenant), '-inf', before, 'LIMIT', offset, limit)),

    countOpen: (tenant) => withRedis(() => redis.zcard(keys.open(tenant))),

    tenants: () => withRedis(() => redis.smembers(keys.tenants)),
  };
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

function fromHash(hash: Record<string, string>): JobRecord {
  const record: Record<string, unknown> = { ...hash };
  for (const field of jsonFields) if (hash[field] !== undefined) record[field] = JSON.parse(hash[field]);
  for (const field of numberFields) if (hash[field] !== undefined) record[field] = Number(hash[field]);
  return jobRecordSchema.parse(record);
}
