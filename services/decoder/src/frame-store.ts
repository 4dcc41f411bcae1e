/** Mel frames on disk: a long track's frames are many times what the decoder may hold in memory. */
import { type FileHandle, open } from 'node:fs/promises';

export interface FrameStore {
  /** Room for the next frame: write `bands` values to `block` from `offset`. Frames come in rising order. */
  next(frame: number): { block: Float32Array; offset: number };
  /** Writes full blocks out; call it between chunks, so that memory stays flat. */
  drain(): Promise<void>;
  /** Frames `from` to `from + count - 1` as float32 [count, bands]. Those that were never written are 0. */
  read(from: number, count: number): Promise<Float32Array>;
  close(): Promise<void>;
}

const blockFrames = 512;

/** The file is sparse: frame k lies at k, whatever was left out before it. */
export async function createFrameStore(path: string, bands: number): Promise<FrameStore> {
  const handle: FileHandle = await open(path, 'w+');
  let block = new Float32Array(blockFrames * bands);
  let first = 0;
  let held = 0;
  const full: { first: number; data: Float32Array }[] = [];

  function turn(): void {
    if (held > 0) full.push({ first, data: block.subarray(0, held * bands) });
    block = new Float32Array(blockFrames * bands);
    held = 0;
  }

  async function drain(): Promise<void> {
    for (let item = full.shift(); item !== undefined; item = full.shift()) {
      const bytes = new Uint8Array(item.data.buffer, item.data.byteOffset, item.data.byteLength);
      await handle.write(bytes, 0, bytes.length, item.first * bands * 4);
    }
  }

  return {
    next(frame) {
      if (held === blockFrames || (held > 0 && frame !== first + held)) turn();
      if (held === 0) first = frame;
      held += 1;
      return { block, offset: (held - 1) * bands };
    },
    drain,
    async read(from, count) {
      turn();
      await drain();
      const frames = new Float32Array(count * bands);
      const bytes = new Uint8Array(frames.buffer);
      for (let at = 0; at < bytes.length; ) {
        const { bytesRead } = await handle.read(bytes, at, bytes.length - at, from * bands * 4 + at);
        if (bytesRead === 0) break;
        at += bytesRead;
      }
      return frames;
    },
    close: () => handle.close(),
  };
}
