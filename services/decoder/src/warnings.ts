/** What is wrong with audio that can still be analysed: detectors, each with its threshold and the reason for it. */
import type { Warning } from '@acousticsense/shared/job';
import type { WindowInfo } from '@acousticsense/shared/tensor';
import type { AudioFacts, DecodeReport } from './ffmpeg.ts';

/** Peak under which a window has no genre: 60 dB under full scale is the noise of a quiet analogue recording. */
export const silentDbfs = -60;

/** The seed's advice: under 8 s a genre is guessed from a phrase. */
const shortSeconds = 8;

/**
 * Clipping: more than one sample in 200 within 1 % of full scale. The loudest masters of 96 recordings at hand reach
 * 0.2 %, most none at all; audible hard clipping begins at several per cent.
 */
const clippedLevel = 0.99;
const clippedShare = 0.005;

/** Content over 8 kHz missing costs accuracy on electronic genres; lower limits are codecs, telephones, old media. */
const lowPassHz = 8_000;
/**
 * A low-pass is a cliff behind which nothing sounds. Natural spectra fall by up to 24 dB within 600 Hz (in 96
 * recordings at hand), but go on after that; behind a codec's or resampler's filter everything is empty.
 */
const cliffDb = 25;
const cliffHz = 600;
/** Cells this far under the strongest count as empty. */
const emptyDb = 75;

/** Errors that whole files show too: junk behind the last frame of an MP3 makes two lines. */
const errorLinesAllowed = 4;
/** Encoders pad and headers round; a file that lacks more than this was cut. */
const wholeShare = 0.95;

const levelBlockSamples = 1024;

export interface LevelMeter {
  /** Samples that follow those of the call before, the first of them at `position`. */
  push(pcm: Float32Array, position: number): void;
  /** Highest absolute sample in the blocks that touch [from, to), and the share near full scale. */
  between(from: number, to: number): { peak: number; clippedShare: number };
}

/** Peaks per block of 1,024 samples: 8 bytes a block, 2.5 MB for four hours. */
export function createLevelMeter(): LevelMeter {
  let peaks = new Float32Array(4096);
  let clipped = new Uint32Array(4096);
  let counted = new Uint32Array(4096);

  function room(blocks: number): void {
    if (blocks <= peaks.length) return;
    const length = 2 ** Math.ceil(Math.log2(blocks));
    const grown = [new Float32Array(length), new Uint32Array(length), new Uint32Array(length)] as const;
    grown[0].set(peaks);
    grown[1].set(clipped);
    grown[2].set(counted);
    [peaks, clipped, counted] = grown;
  }

  return {
    push(pcm, position) {
      room(Math.ceil((position + pcm.length) / levelBlockSamples));
      for (let n = 0; n < pcm.length; ) {
        const block = Math.floor((position + n) / levelBlockSamples);
        const end = Math.min(pcm.length, (block + 1) * levelBlockSamples - position);
        let peak = peaks[block]!;
        let near = 0;
        counted[block]! += end - n;
        for (; n < end; n += 1) {
          const level = Math.abs(pcm[n]!);
          if (level > peak) peak = level;
          if (level >= clippedLevel) near += 1;
        }
        peaks[block] = peak;
        clipped[block]! += near;
      }
    },
    between(from, to) {
      let peak = 0;
      let near = 0;
      let all = 0;
      const end = Math.min(peaks.length, Math.ceil(to / levelBlockSamples));
      for (let block = Math.floor(from / levelBlockSamples); block < end; block += 1) {
        peak = Math.max(peak, peaks[block]!);
        near += clipped[block]!;
        all += counted[block]!;
      }
      return { peak, clippedShare: all === 0 ? 0 : near / all };
    },
  };
}

export interface Bandwidth {
  /** Hz under which the sound lies. */
  readonly hz: number;
  /** It ends there abruptly, as behind a low-pass filter. */
  readonly cliff: boolean;
}

/**
 * Highest frequency whose power, smoothed over 200 Hz, lies less than 75 dB under the strongest; and whether the
 * spectrum falls by 25 dB or more within 600 Hz just there.
 *
 * @param meanPower |X|^2 per bin, averaged over the analysed frames; `fftSize / 2 + 1` values.
 */
