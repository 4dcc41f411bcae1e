/**
 * Promise: whoever listens to a batch hears of every row, of every part and of the end, whatever is killed meanwhile, and
 * knows by the id what is heard twice.
 */
import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createEventLog } from '../../packages/shared/src/event-log.ts';
import { isOver } from './catalogue.ts';
import { killAndStart, openStorm, type Storm, until } from './storm.ts';

let storm: Storm;
before(async () => {
  storm = await openStorm();
});
after(() => storm?.[Symbol.asyncDispose]());

test('a receiver that fails now and then hears of all that happened while services and Redis are killed', async () => {
  const { system } = storm;
  const caller = await storm.newCaller();
  const heard = new Map<string, number>();
  const accepted = new Set<string>();
  const receiver = createServer(async (message, response) => {
    const { type, data } = JSON.parse(Buffer.concat(await message.toArray()).toString()) as {
      type: string;
      data: { challenge?: string };
    };
    if (type === 'endpoint.verification') return void response.end(data.challenge);
    const id = message.headers['webhook-id'] as string;
    const times = (heard.get(id) ?? 0) + 1;
    heard.set(id, times);
    // Of every fifth event the first attempt fails; of every seventh the answer to what was accepted is lost.
    if (times === 1 && heard.size % 5 === 0) return void response.writeHead(500).end();
    accepted.add(id);
    if (times === 1 && heard.size % 7 === 0) message.socket.destroy();
    else response.writeHead(204).end();
  }).listen(0, '127.0.0.1');
  await new Promise((resolve) => receiver.once('listening', resolve));
  const url = `http://127.0.0.1:${(receiver.address() as AddressInfo).port}/hooks`;
  const call = async (at: string, init: RequestInit = {}) => {
    const headers = { authorization: `Bearer ${caller.key}`, 'content-type': 'application/json' };
    return (await (await fetch(system.url + at, { ...init, headers })).json()) as {
      id: string;
      status: string;
    };
  };
  const { id: endpoint } = await call('/v1/webhooks/endpoints', {
    method: 'POST',
    body: JSON.stringify({ url }),
  });
  await until(
    'the endpoint has proven itself',
    async () => (await call(`/v1/webhooks/endpoints/${endpoint}`)).status === 'enabled',
  );

  try {
    const { id } = await caller.submit();
    await until('something was heard', async () => heard.size > 0);
    await killAndStart(system, 'webhook');
    await system.redis.stop('SIGKILL');
    await sleep(300);
    await system.redis.start();
    await until('half of the rows are answered', async () => {
      const batch = await caller.read(id).catch(() => undefined);
      return batch !== undefined && (batch.counts.completed >= 12 || isOver(batch));
    });
    await system.kill('webhook');
    await killAndStart(system, 'api');
    await caller.when(id, isOver);
    await system.start('webhook');
    const log = createEventLog({ redis: caller.redis, storage: caller.storage });
    const { events } = await log.read(caller.tenant, undefined, 1_000);
    const told = events.filter(({ event }) => event.type !== 'batch.progress').map((one) => one.id);
    assert.equal(told.length, new Set(told).size, 'each event is in the log once');
    // 24 rows, one part, the end.
    assert.equal(told.length, 26);
    await until('all of it was accepted', async () => told.every((one) => accepted.has(one)), 60_000);
    assert.deepEqual(new Set(heard.keys()), new Set(told), 'and nothing else was heard');
    await storm.assertUnharmed(caller, id);
  } finally {
    receiver.closeAllConnections();
    receiver.close();
  }
});
