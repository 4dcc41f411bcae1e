/**
 * Power spectrum and mel filterbank on typed arrays: samples in, mel power out.
 *
 * The numbers are those of librosa 0.11 (`librosa.filters.mel`, `librosa.stft`, `librosa.feature.melspectrogram`),
 * held to them by golden vectors (`golden/`). Formulas: M. Slaney, "Auditory Toolbox", Interspace 1998-010 (mel scale
 * linear to 1 kHz, then logarithmic; triangles of equal area); HTK Book 5.4 (2595 log10(1 + f/700)).
 */
import type { Profile } from '@acousticsense/shared/bundle';
import { StartupError } from '@acousticsense/shared/errors';
import FFT from 'fft.js';

export type MelLayout = Pick<
  Profile,
  'sampleRate' | 'fftSize' | 'power' | 'melScale' | 'melNorm' | 'melBands' | 'minHz' | 'maxHz'
>;

export interface PowerSpectrum {
  readonly bins: number;
  /**
   * Windows `fftSize` samples of `pcm` from `offset` with a periodic Hann window and transforms them.
   * @returns |X|^2 of the `fftSize / 2 + 1` bins; the same array on every call.
   */
  transform(pcm: Float32Array, offset: number): Float64Array;
}

/**
 * A real transform of N points as one complex transform of N/2: even samples as real parts, odd ones as imaginary
 * parts, then X[k] = E[k] + e^(-2 pi i k/N) O[k] (Press et al., Numerical Recipes, 12.3). A third faster here than
 * fft.js's own real transform. Plain arrays, because fft.js is twice as slow on typed ones.
 */
export function createPowerSpectrum(fftSize: number): PowerSpectrum {
  if ((fftSize & (fftSize - 1)) !== 0)
    throw new StartupError(`profile.fftSize is ${fftSize}: it must be a power of two.`);
  const half = fftSize / 2;
  const fft = new FFT(half);
  const packed: number[] = new Array(fftSize).fill(0);
  const spectrum: number[] = fft.createComplexArray();
  const power = new Float64Array(half + 1);
  const hann = Float64Array.from(
    { length: fftSize },
    (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / fftSize),
  );
  const cosine = Float64Array.from({ length: half / 2 + 1 }, (_, k) => Math.cos((2 * Math.PI * k) / fftSize));
  const sine = Float64Array.from({ length: half / 2 + 1 }, (_, k) => Math.sin((2 * Math.PI * k) / fftSize));

  function transform(pcm: Float32Array, offset: number): Float64Array {
    for (let n = 0; n < fftSize; n += 1) packed[n] = pcm[offset + n]! * hann[n]!;
    fft.transform(spectrum, packed);
    power[0] = (spectrum[0]! + spectrum[1]!) ** 2;
    power[half] = (spectrum[0]! - spectrum[1]!) ** 2;
    for (let k = 1; k <= half / 2; k += 1) {
      const real = spectrum[2 * k]!;
      const imaginary = spectrum[2 * k + 1]!;
      const mirrorReal = spectrum[2 * (half - k)]!;
      const mirrorImaginary = spectrum[2 * (half - k) + 1]!;
      const evenReal = 0.5 * (real + mirrorReal);
      const evenImaginary = 0.5 * (imaginary - mirrorImaginary);
      const oddReal = 0.5 * (imaginary + mirrorImaginary);
      const oddImaginary = -0.5 * (real - mirrorReal);
      const turnedReal = cosine[k]! * oddReal + sine[k]! * oddImaginary;
      const turnedImaginary = cosine[k]! * oddImaginary - sine[k]! * oddReal;
      power[k] = (evenReal + turnedReal) ** 2 + (evenImaginary + turnedImaginary) ** 2;
      power[half - k] = (evenReal - turnedReal) ** 2 + (evenImaginary - turnedImaginary) ** 2;
    }
    return power;
  }

  return { bins: half + 1, transform };
}

export interface MelFilterbank {
  /** Writes `melBands` values, lowest band first, to `out` from `offset`. `spectrum` is |X|^2 (power) per bin. */
  apply(spectrum: Float64Array, out: Float32Array, offset: number): void;
}

/** Triangular filters, kept sparse: a band covers a few bins of a thousand. */
export function createMelFilterbank(layout: MelLayout): MelFilterbank {
  const { sampleRate, fftSize, melBands, minHz, maxHz, melNorm } = layout;
  const { toMel, toHz } = melScales[layout.melScale];
  const lowest = toMel(minHz);
  const stepMel = (toMel(maxHz) - lowest) / (melBands + 1);
  const edges = Float64Array.from({ length: melBands + 2 }, (_, i) => toHz(lowest + i * stepMel));

  const firstBin = new Int32Array(melBands);
  const firstWeight = new Int32Array(melBands + 1);
  const weights: number[] = [];
  for (let band = 0; band < melBands; band += 1) {
    const [low, centre, high] = [edges[band]!, edges[band + 1]!, edges[band + 2]!];
    const height = melNorm === 'slaney' ? 2 / (high - low) : 1;
    let begun = false;
    for (let bin = 0; bin <= fftSize / 2; bin += 1) {
      const hz = (bin * sampleRate) / fftSize;
      const weight = Math.min((hz - low) / (centre - low), (high - hz) / (high - centre));
      if (weight <= 0) continue;
      if (!begun) firstBin[band] = bin;
      begun = true;
      weights.push(weight * height);
    }
    firstWeight[band + 1] = weights.length;
  }
  const table = Float64Array.from(weights);
  const magnitudes = layout.power === 1 ? new Float64Array(fftSize / 2 + 1) : undefined;

  return {
    apply(spectrum, out, offset) {
      let source = spectrum;
      if (magnitudes !== undefined) {
        for (let bin = 0; bin < magnitudes.length; bin += 1) magnitudes[bin] = Math.sqrt(spectrum[bin]!);
        source = magnitudes;
      }
      for (let band = 0; band < melBands; band += 1) {
        const end = firstWeight[band + 1]!;
        let sum = 0;
        let bin = firstBin[band]!;
        for (let i = firstWeight[band]!; i < end; i += 1, bin += 1) sum += table[i]! * source[bin]!;
        out[offset + band] = sum;
      }
    },
  };
}

const melScales = {
  htk: {
    toMel: (hz: number) => 2595 * Math.log10(1 + hz / 700),
    toHz: (mel: number) => 700 * (10 ** (mel / 2595) - 1),
  },
  slaney: {
    toMel: (hz: number) => (hz < 1000 ? (hz * 3) / 200 : 15 + (27 * Math.log(hz / 1000)) / Math.log(6.4)),
    toHz: (mel: number) => (mel < 15 ? (mel * 200) / 3 : 1000 * Math.exp((Math.log(6.4) * (mel - 15)) / 27)),
  },
};

/** Below this, power counts as none; far under what 24-bit audio can hold. */
export const tinyPower = 1e-30;

/** Decibels of a mel value: `10 log10` of power, `20 log10` of magnitude. */
export function toDecibels(value: number, power: 1 | 2): number {
  return (20 / power) * Math.log10(Math.max(value, tinyPower));
}
