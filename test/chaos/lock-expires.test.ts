/**
 * Promise: a worker that stands still for longer than its lock has its work taken over, and when it goes on, what it
 * still does changes nothing.
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isOver } from './catalogue.ts';
import { atWork, held, modelProcesses, openStorm, type Storm, until } from './storm.ts';

/** The lock is 10 s, and stalled jobs are looked for every 5 s. */
const standstillMs = 16_000;

/** Stops it at a moment at which it holds queue jobs. */
async function stoppedWithWork(pid: number, jobs: () => Promise<number>): Promise<void> {
  await until('it was stopped with work in its hands', async () => {
    if ((await jobs()) === 0) return false;
    process.kill(pid, 'SIGSTOP');
    // What was on its way to Redis has arrived.
    await sleep(50);
    if ((await jobs()) > 0) return true;
    process.kill(pid, 'SIGCONT');
    return false;
  });
}

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
      const stopped = system.pid(name);
      try {
        await held(name === 'inference' ? await modelProcesses(system) : [], async () => {
          await stoppedWithWork(stopped, () => atWork(caller, stage));
          // From here on the system's handle is the new one.
          await system.start(name);
          await sleep(standstillMs);
          await caller.when(id, isOver);
          process.kill(stopped, 'SIGCONT');
        });
        const log = await system.log(name);
        const takenOver = log.filter(
          ({ msg, pid, starts }) =>
            pid !== stopped &&
            ((msg === 'begun' && Number(starts) > 1) || /committed before/.test(String(msg))),
        );
        assert.ok(takenOver.length > 0, 'rows were delivered again, to the other');
        // What it held it now tries to commit.
        await sleep(1_500);
        await storm.assertUnharmed(caller, id);
      } finally {
        process.kill(stopped, 'SIGKILL');
      }
    });
  }
});
