/**
 * A caller's manifest to rows: JSON Lines or CSV, of any size, in memory that does not grow with it (12 to 24 bytes
 * a ref aside). docs/batches-manifest.md describes the format for those who write it.
 *
 * What is wrong with one row is told by its line and the others run. What is wrong with the whole is thrown.
 */
import { Readable } from 'node:stream';
import { ProblemError } from '@acousticsense/shared/errors';
import { windowChoiceSchema } from '@acousticsense/shared/job';
import type { BadRow, BadRowCode, ManifestAudio, ManifestRow } from '@acousticsense/shared/manifest';
import { createCsvRecords } from './csv-records.ts';
import { createSeenRefs } from './seen-refs.ts';
import { createLineSplitter, type Line } from './text-lines.ts';

export interface ManifestOptions {
  readonly format: 'jsonl' | 'csv';
  readonly maxRows: number;
  /** Of one row. */
  readonly maxLineBytes: number;
  /** Of the whole, as it is read: after decompression. 2 kB a row and 64 MiB when absent. */
  readonly maxBytes?: number;
  /** Whether the tenant may have this object read. */
  readonly isAllowed: (bucket: string, key: string) => boolean;
}

/** A field that the manifest has and the service does not know: it is left aside, and told once. */
export interface ManifestNote {
  /** Where it was met first. */
  readonly line: number;
  readonly field: string;
  readonly message: string;
}

export type ManifestItem = { row: ManifestRow } | { bad: BadRow } | { note: ManifestNote };

/** A row in the caller's words: text from CSV, whatever JSON knows from JSON Lines. */
type Fields = Readonly<Record<string, unknown>>;
type Unread = { line: number; lastLine: number; fields: Fields };
type Read = { unread: Unread } | Exclude<ManifestItem, { row: unknown }>;

const known = [
  'audio',
  'ref',
  'declaredGenre',
  'etag',
  'versionId',
  'size',
  'contentId',
  'windows',
  'start',
  'duration',
] as const;
type Field = (typeof known)[number];
const isKnown = (name: string): name is Field => (known as readonly string[]).includes(name);

/** What is looked at before the first row: encodings and formats are told by it. */
const headBytes = 4 * 1024;
const maxNotes = 20;
const maxSeconds = 1e6;

/**
 * Rows, bad rows and notes, in the order of the manifest. A stream is left to its owner, whether this ends, throws
 * or is left early: a request can still be answered.
 *
 * @throws {ProblemError} manifest_invalid, manifest_too_large: of the whole, after what has been yielded so far.
 * @throws what the stream throws.
 */
export async function* readManifest(
  stream: AsyncIterable<Uint8Array>,
  {
    format,
    maxRows,
    maxLineBytes,
    maxBytes = maxRows * 2_048 + 64 * 1024 * 1024,
    isAllowed,
  }: ManifestOptions,
): AsyncGenerator<ManifestItem, void, undefined> {
  const source: AsyncIterable<Uint8Array> =
    stream instanceof Readable
      ? { [Symbol.asyncIterator]: () => stream.iterator({ destroyOnReturn: false }) }
      : stream;
  const splitter = createLineSplitter(maxLineBytes);
  const reader = format === 'csv' ? createCsvReader(maxLineBytes) : createJsonReader(maxLineBytes);
  const refs = createSeenRefs();
  let rows = 0;

  function judge(read: Read): ManifestItem {
    if ('note' in read) return read;
    rows += 1;
    if (rows > maxRows) {
      throw new ProblemError('manifest_too_large', `The manifest has more than ${maxRows} rows; split it.`);
    }
    return 'bad' in read ? read : readRow(read.unread, isAllowed, refs.claim);
  }

  function* items(lines: Iterable<Line>): Generator<ManifestItem, void, undefined> {
    for (const line of lines) for (const read of reader.take(line)) yield judge(read);
  }

  let head: Buffer | undefined = Buffer.alloc(0);
  let total = 0;
  for await (const chunk of source) {
    total += chunk.byteLength;
    if (total > maxBytes) {
      throw new ProblemError('manifest_too_large', `The manifest has more than ${maxBytes} bytes; split it.`);
    }
    let bytes = Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength);
    if (head) {
      head = Buffer.concat([head, bytes]);
      if (head.length < headBytes) continue;
      bytes = checkedHead(head, format);
      head = undefined;
    }
    for (const item of items(splitter.push(bytes))) yield item;
  }
  if (head) for (const item of items(splitter.push(checkedHead(head, format)))) yield item;
  for (const item of items(splitter.end())) yield item;
  for (const read of reader.end()) yield judge(read);
  if (rows === 0) throw invalidManifest('The manifest holds no rows.');
}

