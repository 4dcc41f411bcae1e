import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { loadBundle } from '@acousticsense/shared/bundle';
import { queueName } from '@acousticsense/shared/pipeline';
import { createQueues, type Queues } from '@acousticsense/shared/queues';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Service } from '@acousticsense/shared/service';
import { announceWorker, liveWorkers, type WorkerFacts } from '@acousticsense/shared/serving';
import type { Redis } from 'ioredis';
import { Registry } from 'prom-client';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { exportQueues, lookAtQueues } from './backlogs.ts';

const bundle = await loadBundle(path.resolve(import.meta.dirname, '../../../models/default'), {
  verifyFiles: false,
});
const route = { profileHash: bundle.profileHash, modelDigest: bundle.digest };
const week = 7 * 24 * 3_600_000;

describe('what is told of the queues', () => {
  let server: TestRedis;
  let redis: Redis;
  let queues: Queues;

  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    queues = createQueues(redis);
  });
  beforeEach(() => redis.flushall());
  after(async () => {
    await queues.close();
    redis.disconnect();
    await server[Symbol.asyncDispose]();
  });

  /** A worker that has announced itself; called, it leaves. */
  async function worker(kind: WorkerFacts['kind']): Promise<() => Promise<void>> {
    const closers: (() => unknown)[] = [];
    const service = { onClose: (_: string, close: () => unknown) => closers.push(close) };
    const known = (await liveWorkers(redis)).length;
    announceWorker(
      service as unknown as Service,
      redis,
      kind === 'fetch' ? undefined : bundle,
      { kind, concurrency: 1 },
      () => ({}),
    );
    while ((await liveWorkers(redis)).length === known)
      await new Promise((resolve) => setTimeout(resolve, 5));
    return async () => {
      for (const close of closers) await close();
    };
  }
  const look = (now?: number) => lookAtQueues(redis, queues, now);

  test('a queue whose last worker has left is still told of, with none', async () => {
    const leave = await worker('decoder');
    await queues.add('decode', acceptedJob({ tenant: 'acme', ...route }));
    assert.deepEqual(
      (await look()).map(({ queue, waiting, workers }) => ({ queue, waiting, workers })),
      [{ queue: queueName('decode', route), waiting: 1, workers: 1 }],
    );
    await leave();
    const [alone, ...others] = await look();
    assert.deepEqual([alone?.waiting, alone?.workers, others.length], [1, 0, 0]);
  });

  test('an empty queue is forgotten a week after its last worker, one with work in it never', async () => {
    for (const kind of ['fetch', 'decoder'] as const) {
      const leave = await worker(kind);
      await look();
      await leave();
    }
    await queues.add('decode', acceptedJob({ tenant: 'acme', ...route }));
    assert.equal((await look(Date.now() + week - 60_000)).length, 2);
    assert.deepEqual(
      (await look(Date.now() + week + 60_000)).map(({ stage }) => stage),
      ['decode'],
    );
    assert.deepEqual(
      (await look()).map(({ stage }) => stage),
      ['decode'],
      'forgotten is forgotten',
    );
  });

  test('each queue is one series of each metric, in the process that leads only, from a single look', async () => {
    const leave = await worker('fetch');
    const registry = new Registry();
    let leads = true;
    let looks = 0;
    exportQueues(
      registry,
      () => {
        looks += 1;
        return look();
      },
      () => leads,
    );
    const lines = async () => (await registry.metrics()).split('\n').filter((line) => /^\w/.test(line));
    assert.deepEqual(await lines(), [
      'acousticsense_queue_waiting{queue="fetch",stage="fetch"} 0',
      'acousticsense_queue_active{queue="fetch",stage="fetch"} 0',
      'acousticsense_queue_oldest_seconds{queue="fetch",stage="fetch"} 0',
      'acousticsense_queue_workers{queue="fetch",stage="fetch"} 1',
      'acousticsense_reconciler_leads 1',
    ]);
    assert.equal(looks, 1);
    leads = false;
    assert.deepEqual(await lines(), ['acousticsense_reconciler_leads 0']);
    await leave();
  });

  test('a look that fails leaves the queues untold instead of at their last values', async () => {
    const registry = new Registry();
    exportQueues(
      registry,
      () => Promise.reject(new Error('Redis is away')),
      () => true,
    );
    assert.doesNotMatch(await registry.metrics(), /^acousticsense_queue_\w+\{/m);
  });
});
