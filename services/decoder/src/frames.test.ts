import assert from 'node:assert/strict';
import { test } from 'node:test';
import { countFrames, createFrameCutter, type FrameGrid } from './frames.ts';

const ramp = Float32Array.from({ length: 30_000 }, (_, n) => n + 1);

/** First sample of every frame, with the stream pushed in chunks of the given size. */
function cut(
  grid: FrameGrid,
  chunk: number,
  { firstFrame = 0, firstSample = 0, frames = 0 } = {},
): [number, number][] {
  const seen: [number, number][] = [];
  const cutter = createFrameCutter(grid, { firstFrame, firstSample }, (frame, buffer, offset) => {
    seen.push([frame, buffer[offset]!]);
  });
  for (let at = firstSample; at < ramp.length; at += chunk) cutter.push(ramp.subarray(at, at + chunk));
  cutter.finish(frames);
  return seen;
}

for (const grid of [
  { fftSize: 1024, hop: 256, lead: 0 },
  { fftSize: 1024, hop: 5168, lead: 0 },
  { fftSize: 1024, hop: 300, lead: 512 },
]) {
  test(`frames do not depend on how the stream is chunked: hop ${grid.hop}, lead ${grid.lead}`, () => {
    const frames = countFrames(grid, ramp.length);
    const whole = cut(grid, ramp.length, { frames });
    assert.equal(whole.length, frames);
    for (const chunk of [1, 777, 9000]) assert.deepEqual(cut(grid, chunk, { frames }), whole);
    for (const [frame, first] of whole) {
      const start = frame * grid.hop - grid.lead;
      assert.equal(first, start < 0 ? 0 : start + 1);
    }
  });
}

test('a stream that begins inside the grid yields the frames of the whole one', () => {
  const grid = { fftSize: 1024, hop: 700, lead: 512 };
  const whole = cut(grid, 5000, { frames: 20 });
  assert.deepEqual(cut(grid, 999, { firstFrame: 5, firstSample: 5 * 700 - 512, frames: 20 }), whole.slice(5));
  assert.deepEqual(cut(grid, 999, { firstFrame: 5, firstSample: 100, frames: 20 }), whole.slice(5));
});

test('frames are counted as librosa counts them', () => {
  assert.equal(countFrames({ fftSize: 2048, hop: 512, lead: 1024 }, 22_050), 44);
  assert.equal(countFrames({ fftSize: 2048, hop: 512, lead: 0 }, 22_050), 40);
  assert.equal(countFrames({ fftSize: 2048, hop: 512, lead: 0 }, 100), 1);
});
