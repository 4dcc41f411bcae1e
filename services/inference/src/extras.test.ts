import assert from 'node:assert/strict';
import { test } from 'node:test';
import { explainedOf, explanationOf, shortestFloat32, vectorsOf } from './extras.ts';

const counted = (count: number) => Array.from({ length: count }, (_, i) => i);
const span = { start: 0, end: 1 };

test('up to sixteen windows are all explained, of more sixteen different ones from end to end', () => {
  assert.deepEqual(explainedOf([]), []);
  assert.deepEqual(explainedOf(counted(16)), counted(16));
  for (const count of [17, 31, 1_000]) {
    const chosen = explainedOf(counted(count));
    assert.equal(new Set(chosen).size, 16);
    assert.deepEqual([chosen[0], chosen.at(-1)], [0, count - 1]);
    const gaps = chosen.slice(1).map((window, i) => window - chosen[i]!);
    assert.ok(Math.max(...gaps) - Math.min(...gaps) <= 1);
  }
});

test('a map has rows of columns, with four significant digits whatever its scale', () => {
  const attention = Float32Array.from([0.123456, 0.00001234567, 0, 1, 0.5, 0.25]);
  const { windows } = explanationOf([span], [{ attention }], 3);
  assert.deepEqual(windows[0]?.attention, [
    [0.1235, 0.00001235, 0],
    [1, 0.5, 0.25],
  ]);
});

test('a float32 is written with the fewest digits that are it and no other', () => {
  for (const [value, text] of [
    [0.1, '0.1'],
    [1 / 3, '0.33333334'],
    [-2.5, '-2.5'],
    [16_777_216, '16777216'],
    [0, '0'],
    [3.4028234663852886e38, '3.4028235e+38'],
  ] as const) {
    const single = Math.fround(value);
    assert.equal(String(shortestFloat32(single)), text);
  }
  for (let exponent = -149; exponent < 128; exponent += 1) {
    const single = Math.fround(2 ** exponent * 1.2345678);
    assert.equal(Math.fround(shortestFloat32(single)), single);
  }
});

test('the style anchor has unit length, and embeddings too when the model rounds', () => {
  const answer = (...embedding: number[]) => ({
    logits: Float32Array.of(1, 2),
    embedding: Float32Array.from(embedding),
  });
  const answers = [answer(1.004, 0), null, answer(0, 0.998), answer(0, 1)];
  const { embedding, windows } = vectorsOf(['a', 'b'], [span, span, span, span], answers, true);
  assert.deepEqual(embedding, [0.447214, 0.894427]);
  assert.deepEqual(
    windows.map((window) => window.embedding),
    [[1, 0], null, [0, 1], [0, 1]],
  );
});

test('embeddings that cancel out have no direction, so there is no anchor', () => {
  const answers = [1, -1].map((value) => ({ logits: Float32Array.of(0), embedding: Float32Array.of(value) }));
  assert.equal(vectorsOf(['a'], [span, span], answers, true).embedding, undefined);
});
