import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chunkRows, decodeChunk, encodeChunk, type ManifestRow } from './manifest.ts';

const everything: ManifestRow = {
  line: 7,
  ref: 'GBAYE0601498 – Ünïcode\u2028"quoted"\\',
  audio: {
    s3: { bucket: 'catalogue', key: 'a b/ü"\n.flac', etag: '"9e107d9d"', versionId: 'v1', size: 31_234_567 },
  },
  declaredGenre: ['Hip-Hop', 'R&B'],
  contentId: 'sha256:00ff',
  selection: { windows: 4, start: 1.5, duration: 30 },
};
const rows = (count: number): ManifestRow[] =>
  Array.from({ length: count }, (_, index) => ({
    line: index + 2,
    ref: `GBAYE${index}`,
    audio: {
      s3: {
        bucket: 'catalogue',
        key: `2026/11/label/track-${index}.flac`,
        etag: '"9e107d9d372bb6826bd81d3542a419d6"',
        size: 31_234_567,
      },
    },
    declaredGenre: ['Hip-Hop'],
  }));

test('a chunk gives back the rows that went in, whatever their text holds', () => {
  const mixed: ManifestRow[] = [
    everything,
    { line: 8, audio: { url: 'https://example.org/a.mp3?sig=%2F' } },
    { line: 9, audio: { upload: '018f0000-0000-7000-8000-000000000000' }, selection: { windows: 'all' } },
  ];
  assert.deepEqual(decodeChunk(encodeChunk(mixed)), mixed);
  assert.deepEqual(decodeChunk(encodeChunk(rows(chunkRows))), rows(chunkRows));
});

test('a usual row takes 150 to 300 bytes', () => {
  const size = encodeChunk(rows(chunkRows)).length / chunkRows;
  assert.ok(size > 150 && size < 300, `${size}`);
});

test('a chunk holds 1 to 1,000 rows', () => {
  assert.throws(() => encodeChunk([]), RangeError);
  assert.throws(() => encodeChunk(rows(chunkRows + 1)), RangeError);
});

test('a chunk cut at any byte is told, also between two rows', () => {
  const whole = encodeChunk(rows(3));
  for (let length = 0; length < whole.length; length += 1) {
    assert.throws(
      () => decodeChunk(whole.subarray(0, length)),
      /chunk of a manifest is damaged/,
      `${length}`,
    );
  }
  const lines = whole.toString().split('\n');
  assert.throws(
    () => decodeChunk(Buffer.from(`${lines.slice(0, 3).join('\n')}\n`)),
    /2 rows and should have 3/,
  );
});

test('damage is named by its line', () => {
  const lines = encodeChunk(rows(3)).toString().split('\n');
  const withLine = (index: number, text: string) => Buffer.from(lines.with(index, text).join('\n'));
  assert.throws(() => decodeChunk(withLine(2, '{"line":')), /line 3 is not JSON/);
  assert.throws(() => decodeChunk(withLine(2, '{"line":2}')), /line 3 is no row \(audio\)/);
  assert.throws(() => decodeChunk(withLine(3, '[]')), /line 4 is no row/);
  assert.throws(() => decodeChunk(withLine(0, '{"v":2,"rows":3}')), /no head of a chunk/);
  assert.throws(
    () => decodeChunk(Buffer.concat([encodeChunk(rows(1)), Buffer.from([0xff, 0x0a])])),
    /not UTF-8/,
  );
});

test('what a newer process adds to a row does not stop an older one; another kind of audio does', () => {
  const [head, row] = encodeChunk(rows(1)).toString().split('\n');
  const newer = { ...JSON.parse(row!), mood: 'calm' };
  assert.deepEqual(decodeChunk(Buffer.from(`${head}\n${JSON.stringify(newer)}\n`)), rows(1));
  const foreign = { line: 1, audio: { ftp: 'x' } };
  assert.throws(() => decodeChunk(Buffer.from(`${head}\n${JSON.stringify(foreign)}\n`)), /line 2 is no row/);
});
