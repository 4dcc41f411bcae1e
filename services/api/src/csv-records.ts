/**
 * Lines to CSV records (RFC 4180: commas, quoted cells, a quote within them doubled, line breaks within them).
 *
 * A manifest's bad rows are reported and its good ones run, so what matters here is where reading goes on after a
 * fault: on the line after the one that begins the broken record. csv-parse, which serves elsewhere, cannot do that;
 * docs/decisions/manifest-csv.md has its behaviour.
 */
import type { Line } from './text-lines.ts';

export interface CsvRecord {
  /** Of the file, where the record begins. */
  readonly line: number;
  readonly lastLine: number;
  readonly cells: readonly string[];
  readonly fault?: {
    readonly code: 'row_not_utf8' | 'row_too_long' | 'row_not_csv';
    readonly message: string;
  };
}

export interface CsvRecords {
  take(line: Line): Generator<CsvRecord, void, undefined>;
  /** What a quote holds open when the lines are over. */
  end(): Generator<CsvRecord, void, undefined>;
}

/** @param maxBytes of one record, over all of its lines. */
export function createCsvRecords(maxBytes: number): CsvRecords {
  /** The lines of the record that is open: read again, from the second on, when it turns out to be broken. */
  let lines: Line[] = [];
  let bytes = 0;
  let cells: string[] = [];
  /** What has been read of a quoted cell that is open. */
  let quoted: string | undefined;

  function close(fault?: CsvRecord['fault']): CsvRecord {
    const record = { line: lines[0]!.number, lastLine: lines.at(-1)!.number, cells };
    lines = [];
    bytes = 0;
    cells = [];
    quoted = undefined;
    return fault === undefined ? record : { ...record, fault };
  }

  /** Reads a line into `cells` and `quoted`. */
  function scan(text: string): 'ended' | 'open' | 'broken' {
    for (let at = 0; ; ) {
      if (quoted === undefined && text[at] === '"') {
        quoted = '';
        at += 1;
      }
      if (quoted === undefined) {
        const comma = text.indexOf(',', at);
        const cell = text.slice(at, comma < 0 ? undefined : comma);
        if (cell.includes('"')) return 'broken';
        cells.push(cell);
        if (comma < 0) return 'ended';
        at = comma + 1;
        continue;
      }
      const quote = text.indexOf('"', at);
      if (quote < 0) {
        quoted += `${text.slice(at)}\n`;
        return 'open';
      }
      quoted += text.slice(at, quote);
      const next = text[quote + 1];
      at = quote + 2;
      if (next === '"') {
        quoted += '"';
        continue;
      }
      cells.push(quoted);
      quoted = undefined;
      if (next === undefined) return 'ended';
      if (next !== ',') return 'broken';
    }
  }

  /** What is wrong with the record when this line is added to it; `open` when its end has not come. */
  function add(line: Line): CsvRecord['fault'] | 'ended' | 'open' {
    lines.push(line);
    if (line.fault === 'row_too_long') {
      return { code: 'row_too_long', message: `The row has more than ${maxBytes} bytes.` };
    }
    const how = scan(line.text);
    if (how === 'broken') return lines.length === 1 ? broken : entangled(line.number);
    if (how === 'open') {
      bytes += Buffer.byteLength(line.text) + 1;
      return bytes > maxBytes ? unclosed(`within ${maxBytes} bytes`) : 'open';
    }
    if (lines.some(({ fault }) => fault)) return { code: 'row_not_utf8', message: 'The row is not UTF-8.' };
    return 'ended';
  }

  /**
   * Every line is read at most three times: a quote stays open over lines whose quotes come in pairs, and such a
   * line, read on its own, opens nothing.
   */
  function* takeAll(waiting: Line[]): Generator<CsvRecord, void, undefined> {
    for (let line = waiting.pop(); line !== undefined; line = waiting.pop()) {
      const how = add(line);
      if (how === 'open') continue;
      if (how === 'ended' || how === undefined) {
        yield close();
        continue;
      }
      // Not UTF-8 is a fault of what the record says, not of where it ends.
      if (how.code !== 'row_not_utf8') waiting.push(...lines.slice(1).reverse());
      yield close(how);
    }
  }

  return {
    *take(line) {
      if (lines.length === 0 && line.fault === undefined && !line.text.includes('"')) {
        yield { line: line.number, lastLine: line.number, cells: line.text.split(',') };
      } else {
        yield* takeAll([line]);
      }
    },
    *end() {
      while (lines.length > 0) {
        const waiting = lines.slice(1).reverse();
        yield close(unclosed('before the manifest ends'));
        yield* takeAll(waiting);
      }
    },
  };
}

const broken = {
  code: 'row_not_csv',
  message:
    'A quote stands where none can: put a cell that holds a quote, a comma or a line break in quotes, and double the quotes within it.',
} as const;

function entangled(line: number) {
  return {
    code: 'row_not_csv',
    message: `A quote that is opened on this line meets another on line ${line}, where no cell ends; the following lines were read as rows of their own.`,
  } as const;
}

function unclosed(where: string) {
  return {
    code: 'row_not_csv',
    message: `A quote that is opened on this line is not closed ${where}; the following lines were read as rows of their own.`,
  } as const;
}
