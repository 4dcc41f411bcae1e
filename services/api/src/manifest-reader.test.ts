import assert from 'node:assert/strict';
import { PassThrough, Readable } from 'node:stream';
import { test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import v8 from 'node:v8';
import vm from 'node:vm';
import { createGunzip, createGzip, gzipSync } from 'node:zlib';
import { ProblemError } from '@acousticsense/shared/errors';
import { decodeChunk, encodeChunk } from '@acousticsense/shared/manifest';
import { type ManifestItem, type ManifestOptions, readManifest } from './manifest-reader.ts';

const defaults = { maxRows: 1_000, maxLineBytes: 65_536, isAllowed: () => true };
type Given = Partial<ManifestOptions>;

async function collect(stream: AsyncIterable<Uint8Array>, options: ManifestOptions): Promise<ManifestItem[]> {
  return Array.fromAsync(readManifest(stream, options));
}
const ofBytes = (bytes: Buffer, options: Given & Pick<ManifestOptions, 'format'>) =>
  collect(Readable.from([bytes]), { ...defaults, ...options });
const csv = (text: string, options: Given = {}) => ofBytes(Buffer.from(text), { ...options, format: 'csv' });
const jsonl = (text: string, options: Given = {}) =>
  ofBytes(Buffer.from(text), { ...options, format: 'jsonl' });

const rows = (items: ManifestItem[]) => items.flatMap((item) => ('row' in item ? [item.row] : []));
const bads = (items: ManifestItem[]) => items.flatMap((item) => ('bad' in item ? [item.bad] : []));
/** `line code` of the bad rows. */
const codes = (items: ManifestItem[]) => bads(items).map(({ line, code }) => `${line} ${code}`);
const lines = (items: ManifestItem[]) => rows(items).map(({ line }) => line);
const problem = (code: string, message: RegExp) => (error: unknown) =>
  error instanceof ProblemError && error.code === code && message.test(error.message);

/** The same numbers at every run. */
function pseudoRandom(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fffffff;
    return (state >> 8) % below;
  };
}

const upload = '018f2b6e-5c1d-7e2a-9b1c-0123456789ab';
const expected = [
  {
    audio: {
      s3: {
        bucket: 'catalogue',
        key: 'Ä b/100%25, "live".flac',
        etag: '"9e107d9d-4"',
        versionId: 'v.1',
        size: 31_234_567,
      },
    },
    ref: 'GBAYE0601498',
    declaredGenre: ['Hip-Hop', 'R&B'],
    contentId: 'isrc:1',
    selection: { windows: 4, start: 1.5, duration: 30 },
  },
  { audio: { url: 'https://example.org/a.mp3?sig=%2F,b' }, ref: '7', selection: { windows: 'all' } },
  { audio: { url: 'http://example.org/b.mp3' } },
  { audio: { upload } },
] as const;
const asJsonl = [
  {
    audio: 's3://catalogue/Ä b/100%25, "live".flac',
    ref: 'GBAYE0601498',
    declaredGenre: ['Hip-Hop', 'R&B'],
    etag: '"9e107d9d-4"',
    versionId: 'v.1',
    size: 31_234_567,
    contentId: 'isrc:1',
    windows: 4,
    start: 1.5,
    duration: 30,
  },
  { audio: 'https://example.org/a.mp3?sig=%2F,b', ref: 7, windows: 'all', etag: null, size: '' },
  { audio: 'http://example.org/b.mp3' },
  { audio: `upload:${upload.toUpperCase()}` },
];
const asCsv = [
  'audio,ref,declaredGenre,etag,versionId,size,contentId,windows,start,duration',
  '"s3://catalogue/Ä b/100%25, ""live"".flac",GBAYE0601498,Hip-Hop; R&B;,9e107d9d-4,v.1,31234567,isrc:1, 4 ,1.5,30',
  '"https://example.org/a.mp3?sig=%2F,b",7,,,,,,all,,',
  'http://example.org/b.mp3,,,,,,,,,',
  `upload:${upload},,,,,,,,,`,
];

