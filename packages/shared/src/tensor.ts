/**
 * The tensor between decoder and inference: `uint8 [windows, bands, frames]`, row 0 the lowest mel band, as
 * a NumPy `.npy` file with a JSON sidecar (`sidecarSchema` in job.ts). One byte a cell is what the model reads.
 *
 * Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html (version 1.0)
 */
import { z } from 'zod';

export interface Uint8Tensor {
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

export const windowInfoSchema = z.strictObject({
  start: z.number().min(0).describe('seconds from the start of the file'),
  end: z.number().describe('seconds; the end of real audio in a looped window'),
  validFrames: z.int().min(1).describe('frames of real audio; fewer than the window when it was looped'),
  dbAt0: z.number().describe('decibels (relative to full-scale power in this front end) of the value 0'),
  dbAt255: z.number(),
  peakDbfs: z.number().describe('highest absolute sample of the window, dBFS'),
  silent: z.boolean().describe('peaks under -60 dBFS: has no genre'),
});
export type WindowInfo = z.infer<typeof windowInfoSchema>;

const magic = Buffer.from([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0]);

/** The header of a C-ordered uint8 `.npy`; padded so that the data begins at a multiple of 64 bytes. */
export function npyHeader(shape: readonly number[]): Buffer {
  const text = `{'descr': '|u1', 'fortran_order': False, 'shape': (${shape.join(', ')}${shape.length === 1 ? ',' : ''}), }`;
  const padding = 64 - ((magic.length + 2 + text.length + 1) % 64);
  const header = Buffer.from(`${text}${' '.repeat(padding)}\n`, 'latin1');
  const length = Buffer.alloc(2);
  length.writeUInt16LE(header.length);
  return Buffer.concat([magic, length, header]);
}

/** @throws {TypeError} when the bytes are not a C-ordered uint8 `.npy` of exactly the stated size. */
export function parseNpy(bytes: Buffer): Uint8Tensor {
  if (bytes.length < 10 || !bytes.subarray(0, 6).equals(magic.subarray(0, 6)))
    throw new TypeError('not a .npy file');
  const headerEnd = 10 + bytes.readUInt16LE(8);
  const header = bytes.toString('latin1', 10, headerEnd);
  const shapeText = /'shape':\s*\(([0-9, ]*)\)/.exec(header)?.[1];
  if (
    !/'descr':\s*'\|u1'/.test(header) ||
    !/'fortran_order':\s*False/.test(header) ||
    shapeText === undefined
  ) {
    throw new TypeError(`not a C-ordered uint8 array: ${header.trim()}`);
  }
  const shape = shapeText
    .split(',')
    .map((part) => part.trim())
    .filter(Boolean)
    .map(Number);
  const size = shape.reduce((product, side) => product * side, 1);
  const data = bytes.subarray(headerEnd);
  if (data.length !== size) throw new TypeError(`expected ${size} values, got ${data.length}`);
  return { shape, data };
}
