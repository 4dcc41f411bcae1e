/** The picture of the sound: a stored log-mel image drawn as PNG. */
import type { Uint8Tensor } from '@acousticsense/shared/tensor';
import { encode } from 'fast-png';

/** Side of the picture at scale 1, the model's own input size. */
export const side = 224;

/**
 * @param image `[bands, frames]`, row 0 the lowest band, 0 = quiet.
 * @param size side of the picture in pixels.
 * @returns PNG: time left to right, low frequencies at the bottom.
 */
export function drawSpectrogram(image: Uint8Tensor, size: number): Uint8Array {
  const [bands, frames] = image.shape as [number, number];
  const rows = resample(image.data, bands, frames, size);
  const rgb = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y += 1) {
    const row = (size - 1 - y) * size;
    for (let x = 0; x < size; x += 1) {
      const colour = rows[row + x]! * 3;
      const at = (y * size + x) * 3;
      rgb[at] = colourMap[colour]!;
      rgb[at + 1] = colourMap[colour + 1]!;
      rgb[at + 2] = colourMap[colour + 2]!;
    }
  }
  return encode({ width: size, height: size, data: rgb, channels: 3, depth: 8 });
}

/** Separable: area average where the image shrinks, linear interpolation where it grows. */
function resample(data: Uint8Array, height: number, width: number, size: number): Uint8Array {
  const wide = new Float32Array(height * size);
  const across = createBlend(width, size);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < size; x += 1) {
      let sum = 0;
      for (let cell = across.first[x]!; cell < across.first[x + 1]!; cell += 1) {
        sum += data[y * width + across.source[cell]!]! * across.weight[cell]!;
      }
      wide[y * size + x] = sum;
    }
  }
  const out = new Uint8Array(size * size);
  const down = createBlend(height, size);
  const row = new Float32Array(size);
  for (let y = 0; y < size; y += 1) {
    row.fill(0.5);
    for (let cell = down.first[y]!; cell < down.first[y + 1]!; cell += 1) {
      const from = down.source[cell]! * size;
      const weight = down.weight[cell]!;
      for (let x = 0; x < size; x += 1) row[x]! += wide[from + x]! * weight;
    }
    // Half was added above: cutting off rounds to nearest.
    out.set(row, y * size);
  }
  return out;
}

interface Blend {
  /** Cell n is made of the entries from first[n] to first[n + 1] of the other two; weights of a cell sum to 1. */
  readonly first: Int32Array;
  readonly source: Int32Array;
  readonly weight: Float32Array;
}

function createBlend(from: number, to: number): Blend {
  const ratio = from / to;
  const reach = Math.max(1, ratio);
  const first = new Int32Array(to + 1);
  const source: number[] = [];
  const weight: number[] = [];
  for (let index = 0; index < to; index += 1) {
    const centre = (index + 0.5) * ratio - 0.5;
    let total = 0;
    for (let cell = Math.ceil(centre - reach); cell <= Math.floor(centre + reach); cell += 1) {
      const share = 1 - Math.abs(cell - centre) / reach;
      if (share <= 0) continue;
      source.push(Math.min(from - 1, Math.max(0, cell)));
      weight.push(share);
      total += share;
    }
    for (let n = first[index]!; n < weight.length; n += 1) weight[n]! /= total;
    first[index + 1] = weight.length;
  }
  return { first, source: Int32Array.from(source), weight: Float32Array.from(weight) };
}

/**
 * 256 RGB colours from indigo night over violet and coral to pale yellow: lightness rises evenly in Oklab, so
 * equal steps in decibels look equal. Oklab to sRGB after Björn Ottosson, https://bottosson.github.io/posts/oklab/
 */
export const colourMap: Uint8Array = (() => {
  const table = new Uint8Array(256 * 3);
  for (let value = 0; value < 256; value += 1) {
    const t = value / 255;
    const lightness = 0.1 + 0.88 * t;
    // As colourful as sRGB allows all along this path.
    const chroma = 0.03 + 0.135 * Math.sin(Math.PI * (0.06 + 0.9 * t));
    const hue = ((278 + 182 * t) * Math.PI) / 180;
    table.set(oklabToSrgb(lightness, chroma * Math.cos(hue), chroma * Math.sin(hue)), value * 3);
  }
  return table;
})();

function oklabToSrgb(lightness: number, a: number, b: number): [number, number, number] {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((channel) => {
    const clipped = Math.min(1, Math.max(0, channel));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  }) as [number, number, number];
}
