/** The queues of the pipeline, from the side that adds: names, ids and retention in one place. */
import { Queue, type QueueOptions } from 'bullmq';
import type { Redis } from 'ioredis';
import type { JobRecord } from './job.ts';
import {
  payloadVersion,
  queueJobId,
  queueName,
  queuePriority,
  type StageName,
  type StagePayload,
  stages,
} from './pipeline.ts';
import { withRedis } from './redis.ts';

/** What routes and identifies a queue job: part of every record. */
export type Queued = Pick<
  JobRecord,
  'tenant' | 'id' | 'generation' | 'traceparent' | 'profileHash' | 'modelDigest' | 'class' | 'batch'
>;

export interface Backlog {
  readonly queue: string;
  readonly stage: StageName;
  readonly waiting: number;
  readonly active: number;
  readonly delayed: number;
  /** Seconds since the oldest waiting job was added; 0 when none waits. */
  readonly oldestSeconds: number;
}

export interface Route {
  readonly profileHash: string;
  readonly modelDigest: string;
}

export interface Queues {
  /** Adds the stage's queue job; a repeated add under the same generation is one job. */
  add(stage: StageName, job: Queued): Promise<void>;
  /** As {@link add}, of jobs on one route, in one round trip. */
  addMany(stage: StageName, jobs: readonly Queued[]): Promise<void>;
  /** Queue jobs that a worker holds or could take now: one cheap look. */
  depth(stage: StageName, route: Route): Promise<number>;
  /** What BullMQ knows of the queue job: its state, or `gone`. */
  state(stage: StageName, job: Queued): Promise<string>;
  /** Takes a job that no worker holds out of the queue; one that is held is left to its worker. */
  withdraw(stage: StageName, job: Queued): Promise<void>;
  backlog(stage: StageName, route: Route): Promise<Backlog>;
  close(): Promise<void>;
}

/** Each queue has a hash tag of its own (`{name}`), so that queues spread over a cluster. */
export function queuePrefix(name: string): string {
  return `{as-${name}}`;
}

const hour = 3_600;

export function createQueues(connection: Redis): Queues {
  const open = new Map<string, Queue<StagePayload>>();

  function queueOf(
    stage: StageName,
    route: { profileHash: string; modelDigest: string },
  ): Queue<StagePayload> {
    const name = queueName(stage, route);
    let queue = open.get(name);
    if (queue === undefined) {
      const options: QueueOptions = { connection, prefix: queuePrefix(name), skipVersionCheck: true };
      queue = new Queue<StagePayload>(name, options);
      queue.on('error', () => {});
      open.set(name, queue);
    }
    return queue;
  }

  function entryOf(stage: StageName, job: Queued) {
    const { attempts, backoff, payload } = stages[stage];
    const data = payload.parse({
      v: payloadVersion,
      tenant: job.tenant,
      jobId: job.id,
      generation: job.generation,
      traceparent: job.traceparent,
      ...(job.batch ? { batch: job.batch } : {}),
    });
    const priority = queuePriority[job.class ?? 'interactive'];
    const options = {
      jobId: queueJobId(data),
      attempts,
      backoff,
      ...(priority > 0 ? { priority } : {}),
      removeOnComplete: { age: hour, count: 1_000 },
      removeOnFail: { age: 24 * hour, count: 1_000 },
    };
    return { data, options };
  }

  return {
    async add(stage, job) {
      const { data, options } = entryOf(stage, job);
      await withRedis(() => queueOf(stage, job).add(stage as never, data as never, options));
    },

    async addMany(stage, jobs) {
      const [first] = jobs;
      if (first === undefined) return;
      const entries = jobs.map((job) => {
        const { data, options } = entryOf(stage, job);
        return { name: stage as never, data: data as never, opts: options };
      });
      await withRedis(() => queueOf(stage, first).addBulk(entries));
    },

    depth: (stage, route) =>
      withRedis(() => queueOf(stage, route).getJobCountByTypes('waiting', 'prioritized', 'active')),

    async state(stage, job) {
      const id = queueJobId({ jobId: job.id, generation: job.generation });
      const state = await withRedis(() => queueOf(stage, job).getJobState(id));
      return state === 'unknown' ? 'gone' : state;
    },

    async withdraw(stage, job) {
      const id = queueJobId({ jobId: job.id, generation: job.generation });
      // 0: a worker holds it; that worker's next commit is refused.
      await withRedis(() => queueOf(stage, job).remove(id));
    },

    async backlog(stage, route) {
      const queue = queueOf(stage, route);
      const [counts, oldest] = await withRedis(() =>
        Promise.all([
          queue.getJobCounts('waiting', 'prioritized', 'active', 'delayed'),
          queue.getJobs(['waiting', 'prioritized'], 0, 0, true),
        ]),
      );
      return {
        queue: queue.name,
        stage,
        waiting: (counts['waiting'] ?? 0) + (counts['prioritized'] ?? 0),
        active: counts['active'] ?? 0,
        delayed: counts['delayed'] ?? 0,
        oldestSeconds: oldest[0] ? Math.max(0, (Date.now() - oldest[0].timestamp) / 1_000) : 0,
      };
    },

    async close() {
      await Promise.allSettled([...open.values()].map((queue) => queue.close()));
    },
  };
}
