/**
 * Promise: a worker that stands still for longer than its lock has its work taken over, and when it goes on, what it
 * still does changes nothing.
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isOver } from './catalogue.ts';
import { atWork, held, openStorm, type Storm, until } from './storm.ts';

/** The lock is 10 s, and stalled jobs are looked for every 5 s. */
const standstillMs = 16_000;

describe('what a stopped worker holds is done by another, once', () => {
  let storm: Storm;
  before(async () => {
    storm = await openStorm();
  });
  after(() => storm?.[Symbol.asyncDispose]());

  for (const [name, stage] of [
    ['decoder', 'decode'],
    ['inference', 'inference'],
  ] as const) {
    test(name, async () => {
      const { system } = storm;
      const caller = await storm.newCaller();
      const { id } = await caller.submit();
      await until('rows are in its hands', async () => (await atWork(caller, stage)) > 0);
      const stopped = system.pid(name);
      await held([stopped], async () => {
        // From here on the system's handle is the new one; the old one is ended below.
        await system.start(name);
        await sleep(standstillMs);
        await caller.when(id, isOver);
      });
      assert.notEqual(system.pid(name), stopped);
      const log = await system.log(name);
      const takenOver = log.filter(
        ({ msg, pid, starts }) => msg === 'begun' && pid !== stopped && Number(starts) > 1,
      );
      assert.ok(takenOver.length > 0, 'rows were begun again by the other');
      // What it held it now tries to commit.
      await sleep(1_500);
      await storm.assertUnharmed(caller, id);
      process.kill(stopped, 'SIGKILL');
    });
  }
});
