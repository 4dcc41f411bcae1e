/**
 * What waits in each queue and how many workers read it, told to Prometheus once: by the process that reconciles.
 *
 * A queue is told of for as long as something lies in it, and a week longer, also without any worker: that nobody
 * takes what waits is what an alert and an autoscaler must see. So queues are remembered in Redis, not only known
 * from the workers that are alive.
 */

import type { StageName } from '@acousticsense/shared/pipeline';
import type { Backlog, Queues, Route } from '@acousticsense/shared/queues';
import { withRedis } from '@acousticsense/shared/redis';
import { liveWorkers, stageOfWorker } from '@acousticsense/shared/serving';
import type { Redis } from 'ioredis';
import { Gauge, type Registry } from 'prom-client';

const queuesKey = 'as:queues';
const forgottenAfterMs = 7 * 24 * 3_600_000;

interface KnownQueue extends Route {
  readonly stage: StageName;
  /** When a worker was last heard of (epoch ms). */
  readonly seen: number;
}

export interface QueueState extends Backlog {
  readonly workers: number;
}

/** @returns every queue that is remembered; forgets those that are empty and have had no worker for a week. */
export async function lookAtQueues(redis: Redis, queues: Queues, now = Date.now()): Promise<QueueState[]> {
  const workers = new Map<string, number>();
  const known = new Map<string, KnownQueue>();
  const remembered = await withRedis(() => redis.hgetall(queuesKey));
  for (const [queue, json] of Object.entries(remembered)) known.set(queue, JSON.parse(json) as KnownQueue);
  for (const { queue, kind, profileHash, modelDigest } of await liveWorkers(redis)) {
    workers.set(queue, (workers.get(queue) ?? 0) + 1);
    known.set(queue, { stage: stageOfWorker[kind], profileHash, modelDigest, seen: now });
  }
  if (workers.size > 0) {
    const seen = [...workers.keys()].map((queue) => [queue, JSON.stringify(known.get(queue))] as const);
    await withRedis(() => redis.hset(queuesKey, Object.fromEntries(seen)));
  }

  const states = await Promise.all(
    [...known].map(async ([queue, { stage, seen, ...route }]) => {
      const backlog = await queues.backlog(stage, route);
      const lying = backlog.waiting + backlog.active + backlog.delayed;
      if (lying === 0 && now - seen > forgottenAfterMs) {
        await withRedis(() => redis.hdel(queuesKey, queue));
        return undefined;
      }
      return { ...backlog, workers: workers.get(queue) ?? 0 };
    }),
  );
  return states.filter((state) => state !== undefined);
}

/**
 * @param look asked at each scrape: what it finds is told; when it fails nothing is, which is an alert of its own.
 * @param leads whether this process is the one that tells.
 */
export function exportQueues(
  registry: Registry,
  look: () => Promise<readonly QueueState[]>,
  leads: () => boolean,
): void {
  const registers = [registry];
  /** All gauges of a scrape tell of one look: they are read at once. */
  let looking: Promise<readonly QueueState[]> | undefined;
  const lookOnce = () => {
    looking ??= (leads() ? look().catch(() => []) : Promise.resolve([])).finally(() => {
      looking = undefined;
    });
    return looking;
  };
  const tell = (name: string, help: string, read: (state: QueueState) => number) =>
    new Gauge({
      name,
      help,
      labelNames: ['queue', 'stage'],
      registers,
      async collect() {
        const states = await lookOnce();
        this.reset();
        for (const state of states) this.set({ queue: state.queue, stage: state.stage }, read(state));
      },
    });
  tell(
    'acousticsense_queue_waiting',
    'Queue jobs that wait (delayed ones included).',
    ({ waiting, delayed }) => waiting + delayed,
  );
  tell('acousticsense_queue_active', 'Queue jobs that a worker holds.', ({ active }) => active);
  tell(
    'acousticsense_queue_oldest_seconds',
    'Age of the oldest waiting queue job.',
    ({ oldestSeconds }) => oldestSeconds,
  );
  tell(
    'acousticsense_queue_workers',
    'Workers that are ready for jobs of this queue.',
    ({ workers }) => workers,
  );
  new Gauge({
    name: 'acousticsense_reconciler_leads',
    help: '1 in the process that reconciles and tells of the queues.',
    registers,
    collect() {
      this.set(leads() ? 1 : 0);
    },
  });
}
