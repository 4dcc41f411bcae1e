/**
 * How much room the queues have. Each is kept at a few times what its workers hold and no fuller, whoever fills it; and
 * a row is let in only where every queue on its way has room, since what is let in at the first comes to the last.
 */

import type { NewJobRecord } from '@acousticsense/shared/job-records';
import { type StageName, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues, Route } from '@acousticsense/shared/queues';
import { liveWorkers } from '@acousticsense/shared/serving';
import type { Redis } from 'ioredis';

const order = ['fetch', 'decode', 'inference'] as const satisfies StageName[];
/** Below this a queue would run dry between two rounds, however few its workers. */
const leastQueued = 16;

/** The workers that rows of one model go through. */
export interface Pool {
  readonly route: Route;
  /** Queue jobs that the live workers of each stage hold at a time. */
  readonly slots: Readonly<Record<StageName, number>>;
}

/** @returns by model digest; a model without a live inference service has none. */
export async function readPools(redis: Redis): Promise<Map<string, Pool>> {
  const workers = await liveWorkers(redis);
  const pools = new Map<string, Pool>();
  for (const { kind, profileHash, modelDigest } of workers) {
    if (kind !== 'inference' || pools.has(modelDigest)) continue;
    const slotsOf = (chosen: (worker: (typeof workers)[number]) => boolean) =>
      workers.filter(chosen).reduce((sum, { concurrency }) => sum + (concurrency ?? 1), 0);
    pools.set(modelDigest, {
      route: { profileHash, modelDigest },
      slots: {
        fetch: slotsOf((worker) => worker.kind === 'fetch'),
        decode: slotsOf((worker) => worker.kind === 'decoder' && worker.profileHash === profileHash),
        inference: slotsOf((worker) => worker.kind === 'inference' && worker.modelDigest === modelDigest),
      },
    });
  }
  return pools;
}

export interface Room {
  /** A row that needs no work needs no room. */
  takes(row: NewJobRecord): boolean;
  /** It was let in. */
  fill(row: NewJobRecord): void;
}

/** @param factor rows in a queue, as a multiple of what its workers hold. */
export async function measureRoom(
  queues: Pick<Queues, 'depth'>,
  pool: Pool | undefined,
  factor: number,
): Promise<Room> {
  const left: Record<StageName, number> = { fetch: 0, decode: 0, inference: 0 };
  if (pool) {
    await Promise.all(
      order.map(async (stage) => {
        const slots = pool.slots[stage];
        if (slots === 0) return;
        left[stage] =
          Math.max(leastQueued, Math.ceil(factor * slots)) - (await queues.depth(stage, pool.route));
      }),
    );
  }
  return {
    takes(row) {
      const first = firstStage(row);
      return first === undefined || order.slice(order.indexOf(first)).every((stage) => left[stage] > 0);
    },
    fill(row) {
      const first = firstStage(row);
      if (first) left[first] -= 1;
    },
  };
}

const firstStage = ({ state }: NewJobRecord): StageName | undefined => stageOf(state ?? 'queued');