test('JSON Lines and CSV say the same rows', async () => {
  const fromJson = await jsonl(asJsonl.map((row) => JSON.stringify(row)).join('\n'));
  assert.deepEqual(
    fromJson,
    expected.map((row, index) => ({ row: { line: index + 1, ...row } })),
  );
  const fromCsv = await csv(`${asCsv.join('\n')}\n`);
  assert.deepEqual(
    fromCsv,
    expected.map((row, index) => ({ row: { line: index + 2, ...row } })),
  );
  assert.deepEqual(decodeChunk(encodeChunk(rows(fromCsv))), rows(fromCsv));
});

test('columns may stand in any order, be named with spaces around, or have no name', async () => {
  assert.deepEqual(await csv('ref, audio ,,\na,s3://bucket/k,,x\n'), [
    { row: { line: 2, audio: { s3: { bucket: 'bucket', key: 'k' } }, ref: 'a' } },
  ]);
});

test('a byte-order mark, CRLF, blank lines and a missing last line break change nothing but line numbers', async () => {
  const json = '\uFEFF\r\n{"audio":"s3://bucket/1"}\r\n   \r\n\r\n{"audio":"s3://bucket/2"}';
  assert.deepEqual(lines(await jsonl(json)), [2, 5]);
  const table = '\uFEFFaudio,ref\r\n\r\ns3://bucket/1,"a"\r\n,\r\ns3://bucket/2,b\r';
  const items = await csv(table);
  assert.deepEqual(lines(items), [3, 5]);
  assert.deepEqual(
    rows(items).map(({ ref }) => ref),
    ['a', 'b'],
  );
});

test('however the bytes are cut on their way, the rows are the same', async () => {
  const bad = Buffer.from([0x22, 0xff, 0x22]);
  const text = (...parts: (string | Buffer)[]) => Buffer.concat(parts.map((part) => Buffer.from(part)));
  const long = `s3://bucket/${'ü'.repeat(400)}`;
  const manifests = {
    csv: text(
      `\uFEFF${asCsv.join('\r\n')}\r\n`,
      's3://bucket/"x,b,,,,,,,,\n',
      's3://bucket/嘻哈🎵,ref\u00e9,"Folk\n;Jazz",,,,,,,\n',
      bad,
      ',x,,,,,,,,\n',
      `${long},long,,,,,,,,\n`,
      '"s3://bucket/unclosed,,,,,,,,,\n',
      's3://bucket/after,after,,,,,,,,\n',
    ),
    jsonl: text(
      `\uFEFF${asJsonl.map((row) => JSON.stringify(row)).join('\r\n')}\r\n\n`,
      '{"audio":"s3://bucket/嘻哈🎵","ref":"é"}\n',
      bad,
      `\n{"audio":"${long}"}\n`,
      '{"audio":\n{"audio":"s3://bucket/after"}',
    ),
  };
  const random = pseudoRandom(1);
  for (const format of ['csv', 'jsonl'] as const) {
    const bytes = manifests[format];
    const options = { ...defaults, format, maxLineBytes: 700 };
    const whole = await collect(Readable.from([bytes]), options);
    assert.ok(bads(whole).length >= 3 && rows(whole).length >= 6, JSON.stringify(codes(whole)));
    for (let round = 0; round < 300; round += 1) {
      const largest = 1 + random(round % 3 === 0 ? 3 : 300);
      const parts: Buffer[] = [];
      for (let from = 0; from < bytes.length; ) {
        const end = from + random(largest + 1);
        parts.push(bytes.subarray(from, end));
        from = end;
      }
      assert.deepEqual(await collect(Readable.from(parts), options), whole, `${format}, round ${round}`);
    }
  }
});

