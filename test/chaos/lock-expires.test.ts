/**
 * Promise: a worker that stands still for longer than its lock has its work taken over, and when it goes on, what it
 * still does changes nothing.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isOver } from './catalogue.ts';
import { atWork, held, openStorm, until } from './storm.ts';

/** The lock is 10 s, and stalled jobs are looked for every 5 s. */
const standstillMs = 16_000;

for (const [name, stage] of [
  ['decoder', 'decode'],
  ['inference', 'inference'],
] as const) {
  test(`rows in the hands of a stopped ${name} are done by another, once`, async () => {
    await using storm = await openStorm();
    const { system } = storm;
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    await until('rows are in its hands', async () => (await atWork(caller, stage)) > 0);
    const stopped = system.pid(name);
    await held([stopped], async () => {
      // Under the same name: the system's handle is the new one from here on, the old one is ended below.
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
