/**
 * The reconciler: puts right what no redelivery can.
 *
 * - An unfinished record whose queue job has vanished (a Redis that lost its last writes, an add that never came
 *   through) gets it back.
 * - Objects without a record, audio and uploads past their retention and old tensors are deleted, an hour's prefix at
 *   a time.
 *
 * One process at a time does it, by a lease in Redis. Doing it twice would be harmless: adds are idempotent and
 * deletes too.
 */
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { firstState, type JobRecords, refOf } from '@acousticsense/shared/job-records';
import { createLease } from '@acousticsense/shared/lease';
import { hourPrefix, jobPrefix, tensorPrefix } from '@acousticsense/shared/object-keys';
import { isFinished, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues } from '@acousticsense/shared/queues';
import { deletePrefix, type Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { Uploads } from './uploads.ts';

export interface ReconcilerDeps {
  readonly redis: Redis;
  readonly records: JobRecords;
  readonly queues: Queues;
  readonly storage: Storage;
  readonly uploads: Pick<Uploads, 'ages' | 'sweepHour'>;
  readonly log: Logger;
  readonly reconcileMs: number;
  readonly reconcileAfterMs: number;
  readonly audioRetentionMs: number;
  readonly resultRetentionMs: number;
  readonly tensorRetentionMs: number;
  /** Records of finished jobs that a tenant may have; the oldest go first. */
  readonly jobsKept: number;
  /** 0: any number. */
  readonly tensorsKept: number;
}

const leaseKey = 'as:reconciler:lease';
const hour = 3_600_000;
const page = 1_000;
/** How long an object may lie without a record: an upload may take that long. */
const orphanMs = 24 * hour;
/** At the first start, hours further back than this are not looked through. */
const lookBackMs = 7 * 24 * hour;

/** Objects that lie under the hour in which something began. */
interface Hourly {
  /** Of the keys in Redis that say how far the sweep is. */
  readonly keys: string;
  /** Ages (ms) of an hour's objects at which some of them may be deleted. */
  readonly ages: Iterable<number>;
  /** @returns how many objects were deleted, and when (epoch ms) to come back to what stays past the last age. */
  sweepHour(time: number, now: number): Promise<{ deleted: number; again: number | undefined }>;
}

/** What there is of an object's job. */
type Found = 'none' | 'open' | 'finished';

export function createReconciler(deps: ReconcilerDeps) {
  const { redis, records, queues, storage, log } = deps;
  const lease = createLease(redis, leaseKey, Math.max(60_000, deps.reconcileMs * 3));
  let leads = false;
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> = Promise.resolve();

  /** Re-adds what has vanished. @returns how many were. */
  async function restoreQueueJobs(now = Date.now()): Promise<number> {
    let restored = 0;
    for (const tenant of await records.tenants()) {
      for await (const jobId of openJobs(tenant, now - deps.reconcileAfterMs)) {
        try {
          restored += (await restore(tenant, jobId)) ? 1 : 0;
        } catch (error) {
          // One record that cannot be read (damaged, or of another version) must not keep the others waiting.
          if (error instanceof InfrastructureFault) throw error;
          log.error({ err: error, jobId }, 'record cannot be reconciled');
        }
      }
    }
    return restored;
  }

  /** Page by page; a job that changes meanwhile moves behind, and one that is skipped for it comes up next time. */
  async function* openJobs(tenant: string, before: number): AsyncGenerator<string> {
    for (let offset = 0; ; offset += page) {
      const jobs = await records.openSince(tenant, before, page, offset);
      yield* jobs;
      if (jobs.length < page) return;
    }
  }

  async function restore(tenant: string, jobId: string): Promise<boolean> {
    const record = await records.get(tenant, jobId);
    const stage = record && stageOf(record.state);
    if (!record || !stage) return false;
    const state = await queues.state(stage, record);
    if (['waiting', 'active', 'delayed', 'prioritized', 'waiting-children'].includes(state)) return false;
    if (state === 'gone') {
      log.warn({ jobId, state: record.state, stage }, 'queue job had vanished: added again');
      await queues.add(stage, record);
      return true;
    }
    // The queue says that it ended, the record says that it did not: its id is taken, so under a new generation.
    log.warn(
      { jobId, state: record.state, queueState: state },
      'queue job ended without an end of the job: starting over',
    );
    const raised = await records.commit(refOf(record), {
      // If it has gone on since it was read, the queue job that ended was not the last one.
      from: [record.state],
      to: firstState(record.audio),
      raiseGeneration: true,
      clear: ['decoded'],
    });
    if (raised.outcome !== 'committed') return false;
    await queues.add(stageOf(firstState(record.audio))!, { ...record, generation: raised.generation });
    return true;
  }

  const jobs: Hourly = {
    keys: 'as:reconciler',
    ages: [orphanMs, deps.audioRetentionMs, deps.resultRetentionMs + hour],
    sweepHour: sweepJobs,
  };
  const uploads: Hourly = { keys: 'as:reconciler:uploads', ...deps.uploads };

  /** @returns how many objects were deleted. */
  async function sweepObjects(now = Date.now()): Promise<number> {
    return (await sweep(jobs, now)) + (await sweep(uploads, now)) + (await sweepTensors(now));
  }

  /** Looks through each hour once it has come to an age at which something in it may be deleted. */
  async function sweep({ keys, ages, sweepHour }: Hourly, now: number): Promise<number> {
    /** Hours (epoch ms) in which something stayed, by when to look again. */
    const lateKey = `${keys}:late`;
    let deleted = 0;
    const look = async (time: number) => {
      const seen = await sweepHour(time, now);
      deleted += seen.deleted;
      // The cursors never come back to this hour.
      if (seen.again === undefined) await redis.zrem(lateKey, time);
      else await redis.zadd(lateKey, seen.again, time);
    };
    for (const age of new Set(ages)) {
      const cursorKey = `${keys}:swept:${age}`;
      const until = Math.floor((now - age) / hour) * hour;
      const last = Number((await redis.get(cursorKey)) ?? until - lookBackMs);
      for (let time = last; time < until; time += hour) {
        await look(time);
        await redis.set(cursorKey, time + hour);
      }
    }
    for (const time of await redis.zrangebyscore(lateKey, '-inf', now)) await look(Number(time));
    return deleted;
  }

  async function sweepJobs(time: number, now: number) {
    let deleted = 0;
    let late = false;
    const known = new Map<string, Found>();
    /** Whether every job of this hour is as old as that. */
    const allOlderThan = (age: number) => now - (time + hour) >= age;
    for await (const { key, lastModified } of storage.list(hourPrefix(new Date(time)))) {
      const [, , tenant, jobId, name] = key.split('/');
      if (!tenant || !jobId) continue;
      if (!known.has(jobId)) known.set(jobId, await lookUp(tenant, jobId));
      const age = now - lastModified.getTime();
      const orphan = known.get(jobId) === 'none' && age > orphanMs;
      const expired = known.get(jobId) === 'finished' && name === 'audio' && age > deps.audioRetentionMs;
      if (orphan || expired) {
        await storage.delete(key);
        deleted += 1;
        continue;
      }
      // Its time has come and it had to stay: an upload that went on over the full hour, a job that took long.
      late ||=
        (known.get(jobId) === 'none' && allOlderThan(orphanMs)) ||
        (name === 'audio' && allOlderThan(deps.audioRetentionMs)) ||
        allOlderThan(deps.resultRetentionMs + hour);
    }
    // What processes that were killed had begun to write.
    if (allOlderThan(orphanMs))
      await storage.abandonParts(hourPrefix(new Date(time)), new Date(now - orphanMs));
    return { deleted, again: late ? now + hour : undefined };
  }

  async function lookUp(tenant: string, jobId: string): Promise<Found> {
    try {
      const record = await records.get(tenant, jobId);
      if (!record) return 'none';
      return isFinished(record.state) ? 'finished' : 'open';
    } catch (error) {
      if (error instanceof InfrastructureFault) throw error;
      // A record that cannot be read is a record: its objects stay until it expires.
      return 'open';
    }
  }

  /** However many jobs come, the records of finished ones take no more than so much of Redis. */
  async function sweepRecords(): Promise<number> {
    let removed = 0;
    for (const tenant of await records.tenants()) {
      for (const jobId of await records.finishedBeyond(tenant, deps.jobsKept, page)) {
        await deletePrefix(storage, jobPrefix({ tenant, id: jobId }));
        await records.remove(tenant, jobId);
        removed += 1;
      }
    }
    return removed;
  }

  async function sweepTensors(now: number): Promise<number> {
    const cursorKey = 'as:reconciler:swept:tensors';
    if (now - Number((await redis.get(cursorKey)) ?? 0) < hour) return 0;
    let deleted = 0;
    const youngest = await oldEnough(now);
    for await (const { key, lastModified } of storage.list(tensorPrefix)) {
      if (lastModified.getTime() >= youngest) continue;
      await storage.delete(key);
      deleted += 1;
    }
    await redis.set(cursorKey, now);
    return deleted;
  }

  /**
   * Up to when tensors go: past their retention, and so that about `tensorsKept` stay. Two looks through the list
   * instead of one list in memory: there may be millions.
   */
  async function oldEnough(now: number): Promise<number> {
    const byAge = now - deps.tensorRetentionMs;
    if (deps.tensorsKept === 0) return byAge;
    const perMinute = new Map<number, number>();
    for await (const { key, lastModified } of storage.list(tensorPrefix)) {
      if (!key.endsWith('.npy')) continue;
      const minute = Math.floor(lastModified.getTime() / 60_000);
      perMinute.set(minute, (perMinute.get(minute) ?? 0) + 1);
    }
    let kept = 0;
    for (const [minute, count] of [...perMinute].sort(([a], [b]) => b - a)) {
      kept += count;
      if (kept > deps.tensorsKept) return Math.max(byAge, (minute + 1) * 60_000);
    }
    return byAge;
  }

  async function round(): Promise<void> {
    leads = await lease.hold();
    if (!leads) return;
    await restoreQueueJobs();
    await sweepRecords();
    await sweepObjects();
  }

  return {
    restoreQueueJobs,
    sweepObjects,
    sweepRecords,
    /** Whether this process held the lease at its last round. */
    leads: () => leads,
    start() {
      const next = () => {
        timer = setTimeout(() => {
          running = round()
            .catch((error) => log.warn({ err: error }, 'reconciler'))
            .then(() => (timer === undefined ? undefined : next()));
        }, deps.reconcileMs);
      };
      next();
    },
    async stop() {
      clearTimeout(timer);
      timer = undefined;
      await running;
      await lease.release().catch(() => {});
    },
  };
}
