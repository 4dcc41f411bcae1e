import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import { createPlaces } from './places.ts';

const calm = new AbortController().signal;

test('so many are in at a time, in all and at one host; who leaves lets the first in that has room', async () => {
  const places = createPlaces({ total: 3, perHost: 2 });
  const inside: string[] = [];
  const take = async (name: string, host: string) => {
    const place = await places.take(host, calm);
    inside.push(name);
    return place;
  };
  const a1 = await take('a1', 'a');
  void take('a2', 'a');
  void take('a3', 'a');
  const b1 = take('b1', 'b');
  void take('b2', 'b');
  await setImmediate();
  assert.deepEqual(inside, ['a1', 'a2', 'b1']);
  a1[Symbol.dispose]();
  a1[Symbol.dispose]();
  await setImmediate();
  assert.deepEqual(inside.slice(3), ['a3']);
  (await b1)[Symbol.dispose]();
  await setImmediate();
  assert.deepEqual(inside.slice(4), ['b2']);
});

test('who gives up waiting leaves with the reason, and takes nobody else a place', async () => {
  const places = createPlaces({ total: 4, perHost: 1 });
  const first = await places.take('a', calm);
  const impatient = new AbortController();
  const waiting = places.take('a', impatient.signal);
  const next = places.take('a', calm);
  const reason = new Error('cancelled');
  impatient.abort(reason);
  await assert.rejects(waiting, reason);
  first[Symbol.dispose]();
  await next;
  assert.throws(() => places.take('b', AbortSignal.abort(reason)), reason);
});

test('a host that rests lets nobody in until it has rested, and the last word counts', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  const places = createPlaces({ total: 4, perHost: 4 });
  places.rest('a', 1_000);
  places.rest('a', 5_000);
  let entered = false;
  void places.take('a', calm).then(() => {
    entered = true;
  });
  await places.take('b', calm);
  t.mock.timers.tick(4_999);
  await setImmediate();
  assert.equal(entered, false);
  t.mock.timers.tick(1);
  await setImmediate();
  assert.equal(entered, true);
  // No host is waited for longer than a minute, whatever it asks.
  places.rest('a', 86_400_000);
  t.mock.timers.tick(60_000);
  await places.take('a', calm);
});
