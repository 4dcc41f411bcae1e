/** Promise: `kill -9` of a Redis that keeps an append-only file costs nothing but time. */
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isOver } from './catalogue.ts';
import { openStorm, type Storm, until } from './storm.ts';

describe('while Redis is killed', () => {
  let storm: Storm;
  before(async () => {
    storm = await openStorm();
  });
  after(() => storm?.[Symbol.asyncDispose]());

  test('a batch survives, again and again', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    for (const rows of [1, 8, 16]) {
      await until(`${rows} rows are answered`, async () => {
        const batch = await caller.read(id).catch(() => undefined);
        return batch !== undefined && (batch.counts.completed >= rows || isOver(batch));
      });
      await system.redis.stop('SIGKILL');
      await sleep(500);
      await system.redis.start();
    }
    await storm.assertUnharmed(caller, id);
  });

  test('a manifest that is sent meanwhile is accepted once it is back, and once only', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    await system.redis.stop('SIGKILL');
    const accepting = caller.submit();
    await sleep(1_500);
    await system.redis.start();
    const { id } = await accepting;
    await storm.assertUnharmed(caller, id);
  });
});
