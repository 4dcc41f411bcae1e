/** Which frames make a window, and how a window becomes bytes. Pure. */
import { createHash } from 'node:crypto';
import type { Selection, WindowChoice } from '@acousticsense/shared/job';
import { tinyPower, toDecibels } from './log-mel.ts';

/**
 * First frames of the chosen windows, rising, in a range of `frames` frames.
 *
 * `middle` (and 1): floor((K - W) / 2). `all`: every `step`, the last anchored to the end. N: evenly spaced from 0
 * to K - W. Fewer frames than a window (K < W), or no room for more than one: one window at 0.
 */
export function planWindows(
  choice: WindowChoice,
  frames: number,
  windowFrames: number,
  stepFrames: number,
): number[] {
  const last = frames - windowFrames;
  if (last <= 0) return [0];
  if (choice === 'middle' || choice === 1) return [Math.floor(last / 2)];
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

/**
 * Quantises a window: decibels relative to `reference`, 0 = `floorDb` under it or less, 255 = the reference,
 * linear between, rounded to nearest. A window without any power is all 0.
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
    reference: number;
    floorDb: number;
    power: 1 | 2;
  },
): void {
  const { bands, windowFrames, validFrames, reference, floorDb, power } = of;
  if (reference <= tinyPower) {
    out.fill(0);
    return;
  }
  const referenceDb = toDecibels(reference, power);
  const scale = 255 / -floorDb;
  for (let column = 0; column < windowFrames; column += 1) {
    const frame = (column % validFrames) * bands;
    for (let band = 0; band < bands; band += 1) {
      const level = (toDecibels(mel[frame + band]!, power) - referenceDb - floorDb) * scale;
      out[band * windowFrames + column] = level <= 0 ? 0 : level >= 255 ? 255 : Math.round(level);
    }
  }
}

/** Largest value of `mel`. */
export function peakOf(mel: Float32Array): number {
  let peak = 0;
  for (const value of mel) if (value > peak) peak = value;
  return peak;
}
