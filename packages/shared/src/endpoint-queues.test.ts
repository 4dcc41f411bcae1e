import assert from 'node:assert/strict';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { Queue, Worker } from 'bullmq';
import { startRedis } from '../../../test/redis.ts';
import { createEndpointQueues } from './endpoint-queues.ts';
import { endpointQueueName } from './endpoints.ts';
import { queuePrefix } from './queues.ts';
import { connectRedis, connectRedisForWorker } from './redis.ts';

const server = await startRedis();
const redis = connectRedis(server.url);
await once(redis, 'ready');
const queues = createEndpointQueues(redis);
after(async () => {
  redis.disconnect();
  await server[Symbol.asyncDispose]();
});

test('what waits, what is tried again later and what is being sent are counted, and go together', async (t) => {
  const name = endpointQueueName('ep_1');
  const options = { connection: redis, prefix: queuePrefix(name) };
  const queue = new Queue(name, options);
  const connection = connectRedisForWorker(server.url);
  const held = Promise.withResolvers<void>();
  const worker = new Worker(name, () => held.promise, { ...options, connection, concurrency: 1 });
  worker.on('error', () => {});
  t.after(async () => {
    held.resolve();
    await worker.close(true);
    await queue.close();
    connection.disconnect();
  });
  await queue.add('message', {});
  await once(worker, 'active');
  await queue.addBulk(Array.from({ length: 3 }, () => ({ name: 'message', data: {} })));
  await queue.add('message', {}, { delay: 600_000 });
  assert.deepEqual(await queues.backlog('ep_1'), { waiting: 3, delayed: 1, active: 1 });
  await queues.remove('ep_1');
  assert.deepEqual(await queues.backlog('ep_1'), { waiting: 0, delayed: 0, active: 0 });
});

test('a queue that never was has nothing in it and can be removed', async () => {
  assert.deepEqual(await queues.backlog('ep_none'), { waiting: 0, delayed: 0, active: 0 });
  await queues.remove('ep_none');
  assert.deepEqual(await redis.keys('*ep_none*'), []);
});

test('a look leaves nothing behind, on the connection and in Redis', async () => {
  const listeners = () => redis.eventNames().map((event) => redis.listenerCount(event));
  await queues.backlog('ep_looked_at');
  const before = listeners();
  for (let n = 0; n < 20; n += 1) await queues.backlog('ep_looked_at');
  assert.deepEqual(listeners(), before);
  assert.deepEqual(await redis.keys('*ep_looked_at*'), []);
});
