import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { createErrands } from './errands.ts';

const log = pino({ level: 'silent' });
const never = new AbortController().signal;

test('of one name one is under way, of all so many', async () => {
  const errands = createErrands('test', 2, log, never);
  const gates = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const begun: string[] = [];
  const run = (name: string, gate: Promise<void>) =>
    errands.run(name, async () => {
      begun.push(name);
      await gate;
    });
  run('a', gates[0]!.promise);
  run('a', gates[0]!.promise);
  run('b', gates[1]!.promise);
  run('c', Promise.resolve());
  assert.deepEqual(begun, ['a', 'b']);
  gates[0]!.resolve();
  await sleep(0);
  run('a', Promise.resolve());
  assert.deepEqual(begun, ['a', 'b', 'a']);
  gates[1]!.resolve();
  await errands.settle();
});

test('what fails is tried again after a while, and ever more seldom; what works is not slowed down', async () => {
  const errands = createErrands('test', 9, log, never);
  const times: number[] = [];
  let works = false;
  const from = performance.now();
  while (times.length < 3) {
    errands.run('a', async () => {
      times.push(performance.now() - from);
      if (!works) throw new Error('no');
    });
    assert.ok(performance.now() - from < 20_000);
    await sleep(5);
  }
  const [first, second, third] = times as [number, number, number];
  assert.ok(second - first >= 490 && second - first < 900, `${times}`);
  assert.ok(third - second >= 990 && third - second < 1_500, `${times}`);
  works = true;
  while (times.length < 5) {
    errands.run('a', async () => void times.push(performance.now() - from));
    await sleep(5);
  }
  assert.ok(times[4]! - times[3]! < 400, `${times}`);
});

test('after a stop nothing is begun', async () => {
  const stop = new AbortController();
  const errands = createErrands('test', 9, log, stop.signal);
  stop.abort();
  errands.run('a', () => assert.fail('begun'));
  await errands.settle();
});
