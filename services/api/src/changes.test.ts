import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { changesChannel, createJobRecords, type JobRecords } from '@acousticsense/shared/job-records';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Redis } from 'ioredis';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { createChanges } from './changes.ts';

const tenant = 'acme';

describe('a follower', () => {
  let server: TestRedis;
  let redis: Redis;
  let subscriber: Redis;
  let records: JobRecords;

  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    subscriber = connectRedisForWorker(server.url);
    records = createJobRecords(redis, { resultSeconds: 60 });
  });
  after(async () => {
    redis.disconnect();
    subscriber.disconnect();
    await server[Symbol.asyncDispose]();
  });

  async function queued(): Promise<string> {
    const job = acceptedJob({ tenant });
    await records.create(job);
    return job.id;
  }

  test('hears the end of a job after messages that are none of ours', async (t) => {
    // Thrown in a listener of the connection, it would end the API.
    const thrown: unknown[] = [];
    const note = (error: unknown) => thrown.push(error);
    process.on('uncaughtException', note);
    t.after(() => process.off('uncaughtException', note));
    const id = await queued();
    const changes = createChanges(subscriber, records);
    const states: string[] = [];
    for await (const told of changes.follow(tenant, id, AbortSignal.timeout(10_000))) {
      if (told === 'heartbeat' || 'fraction' in told) continue;
      states.push(told.state);
      if (told.state !== 'queued') continue;
      for (const message of ['not JSON', 'null', '7', '{}']) await redis.publish(changesChannel, message);
      await sleep(50);
      await records.commit({ tenant, jobId: id, generation: 1 }, { from: ['queued'], to: 'cancelled' });
    }
    assert.deepEqual(states, ['queued', 'cancelled']);
    assert.deepEqual(thrown, []);
    assert.equal(changes.followers, 0);
  });

  test('of whom no message comes reads the record at every heartbeat, whatever the clock says', async (t) => {
    const id = await queued();
    const deaf = connectRedisForWorker(server.url);
    t.after(() => deaf.disconnect());
    const changes = createChanges(deaf, records, 50);
    // A clock that is set back does not put the heartbeat off.
    let now = Date.now();
    t.mock.method(Date, 'now', () => (now -= 1_000));
    await deaf.unsubscribe();
    let heartbeats = 0;
    for await (const told of changes.follow(tenant, id, AbortSignal.timeout(2_000)))
      if (told === 'heartbeat' && ++heartbeats === 3) break;
    assert.equal(heartbeats, 3);
    assert.equal(changes.followers, 0);
  });
});
