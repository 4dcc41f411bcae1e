import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { mkdtemp, rm, utimes } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import type { JobRecord } from '@acousticsense/shared/job';
import { createJobRecords, type JobRecords } from '@acousticsense/shared/job-records';
import {
  audioKey,
  explanationKey,
  spectrogramKey,
  uploadKey,
  vectorsKey,
} from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues, type Queues } from '@acousticsense/shared/queues';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Storage } from '@acousticsense/shared/storage';
import { writeUpload } from '@acousticsense/shared/uploads';
import type { Redis } from 'ioredis';
import { pino } from 'pino';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { createReconciler } from './reconciler.ts';
import { createUploads } from './uploads.ts';

const tenant = 'acme';
const hour = 3_600_000;
const day = 24 * hour;

describe('the reconciler', () => {
  let server: TestRedis;
  let redis: Redis;
  let records: JobRecords;
  let queues: Queues;
  let storage: Storage;
  let directory: string;

  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    records = createJobRecords(redis, { resultSeconds: 3_600 });
    queues = createQueues(redis);
    directory = await mkdtemp(path.join(tmpdir(), 'as-reconcile-'));
    storage = openStorage(pathToFileURL(directory).href);
  });
  beforeEach(() => redis.flushall());
  after(async () => {
    await queues.close();
    redis.disconnect();
    await server[Symbol.asyncDispose]();
    await rm(directory, { recursive: true });
  });

  const uploads = () =>
    createUploads({
      redis,
      storage,
      log: pino({ level: 'silent' }),
      maxUploadBytes: 1_000,
      uploadExpiryMs: day,
      audioRetentionMs: day,
      uploadUrlMs: hour,
      charge: async () => {},
    });

  const reconciler = (retention = {}) =>
    createReconciler({
      redis,
      records,
      queues,
      storage,
      uploads: uploads(),
      log: pino({ level: 'silent' }),
      reconcileMs: 1_000,
      reconcileAfterMs: 0,
      audioRetentionMs: day,
      resultRetentionMs: 30 * day,
      tensorRetentionMs: day,
      jobsKept: 1_000,
      tensorsKept: 0,
      ...retention,
    });

  /** A UUIDv7 made at that time. */
  function idAt(time: number): string {
    const stamp = time.toString(16).padStart(12, '0');
    return `${stamp.slice(0, 8)}-${stamp.slice(8)}${randomUUIDv7().slice(13)}`;
  }

  async function job(state: JobRecord['state'], createdAt = Date.now()): Promise<JobRecord> {
    const record = acceptedJob({ tenant, id: idAt(createdAt), createdAt });
    await records.create(record);
    if (state !== 'queued') {
      await records.commit({ tenant, jobId: record.id, generation: 1 }, { from: ['queued'], to: state });
    }
    await sleep(2);
    return (await records.get(tenant, record.id))!;
  }

  async function object(key: string, age: number): Promise<void> {
    await storage.put(key, Buffer.from('x'));
    const time = new Date(Date.now() - age);
    await utimes(path.join(directory, key), time, time);
  }

  test('gives an unfinished job whose queue job has vanished a new one, in the stage of its state', async () => {
    for (const [state, stage] of [
      ['queued', 'decode'],
      ['decoding', 'decode'],
      ['decoded', 'inference'],
      ['classifying', 'inference'],
    ] as const) {
      const record = await job(state);
      assert.equal(await queues.state(stage, record), 'gone');
      assert.equal(await reconciler().restoreQueueJobs(), 1, state);
      assert.equal(await queues.state(stage, record), 'waiting', state);
      assert.equal((await records.get(tenant, record.id))?.state, state);
      assert.equal(await reconciler().restoreQueueJobs(), 0, 'a second round finds nothing to do');
    }
  });

  test('leaves finished jobs alone, and jobs that have just changed', async () => {
    for (const state of ['completed', 'failed', 'cancelled'] as const) await job(state);
    await job('queued');
    assert.equal(await reconciler({ reconcileAfterMs: 60_000 }).restoreQueueJobs(), 0);
  });

  test('starts a job over under the next generation when its queue job ended without it', async () => {
    const record = await job('decoding');
    await queues.add('decode', record);
    // What BullMQ keeps of a job that ended: its hash, and its id in the completed set.
    const prefix = `{as-decode-${record.profileHash}}:decode-${record.profileHash}`;
    await redis.del(`${prefix}:wait`);
    await redis.zadd(`${prefix}:completed`, Date.now(), `${record.id}.1`);
    assert.equal(await queues.state('decode', record), 'completed');
    assert.equal(await reconciler().restoreQueueJobs(), 1);
    const again = (await records.get(tenant, record.id))!;
    assert.deepEqual([again.state, again.generation], ['queued', 2]);
    assert.equal(await queues.state('decode', again), 'waiting');
  });

  test('leaves a job alone that went on between the two looks at it', async () => {
    const record = await job('decoding');
    const overtaken: Queues = {
      ...queues,
      // The decoder ends its job just after the record was read.
      async state() {
        await records.commit(
          { tenant, jobId: record.id, generation: 1 },
          { from: ['decoding'], to: 'decoded' },
        );
        return 'completed';
      },
    };
    assert.equal(await reconciler({ queues: overtaken }).restoreQueueJobs(), 0);
    const after = (await records.get(tenant, record.id))!;
    assert.deepEqual([after.state, after.generation], ['decoded', 1]);
  });

  test('is not kept from the others by a record that cannot be read', async () => {
    const damaged = await job('queued');
    await redis.hset(`as:{${tenant}}:job:${damaged.id}`, 'selection', '{');
    const record = await job('queued');
    assert.equal(await reconciler().restoreQueueJobs(), 1);
    assert.equal(await queues.state('decode', record), 'waiting');
  });

  test('deletes objects without a record after a day, and not before', async () => {
    const old = audioKey({ tenant, id: idAt(Date.now() - 26 * hour) });
    const young = audioKey({ tenant, id: idAt(Date.now() - 2 * hour) });
    await object(old, 26 * hour);
    await object(young, 2 * hour);
    assert.equal(await reconciler().sweepObjects(), 1);
    assert.equal(await storage.stat(old), undefined);
    assert.ok(await storage.stat(young));
  });

  test('deletes the audio of finished jobs after its retention, and keeps what explains their result', async () => {
    const created = Date.now() - 26 * hour;
    const done = await job('completed', created);
    const open = await job('decoding', created);
    for (const { id } of [done, open]) {
      for (const keyOf of [audioKey, spectrogramKey, explanationKey, vectorsKey])
        await object(keyOf({ tenant, id }), 26 * hour);
    }
    assert.equal(await reconciler().sweepObjects(), 1);
    assert.equal(await storage.stat(audioKey({ tenant: tenant, id: done.id })), undefined);
    for (const keyOf of [spectrogramKey, explanationKey, vectorsKey])
      assert.ok(await storage.stat(keyOf({ tenant, id: done.id })));
    assert.ok(
      await storage.stat(audioKey({ tenant: tenant, id: open.id })),
      'an unfinished job still needs its audio',
    );
  });

  test('deletes what is left of a job when its record has expired', async () => {
    const id = idAt(Date.now() - 31 * day - 2 * hour);
    const keys = [spectrogramKey, explanationKey, vectorsKey].map((keyOf) => keyOf({ tenant, id }));
    for (const key of keys) await object(key, 31 * day);
    await reconciler().sweepObjects();
    for (const key of keys) assert.equal(await storage.stat(key), undefined, key);
  });

  test('comes back for audio whose upload went on over the full hour', async () => {
    const done = await job('completed', Math.floor(Date.now() / hour) * hour - 24 * hour - 1);
    const key = audioKey({ tenant: tenant, id: done.id });
    await object(key, 24 * hour - 5 * 60_000);
    const now = Math.floor(Date.now() / hour) * hour + 1;
    const sweep = (at: number) => reconciler().sweepObjects(at);
    if (Date.now() - now < 5 * 60_000) await object(key, 23 * hour);
    await sweep(now);
    assert.ok(await storage.stat(key), 'it is not a day old');
    await sweep(now + 3 * hour);
    assert.equal(await storage.stat(key), undefined);
  });

  test('comes back for what a job left whose record outlived the last look', async () => {
    const done = await job('completed', Date.now() - 31 * day - 2 * hour);
    const key = spectrogramKey({ tenant: tenant, id: done.id });
    await object(key, 31 * day);
    await reconciler().sweepObjects();
    assert.ok(await storage.stat(key));
    await records.remove(tenant, done.id);
    await reconciler().sweepObjects(Date.now() + 2 * hour);
    assert.equal(await storage.stat(key), undefined);
    assert.equal(await redis.zcard('as:reconciler:late'), 0);
  });

  test('sweeps past a record that cannot be read, and keeps its objects', async () => {
    const created = Date.now() - 26 * hour;
    const damaged = await job('completed', created);
    await redis.hset(`as:{${tenant}}:job:${damaged.id}`, 'selection', '{');
    const orphan = audioKey({ tenant, id: idAt(created) });
    await object(spectrogramKey({ tenant: tenant, id: damaged.id }), 26 * hour);
    await object(orphan, 26 * hour);
    assert.equal(await reconciler().sweepObjects(), 1);
    assert.equal(await storage.stat(orphan), undefined);
    await storage.delete(spectrogramKey({ tenant: tenant, id: damaged.id }));
  });

  test('deletes the oldest finished jobs beyond the number that is kept, with their objects', async () => {
    const finished = [await job('completed'), await job('failed'), await job('completed')];
    const open = await job('queued');
    for (const { id } of finished) await storage.put(spectrogramKey({ tenant, id }), Buffer.from('x'));
    const keeping = reconciler({ jobsKept: 2 });
    assert.equal(await keeping.sweepRecords(), 1);
    assert.equal(await keeping.sweepRecords(), 0, 'two stay');
    const there = await Promise.all([...finished, open].map(({ id }) => records.exists(tenant, id)));
    assert.deepEqual(there, [false, true, true, true]);
    const objects = await Promise.all(finished.map(({ id }) => storage.stat(spectrogramKey({ tenant, id }))));
    assert.deepEqual(
      objects.map((object) => object !== undefined),
      [false, true, true],
    );
  });

  test('deletes the oldest tensors beyond the number that is kept', async () => {
    for (const minutes of [10, 20, 30, 40])
      for (const ending of ['npy', 'json'])
        await object(`tensors/${tenant}/${minutes}.${ending}`, minutes * 60_000);
    assert.equal(await reconciler({ tensorsKept: 2 }).sweepObjects(), 4);
    const left: string[] = [];
    for await (const { key } of storage.list('tensors/')) left.push(key);
    assert.deepEqual(
      left.sort(),
      [10, 20].flatMap((m) => ['json', 'npy'].map((e) => `tensors/${tenant}/${m}.${e}`)),
    );
  });

  test('deletes tensors past their retention', async () => {
    await object('tensors/acme/old/p/s.1.npy', 25 * hour);
    await object('tensors/acme/new/p/s.1.npy', hour);
    assert.equal(await reconciler().sweepObjects(), 1);
    assert.equal(await storage.stat('tensors/acme/old/p/s.1.npy'), undefined);
    assert.ok(await storage.stat('tensors/acme/new/p/s.1.npy'));
  });

  test('deletes uploads whose time is over, unfinished or used, and leaves the others', async () => {
    const now = Date.now();
    async function upload(begun: number, state: 'open' | 'finished', expiresAt: number) {
      const id = idAt(begun);
      const common = { v: 1, by: 'tus', size: 1, filename: 'a', createdAt: begun, expiresAt } as const;
      await writeUpload(
        storage,
        tenant,
        id,
        state === 'open'
          ? { ...common, state }
          : { ...common, state, etag: 'e', completedAt: expiresAt - day },
      );
      await object(uploadKey(tenant, id), now - begun);
      return uploadKey(tenant, id);
    }
    const kept = [
      await upload(now - hour, 'open', now + 23 * hour),
      await upload(now - 30 * hour, 'finished', now + 10 * hour),
    ];
    const gone = [
      await upload(now - 26 * hour, 'open', now - 2 * hour),
      await upload(now - 27 * hour, 'finished', now - 2 * hour),
      await upload(now - 50 * hour, 'finished', now - 3 * hour),
    ];
    await reconciler().sweepObjects(now);
    const left = (await Array.fromAsync(storage.list('uploads/'))).map(({ key }) => key);
    assert.deepEqual(left.sort(), kept.flatMap((key) => [key, `${key}.json`]).sort());
    for (const key of gone) assert.equal(await storage.stat(key), undefined);
    await reconciler().sweepObjects(now + 12 * hour);
    assert.equal(await storage.stat(kept[1]!), undefined);
    assert.ok(await storage.stat(kept[0]!));
    await storage.delete(kept[0]!);
    await storage.delete(`${kept[0]!}.json`);
  });

  test('of two processes one works; the other takes over when it stops', async () => {
    const record = await job('queued');
    const first = reconciler({ reconcileMs: 20 });
    const second = reconciler({ reconcileMs: 20 });
    first.start();
    while ((await queues.state('decode', record)) !== 'waiting') await sleep(10);
    const holder = await redis.get('as:reconciler:lease');
    second.start();
    await sleep(100);
    assert.equal(await redis.get('as:reconciler:lease'), holder);
    await first.stop();
    let next: string | null = null;
    for (let n = 0; n < 100 && !next; n += 1) {
      await sleep(20);
      next = await redis.get('as:reconciler:lease');
    }
    assert.ok(next && next !== holder);
    await second.stop();
  });
});
