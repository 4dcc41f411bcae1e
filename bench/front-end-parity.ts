/**
 * Parity of the front end with log-mel arrays that others computed from the same recordings: decodes each FLAC, makes
 * a centred hop-512 log-mel, and compares it with the clip's stored array after one offset and one scale per clip.
 *
 *     npm run bench -- front-end-parity <directory of FLACs> <mel.npy> <names.json>
 *
 * The arrays come from the two GTZAN files of the project's data, made plain by these lines of Python:
 *
 *     import json, numpy as np
 *     parts = [np.load(f"gtzan-{part}.npz") for part in ("train", "valid")]
 *     np.save("mel.npy", np.concatenate([p["mel"] for p in parts]))
 *     json.dump([str(n) for p in parts for n in p["name"]], open("names.json", "w"))
 */
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Profile } from '@acousticsense/shared/bundle';
import { parseNpy } from '@acousticsense/shared/tensor';
import { loadConfig } from '../services/decoder/src/config.ts';
import { createFfmpeg } from '../services/decoder/src/ffmpeg.ts';
import { createFrontEnd } from '../services/decoder/src/front-end.ts';
import { fineProfile } from '../services/decoder/src/testing/setup.ts';

/** How the arrays were made; a window longer than any clip, so that one window holds all of it. */
const profile: Profile = { ...fineProfile, windowFrames: 4096, stepFrames: 4096 };
/** These FLACs drift in time against their arrays. */
const drifting = new Set([
  ...[0, 2, 3, 4, 5, 6, 7, 9].map((number) => `country.0000${number}`),
  ...[0, 3, 5, 8].map((number) => `disco.0000${number}`),
]);
const columns = 387;
const frameOf = (column: number) => Math.floor(((column + 0.5) * 1293) / 387.5);

const [directory, melFile, namesFile] = process.argv.slice(2);
if (directory === undefined || melFile === undefined || namesFile === undefined) {
  console.error('usage: npm run bench -- front-end-parity <directory of FLACs> <mel.npy> <names.json>');
  process.exit(2);
}
const stored = parseNpy(await readFile(melFile)).data;
const names = JSON.parse(await readFile(namesFile, 'utf8')) as string[];
const options = loadConfig({}).ffmpeg;
const frontEnd = createFrontEnd({
  ffmpeg: createFfmpeg(options),
  profile,
  maxSeconds: options.maxDurationSeconds,
});

const results: { name: string; error: number }[] = [];
for (const file of (await readdir(directory)).filter((name) => name.endsWith('.flac')).sort()) {
  const name = file.replace(/\.flac$/, '');
  const index = names.findIndex((stored) => stored.includes(name));
  if (index < 0 || drifting.has(name)) continue;
  results.push({ name, error: await compare(path.join(directory, file), index) });
}
const errors = results.map(({ error }) => error).sort((a, b) => a - b);
const worst = results.toSorted((a, b) => b.error - a.error).slice(0, 5);
console.log(
  `${errors.length} clips, median error ${median(errors).toFixed(3)} dB, 90th percentile ${errors[Math.floor(errors.length * 0.9)]?.toFixed(3)} dB`,
);
console.log(`worst: ${worst.map(({ name, error }) => `${name} ${error.toFixed(3)}`).join(', ')}`);

/** Median absolute difference in dB over the cells that neither side has cut off at its floor. */
async function compare(file: string, index: number): Promise<number> {
  const scratch = await mkdtemp(path.join(tmpdir(), 'parity-'));
  try {
    const signal = AbortSignal.timeout(60_000);
    const { tensorFile, windows } = await frontEnd.analyse(
      file,
      { windows: 'middle', start: 0 },
      scratch,
      signal,
    );
    const { data } = parseNpy(await readFile(tensorFile));
    const { validFrames, dbAt0, dbAt255 } = windows[0]!;
    const x: number[] = [];
    const y: number[] = [];
    for (let column = 0; column < columns; column += 1) {
      // The last frames reach into zeros here and into sound in the 30 s clip.
      if (frameOf(column) >= validFrames - 3) break;
      for (let band = 0; band < 128; band += 1) {
        const theirs = stored[(index * 128 + band) * columns + column]!;
        const ours = data[band * profile.windowFrames + frameOf(column)]!;
        if (theirs <= 2 || ours <= 2) continue;
        x.push(theirs);
        y.push(dbAt0 + (ours / 255) * (dbAt255 - dbAt0));
      }
    }
    const { offset, scale } = fitLine(x, y);
    return median(y.map((value, i) => Math.abs(value - offset - scale * x[i]!)).sort((a, b) => a - b));
  } finally {
    await rm(scratch, { recursive: true });
  }
}

function fitLine(x: readonly number[], y: readonly number[]): { offset: number; scale: number } {
  const meanX = x.reduce((sum, value) => sum + value, 0) / x.length;
  const meanY = y.reduce((sum, value) => sum + value, 0) / y.length;
  let covariance = 0;
  let variance = 0;
  for (const [i, value] of x.entries()) {
    covariance += (value - meanX) * (y[i]! - meanY);
    variance += (value - meanX) ** 2;
  }
  const scale = covariance / variance;
  return { offset: meanY - scale * meanX, scale };
}

function median(sorted: readonly number[]): number {
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}