test('whatever bytes come, what is told is rows, bad rows or a problem with a name', async () => {
  const random = pseudoRandom(3);
  const pieces = [
    '"',
    ',',
    '\n',
    '\r\n',
    '{',
    '}',
    '":',
    'audio',
    's3://bucket/k',
    'ref',
    '\\u',
    '\uFEFF',
    'x',
  ];
  for (let round = 0; round < 2_000; round += 1) {
    const parts = Array.from({ length: random(60) }, () => Buffer.from(pieces[random(pieces.length)]!));
    if (round % 3 === 0) parts.push(Buffer.from([random(256), random(256)]));
    const start = round % 2 === 0 ? Buffer.from('audio,ref\n') : Buffer.from('{"audio":"s3://bucket/k"}\n');
    const bytes = Buffer.concat([start, ...parts]);
    const format = round % 2 === 0 ? 'csv' : 'jsonl';
    try {
      const items = await ofBytes(bytes, { format, maxLineBytes: 100 });
      const told = items.flatMap((item) =>
        'row' in item ? item.row.line : 'bad' in item ? item.bad.line : [],
      );
      assert.deepEqual(
        told,
        [...new Set(told)].sort((a, b) => a - b),
        'in order, each line once',
      );
    } catch (error) {
      assert.ok(error instanceof ProblemError, `${error}: ${JSON.stringify(bytes.toString())}`);
    }
  }
});

test('a line that is not UTF-8 is bad, the others run', async () => {
  const latin1 = Buffer.from('s3://bucket/Bj\xf6rk.flac,2\n', 'latin1');
  const table = Buffer.concat([
    Buffer.from('audio,ref\ns3://bucket/1,1\n'),
    latin1,
    Buffer.from('"s3://bucket/3\n'),
    latin1,
    Buffer.from('",3\ns3://bucket/4,4\n'),
  ]);
  const items = await ofBytes(table, { format: 'csv' });
  assert.deepEqual(codes(items), ['3 row_not_utf8', '4 row_not_utf8']);
  assert.deepEqual(lines(items), [2, 7]);
  const json = Buffer.concat([
    Buffer.from('{"audio":"s3://bucket/1"}\n'),
    Buffer.from('{"audio":"s3://bucket/\xf6"}\n', 'latin1'),
    Buffer.from('{"audio":"s3://bucket/3"}'),
  ]);
  const read = await ofBytes(json, { format: 'jsonl' });
  assert.deepEqual(codes(read), ['2 row_not_utf8']);
  assert.deepEqual(lines(read), [1, 3]);
});

test('a manifest in UTF-16, in an archive, or with NUL bytes is refused as a whole, saying so', async () => {
  const table = 'audio,ref\ns3://bucket/1,1\n';
  const utf16 = Buffer.from(`\uFEFF${table}`, 'utf16le');
  const refused: [Buffer, RegExp][] = [
    [utf16, /UTF-16/],
    [Buffer.from(utf16).swap16(), /UTF-16/],
    [Buffer.from(table, 'utf16le'), /NUL bytes/],
    [Buffer.from(`${table}\0`), /NUL bytes/],
    [gzipSync(table), /gzip.*Content-Encoding/],
    [Buffer.from('PK\x03\x04rest of a spreadsheet'), /spreadsheet/],
    [Buffer.from(table.replaceAll('\n', '\r')), /CR alone/],
  ];
  for (const [bytes, message] of refused) {
    for (const format of ['csv', 'jsonl'] as const) {
      await assert.rejects(ofBytes(bytes, { format }), problem('manifest_invalid', message), `${message}`);
    }
  }
  await assert.rejects(jsonl(' [{"audio":"s3://bucket/1"}]'), problem('manifest_invalid', /JSON array/));
});

test('a manifest without a row is refused', async () => {
  for (const text of ['', '\n\r\n  \n', '\uFEFF']) {
    await assert.rejects(csv(text), problem('manifest_invalid', /no rows/));
    await assert.rejects(jsonl(text), problem('manifest_invalid', /no rows/));
  }
  await assert.rejects(csv('audio,ref\n\n,\n'), problem('manifest_invalid', /no rows/));
});

