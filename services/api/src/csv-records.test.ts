import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parse } from 'csv-parse/sync';
import { createCsvRecords } from './csv-records.ts';
import { createLineSplitter } from './text-lines.ts';

function recordsOf(text: string, maxBytes = 65_536) {
  const lines = createLineSplitter(maxBytes);
  const records = createCsvRecords(maxBytes);
  const split = [...lines.push(Buffer.from(text)), ...lines.end()];
  return [...split.flatMap((line) => [...records.take(line)]), ...records.end()];
}

test('CSV as others write it is read as csv-parse reads it', () => {
  let seed = 7;
  const random = (below: number) => {
    seed = (Math.imul(seed, 1_103_515_245) + 12_345) & 0x7fffffff;
    return (seed >> 8) % below;
  };
  const pieces = ['a', 'ü', '🎵', ' ', ',', '"', '""', '\n', ';', 'x y', '', '"\n"', ',"'];
  const cell = () => Array.from({ length: random(5) }, () => pieces[random(pieces.length)]).join('');
  const quote = (text: string) =>
    /[",\n]/.test(text) || random(3) === 0 ? `"${text.replaceAll('"', '""')}"` : text;
  for (let round = 0; round < 500; round += 1) {
    const table = Array.from({ length: 1 + random(6) }, () => ['r', cell(), cell(), cell()]);
    const text = table.map((row) => row.map(quote).join(',')).join('\n');
    const found = recordsOf(text);
    assert.deepEqual(
      found.map(({ cells }) => cells),
      parse(text),
      text,
    );
    let line = 1;
    for (const [index, row] of table.entries()) {
      assert.equal(found[index]!.line, line);
      line += 1 + row.join('').split('\n').length - 1;
    }
  }
});

test('lines that each seem to open a quote are read in time that grows with their number only', () => {
  const hostile = ['"a\n', '""\n', 'x,"\n', '"""\n', 'a,""""\n', '"\n""\n""\n'];
  for (const line of hostile) {
    const began = performance.now();
    const lines = 200_000;
    const found = recordsOf(line.repeat(lines));
    assert.ok(found.length > 0);
    assert.ok(performance.now() - began < 10_000, JSON.stringify(line));
  }
});
