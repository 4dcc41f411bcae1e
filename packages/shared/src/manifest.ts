/**
 * The rows of a batch as they lie in object storage: chunks of up to 1,000 rows, JSON Lines under a head line that
 * says how many follow. What a caller may write is another matter: `services/api/src/manifest-reader.ts`.
 */
import { isUtf8 } from 'node:buffer';
import { z } from 'zod';
import { selectionSchema, sourceObjectSchema } from './job.ts';
import type { BatchRow } from './pipeline.ts';

/** Rows of a chunk; the last one of a batch has fewer. */
export const chunkRows = 1_000;

/** Within the whole batch, from 0. */
export const rowIndex = ({ chunk, row }: Pick<BatchRow, 'chunk' | 'row'>): number => chunk * chunkRows + row;

/** `s3`: read in place from a registered source; `url`: fetched first; `upload`: the id of a finished upload. */
const manifestAudioSchema = z.union([
  z.strictObject({ s3: sourceObjectSchema }),
  z.strictObject({ url: z.string() }),
  z.strictObject({ upload: z.uuid() }),
]);
export type ManifestAudio = z.infer<typeof manifestAudioSchema>;

/** Not strict: during a roll-out an older process reads the chunks of a newer one, without what it does not know. */
export const manifestRowSchema = z.object({
  line: z.int().min(1).describe("of the caller's manifest, counted from 1; of a walked prefix, the position"),
  ref: z.string().optional().describe("the caller's own name for the track"),
  audio: manifestAudioSchema,
  declaredGenre: z.array(z.string()).min(1).optional().describe('what the catalogue says'),
  contentId: z.string().optional().describe("the caller's own name for this very sound"),
  selection: selectionSchema.partial().optional().describe("instead of the batch's own"),
});
export type ManifestRow = z.infer<typeof manifestRowSchema>;

/** Why a single row does not run. Stable, explained in docs/batches-manifest.md. */
export const badRowCodes = [
  'row_not_utf8',
  'row_too_long',
  'row_not_json',
  'row_not_csv',
  'row_invalid',
  'duplicate_ref',
  'source_not_allowed',
] as const;
export type BadRowCode = (typeof badRowCodes)[number];

export const badRowSchema = z.strictObject({
  line: z.int().min(1).describe('of the manifest, counted from 1; where the row begins'),
  code: z.enum(badRowCodes),
  message: z.string().describe('one sentence: what was wrong, and what to do'),
  ref: z.string().optional().describe('when it could be read'),
});
export type BadRow = z.infer<typeof badRowSchema>;

const headSchema = z.strictObject({ v: z.literal(1), rows: z.int().min(1).max(chunkRows) });
const chunkSchema = z.array(manifestRowSchema);

/** @throws {RangeError} when there are no rows, or more than a chunk holds. */
export function encodeChunk(rows: readonly ManifestRow[]): Buffer {
  if (rows.length < 1 || rows.length > chunkRows) {
    throw new RangeError(`A chunk holds 1 to ${chunkRows} rows, not ${rows.length}.`);
  }
  const head: z.infer<typeof headSchema> = { v: 1, rows: rows.length };
  return Buffer.from(`${[head, ...rows].map((line) => JSON.stringify(line)).join('\n')}\n`);
}

/** @throws {Error} naming the line that is damaged; a chunk cut anywhere, between two rows included, is told. */
export function decodeChunk(bytes: Buffer): ManifestRow[] {
  if (!isUtf8(bytes)) throw damaged('it is not UTF-8');
  const lines = bytes.toString('utf8').split('\n');
  if (lines.pop() !== '') throw damaged('it does not end with a line break');
  const [head, ...rows] = lines.map(parseLine);
  const { success, data } = headSchema.safeParse(head);
  if (!success) throw damaged('its first line is no head of a chunk');
  if (data.rows !== rows.length) throw damaged(`it has ${rows.length} rows and should have ${data.rows}`);
  const parsed = chunkSchema.safeParse(rows);
  if (parsed.success) return parsed.data;
  const [index, ...path] = parsed.error.issues[0]!.path;
  throw damaged(`line ${Number(index) + 2} is no row (${path.join('.') || parsed.error.issues[0]!.message})`);
}

function parseLine(line: string, index: number): unknown {
  try {
    return JSON.parse(line);
  } catch (error) {
    throw damaged(`line ${index + 1} is not JSON`, error);
  }
}

function damaged(what: string, cause?: unknown): Error {
  return new Error(`A chunk of a manifest is damaged: ${what}.`, { cause });
}