test('a CSV that does not name the column audio is refused, with what may be the reason', async () => {
  const isMissing = (message: RegExp) => (error: unknown) =>
    problem('manifest_invalid', message)(error) && (error as ProblemError).details.field === 'audio';
  await assert.rejects(csv('url,ref\nhttps://a/b,1\n'), isMissing(/no column "audio".*"url,ref"/));
  await assert.rejects(csv('s3://bucket/1,1\n'), isMissing(/no column "audio"/));
  await assert.rejects(csv('audio;ref\ns3://bucket/1;1\n'), isMissing(/commas, not with ";"/));
  await assert.rejects(csv('audio\tref\ns3://bucket/1\t1\n'), isMissing(/commas, not with "\\t"/));
  await assert.rejects(csv('audio,ref,ref\na,b,c\n'), problem('manifest_invalid', /column "ref" twice/));
  await assert.rejects(csv('aud"io,ref\na,b\n'), problem('manifest_invalid', /Line 1.*quote/));
  await assert.rejects(csv(`${'x'.repeat(70_000)}\na\n`), problem('manifest_invalid', /Line 1.*65536 bytes/));
});

test('one row more than allowed, or one byte, ends it; bad rows count, blank lines and the first of a CSV do not', async () => {
  const three = 'audio\ns3://bucket/1\n\nnonsense\ns3://bucket/3\n';
  assert.equal((await csv(three, { maxRows: 3 })).length, 3);
  await assert.rejects(csv(three, { maxRows: 2 }), problem('manifest_too_large', /more than 2 rows/));
  assert.equal((await csv(three, { maxBytes: three.length })).length, 3);
  await assert.rejects(
    csv(three, { maxBytes: three.length - 1 }),
    problem('manifest_too_large', /more than \d+ bytes/),
  );
});

test('a line of 10 MB is bad by its number, in both formats, and the lines around it run', async () => {
  const huge = 'x'.repeat(10_000_000);
  const table = await csv(`audio,ref\ns3://bucket/1,1\ns3://bucket/${huge},2\ns3://bucket/3,3\n`);
  assert.deepEqual(codes(table), ['3 row_too_long']);
  assert.deepEqual(lines(table), [2, 4]);
  const json = await jsonl(`{"audio":"s3://bucket/1"}\n{"audio":"${huge}"}\n{"audio":"s3://bucket/3"}`);
  assert.deepEqual(codes(json), ['2 row_too_long']);
  assert.deepEqual(lines(json), [1, 3]);
  const last = await jsonl(`{"audio":"s3://bucket/1"}\n${huge}`);
  assert.deepEqual(codes(last), ['2 row_too_long']);
});

test('a line is bad from one byte over the limit on, counted in UTF-8', async () => {
  const of = (characters: number) => `{"audio":"s3://bucket/${'ü'.repeat(characters)}"}`;
  const maxLineBytes = Buffer.byteLength(of(100));
  assert.deepEqual(codes(await jsonl(`${of(100)}\n${of(101)}\n${of(100)}\n${of(101)}`, { maxLineBytes })), [
    '2 row_too_long',
    '4 row_too_long',
  ]);
});

test('what a line without an end sends is not kept', async () => {
  v8.setFlagsFromString('--expose-gc');
  const collectGarbage = vm.runInNewContext('gc') as () => void;
  const parts: WeakRef<ArrayBufferLike>[] = [];
  let kept = Number.NaN;
  async function* endless() {
    yield Buffer.from('audio,ref\n"s3://bucket/1');
    for (let i = 0; i < 64; i += 1) {
      const part = Buffer.alloc(1024 * 1024, 'x');
      parts.push(new WeakRef(part.buffer));
      yield part;
    }
    // A reference that was made or read in this turn of the event loop counts as a live one.
    await setImmediate();
    collectGarbage();
    kept = parts.filter((part) => part.deref()).length;
    yield Buffer.from('\ns3://bucket/2,2\n');
  }
  const items = await collect(endless(), { ...defaults, format: 'csv', maxBytes: 1e9 });
  assert.deepEqual(codes(items), ['2 row_too_long']);
  assert.deepEqual(lines(items), [3]);
  assert.ok(kept <= 2, `${kept} of 64 parts`);
});

