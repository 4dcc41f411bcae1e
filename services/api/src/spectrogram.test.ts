import assert from 'node:assert/strict';
import { test } from 'node:test';
import { decode } from 'fast-png';
import { colourMap, drawSpectrogram } from './spectrogram.ts';

const pixel = (png: Uint8Array, x: number, y: number) => {
  const { data, width } = decode(png);
  return [...data.subarray((y * width + x) * 3, (y * width + x) * 3 + 3)];
};
const colour = (value: number) => [...colourMap.subarray(value * 3, value * 3 + 3)];

test('time runs left to right and low frequencies lie at the bottom', () => {
  // Loud only in the lowest band, and there only in the last frame.
  const image = { shape: [8, 8], data: new Uint8Array(64) };
  image.data[7] = 255;
  const png = drawSpectrogram(image, 224);
  assert.deepEqual(pixel(png, 223, 223), colour(255));
  assert.deepEqual(pixel(png, 0, 223), colour(0));
  assert.deepEqual(pixel(png, 223, 0), colour(0));
});

test('an even image keeps its value at every size', () => {
  for (const [bands, frames] of [
    [128, 2_000],
    [128, 1],
    [64, 224],
    [300, 50],
  ] as const) {
    const png = drawSpectrogram(
      { shape: [bands, frames], data: new Uint8Array(bands * frames).fill(97) },
      224,
    );
    for (const at of [0, 111, 223]) assert.deepEqual(pixel(png, at, at), colour(97), `${bands}x${frames}`);
  }
});

test('the colour map gets lighter with every few steps: louder never looks quieter', () => {
  const luminance = Array.from({ length: 256 }, (_, value) => {
    const [r, g, b] = colour(value).map((channel) => (channel / 255) ** 2.2);
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  });
  for (let value = 4; value < 256; value += 4)
    assert.ok(luminance[value]! > luminance[value - 4]!, String(value));
  assert.ok(luminance[0]! < 0.02 && luminance[255]! > 0.8);
});
