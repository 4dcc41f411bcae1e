import assert from 'node:assert/strict';
import { test } from 'node:test';
import { fastClock, systemClock } from './clock.ts';
import { backoffBy, maxAttempts, TryLater, waitAfter } from './messages.ts';

const hour = 3_600_000;

test('ten attempts are spread over about 75 hours, each wait longer than the one before', () => {
  const waits = Array.from({ length: maxAttempts - 1 }, (_, n) => waitAfter(n + 1, 0, 0.5));
  assert.equal(maxAttempts, 10);
  const total = waits.reduce((a, b) => a + b) / hour;
  assert.ok(total > 75 && total < 76, `${total} h`);
  assert.deepEqual(
    [...waits].sort((a, b) => a - b),
    waits,
  );
});

test('no two receivers are met by all at once: a wait differs by a tenth either way', () => {
  assert.equal(Math.round(waitAfter(2, 0, 0)), 270_000);
  assert.equal(Math.round(waitAfter(2, 0, 1)), 330_000);
  const some = new Set(Array.from({ length: 20 }, () => waitAfter(2)));
  assert.ok(some.size > 10);
});

test('a receiver that asks for more time gets it, one that asks for less does not come sooner', () => {
  assert.equal(waitAfter(1, 10 * hour, 0.5), 10 * hour);
  assert.equal(waitAfter(5, 1_000, 0.5), 5 * hour);
});

test('a clock that runs fast shortens what is waited for', () => {
  const asked = new TryLater('status', 10 * hour);
  assert.equal(backoffBy(systemClock)(1, 'custom', asked), 10 * hour);
  assert.equal(backoffBy(fastClock(1_000))(1, 'custom', asked), 36_000);
  assert.ok(backoffBy(systemClock)(3, 'custom', new Error('a fault of ours')) < hour);
});