test('a cell may hold line breaks; a row is numbered by its first line', async () => {
  const items = await csv(
    'audio,ref,notes\ns3://bucket/1,1,"two\r\nlines, and ""quotes"""\ns3://bucket/2,2,\ns3://bucket/3,"3\n",\n',
  );
  assert.deepEqual(lines(items), [2, 4]);
  const [broken] = bads(items);
  assert.equal(broken?.code, 'row_invalid');
  assert.match(broken?.message ?? '', /"ref" holds a line break.*Lines 5 to 6 were read as one row/);
});

test('an unclosed quote costs its own row only', async () => {
  const good = (from: number, to: number) =>
    Array.from({ length: to - from }, (_, i) => `s3://bucket/${from + i},${from + i}\n`).join('');
  const toTheEnd = await csv(`audio,ref\n"s3://bucket/2,2\n${good(3, 9)}`);
  assert.deepEqual(codes(toTheEnd), ['2 row_not_csv']);
  assert.deepEqual(lines(toTheEnd), [3, 4, 5, 6, 7, 8]);
  assert.match(bads(toTheEnd)[0]!.message, /not closed before the manifest ends/);

  const overTheLimit = await csv(`audio,ref\n"s3://bucket/2,2\n${good(3, 500)}`, { maxLineBytes: 200 });
  assert.deepEqual(codes(overTheLimit), ['2 row_not_csv']);
  assert.equal(rows(overTheLimit).length, 497);
  assert.match(bads(overTheLimit)[0]!.message, /not closed within 200 bytes/);

  const meetsAnother = await csv(
    `audio,ref\n"s3://bucket/2,2\n${good(3, 5)}"s3://bucket/5","5"\n${good(6, 8)}`,
  );
  assert.deepEqual(codes(meetsAnother), ['2 row_not_csv']);
  assert.deepEqual(lines(meetsAnother), [3, 4, 5, 6, 7]);
  assert.match(bads(meetsAnother)[0]!.message, /meets another on line 5/);

  const meetsOverlong = await csv(
    `audio,ref\n"s3://bucket/2,2\n${good(3, 4)}${'x'.repeat(300)}\n${good(5, 6)}`,
    {
      maxLineBytes: 200,
    },
  );
  assert.deepEqual(codes(meetsOverlong), ['2 row_too_long', '4 row_too_long']);
  assert.deepEqual(lines(meetsOverlong), [3, 5]);

  const twoInARow = await csv(`audio,ref\n"s3://bucket/2,2\n${good(3, 4)}"s3://bucket/4,4\n${good(5, 6)}`);
  assert.deepEqual(codes(twoInARow), ['2 row_not_csv', '4 row_not_csv']);
  assert.deepEqual(lines(twoInARow), [3, 5]);
});

test('a row whose cells are not as many as the columns is bad', async () => {
  const items = await csv('audio,ref\ns3://bucket/a,b,1\ns3://bucket/2\ns3://bucket/3,3\n');
  assert.deepEqual(codes(items), ['2 row_invalid', '3 row_invalid']);
  assert.match(bads(items)[0]!.message, /3 cells, and 2 columns/);
});

test('what is no JSON object is bad by its line', async () => {
  const items = await jsonl(
    '{"audio":\n"s3://bucket/1"\n[1]\nnull\n{"audio":"s3://bucket/1"},\n{"audio":"s3://bucket/1"}',
  );
  assert.deepEqual(
    codes(items),
    [1, 2, 3, 4, 5].map((line) => `${line} row_not_json`),
  );
  assert.deepEqual(lines(items), [6]);
});

