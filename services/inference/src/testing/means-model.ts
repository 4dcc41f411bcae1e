/** Bundles around the tiny models of `make_test_models.py`, whose answers a test can predict. */
import { createHash } from 'node:crypto';
import { copyFile, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Manifest } from '@acousticsense/shared/bundle';
import { npyHeader } from '@acousticsense/shared/tensor';

const bands = 16;
const frames = 8;
export const windowBytes = bands * frames;
export const labels = ['Loud', 'Louder', 'Soft', 'Softer'];
export const moodyChild = new URL('./moody-child.ts', import.meta.url);

/** A window of one value, with its first byte replaced where a mood is wanted. */
export function windowOf(value: number, first = value): Uint8Array {
  const window = new Uint8Array(windowBytes).fill(value);
  window[0] = first;
  return window;
}

/** What the model must answer for a window. */
export function logitsOf(window: Uint8Array): number[] {
  const mean = window.reduce((sum, value) => sum + value, 0) / window.length;
  return [8, 4, -4, -8].map((slope, i) => (mean / 255) * slope + i);
}

/** Of the full model: unit length. */
export function embeddingOf(window: Uint8Array): number[] {
  const mean = outlierOf(window);
  return [Math.cos(mean), Math.sin(mean)];
}

/** Of the full model. */
export function outlierOf(window: Uint8Array): number {
  return window.reduce((sum, value) => sum + value, 0) / window.length / 255;
}

/** Of the full model, [4][2]: cells of 4 x 4 values, brighter ones drawing more attention. */
export function attentionOf(window: Uint8Array): number[][] {
  const cell = (row: number, column: number) => {
    let sum = 0;
    for (let i = 0; i < 16; i += 1) sum += window[(4 * row + (i >> 2)) * frames + 4 * column + (i % 4)]!;
    return sum / 16 / 255 + 1;
  };
  const cells = [0, 1, 2, 3].map((row) => [0, 1].map((column) => cell(row, column)));
  const total = cells.flat().reduce((a, b) => a + b, 0);
  return cells.map((row) => row.map((value) => value / total));
}

export function distance(actual: ArrayLike<number>, expected: readonly number[]): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  return Math.max(...expected.map((value, i) => Math.abs(value - actual[i]!)));
}

/** Byte offsets of values in the full model's weights.bin. */
export const weightsAt = { slope: 4, gain: 36 } as const;

/**
 * Writes the bundle into a new directory.
 *
 * @param full with embedding, outlier score, explain graph and weights in a file of their own.
 * @param spoil alters files before they are hashed, `change` the manifest after that.
 */
export async function writeMeansBundle({
  full = false,
  change,
  spoil = {},
  selfTest = [windowOf(10), windowOf(200)].map(logitsOf),
}: {
  full?: boolean;
  change?: (manifest: Manifest) => void;
  spoil?: Record<string, (bytes: Buffer) => Buffer>;
  selfTest?: unknown;
} = {}) {
  const directory = await mkdtemp(path.join(tmpdir(), 'acousticsense-means-'));
  const models = full
    ? ['full/model.onnx', 'full/explain.onnx', 'full/weights.bin'].map((file) => [file, path.basename(file)])
    : [['means.onnx', 'model.onnx']];
  for (const [from, to] of models) await copyFile(new URL(from!, import.meta.url), path.join(directory, to!));
  const windows = Buffer.concat([npyHeader([2, bands, frames]), windowOf(10), windowOf(200)]);
  await writeFile(path.join(directory, 'input.npy'), windows);
  await writeFile(path.join(directory, 'logits.json'), JSON.stringify(selfTest));
  const files: Record<string, string> = {};
  for (const file of await readdir(directory)) {
    const original = await readFile(path.join(directory, file));
    const bytes = spoil[file]?.(original) ?? original;
    if (bytes !== original) await writeFile(path.join(directory, file), bytes);
    files[file] = createHash('sha256').update(bytes).digest('hex');
  }
  const manifest: Manifest = {
    format: 1,
    name: 'means',
    version: '1',
    licence: 'none',
    provenance: 'made for tests',
    labels: [...labels],
    profile: {
      sampleRate: 8_000,
      channels: 'mean',
      resampler: 'soxr',
      window: 'hann',
      fftSize: 256,
      hopLength: 1_000,
      centered: false,
      padMode: 'none',
      power: 2,
      melScale: 'slaney',
      melNorm: 'slaney',
      melBands: bands,
      minHz: 0,
      maxHz: 4_000,
      reference: 'max',
      scope: 'window',
      floorDb: -70,
      stretch: 'none',
      quantisation: 'linear-uint8',
      windowFrames: frames,
      stepFrames: frames,
      placement: 'anchored',
      shortInput: 'loop',
    },
    graph: {
      file: 'model.onnx',
      input: { name: 'windows', shape: ['batch', bands, frames], type: 'uint8' },
      outputs: {
        logits: { name: 'logits', shape: ['batch', labels.length] },
        ...(full ? { embedding: { name: 'embedding', shape: ['batch', 2] } } : {}),
        ...(full ? { outlier: { name: 'outlier', shape: ['batch'] } } : {}),
      },
      ...(full
        ? { explain: { file: 'explain.onnx', output: { name: 'attention', shape: ['batch', 4, 2] } } }
        : {}),
      precision: 'fp32',
      imageSize: 8,
      colour: 'none',
      resize: 'none',
      mean: [0],
      std: [1],
    },
    windows: 'middle',
    aggregation: 'mean',
    calibration: 'none',
    threshold: 0.5,
    ...(full ? { outlierThreshold: 0.9 } : {}),
    accuracy: { split: 'none', clips: 0, top1: 0, top3: 0, meanRecall: 0 },
    selfTest: { input: 'input.npy', output: 'logits.json', tolerance: 1e-4 },
    files,
  };
  change?.(manifest);
  await writeFile(path.join(directory, 'model.json'), JSON.stringify(manifest));
  return { directory, [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }) };
}
