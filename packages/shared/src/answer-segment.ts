/**
 * The objects of the index of known answers: their names and their bytes. All lie under `index/<tenant>/`, and none
 * is ever changed.
 *
 *   2026-11-24T13/<batch>-<chunk>-<round>.jsonl     segment: what one closing of a chunk found. Hour of its writing.
 *   2026-11-24T13/<batch>-deleted-<epoch ms>.json   tombstone: the name says it all.
 *   2026-11-24/merged-<digest of names>.jsonl       the segments of a day, one after another.
 *
 * A segment is a header line and a line for each row; hashes stand for keys and refs, so what the index keeps of a
 * deleted batch names nobody's tracks. A merged object begins with the names of its segments, so that a reader who
 * knows them all need not read on, and each segment in it is preceded by its name.
 */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import { hash128 } from './answer-key.ts';
import { tenantNameSchema } from './pipeline.ts';

export interface AnswerEntry {
  /** Index within the chunk. */
  readonly row: number;
  /** Of several results under one key or ref, the higher one is the latest. */
  readonly revision: number;
  /** Epoch milliseconds. */
  readonly finishedAt: number;
  /** The caller's own name for the track. */
  readonly ref?: string | undefined;
  /** See `answerKey`; empty when this result must not be taken for another row, as that of a failed one. */
  readonly keys: readonly string[];
}

const headerSchema = z.strictObject({
  v: z.literal(1),
  tenant: tenantNameSchema,
  batchId: z.string().regex(/^[0-9A-Za-z-]{1,64}$/),
  chunk: z.int().min(0),
  round: z.int().min(0).describe('how often this chunk was closed before'),
  lines: z.int().min(0).describe('that follow: by it a reader knows that it has them all'),
});
type Header = Omit<z.infer<typeof headerSchema>, 'v' | 'lines'>;

export interface Segment extends Header {
  readonly entries: readonly AnswerEntry[];
}

/** `[row, revision, finishedAt, hash of the ref or null, ...keys]` */
export type EntryLine = [
  row: number,
  revision: number,
  finishedAt: number,
  ref: string | null,
  ...keys: string[],
];

/** @throws {TypeError | z.ZodError} a header that no reader would take: a mistake of the writer. */
export function encodeSegment({ entries, ...header }: Segment): Buffer {
  const lines = entries.map(
    ({ row, revision, finishedAt, ref, keys }): EntryLine => [
      row,
      revision,
      finishedAt,
      ref === undefined ? null : hash128(ref),
      ...keys,
    ],
  );
  const wrong = lines.find((line) => !isEntryLine(line));
  if (wrong) throw new TypeError(`not an entry of a segment: ${JSON.stringify(wrong)}`);
  const all = [headerSchema.parse({ v: 1, ...header, lines: lines.length }), ...lines];
  return Buffer.from(all.map((line) => `${JSON.stringify(line)}\n`).join(''));
}

/** @throws when it is none, is cut short, or is of another tenant. */
export function parseSegment(text: string, tenant: string): { header: Header; lines: EntryLine[] } {
  const end = text.indexOf('\n');
  const header = headerSchema.parse(JSON.parse(text.slice(0, end)));
  if (header.tenant !== tenant)
    throw new TypeError(`a segment of ${header.tenant} in the index of ${tenant}`);
  // At once: a good deal faster than a call a line.
  const lines = JSON.parse(`[${text.slice(end).trim().replaceAll('\n', ',')}]`) as EntryLine[];
  if (lines.length !== header.lines) throw new TypeError(`${lines.length} of ${header.lines} lines`);
  // By hand: this is passed millions of times.
  if (!lines.every(isEntryLine)) throw new TypeError('a line that is no entry');
  return { header, lines };
}

function isEntryLine(line: unknown): line is EntryLine {
  if (!Array.isArray(line)) return false;
  const [row, revision, finishedAt, ref, ...keys] = line as unknown[];
  const isNumber = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0;
  return (
    isNumber(row) &&
    isNumber(revision) &&
    isNumber(finishedAt) &&
    (ref === null || typeof ref === 'string') &&
    keys.every((key) => typeof key === 'string')
  );
}