test('every field is checked, and the message names it', async () => {
  const s3 = { audio: 's3://bucket/key' };
  const wrong: [object, RegExp][] = [
    [{}, /"audio" is missing/],
    [{ audio: '' }, /"audio" is missing/],
    [{ audio: { s3: 'x' } }, /"audio" must be text/],
    [
      { audio: 'song.mp3' },
      /must be s3:\/\/bucket\/key, an https:\/\/ address or upload:id, and is "song\.mp3"/,
    ],
    [{ audio: 'file:///etc/passwd' }, /must be s3/],
    [{ audio: ' s3://bucket/key' }, /must be s3/],
    [{ audio: 's3://bucket' }, /must be s3:\/\/bucket\/key, and is/],
    [{ audio: 's3://bucket/' }, /must be s3:\/\/bucket\/key, and is/],
    [{ audio: 's3:///key' }, /must be s3:\/\/bucket\/key, and is/],
    [{ audio: 's3://../key' }, /must be s3:\/\/bucket\/key, and is/],
    [{ audio: `s3://bucket/${'ü'.repeat(513)}` }, /1,024 bytes/],
    [{ audio: 's3://bucket/a\nb' }, /"audio" holds a line break/],
    [{ audio: 's3://bucket/\ud800' }, /lone surrogate/],
    [{ audio: 'https://' }, /no URL/],
    [{ audio: 'https://[::1/x' }, /no URL/],
    [{ audio: `https://example.org/${'x'.repeat(4_100)}` }, /more than 4096 characters/],
    [{ audio: 'upload:42' }, /must be s3/],
    [{ audio: 'https://example.org/a', etag: 'x' }, /"etag" can be given for s3/],
    [{ audio: `upload:${upload}`, size: 1 }, /"size" can be given for s3/],
    [{ ...s3, ref: 'x'.repeat(257) }, /"ref" has more than 256 characters/],
    [{ ...s3, ref: 'a\u0000b' }, /"ref" holds a line break or another control character/],
    [{ ...s3, ref: ['x'] }, /"ref" must be text/],
    [{ ...s3, ref: 2 ** 60 }, /"ref" must be text/],
    [{ ...s3, ref: 1.5 }, /"ref" must be text/],
    [{ ...s3, contentId: 'x'.repeat(129) }, /"contentId" has more than 128/],
    [{ ...s3, etag: 'W/"abc"' }, /"etag" is not an ETag/],
    [{ ...s3, etag: 'a b' }, /"etag" is not an ETag/],
    [{ ...s3, size: -1 }, /"size" must be a number/],
    [{ ...s3, size: 1.5 }, /"size" must be a whole number/],
    [{ ...s3, size: '1e3' }, /"size" must be a number/],
    [{ ...s3, declaredGenre: 7 }, /"declaredGenre" must be text/],
    [{ ...s3, declaredGenre: ['Rock', 7] }, /"declaredGenre" must be text/],
    [{ ...s3, declaredGenre: 'x'.repeat(101) }, /"declaredGenre" has more than 100/],
    [{ ...s3, declaredGenre: Array.from({ length: 17 }, (_, i) => `g${i}`) }, /more than 16 genres/],
    [{ ...s3, windows: 0 }, /"windows" must be middle, all, or a number from 1 to 64/],
    [{ ...s3, windows: 'some' }, /"windows" must be/],
    [{ ...s3, start: -1 }, /"start" must be a number/],
    [{ ...s3, start: 'soon' }, /"start" must be a number/],
    [{ ...s3, start: 1e7 }, /"start" must be a number from 0 to 1000000/],
    [{ ...s3, duration: 0 }, /"duration" must be more than 0/],
    [{ ...s3, duration: true }, /"duration" must be a number/],
  ];
  const items = await jsonl(wrong.map(([row]) => JSON.stringify(row)).join('\n'));
  for (const [index, [row, message]] of wrong.entries()) {
    const item = items[index]!;
    assert.ok('bad' in item, JSON.stringify(row));
    assert.equal(item.bad.code, 'row_invalid');
    assert.equal(item.bad.line, index + 1);
    assert.match(item.bad.message, message);
  }
});

test('a bad row tells its ref where it can be read, and a message never holds much of the row', async () => {
  const [item] = await jsonl(JSON.stringify({ audio: `x\u0085${'y'.repeat(4_000)}`, ref: 'mine' }));
  assert.ok(item && 'bad' in item);
  assert.equal(item.bad.ref, 'mine');
  assert.ok(item.bad.message.length < 250, item.bad.message);
});

