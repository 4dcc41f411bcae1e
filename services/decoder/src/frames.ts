/** Cuts a stream of PCM into the overlapping frames of a grid, in memory that does not grow with the stream. */

export interface FrameGrid {
  readonly fftSize: number;
  readonly hop: number;
  /** Frame k begins at sample `k * hop - lead`: half a frame when frames are centred, else 0. */
  readonly lead: number;
}

/**
 * Frames in `samples` samples, as librosa counts them: 1 + floor(n / hop) when centred, else only whole frames
 * (at least one, padded with zeros).
 */
export function countFrames({ fftSize, hop, lead }: FrameGrid, samples: number): number {
  if (lead > 0) return 1 + Math.floor(samples / hop);
  return samples < fftSize ? 1 : 1 + Math.floor((samples - fftSize) / hop);
}

export interface FrameCutter {
  /** The next samples of the stream; the array may be reused by the caller afterwards. */
  push(pcm: Float32Array): void;
  /** Pads with zeros until frame `frames - 1` is out. */
  finish(frames: number): void;
}

const pieceSamples = 8192;

/**
 * @param firstFrame the first frame wanted.
 * @param firstSample position, on the same axis as the grid, of the first sample that will be pushed; what lies
 *   before it reads as zeros.
 * @param onFrame receives frame k as `fftSize` samples of `buffer` from `offset`; valid during the call only.
 */
export function createFrameCutter(
  { fftSize, hop, lead }: FrameGrid,
  { firstFrame, firstSample }: { firstFrame: number; firstSample: number },
  onFrame: (frame: number, buffer: Float32Array, offset: number) => void,
): FrameCutter {
  const buffer = new Float32Array(fftSize + pieceSamples);
  const zeros = new Float32Array(pieceSamples);
  let frame = firstFrame;
  let filled = 0;
  const begin = firstFrame * hop - lead;
  /** Samples to drop before the next frame begins (frames further apart than they are long). */
  let skip = Math.max(0, begin - firstSample);

  function pushPiece(piece: Float32Array): void {
    const dropped = Math.min(skip, piece.length);
    skip -= dropped;
    if (dropped === piece.length) return;
    buffer.set(dropped === 0 ? piece : piece.subarray(dropped), filled);
    filled += piece.length - dropped;
    let offset = 0;
    while (offset + fftSize <= filled) {
      onFrame(frame, buffer, offset);
      frame += 1;
      offset += hop;
    }
    skip = Math.max(0, offset - filled);
    buffer.copyWithin(0, Math.min(offset, filled), filled);
    filled = Math.max(0, filled - offset);
  }

  function push(pcm: Float32Array): void {
    for (let at = 0; at < pcm.length; at += pieceSamples) pushPiece(pcm.subarray(at, at + pieceSamples));
  }

  function pushZeros(count: number): void {
    for (let left = count; left > 0; left -= pieceSamples)
      pushPiece(zeros.subarray(0, Math.min(left, pieceSamples)));
  }

  if (firstSample > begin) pushZeros(firstSample - begin);
  return {
    push,
    finish(frames) {
      if (frames > frame) pushZeros(skip + (frames - 1 - frame) * hop + fftSize - filled);
    },
  };
}
