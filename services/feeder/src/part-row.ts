/**
 * One row of a part without reading the part: rows stand in their order and are about equally long, so it is looked for
 * where it should be, and once more where the first look says. A catalogue that comes again in another order asks for
 * one row of each of a thousand parts.
 */
import type { PartRow } from '@acousticsense/shared/batch';
import { chunkRows } from '@acousticsense/shared/manifest';
import type { Storage } from '@acousticsense/shared/storage';

/** Bytes of one look: some ten rows. */
const firstLook = 16 << 10;
const newline = 0x0a;

/**
 * @param row within its chunk.
 * @returns undefined when the part has no such row.
 * @throws {ObjectNotFound | ObjectChanged} and what is thrown for a damaged part
 */
export async function readPartRow(
  storage: Pick<Storage, 'stat' | 'read'>,
  key: string,
  row: number,
): Promise<PartRow | undefined> {
  const part = await storage.stat(key);
  // As if it were not there: reading it says so.
  if (part === undefined) return void (await storage.read(key));
  const read = (start: number, end: number) =>
    storage.read(key, undefined, { start, end, ifMatch: part.etag });
  // Rows `fromRow` to `toRow` stand in these bytes, which begin and end with a line. How many there are is a guess.
  let [from, to, fromRow, toRow] = [0, part.size, 0, chunkRows];
  let look = firstLook;
  while (from < to) {
    const share = (row - fromRow) / Math.max(1, toRow - fromRow);
    const aim = from + Math.floor(share * (to - from)) - look / 2;
    const start = Math.max(from, Math.min(aim, to - look));
    const end = Math.min(to, start + look);
    const lines = linesIn(await read(start, end), start, start === from, end === to);
    if (lines === undefined) {
      if (start === from && end === to) return undefined;
      // A line is longer than that.
      look *= 4;
      continue;
    }
    const rows = lines.texts.map((text) => JSON.parse(text) as PartRow);
    const found = rows.find((one) => one.row % chunkRows === row);
    if (found) return found;
    const [first, last] = [rows[0]!.row % chunkRows, rows.at(-1)!.row % chunkRows];
    if (row < first) [to, toRow] = [lines.from, first];
    else if (row > last) [from, fromRow] = [lines.to, last + 1];
    else return undefined;
  }
  return undefined;
}

/** The whole lines among these bytes, and where they begin and end; undefined when there is none. */
function linesIn(
  bytes: Buffer,
  at: number,
  beginsLine: boolean,
  endsLine: boolean,
): { texts: string[]; from: number; to: number } | undefined {
  const from = beginsLine ? 0 : bytes.indexOf(newline) + 1;
  const to = endsLine ? bytes.length : bytes.lastIndexOf(newline) + 1;
  if ((!beginsLine && from === 0) || to <= from) return undefined;
  const texts = bytes.toString('utf8', from, to).split('\n');
  texts.pop();
  return texts.length === 0 ? undefined : { texts, from: at + from, to: at + to };
}