/** @returns the head without a byte-order mark. */
function checkedHead(bytes: Buffer, format: ManifestOptions['format']): Buffer {
  const begins = (...prefix: number[]) => prefix.every((byte, index) => bytes[index] === byte);
  if (begins(0xff, 0xfe) || begins(0xfe, 0xff)) {
    throw invalidManifest('The manifest is UTF-16; save it as UTF-8.');
  }
  if (begins(0x1f, 0x8b)) {
    throw invalidManifest(
      'The manifest is compressed with gzip: say so with the header "Content-Encoding: gzip".',
    );
  }
  if (begins(0x50, 0x4b, 0x03, 0x04)) {
    throw invalidManifest('The manifest is a ZIP archive or a spreadsheet; save it as CSV in UTF-8.');
  }
  const head = bytes.subarray(0, headBytes);
  if (head.includes(0)) {
    throw invalidManifest('The manifest holds NUL bytes: it is UTF-16 or no text. Save it as text in UTF-8.');
  }
  const text = head.toString('latin1');
  if (!text.includes('\n') && /\r[^\r]/.test(text)) {
    throw invalidManifest('The lines of the manifest end with CR alone; end them with LF or CRLF.');
  }
  const unmarked = begins(0xef, 0xbb, 0xbf) ? bytes.subarray(3) : bytes;
  if (format === 'jsonl' && /^\s*\[/.test(unmarked.subarray(0, headBytes).toString('latin1'))) {
    throw invalidManifest(
      'The manifest is a JSON array; write JSON Lines: one object a line, without commas between.',
    );
  }
  return unmarked;
}

interface FormatReader {
  take(line: Line): Generator<Read, void, undefined>;
  end(): Generator<Read, void, undefined>;
}

function createJsonReader(maxLineBytes: number): FormatReader {
  const noted = new Set<string>();

  function* notes(fields: Fields, line: number): Generator<Read, void, undefined> {
    for (const name in fields) {
      if (isKnown(name) || noted.size >= maxNotes || noted.has(name)) continue;
      noted.add(name);
      yield note(line, name);
    }
  }

  return {
    *take({ number: line, text, fault }) {
      if (fault === 'row_too_long') yield bad(line, fault, `The row has more than ${maxLineBytes} bytes.`);
      else if (fault) yield bad(line, fault, 'The row is not UTF-8.');
      else if (text.trim() !== '') {
        const fields = parseObject(text);
        if (typeof fields === 'string') {
          yield bad(line, 'row_not_json', fields);
          return;
        }
        yield* notes(fields, line);
        yield { unread: { line, lastLine: line, fields } };
      }
    },
    *end() {},
  };
}

/** @returns the object, or the sentence that says why there is none. */
function parseObject(text: string): Fields | string {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return `The row is not JSON: "${cut(text)}". Write one whole object a line.`;
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Fields;
  return `The row is JSON, but no object: "${cut(text)}".`;
}

function createCsvReader(maxLineBytes: number): FormatReader {
  const records = createCsvRecords(maxLineBytes);
  let columns: readonly string[] | undefined;

  function* read(found: ReturnType<typeof records.take>): Generator<Read, void, undefined> {
    for (const { line, lastLine, cells, fault } of found) {
      if (fault) {
        // Every row depends on the first line.
        if (!columns)
          throw invalidManifest(`Line ${line}, which names the columns, cannot be read. ${fault.message}`);
        yield bad(line, fault.code, fault.message);
      } else if (cells.every((cell) => cell.trim() === '')) {
        // A blank line, or an empty row of a spreadsheet.
      } else if (!columns) {
        columns = checkedColumns(cells);
        const unknown = columns.filter((name) => name !== '' && !isKnown(name));
        for (const name of unknown.slice(0, maxNotes)) yield note(line, name);
      } else if (cells.length !== columns.length) {
        const message = `The row has ${cells.length} cells, and ${columns.length} columns are named.`;
        yield bad(line, 'row_invalid', `${message}${asOne(line, lastLine)}`);
      } else {
        const fields: Record<string, unknown> = {};
        for (let i = 0; i < cells.length; i += 1) if (isKnown(columns[i]!)) fields[columns[i]!] = cells[i];
        yield { unread: { line, lastLine, fields } };
      }
    }
  }

  return { take: (line) => read(records.take(line)), end: () => read(records.end()) };
}

function checkedColumns(cells: readonly string[]): string[] {
  const columns = cells.map((cell) => cell.trim());
  if (!columns.includes('audio')) {
    const other = columns.length === 1 && /[;\t|]/.exec(columns[0]!)?.[0];
    const hint = other ? ` Separate the columns with commas, not with ${JSON.stringify(other)}.` : '';
    throw new ProblemError(
      'manifest_invalid',
      `The manifest has no column "audio"; its first line names "${cut(columns.join(','), 200)}".${hint}`,
      { field: 'audio' },
    );
  }
  const twice = columns.find((name, index) => isKnown(name) && columns.indexOf(name) !== index);
  if (twice) {
    throw new ProblemError('manifest_invalid', `The manifest has the column "${twice}" twice.`, {
      field: twice,
    });
  }
  return columns;
}

/** What is wrong with a row, thrown by whatever reads a part of it. */
class RowFault extends Error {
  readonly code: BadRowCode;
  constructor(code: BadRowCode, message: string) {
    super(message);
    this.code = code;
  }
}

function readRow(
  { line, lastLine, fields }: Unread,
  isAllowed: ManifestOptions['isAllowed'],
  claim: (ref: string, line: number) => number | undefined,
): ManifestItem {
  let ref: string | undefined;
  try {
    ref = readText(fields, 'ref', 256);
    const row: ManifestRow = { line, audio: readAudio(fields) };
    if (ref !== undefined) row.ref = ref;
    const declaredGenre = readGenres(fields);
    if (declaredGenre) row.declaredGenre = declaredGenre;
    const contentId = readText(fields, 'contentId', 128);
    if (contentId !== undefined) row.contentId = contentId;
    const selection = readSelection(fields);
    if (selection) row.selection = selection;
    if ('s3' in row.audio && !isAllowed(row.audio.s3.bucket, row.audio.s3.key)) {
      throw new RowFault(
        'source_not_allowed',
        `s3://${cut(`${row.audio.s3.bucket}/${row.audio.s3.key}`)} lies in no source that is registered for you.`,
      );
    }
    // Last: a row that does not run leaves its ref to one that does.
    const first = ref === undefined ? undefined : claim(ref, line);
    if (first !== undefined) {
      throw new RowFault('duplicate_ref', `The ref "${cut(ref!)}" is that of line ${first} already.`);
    }
    return { row };
  } catch (error) {
    if (!(error instanceof RowFault)) throw error;
    return bad(line, error.code, `${error.message}${asOne(line, lastLine)}`, ref);
  }
}

function readAudio(fields: Fields): ManifestAudio {
  const text = readText(fields, 'audio', 4_096);
  if (text === undefined) throw invalid('"audio" is missing.');
  if (text.startsWith('s3://')) return { s3: readSourceObject(text, fields) };
  const misplaced = (['etag', 'versionId', 'size'] as const).find((name) => !isAbsent(fields[name]));
  if (misplaced) throw invalid(`"${misplaced}" can be given for s3:// audio only.`);
  if (/^https?:\/\//i.test(text)) {
    if (!URL.canParse(text)) throw invalid(`"audio" is no URL that can be read: "${cut(text)}".`);
    return { url: text };
  }
  const upload = /^upload:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/i.exec(text)?.[1];
  if (upload !== undefined) return { upload: upload.toLowerCase() };
  throw invalid(`"audio" must be s3://bucket/key, an https:// address or upload:id, and is "${cut(text)}".`);
}

/** The key is taken as it is written: nothing in it is percent-decoded. */
function readSourceObject(text: string, fields: Fields): Extract<ManifestAudio, { s3: unknown }>['s3'] {
  const [, bucket, key] = /^s3:\/\/([A-Za-z0-9][A-Za-z0-9._-]{1,62})\/(.+)$/.exec(text) ?? [];
  if (bucket === undefined || key === undefined) {
    throw invalid(`"audio" must be s3://bucket/key, and is "${cut(text)}".`);
  }
  if (Buffer.byteLength(key) > 1_024)
    throw invalid('The key in "audio" has more than the 1,024 bytes that S3 knows.');
  const object: ReturnType<typeof readSourceObject> = { bucket, key };
  const etag = readText(fields, 'etag', 200);
  if (etag !== undefined) object.etag = quotedEtag(etag);
  const versionId = readText(fields, 'versionId', 1_024);
  if (versionId !== undefined) object.versionId = versionId;
  const size = readNumber(fields, 'size', Number.MAX_SAFE_INTEGER);
  if (size !== undefined) {
    if (!Number.isInteger(size)) throw invalid('"size" must be a whole number of bytes.');
    object.size = size;
  }
  return object;
}

/** In its quotes, as S3 answers it and If-Match wants it; lists and inventories leave them away. */
function quotedEtag(text: string): string {
  const [, tag] = /^"?([!#-~]+)"?$/.exec(text) ?? [];
  if (tag === undefined) throw invalid(`"etag" is not an ETag of S3: "${cut(text)}".`);
  return `"${tag}"`;
}

function readGenres(fields: Fields): string[] | undefined {
  const value = fields['declaredGenre'];
  if (isAbsent(value)) return undefined;
  const given = Array.isArray(value) ? value : [value];
  if (!given.every((genre) => typeof genre === 'string')) {
    throw invalid('"declaredGenre" must be text, or an array of texts.');
  }
  const genres = given.flatMap((genre) => genre.split(';')).map((genre) => genre.trim());
  const found = [...new Set(genres.filter((genre) => genre !== ''))];
  if (found.length > 16) throw invalid('"declaredGenre" names more than 16 genres.');
  for (const genre of found) checkText('declaredGenre', genre, 100);
  return found.length === 0 ? undefined : found;
}

function readSelection(fields: Fields): ManifestRow['selection'] {
  const selection: NonNullable<ManifestRow['selection']> = {};
  if (!isAbsent(fields['windows'])) {
    const given = fields['windows'];
    const text = typeof given === 'string' ? given.trim() : given;
    const windows = windowChoiceSchema.safeParse(
      typeof text === 'string' && /^\d+$/.test(text) ? Number(text) : text,
    );
    if (!windows.success) throw invalid('"windows" must be middle, all, or a number from 1 to 64.');
    selection.windows = windows.data;
  }
  const start = readNumber(fields, 'start', maxSeconds);
  if (start !== undefined) selection.start = start;
  const duration = readNumber(fields, 'duration', maxSeconds);
  if (duration === 0) throw invalid('"duration" must be more than 0 seconds.');
  if (duration !== undefined) selection.duration = duration;
  for (const _ in selection) return selection;
  return undefined;
}

/** An empty cell, an empty text and JSON's null say the same: nothing. */
function isAbsent(value: unknown): boolean {
  return value === undefined || value === null || value === '';
}

function readText(fields: Fields, name: Field, maxLength: number): string | undefined {
  const value = fields[name];
  if (isAbsent(value)) return undefined;
  // Catalogues number their tracks; a number too large to be exact is not the one that was written.
  const text = Number.isSafeInteger(value) ? String(value) : value;
  if (typeof text !== 'string') throw invalid(`"${name}" must be text.`);
  checkText(name, text, maxLength);
  return text;
}

function checkText(name: Field, text: string, maxLength: number): void {
  if (text.length > maxLength) throw invalid(`"${name}" has more than ${maxLength} characters.`);
  // A line break in a cell is, as good as ever, a quote that was not closed.
  if (/\p{Cc}/u.test(text)) throw invalid(`"${name}" holds a line break or another control character.`);
  if (!text.isWellFormed()) throw invalid(`"${name}" holds half a character (a lone surrogate).`);
}

function readNumber(fields: Fields, name: Field, max: number): number | undefined {
  const value = fields[name];
  if (isAbsent(value)) return undefined;
  const number = typeof value === 'string' && /^\s*\d+(\.\d+)?\s*$/.test(value) ? Number(value) : value;
  if (typeof number === 'number' && number >= 0 && number <= max) return number;
  throw invalid(`"${name}" must be a number from 0 to ${max}.`);
}

function asOne(line: number, lastLine: number): string {
  return lastLine === line ? '' : ` Lines ${line} to ${lastLine} were read as one row, because of a quote.`;
}

function bad(line: number, code: BadRowCode, message: string, ref?: string): { bad: BadRow } {
  return { bad: ref === undefined ? { line, code, message } : { line, code, message, ref } };
}

function note(line: number, name: string): { note: ManifestNote } {
  const field = cut(name);
  return { note: { line, field, message: `"${field}" is not a field of a manifest and is left aside.` } };
}

function invalid(message: string): RowFault {
  return new RowFault('row_invalid', message);
}

function invalidManifest(message: string): ProblemError {
  return new ProblemError('manifest_invalid', message);
}

/** For messages, whatever the caller's text holds. */
function cut(text: string, length = 80): string {
  const short = text.length <= length ? text : `${text.slice(0, length)}…`;
  return short.toWellFormed().replace(/\p{Cc}/gu, ' ');
}
