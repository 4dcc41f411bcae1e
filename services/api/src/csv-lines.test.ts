import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parse } from 'csv-parse/sync';
import { csvLine } from './csv-lines.ts';

test('what is written is read again by a parser of RFC 4180', () => {
  const cells = [
    'plain',
    'a,b',
    'say "hi"',
    'two\r\nlines',
    ' spaced ',
    'a;b',
    'tab\tbed',
    '',
    'Ünïcode 音樂',
  ];
  assert.deepEqual(parse(csvLine(cells) + csvLine(cells)), [cells, cells]);
});

test('numbers and flags are bare, what is absent is empty, a line ends with CR LF', () => {
  assert.equal(csvLine([1, -0.5, true, false, undefined, '']), '1,-0.5,true,false,,\r\n');
});

test('a text that a spreadsheet would run is told as text', () => {
  const run = [
    '=HYPERLINK("http://x.example","y")',
    '+1+1',
    '-1+1',
    '@SUM(A1)',
    '\t=1',
    '\r=1',
    '\n=1',
    '＝1',
    '＋1+1',
    '－1+1',
    '＠A1',
  ];
  for (const text of run) assert.deepEqual(parse(csvLine([text, 'x'])), [[`'${text}`, 'x']], text);
  // A quote or a separator within a text opens no cell of its own.
  const hidden = ['a,=1', 'a";=1', 'a\r\n=1', 'a\t=1', 'a;=1'];
  for (const text of hidden) assert.match(csvLine([text]), /^"(?:[^"]|"")*"\r\n$/s, text);
});

test('a number that came as a text stays one, and so does everything that is harmless', () => {
  for (const text of ['-12', '+49', '-0.5', '12', "it's", "'quoted", 'a=b', '1-2'])
    assert.equal(csvLine([text]), `${text}\r\n`);
});