test('of several rows with one ref the first runs; a row that does not run leaves its ref to another', async () => {
  const items = await csv(
    'audio,ref\nnonsense,a\ns3://bucket/1,a\ns3://bucket/2,b\ns3://bucket/3,a\ns3://bucket/4,\ns3://bucket/5,\ns3://bucket/6,a\ns3://bucket/7,A\n',
  );
  assert.deepEqual(codes(items), ['2 row_invalid', '5 duplicate_ref', '8 duplicate_ref']);
  assert.deepEqual(lines(items), [3, 4, 6, 7, 9]);
  assert.deepEqual(bads(items)[2], {
    line: 8,
    code: 'duplicate_ref',
    message: 'The ref "a" is that of line 3 already.',
    ref: 'a',
  });
});

test('an object outside the registered sources is bad; addresses and uploads are not asked about', async () => {
  const asked: string[] = [];
  const isAllowed = (bucket: string, key: string) => {
    asked.push(`${bucket} ${key}`);
    return bucket === 'mine' && key.startsWith('music/');
  };
  const items = await csv(
    `audio\ns3://mine/music/1\ns3://mine/private/2\ns3://acousticsense/jobs/x/audio\nhttps://example.org/a\nupload:${upload}\n`,
    { isAllowed },
  );
  assert.deepEqual(codes(items), ['3 source_not_allowed', '4 source_not_allowed']);
  assert.deepEqual(lines(items), [2, 5, 6]);
  assert.deepEqual(asked, ['mine music/1', 'mine private/2', 'acousticsense jobs/x/audio']);
});

test('unknown fields are left aside and told once each, twenty at most', async () => {
  const table = await csv('audio,title,ref,declaredgenre\ns3://bucket/1,A,1,Rock\ns3://bucket/2,B,2,Rock\n');
  const noted = table.flatMap((item) => ('note' in item ? [`${item.note.line} ${item.note.field}`] : []));
  assert.deepEqual(noted, ['1 title', '1 declaredgenre']);
  assert.equal(rows(table).length, 2);

  const many = Array.from({ length: 50 }, (_, i) =>
    JSON.stringify({ audio: `s3://bucket/${i}`, title: 'x', [`field${i}`]: 1, ['__proto__']: 1 }),
  );
  const json = await jsonl(many.join('\n'));
  assert.equal(json.filter((item) => 'note' in item).length, 20);
  assert.equal(rows(json).length, 50);
});

test('a compressed manifest comes through zlib', async () => {
  const text = asJsonl.map((row) => JSON.stringify(row)).join('\n');
  const stream = Readable.from([Buffer.from(text)])
    .pipe(createGzip())
    .pipe(createGunzip());
  assert.equal((await collect(stream, { ...defaults, format: 'jsonl' })).length, asJsonl.length);
});

test('a stream is left open when the manifest is refused or left early, so that its request can be answered', async () => {
  const stream = new PassThrough();
  stream.write(`url\n${'x'.repeat(5_000)}`);
  await assert.rejects(collect(stream, { ...defaults, format: 'csv' }), ProblemError);
  assert.equal(stream.destroyed, false);

  const left = new PassThrough();
  left.write(`audio\n${'s3://bucket/1\n'.repeat(1_000)}`);
  for await (const _ of readManifest(left, { ...defaults, format: 'csv' })) break;
  assert.equal(left.destroyed, false);
});

test('a stream that breaks off is an error, after the rows that came', async () => {
  async function* broken() {
    yield Buffer.from(`audio\n${'s3://bucket/1\n'.repeat(1_000)}`);
    throw new Error('connection lost');
  }
  let count = 0;
  await assert.rejects(async () => {
    for await (const _ of readManifest(broken(), { ...defaults, format: 'csv' })) count += 1;
  }, /connection lost/);
  assert.equal(count, 1_000);
});

test('no more is read than is asked for', async () => {
  let parts = 0;
  async function* source() {
    yield Buffer.from('audio\n');
    for (; parts < 1_000; parts += 1) yield Buffer.from('s3://bucket/1\n'.repeat(500));
  }
  const items = readManifest(source(), { ...defaults, maxRows: 1e6, format: 'csv' });
  for (let i = 0; i < 1_000; i += 1) await items.next();
  assert.ok(parts <= 3, `${parts} parts read for 1,000 rows`);
  await items.return();
});
