import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { Worker } from 'bullmq';
import { startRedis } from '../../../test/redis.ts';
import { queuePrefix } from './queues.ts';
import { connectRedis, connectRedisForWorker } from './redis.ts';
import { createOrders, ordersQueueName, parseOrder, type WebhookOrder } from './webhook-orders.ts';

const server = await startRedis();
const redis = connectRedis(server.url);
const connection = connectRedisForWorker(server.url);
await once(redis, 'ready');
after(async () => {
  connection.disconnect();
  redis.disconnect();
  await server[Symbol.asyncDispose]();
});

test('an order arrives once under its id, and one that fails is not carried out again', async (t) => {
  const orders = createOrders(redis);
  const arrived: (WebhookOrder | undefined)[] = [];
  const worker = new Worker(
    ordersQueueName,
    async ({ data }) => {
      arrived.push(parseOrder(data));
      throw new Error('the receiver is away');
    },
    { connection, prefix: queuePrefix(ordersQueueName), autorun: false },
  );
  worker.on('error', () => {});
  t.after(async () => {
    await worker.close();
    await orders.close();
  });
  const orderId = await orders.add({ kind: 'test', tenant: 'acme', endpointId: 'ep_1' });
  await orders.add({ kind: 'test', tenant: 'acme', endpointId: 'ep_1', orderId });
  const last = await orders.add({ kind: 'verify', tenant: 'acme', endpointId: 'ep_2' });
  const failed = new Promise<void>((resolve) => {
    worker.on('failed', (job) => job?.id === last && resolve());
  });
  void worker.run();
  await failed;
  assert.deepEqual(arrived, [
    { v: 1, kind: 'test', tenant: 'acme', endpointId: 'ep_1', orderId },
    { v: 1, kind: 'verify', tenant: 'acme', endpointId: 'ep_2', orderId: last },
  ]);
});

test('what is no order is none', () => {
  const order = { v: 1, kind: 'verify', tenant: 'acme', endpointId: 'ep_1', orderId: randomUUID() };
  assert.deepEqual(parseOrder(order), order);
  for (const other of [
    undefined,
    'verify',
    { ...order, v: 2 },
    { ...order, kind: 'erase' },
    { ...order, tenant: '../x' },
  ])
    assert.equal(parseOrder(other), undefined);
});
