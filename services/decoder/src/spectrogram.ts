/**
 * The picture people look at: log-mel at the finest time resolution that fits, made in the same pass as the
 * model's windows but independent of the model's own frame grid.
 */
import type { Profile } from '@acousticsense/shared/bundle';
import { createFrameCutter, type FrameCutter, type FrameGrid } from './frames.ts';
import { createMelFilterbank, type PowerSpectrum } from './log-mel.ts';
import { decibelRange, peakOf, quantise } from './windows.ts';

const bands = 128;
const finestHop = 512;
const maxColumns = 2000;
const floorDb = -80;

export interface Spectrogram {
  /** A cutter for samples that begin at `firstSample` (on the axis of the analysed range). */
  cutterFrom(firstSample: number): FrameCutter;
  /** How many of a cutter's frames are centred before sample `end`. */
  columnsIn(end: number): number;
  /**
   * The stretch from sample `from` to sample `to`: uint8 [128, columns], row 0 the lowest band, 255 = its loudest
   * cell, 0 = 80 dB under it, and where nothing was read.
   */
  render(from: number, to: number): { shape: [number, number]; data: Uint8Array };
}

/**
 * @param expectedSamples length of the stretch, as far as it is known: it sets the hop, with 2 % to spare. When more comes, every
 *   other column is dropped and the hop doubles: memory is that of 2,000 columns however long the audio is.
 */
export function createSpectrogram(
  profile: Profile,
  spectrum: PowerSpectrum,
  { origin, expectedSamples }: { origin: number; expectedSamples: number },
): Spectrogram {
  const { fftSize } = profile;
  const mel = createMelFilterbank({
    ...profile,
    melBands: bands,
    power: 2,
    melScale: 'slaney',
    melNorm: 'slaney',
  });
  const baseHop = Math.max(finestHop, Math.ceil((expectedSamples * 1.02) / maxColumns));
  const columns = new Float32Array(maxColumns * bands);
  const lead = fftSize / 2;
  const grid: FrameGrid = { fftSize, hop: baseHop, lead: lead - origin };
  let merged = 1;
  let highest = -1;

  function halve(): void {
    for (let column = 0; column < maxColumns / 2; column += 1) {
      columns.copyWithin(column * bands, 2 * column * bands, (2 * column + 1) * bands);
    }
    columns.fill(0, (maxColumns / 2) * bands);
    merged *= 2;
    highest >>= 1;
  }

  function onFrame(frame: number, buffer: Float32Array, offset: number): void {
    while (frame / merged >= maxColumns) halve();
    if (frame % merged !== 0) return;
    highest = frame / merged;
    mel.apply(spectrum.transform(buffer, offset), columns, highest * bands);
  }

  return {
    cutterFrom(firstSample) {
      const firstFrame = Math.max(0, Math.ceil((firstSample - origin) / baseHop));
      return createFrameCutter(grid, { firstFrame, firstSample }, onFrame);
    },
    columnsIn: (end) => Math.ceil((end - origin) / baseHop),
    render(from, to) {
      const hop = baseHop * merged;
      const first = Math.min(Math.max(0, Math.round((from - origin) / hop)), Math.max(highest, 0));
      const end = Math.min(highest + 1, Math.ceil((to - origin) / hop));
      const width = Math.max(1, end - first);
      const part = columns.subarray(first * bands, (first + width) * bands);
      const data = new Uint8Array(bands * width);
      const range = decibelRange(part, { stretch: 'none', reference: peakOf(part), floorDb, power: 2 });
      const layout = { bands, windowFrames: width, validFrames: width, power: 2 } as const;
      quantise(part, data, { ...layout, range, quantisation: 'linear-uint8' });
      return { shape: [bands, width], data };
    },
  };
}
