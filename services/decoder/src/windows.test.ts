import assert from 'node:assert/strict';
import { test } from 'node:test';
import { decibelRange, hashSelection, planWindows, quantise } from './windows.ts';

const anchored = { windowFrames: 128, stepFrames: 64, placement: 'anchored' } as const;
const floor70 = { topDb: 0, spanDb: 70 };
const linear = { quantisation: 'linear-uint8', power: 2 } as const;

test('the middle window lies in the middle', () => {
  assert.deepEqual(planWindows('middle', 1000, anchored), [436]);
  assert.deepEqual(planWindows(1, 1000, anchored), [436]);
});

test('all windows come every step, the last anchored to the end', () => {
  assert.deepEqual(planWindows('all', 300, anchored), [0, 64, 128, 172]);
  assert.deepEqual(planWindows('all', 256, anchored), [0, 64, 128]);
});

test('centred windows are as many as fit, and what is left over is cut from both ends alike', () => {
  const centred = { windowFrames: 100, stepFrames: 100, placement: 'centred' } as const;
  assert.deepEqual(planWindows('all', 399, centred), [49, 149, 249]);
  assert.deepEqual(planWindows('all', 400, centred), [0, 100, 200, 300]);
  assert.deepEqual(planWindows('all', 100, centred), [0]);
  assert.deepEqual(planWindows('all', 199, centred), [49]);
  assert.deepEqual(planWindows('all', 60, centred), [0]);
  const overlapping = { ...centred, stepFrames: 30 };
  for (let frames = 101; frames < 300; frames += 1) {
    const starts = planWindows('all', frames, overlapping);
    const [before, after] = [starts[0]!, frames - (starts.at(-1)! + 100)];
    assert.ok(after - before === 0 || after - before === 1, `${frames}: ${before} before, ${after} after`);
    assert.ok(before + after < 30, `${frames}: one more would have fitted`);
  }
  assert.deepEqual(planWindows('middle', 399, centred), [149]);
  assert.deepEqual(planWindows(2, 399, centred), [0, 299]);
});

test('N windows are evenly spaced from the beginning to the end', () => {
  assert.deepEqual(planWindows(3, 328, anchored), [0, 100, 200]);
  assert.deepEqual(planWindows(2, 1000, anchored), [0, 872]);
});

test('more windows than places give each place once', () => {
  assert.deepEqual(planWindows(64, 130, anchored), [0, 1, 2]);
});

test('audio of a window or less has one window', () => {
  for (const choice of ['middle', 'all', 5] as const) {
    assert.deepEqual(planWindows(choice, 128, anchored), [0]);
    assert.deepEqual(planWindows(choice, 3, anchored), [0]);
  }
});

test('quantisation puts the floor at 0, the reference at 255, and rounds between', () => {
  const mel = Float32Array.from([1, 0.1, 1e-7, 1e-9, 0, 10 ** -1.4]);
  const out = new Uint8Array(6);
  quantise(mel, out, { bands: 1, windowFrames: 6, validFrames: 6, range: floor70, ...linear });
  assert.deepEqual([...out], [255, Math.round((60 / 70) * 255), 0, 0, 0, 204]);
});

test('rows are bands, and a short input repeats its columns', () => {
  const mel = Float32Array.from([1, 1e-9, 1e-9, 1]); // frame 0: low band; frame 1: high band
  const out = new Uint8Array(10);
  quantise(mel, out, { bands: 2, windowFrames: 5, validFrames: 2, range: floor70, ...linear });
  assert.deepEqual([...out], [255, 0, 255, 0, 255, 0, 255, 0, 255, 0]);
});

test('a window without power is empty, not full', () => {
  const out = new Uint8Array(4).fill(9);
  quantise(new Float32Array(4), out, {
    bands: 1,
    windowFrames: 4,
    validFrames: 4,
    range: decibelRange(new Float32Array(4), { stretch: 'none', reference: 0, floorDb: -70, power: 2 }),
    ...linear,
  });
  assert.deepEqual([...out], [0, 0, 0, 0]);
});

/** What a row of cells becomes. */
function levels(
  mel: number[],
  reference: number,
  quantisation: 'linear-uint8' | 'matplotlib-uint8' = 'matplotlib-uint8',
): number[] {
  const cells = Float32Array.from(mel);
  const out = new Uint8Array(mel.length);
  const range = decibelRange(cells, { stretch: 'window', reference, floorDb: -80, power: 2 });
  const shape = { bands: 1, windowFrames: mel.length, validFrames: mel.length };
  quantise(cells, out, { ...shape, range, quantisation, power: 2 });
  return [...out];
}

test('a stretched window spans from its own least to its own greatest cell', () => {
  // -60, -41, -20 dB under the track's loudest cell.
  const cells = [1e-6, 10 ** -4.1, 1e-2];
  assert.deepEqual(levels(cells, 1), [0, 121, 255]);
  assert.deepEqual(levels(cells, 0.1, 'linear-uint8'), [0, 121, 255]);
  const range = decibelRange(Float32Array.from(cells), {
    stretch: 'window',
    reference: 1,
    floorDb: -80,
    power: 2,
  });
  assert.ok(Math.abs(range.topDb + 20) < 1e-6 && Math.abs(range.spanDb - 40) < 1e-6, JSON.stringify(range));
});

test('the floor under the reference is raised before a window is stretched', () => {
  assert.deepEqual(levels([1e-12, 1e-8, 1e-4], 1), [0, 0, 255]);
  assert.deepEqual(levels([1e-12, 1e-9, 1e-11], 1), [0, 0, 0], 'a window under the floor is constant');
});

test('a constant window is all 0', () => {
  assert.deepEqual(levels([0.5, 0.5, 0.5], 1), [0, 0, 0]);
  assert.deepEqual(levels([0, 0, 0], 0), [0, 0, 0]);
});

test('the colour index takes 256 equal steps, and only the top itself shares the last one', () => {
  const share = (at: number) => 10 ** (8 * at - 8);
  const index = (at: number) => levels([share(0), share(at), share(1)], 1)[1];
  for (let step = 0; step < 256; step += 1) {
    assert.equal(index((step + 0.02) / 256), step);
    assert.equal(index((step + 0.98) / 256), step);
  }
  assert.equal(index(1), 255);
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