/** Before every name. @throws {TypeError} not a tenant: such a name could lie anywhere. */
export function indexPrefix(tenant: string): string {
  if (!tenantNameSchema.safeParse(tenant).success)
    throw new TypeError(`not a tenant: ${JSON.stringify(tenant)}`);
  return `index/${tenant}/`;
}

export const hourName = (time: number) => new Date(time).toISOString().slice(0, 13);
export const dayName = (time: number) => new Date(time).toISOString().slice(0, 10);

export function segmentName({ batchId, chunk, round }: Header, time: number): string {
  return `${hourName(time)}/${batchId}-${String(chunk).padStart(5, '0')}-${round}.jsonl`;
}

export function tombstoneName(batchId: string, deletedAt: number, time: number): string {
  return `${hourName(time)}/${headerSchema.shape.batchId.parse(batchId)}-deleted-${deletedAt}.json`;
}

/** The same for the same segments: who merges a day again, because a crash came between, writes no second object. */
export function mergedName(day: string, segments: readonly string[]): string {
  const digest = createHash('sha256').update(segments.join('\n')).digest('hex').slice(0, 32);
  return `${day}/merged-${digest}.jsonl`;
}

export type IndexObject = { readonly name: string; readonly day: string } & (
  | { readonly kind: 'segment'; readonly batchId: string }
  | { readonly kind: 'tombstone'; readonly batchId: string; readonly deletedAt: number }
  | { readonly kind: 'merged' }
);

/** @returns undefined for what is none of ours. */
export function readName(name: string): IndexObject | undefined {
  const day = name.slice(0, 10);
  if (/^\d{4}-\d\d-\d\d\/merged-[0-9a-f]{32}\.jsonl$/.test(name)) return { name, day, kind: 'merged' };
  const [, batchId, deletedAt, segment] =
    /^\d{4}-\d\d-\d\dT\d\d\/([0-9A-Za-z-]{1,64}?)-(?:deleted-(\d{1,15})\.json|(\d+-\d+)\.jsonl)$/.exec(
      name,
    ) ?? [];
  if (batchId === undefined) return undefined;
  if (segment !== undefined) return { name, day, kind: 'segment', batchId };
  return { name, day, kind: 'tombstone', batchId, deletedAt: Number(deletedAt) };
}

export function mergedManifest(segments: readonly string[]): string {
  return `${JSON.stringify({ v: 1, merged: segments })}\n`;
}

/** Before each segment in a merged object: the only lines that begin with a quotation mark. */
export const mergedMark = (name: string) => `${JSON.stringify(name)}\n`;

const manifestSchema = z.object({ v: z.literal(1), merged: z.array(z.string()) });

export type MergedPart = { readonly names: string[] } | { readonly name: string; readonly text: string };

/** A merged object that is none, as far as this version knows. */
export class UnreadableObject extends Error {
  override readonly name = 'UnreadableObject';
}

/**
 * The names in a merged object, then its segments in that order; nothing of it is held but one segment.
 * @throws {UnreadableObject} it begins with no manifest, or ends before its last segment.
 */
export async function* readMerged(bytes: AsyncIterable<Buffer>): AsyncGenerator<MergedPart> {
  let names: string[] | undefined;
  let left = 0;
  let segment: { name: string; lines: string[] } | undefined;
  const whole = () => (segment ? [{ name: segment.name, text: segment.lines.join('\n') }] : []);
  for await (const line of linesOf(bytes)) {
    if (names === undefined) {
      names = manifestOf(line);
      left = names.length;
      yield { names };
    } else if (line.startsWith('"')) {
      yield* whole();
      segment = { name: line.slice(1, -1), lines: [] };
      left -= 1;
    } else {
      segment?.lines.push(line);
    }
  }
  yield* whole();
  if (names === undefined || left > 0) throw new UnreadableObject(`it ended before ${left} of its segments`);
}

function manifestOf(line: string): string[] {
  try {
    return manifestSchema.parse(JSON.parse(line)).merged;
  } catch (cause) {
    throw new UnreadableObject('it begins with no manifest', { cause });
  }
}

async function* linesOf(bytes: AsyncIterable<Buffer>): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let rest = '';
  for await (const chunk of bytes) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split('\n');
    rest = lines.pop()!;
    yield* lines;
  }
  if (rest !== '') yield rest;
}
