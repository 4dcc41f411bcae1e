import assert from 'node:assert/strict';
import { after, before, beforeEach, describe, test } from 'node:test';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Redis } from 'ioredis';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import type { QueuedMessage } from './messages.ts';
import { createOrder, type Order } from './order-of-refs.ts';

describe('messages of one ref', () => {
  let server: TestRedis;
  let redis: Redis;
  let order: Order;
  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    order = createOrder(redis);
  });
  beforeEach(() => redis.flushall());
  after(async () => {
    redis.disconnect();
    await server[Symbol.asyncDispose]();
  });

  const endpoint = { tenant: 'acme', id: 'ep_1' };
  const queued = (at: number, ref?: string, again = '') => ({
    id: `m${at}${again}`,
    message: {
      ...{ v: 1, tenant: 'acme', endpointId: 'ep_1', eventId: `evt_${at}`, type: 'job.completed' },
      ...{ cursor: `${at}-0`, url: 'https://receiver.example/', body: '{}', handedOverAt: 0, attempts: [] },
      ...(ref === undefined ? {} : { ref }),
    } as QueuedMessage,
  });
  const waits = async (...messages: ReturnType<typeof queued>[]) =>
    (await order.chain(endpoint, messages)).map(({ message }) => message.after);

  test('wait for the one before, within a hand-over and across two; others wait for nobody', async () => {
    assert.deepEqual(await waits(queued(1, 'a'), queued(2, 'b'), queued(3, 'a'), queued(4)), [
      undefined,
      undefined,
      'm1',
      undefined,
    ]);
    assert.deepEqual(await waits(queued(5, 'a'), queued(6, 'b')), ['m3', 'm2']);
  });

  test('do not wait for themselves, nor for what comes after them, when a hand-over is repeated', async () => {
    await waits(queued(1, 'a'), queued(2, 'a'));
    assert.deepEqual(await waits(queued(1, 'a'), queued(2, 'a')), [undefined, 'm1']);
    assert.deepEqual(await waits(queued(3, 'a')), ['m2']);
  });

  test('wait for the same ones when a hand-over is repeated that was broken off before they were added', async () => {
    await waits(queued(1, 'a'));
    for (const messages of [
      [queued(2, 'a'), queued(3, 'a')],
      [queued(2, 'a'), queued(3, 'a'), queued(4, 'a')],
      [queued(2, 'a'), queued(3, 'a'), queued(4, 'a')],
    ])
      assert.deepEqual(await waits(...messages), ['m1', 'm2', 'm3'].slice(0, messages.length));
    // There is less room than before.
    assert.deepEqual(await waits(queued(2, 'a')), ['m1']);
    assert.deepEqual(await waits(queued(3, 'a'), queued(4, 'a')), ['m2', 'm3']);
    assert.deepEqual(await waits(queued(5, 'a')), ['m4']);
  });

  test('that are told once more, out of their time, are not waited for', async () => {
    await waits(queued(1, 'a'), queued(2, 'a'));
    assert.deepEqual(await waits(queued(1, 'a', '.again')), [undefined]);
    assert.deepEqual(await waits(queued(3, 'a')), ['m2']);
  });

  test('leave nothing behind once they are over', async () => {
    const [one, two] = [queued(1, 'a'), queued(2, 'a')];
    await waits(one, two);
    await order.release(one.message, one.id);
    await order.release(two.message, two.id);
    assert.deepEqual(await redis.keys('*'), []);
    assert.deepEqual(await waits(queued(3, 'a')), [undefined]);
  });

  test('wake the one that waits for them, once', async () => {
    const [one, two] = await order.chain(endpoint, [queued(1, 'a'), queued(2, 'a')]);
    await order.hold(two!.message, two!.id);
    assert.equal(await order.next(one!.message, one!.id), 'm2');
    assert.equal(await order.next(one!.message, one!.id), undefined);
  });
});
