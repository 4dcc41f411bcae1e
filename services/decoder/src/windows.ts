/** Which frames make a window, and how a window becomes bytes. Pure. */
import { createHash } from 'node:crypto';
import type { Profile } from '@acousticsense/shared/bundle';
import type { Selection, WindowChoice } from '@acousticsense/shared/job';
import { tinyPower, toDecibels } from './log-mel.ts';

/**
 * First frames of the chosen windows, rising, in a range of `frames` frames.
 *
 * `middle` (and 1): floor((K - W) / 2). `all`: every `step`, `anchored` with the last one at the end of the audio;
 * `centred` only as many as fit, what they leave over cut from both ends alike. N: evenly spaced from 0 to K - W.
 * Fewer frames than a window (K < W), or no room for more than one: one window at 0.
 */
export function planWindows(
  choice: WindowChoice,
  frames: number,
  { windowFrames, stepFrames, placement }: Pick<Profile, 'windowFrames' | 'stepFrames' | 'placement'>,
): number[] {
  const last = frames - windowFrames;
  if (last <= 0) return [0];
  if (choice === 'middle' || choice === 1) return [Math.floor(last / 2)];
  if (choice === 'all' && placement === 'centred') {
    const fitting = Math.floor(last / stepFrames) + 1;
    const first = Math.floor((last - (fitting - 1) * stepFrames) / 2);
    return Array.from({ length: fitting }, (_, i) => first + i * stepFrames);
  }
  const count = choice === 'all' ? Math.ceil(last / stepFrames) + 1 : choice;
  const starts = Array.from({ length: count }, (_, i) =>
    choice === 'all' ? Math.min(i * stepFrames, last) : Math.round((i * last) / (count - 1)),
  );
  // More windows asked for than there are places: each place once.
  return [...new Set(starts)];
}

/** Names what of the audio a tensor holds; equal for selections that choose the same. */
export function hashSelection({ start, duration, windows }: Selection): string {
  const resolved = JSON.stringify({
    duration: duration ?? null,
    start,
    windows: windows === 1 ? 'middle' : windows,
  });
  return createHash('sha256').update(resolved).digest('hex').slice(0, 16);
}

export interface DecibelRange {
  /** Decibels that the highest value stands for. */
  readonly topDb: number;
  /** From there down to the value 0; 0 when all cells of a stretched window are equal. */
  readonly spanDb: number;
}

/**
 * librosa's `power_to_db` takes power under 1e-10 (magnitude under 1e-5) for that much. Ends of a stretched window
 * follow it, because it is part of the recipe they come from: it raises the floor where the reference lies under
 * -20 dB, that is in recordings that peak at about -50 dBFS (tones) or -30 dBFS (noise), or are silent.
 */
const librosaLeastDb = -100;

/**
 * What the values 0 and 255 of a window mean.
 *
 * `none`: the reference, and `floorDb` under it. `window`: the window's greatest and least cell, after everything
 * below the floor was raised to it (librosa's `power_to_db(ref=max, top_db=-floorDb)` over the reference's scope,
 * then matplotlib's `Normalize` over the window).
 *
 * @param mel mel values of the window's own frames.
 */
export function decibelRange(
  mel: Float32Array,
  {
    stretch,
    reference,
    floorDb,
    power,
  }: Pick<Profile, 'stretch' | 'floorDb' | 'power'> & { reference: number },
): DecibelRange {
  const referenceDb = toDecibels(reference, power);
  if (stretch === 'none') return { topDb: referenceDb, spanDb: -floorDb };
  const lowestDb = Math.max(referenceDb + floorDb, librosaLeastDb);
  let least = Number.POSITIVE_INFINITY;
  for (const value of mel) if (value < least) least = value;
  const topDb = Math.max(toDecibels(peakOf(mel), power), lowestDb);
  return { topDb, spanDb: topDb - Math.max(toDecibels(least, power), lowestDb) };
}

/**
 * Quantises a window: 0 = the bottom of the range or less, 255 = its top, linear in decibels between; rounded to
 * the nearest of 255 steps (`linear-uint8`), or the index that a colour map of 256 colours is asked for
 * (`matplotlib-uint8`: floor(256 x share), a share of 1 counting as 255). A window without any power, or a
 * stretched one whose cells are all equal, is all 0.
 *
 * @param mel float32 [frames, bands], one frame after the other.
 * @param validFrames frames that `mel` holds; column j shows frame j mod validFrames.
 * @param out uint8 [bands, windowFrames].
 */
export function quantise(
  mel: Float32Array,
  out: Uint8Array,
  of: {
    bands: number;
    windowFrames: number;
    validFrames: number;
    range: DecibelRange;
    quantisation: Profile['quantisation'];
    power: 1 | 2;
  },
): void {
  const { bands, windowFrames, validFrames, range, quantisation, power } = of;
  const { topDb, spanDb } = range;
  if (topDb <= toDecibels(tinyPower, power) || spanDb === 0) {
    out.fill(0);
    return;
  }
  const rounded = quantisation === 'linear-uint8';
  const scale = 255 / spanDb;
  for (let column = 0; column < windowFrames; column += 1) {
    const frame = (column % validFrames) * bands;
    for (let band = 0; band < bands; band += 1) {
      const above = toDecibels(mel[frame + band]!, power) - topDb + spanDb;
      const level = rounded ? Math.round(above * scale) : Math.floor((above / spanDb) * 256);
      out[band * windowFrames + column] = Math.min(255, Math.max(0, level));
    }
  }
}

/** Largest value of `mel`. */
export function peakOf(mel: Float32Array): number {
  let peak = 0;
  for (const value of mel) if (value > peak) peak = value;
  return peak;
}
