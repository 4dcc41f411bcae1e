import assert from 'node:assert/strict';
import { test } from 'node:test';
import { hashSelection, planWindows, quantise } from './windows.ts';

test('the middle window lies in the middle', () => {
  assert.deepEqual(planWindows('middle', 1000, 128, 64), [436]);
  assert.deepEqual(planWindows(1, 1000, 128, 64), [436]);
});

test('all windows come every step, the last anchored to the end', () => {
  assert.deepEqual(planWindows('all', 300, 128, 64), [0, 64, 128, 172]);
  assert.deepEqual(planWindows('all', 256, 128, 64), [0, 64, 128]);
});

test('N windows are evenly spaced from the beginning to the end', () => {
  assert.deepEqual(planWindows(3, 328, 128, 64), [0, 100, 200]);
  assert.deepEqual(planWindows(2, 1000, 128, 64), [0, 872]);
});

test('more windows than places give each place once', () => {
  assert.deepEqual(planWindows(64, 130, 128, 64), [0, 1, 2]);
});

test('audio of a window or less has one window', () => {
  for (const choice of ['middle', 'all', 5] as const) {
    assert.deepEqual(planWindows(choice, 128, 128, 64), [0]);
    assert.deepEqual(planWindows(choice, 3, 128, 64), [0]);
  }
});

test('quantisation puts the floor at 0, the reference at 255, and rounds between', () => {
  const mel = Float32Array.from([1, 0.1, 1e-7, 1e-9, 0, 10 ** -1.4]);
  const out = new Uint8Array(6);
  quantise(mel, out, { bands: 1, windowFrames: 6, validFrames: 6, reference: 1, floorDb: -70, power: 2 });
  assert.deepEqual([...out], [255, Math.round((60 / 70) * 255), 0, 0, 0, 204]);
});

test('rows are bands, and a short input repeats its columns', () => {
  const mel = Float32Array.from([1, 1e-9, 1e-9, 1]); // frame 0: low band; frame 1: high band
  const out = new Uint8Array(10);
  quantise(mel, out, { bands: 2, windowFrames: 5, validFrames: 2, reference: 1, floorDb: -70, power: 2 });
  assert.deepEqual([...out], [255, 0, 255, 0, 255, 0, 255, 0, 255, 0]);
});

test('a window without power is empty, not full', () => {
  const out = new Uint8Array(4).fill(9);
  quantise(new Float32Array(4), out, {
    bands: 1,
    windowFrames: 4,
    validFrames: 4,
    reference: 0,
    floorDb: -70,
    power: 2,
  });
  assert.deepEqual([...out], [0, 0, 0, 0]);
});

test('selections that choose the same share a hash, others do not', () => {
  const one = hashSelection({ windows: 'middle', start: 0 });
  assert.equal(hashSelection({ start: 0, windows: 1 }), one);
  const others = [
    hashSelection({ windows: 'all', start: 0 }),
    hashSelection({ windows: 'middle', start: 1 }),
    hashSelection({ windows: 'middle', start: 0, duration: 10 }),
    hashSelection({ windows: 2, start: 0 }),
  ];
  assert.equal(new Set([one, ...others]).size, 5);
});
