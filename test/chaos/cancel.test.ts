/** Promise: a batch can be cancelled at any moment; then its rows have ended, each once, and nothing of them is left. */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Caller, isOver } from './catalogue.ts';
import { atWork, held, modelProcesses, openStorm, type Storm, until } from './storm.ts';

describe('a batch that is cancelled', () => {
  let storm: Storm;
  before(async () => {
    storm = await openStorm();
  });
  after(() => storm?.[Symbol.asyncDispose]());

  async function assertCancelled(caller: Caller, id: string): Promise<void> {
    const batch = await caller.when(id, isOver);
    assert.equal(batch.state, 'cancelled');
    assert.ok(batch.counts.cancelled > 0);
    await storm.assertNothingLeft(caller);
  }

  /** Stops these processes, cancels when `reached` holds, and lets them go on when the batch has ended or soon after. */
  async function cancelledWhile(
    stopped: () => number[] | Promise<number[]>,
    reached: (caller: Caller, id: string) => Promise<boolean>,
  ): Promise<void> {
    const caller = await storm.newCaller();
    const id = await held(await stopped(), async () => {
      const batch = await caller.submit();
      await until('the rows are there', () => reached(caller, batch.id));
      assert.equal((await caller.post(batch.id, 'cancel')).counts.waiting, 0);
      await sleep(700);
      return batch.id;
    });
    await assertCancelled(caller, id);
  }
  const pid = (name: 'fetch' | 'decoder' | 'feeder') => () => [storm.system.pid(name)];
  const some = (stage: 'fetch' | 'decode' | 'inference') => async (caller: Caller) =>
    (await atWork(caller, stage)) > 0;

  test('before the feeder has seen it', () => cancelledWhile(pid('feeder'), async () => true));

  test('while its rows wait for the decoder', () =>
    cancelledWhile(pid('decoder'), async (caller, id) => (await caller.read(id)).counts.running > 10));

  test('while files are fetched', async () => {
    storm.catalogue.webDelayMs = 1_000;
    try {
      await cancelledWhile(() => [], some('fetch'));
    } finally {
      storm.catalogue.webDelayMs = 0;
    }
  });

  test('while files are decoded', () => cancelledWhile(() => modelProcesses(storm.system), some('decode')));

  test('while its rows are in the hands of the model', () =>
    cancelledWhile(() => modelProcesses(storm.system), some('inference')));

  test('at any moment', async () => {
    for (const ms of [0, 30, 150, 400, 900, 1_600]) {
      const caller = await storm.newCaller();
      const { id } = await caller.submit();
      await sleep(ms);
      await caller.post(id, 'cancel').catch((error) => assert.equal(error.status, 409));
      await caller.when(id, isOver);
      await storm.assertNothingLeft(caller);
    }
  });

  test('while the feeder is killed', async () => {
    const caller = await storm.newCaller();
    const { id } = await held(await modelProcesses(storm.system), async () => {
      const batch = await caller.submit();
      await until('rows are at the model', async () => (await atWork(caller, 'inference')) > 0);
      const cancelling = caller.post(batch.id, 'cancel');
      await storm.system.kill('feeder');
      return cancelling;
    });
    await storm.system.start('feeder');
    await assertCancelled(caller, id);
  });
});
