/** A bundle around the tiny model of `make_test_models.py`, whose answers a test can predict. */
import { createHash } from 'node:crypto';
import { copyFile, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
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

export function distance(actual: ArrayLike<number>, expected: readonly number[]): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  return Math.max(...expected.map((value, i) => Math.abs(value - actual[i]!)));
}

/** Writes the bundle into a new directory. `change` may alter the manifest before it is written. */
export async function writeMeansBundle({
  change,
  selfTest = [windowOf(10), windowOf(200)].map(logitsOf),
}: {
  change?: (manifest: Manifest) => void;
  selfTest?: number[][];
} = {}) {
  const directory = await mkdtemp(path.join(tmpdir(), 'acousticsense-means-'));
  await copyFile(new URL('./means.onnx', import.meta.url), path.join(directory, 'model.onnx'));
  const windows = Buffer.concat([npyHeader([2, bands, frames]), windowOf(10), windowOf(200)]);
  await writeFile(path.join(directory, 'input.npy'), windows);
  await writeFile(path.join(directory, 'logits.json'), JSON.stringify(selfTest));
  const files: Record<string, string> = {};
  for (const file of ['model.onnx', 'input.npy', 'logits.json']) {
    files[file] = createHash('sha256')
      .update(await readFile(path.join(directory, file)))
      .digest('hex');
  }
  const manifest: Manifest = {
    format: 1,
    name: 'means',
    version: '1',
    licence: 'none',
    provenance: 'made for tests',
    labels,
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
      outputs: { logits: { name: 'logits', shape: ['batch', labels.length] } },
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
    accuracy: { split: 'none', clips: 0, top1: 0, top3: 0, meanRecall: 0 },
    selfTest: { input: 'input.npy', output: 'logits.json', tolerance: 1e-4 },
    files,
  };
  change?.(manifest);
  await writeFile(path.join(directory, 'model.json'), JSON.stringify(manifest));
  return { directory, [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }) };
}
