import assert from 'node:assert/strict';
import { test } from 'node:test';
import { aggregate, calibratedSoftmax } from './aggregate.ts';

const close = (actual: readonly number[], expected: readonly number[]) =>
  actual.length === expected.length && actual.every((value, i) => Math.abs(value - expected[i]!) < 1e-6);
const row = (...logits: number[]) => Float32Array.from(logits);
const plain = { calibration: 'none', aggregation: 'mean' } as const;

test('a temperature above one flattens the probabilities and keeps their order', () => {
  assert.ok(close(calibratedSoftmax(row(Math.log(9), 0), 'none'), [0.9, 0.1]));
  const warm = calibratedSoftmax(row(Math.log(9), 0), { temperature: 2 });
  assert.ok(close(warm, [0.75, 0.25]));
});

test('logits of any size give probabilities that sum to one', () => {
  for (const logits of [row(1e30, 0), row(-1e30, -1e30), row(1_000, 999), row(0, 0)]) {
    const probabilities = calibratedSoftmax(logits, 'none');
    assert.ok(Math.abs(probabilities.reduce((a, b) => a + b) - 1) < 1e-9, String(probabilities));
  }
});

test('a logit that is not a number is an error, not a probability', () => {
  for (const wrong of [Number.NaN, Number.POSITIVE_INFINITY]) {
    assert.throws(() => aggregate([row(0, wrong)], plain), RangeError);
  }
});

test('the mean is taken over the windows that are not silent', () => {
  const { probabilities, windows } = aggregate([row(Math.log(9), 0), null, row(0, 0)], plain);
  assert.ok(close(probabilities!, [0.7, 0.3]));
  assert.equal(windows[1], null);
  assert.ok(close(windows[0]!, [0.9, 0.1]));
});

test('a vote counts in how many windows a label comes first', () => {
  const voted = aggregate([row(5, 0, 1), row(1, 0, 0), null, row(0, 9, 0), row(2, 1, 1)], {
    ...plain,
    aggregation: 'vote',
  });
  assert.deepEqual(voted.probabilities, [0.75, 0.25, 0]);
});

test('when every window is silent there are no probabilities', () => {
  assert.deepEqual(aggregate([null, null], plain), { probabilities: null, windows: [null, null] });
});
