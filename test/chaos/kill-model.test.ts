/** Promise: the model's process dies in the middle of a batch of windows, and no row suffers. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { atWork, held, modelProcesses, openStorm, until } from './storm.ts';

test("a batch survives kill -9 of the model's process in the middle of a batch of windows, again and again", async () => {
  await using storm = await openStorm();
  const { system } = storm;
  const caller = await storm.newCaller();
  const { id } = await caller.submit();
  for (let n = 0; n < 3; n += 1) {
    const children = await modelProcesses(system);
    await held(children, async () => {
      await until('several rows are at the model', async () => (await atWork(caller, 'inference')) > 2);
      for (const pid of children) process.kill(pid, 'SIGKILL');
    });
    await until('another process is there', async () => {
      const now = await modelProcesses(system).catch(() => []);
      return now.some((pid) => !children.includes(pid));
    });
  }
  await storm.assertUnharmed(caller, id);
  const metrics = await (await fetch(`${system.healthUrl('inference')}/metrics`)).text();
  const restarts = Number(/^acousticsense_\w*child_restarts_total\{[^}]*\} (\d+)/m.exec(metrics)?.[1]);
  assert.ok(restarts >= 3, `${restarts} restarts are counted`);
});