export function estimateBandwidth(meanPower: Float64Array, sampleRate: number): Bandwidth {
  const binHz = sampleRate / 2 / (meanPower.length - 1);
  const smooth = smoothed(meanPower, Math.max(1, Math.round(100 / binHz)));
  let strongest = 0;
  for (const value of smooth) if (value > strongest) strongest = value;
  if (strongest === 0) return { hz: 0, cliff: false };
  const reach = Math.round(cliffHz / binHz);
  const drop = 10 ** (cliffDb / 10);
  const empty = strongest / 10 ** (emptyDb / 10);
  const falls = (bin: number) => bin + reach < smooth.length && smooth[bin]! >= drop * smooth[bin + reach]!;
  let top = smooth.length - 1;
  while (top > 0 && smooth[top]! < empty) top -= 1;
  let foot = top;
  while (foot > 0 && foot > top - reach && !falls(foot)) foot -= 1;
  if (!falls(foot)) return { hz: top * binHz, cliff: false };
  // From the foot up to where the fall begins; the edge is where half of the amplitude is left.
  let brink = foot;
  while (brink > 0 && falls(brink - 1)) brink -= 1;
  let edge = foot;
  while (edge > brink && smooth[edge]! < smooth[brink]! / 4) edge -= 1;
  // The resampler's own edge: the sound goes on as far as can be seen.
  if (edge * binHz > 0.9 * (sampleRate / 2)) return { hz: sampleRate / 2, cliff: false };
  return { hz: edge * binHz, cliff: true };
}

function smoothed(values: Float64Array, radius: number): Float64Array {
  const out = new Float64Array(values.length);
  let sum = 0;
  for (let i = -radius; i < values.length; i += 1) {
    if (i + radius < values.length) sum += values[i + radius]!;
    if (i - radius - 1 >= 0) sum -= values[i - radius - 1]!;
    const width = Math.min(values.length - 1, i + radius) - Math.max(0, i - radius) + 1;
    if (i >= 0) out[i] = Math.max(0, sum / width);
  }
  return out;
}

export interface Findings {
  readonly facts: AudioFacts;
  readonly report: DecodeReport;
  readonly windows: readonly WindowInfo[];
  /** Seconds of audio in the analysed range. */
  readonly analysedSeconds: number;
  /** Seconds that the file turned out to hold, where it was read to its end from its beginning. */
  readonly actualSeconds?: number;
  readonly clippedShare: number;
  readonly bandwidth: Bandwidth;
}

export function collectWarnings(of: Findings): Warning[] {
  const { report, windows, analysedSeconds, bandwidth } = of;
  const warnings: Warning[] = [];
  const silent = windows.filter((window) => window.silent).length;

  if (analysedSeconds < shortSeconds) {
    warnings.push({
      code: 'too_short',
      message: `Only ${analysedSeconds.toFixed(1)} s of audio were analysed, which says little about a genre: send at least ${shortSeconds} s.`,
      value: round(analysedSeconds, 2),
    });
  }
  if (silent > 0) {
    const which =
      silent === windows.length ? 'The analysed audio is' : `${silent} of ${windows.length} windows are`;
    warnings.push({
      code: 'silent',
      message: `${which} silent (peaks under ${silentDbfs} dBFS) and left out: choose a part with sound.`,
      value: silent,
    });
  }
  if (of.clippedShare > clippedShare) {
    warnings.push({
      code: 'clipped',
      message: `${(of.clippedShare * 100).toFixed(1)} % of the samples lie at full scale, so the recording is clipped: use a copy with a lower level.`,
      value: round(of.clippedShare, 4),
    });
  }
  if (silent < windows.length && bandwidth.cliff && bandwidth.hz < lowPassHz) {
    warnings.push({
      code: 'low_passed',
      message: `Nothing sounds above ${(bandwidth.hz / 1000).toFixed(1)} kHz, as after strong compression or a low sample rate: use a better copy if there is one.`,
      value: Math.round(bandwidth.hz),
    });
  }
  const damage = describeDamage(of);
  if (damage !== undefined) warnings.push(damage);
  if (report.sanitised > 0) {
    warnings.push({
      code: 'sanitised',
      message: `${report.sanitised} samples were no valid numbers and count as silence: export the audio again.`,
      value: report.sanitised,
    });
  }
  return warnings;
}

/**
 * Partly corrupt: ffmpeg failed, or reported more than a few errors, or the file holds less than 95 % of what its
 * header says (in bytes, or in seconds when it was read to its end).
 */
function describeDamage({ facts, report, actualSeconds }: Findings): Warning | undefined {
  const missing = actualSeconds !== undefined && actualSeconds < wholeShare * (facts.duration ?? 0);
  if (!report.failed && !facts.truncated && !missing && report.errorLines <= errorLinesAllowed)
    return undefined;
  const held = actualSeconds === undefined ? '' : `, ${actualSeconds.toFixed(1)} s could be decoded`;
  const errors =
    report.errorLines === 0 ? 'it is shorter than its header says' : `${report.errorLines} decoding errors`;
  return {
    code: 'partly_corrupt',
    message: `The file is damaged (${errors}${held}) and only its readable part was analysed: send an intact copy.`,
    value: actualSeconds === undefined ? report.errorLines : round(actualSeconds, 2),
  };
}

function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}
