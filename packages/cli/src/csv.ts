/** CSV files with a header (RFC 4180): rows with the line they begin on. */
import { readFile } from 'node:fs/promises';
import { CsvError, parse } from 'csv-parse/sync';
import { Failure, systemCode } from './failure.ts';

export interface CsvRow {
  /** Counted from 1, the header included. */
  readonly line: number;
  readonly cells: readonly string[];
}

export interface CsvFile {
  readonly columns: readonly string[];
  readonly rows: readonly CsvRow[];
}

/** @throws {Failure} naming the line that is not CSV. */
export async function readCsv(file: string): Promise<CsvFile> {
  let bytes: Buffer;
  try {
    bytes = await readFile(file);
  } catch (error) {
    const code = systemCode(error);
    throw new Failure(
      `${file} cannot be read${code === 'ENOENT' ? ': there is no such file' : ` (${code})`}.`,
    );
  }
  let parsed: { record: string[]; info: { lines: number } }[];
  try {
    parsed = parse(bytes, {
      // Tells UTF-16, as spreadsheets write it, from UTF-8 too.
      bom: true,
      info: true,
      skip_empty_lines: true,
      trim: true,
    }) as unknown as typeof parsed;
  } catch (error) {
    if (!(error instanceof CsvError)) throw error;
    throw new Failure(`${file} is not CSV: ${error.message.replace(/\.$/, '')}.`);
  }
  const [header, ...rows] = parsed;
  if (header === undefined) throw new Failure(`${file} is empty: its first line must name the columns.`);
  return {
    columns: header.record,
    rows: rows.map(({ record, info }) => ({ line: info.lines, cells: record })),
  };
}
