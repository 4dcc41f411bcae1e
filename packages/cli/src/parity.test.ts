import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { createLabelMatcher } from './labels.ts';
import { compareLogits, readReference } from './parity.ts';

const labels = ['Blues', 'Hip-Hop', 'Rock'];
const theirs = new Map([
  [
    'a.wav',
    new Map([
      [0, [1, 2, 3]],
      [1, [3, 0, 0]],
    ]),
  ],
]);
const near = (actual: number | null, expected: number) =>
  assert.ok(actual !== null && Math.abs(actual - expected) < 1e-9, `${actual} instead of ${expected}`);

test('errors are of logits, absolute and as shares of the standard deviation of the reference', () => {
  const own = [
    [1, 2, 3.1],
    [3, 0, 0.02],
  ];
  const parity = compareLogits(theirs, new Map([['a.wav', own]]), labels);
  // 1 2 3 3 0 0: mean 1.5, mean of the squares 23/6.
  const std = Math.sqrt(23 / 6 - 1.5 ** 2);
  near(parity.maxError, 0.1);
  near(parity.meanError, 0.12 / 6);
  near(parity.referenceStd, std);
  near(parity.maxErrorShare, 0.1 / std);
  near(parity.top1Agreement, 1);
  assert.deepEqual(parity.mismatches, []);
  assert.deepEqual(parity.worst, {
    file: 'a.wav',
    window: 0,
    label: 'Rock',
    reference: 3,
    ours: 3.1,
  });
});

test('another best label in one of two windows is an agreement of a half', () => {
  const own = [
    [1, 4, 3],
    [3, 0, 0],
  ];
  near(compareLogits(theirs, new Map([['a.wav', own]]), labels).top1Agreement, 0.5);
});

test('files and windows without a counterpart are named', () => {
  const reference = new Map([
    ...theirs,
    ['b.wav', new Map([[0, [0, 0, 0]]])],
    ['c.wav', new Map([[0, [0, 0, 0]]])],
  ]);
  const ours = new Map<string, (number[] | null)[] | string>([
    ['a.wav', [[1, 2, 3]]],
    ['b.wav', 'The file is not audio.'],
    ['c.wav', [null]],
  ]);
  const parity = compareLogits(reference, ours, labels);
  assert.deepEqual(parity.mismatches, [
    'a.wav: 2 windows in the reference, 1 here',
    'b.wav: The file is not audio.',
    'c.wav: window 0 is silent here',
  ]);
  assert.equal(parity.windows, 1);
});

describe('a reference file', () => {
  let directory: string;
  before(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'as-parity-'));
  });
  after(() => rm(directory, { recursive: true }));

  const match = createLabelMatcher(labels);
  async function read(text: string) {
    const file = path.join(directory, 'logits.csv');
    await writeFile(file, text);
    return readReference(file, { labels, match });
  }

  test('is read by the names of its columns, in any order', async () => {
    const { files, columns } = await read('file,window,rock,hiphop,blues\na.wav,0,3,2.5e0,-1\n');
    assert.deepEqual(files.get('a.wav')?.get(0), [-1, 2.5, 3]);
    assert.match(columns, /by name/);
  });

  test('is read in the order of the bundle when no column has the name of a label', async () => {
    const { files, columns } = await read('file,window,0,1,2\n"a, b.wav",0,3,2,1\n');
    assert.deepEqual(files.get('a, b.wav')?.get(0), [3, 2, 1]);
    assert.match(columns, /bundle's order \(Blues first\)/);
  });

  const faults: [string, string, RegExp][] = [
    ['with other first columns', 'path,slice,0,1,2\n', /first two columns must be file and window/],
    ['with too few columns', 'file,window,0,1\na,0,1,2\n', /2 columns of logits, the bundle 3 labels/],
    ['with a label that is not there', 'file,window,blues,rock,soul\na,0,1,2,3\n', /no label soul/],
    ['with a label twice', 'file,window,blues,rock,Rock\na,0,1,2,3\n', /two columns are of the same label/],
    ['with what is no number', 'file,window,0,1,2\na,0,1,nan,3\n', /line 2: "nan" is no number/],
    ['with a number beyond all numbers', 'file,window,0,1,2\na,0,1,1e999,3\n', /"1e999" is no number/],
    [
      'with a window twice',
      'file,window,0,1,2\na,0,1,2,3\na,0,1,2,3\n',
      /line 3: window 0 of a is there twice/,
    ],
    [
      'with a window that is no number',
      'file,window,0,1,2\na,first,1,2,3\n',
      /line 2: the window is "first"/,
    ],
    ['without rows', 'file,window,0,1,2\n', /holds no logits/],
    ['with a row that is too short', 'file,window,0,1,2\na,0,1\n', /is not CSV: .*line 2/],
    ['that is empty', '', /is empty/],
  ];
  for (const [what, text, sentence] of faults) {
    test(`${what} is refused with a sentence`, async () => {
      await assert.rejects(read(text), sentence);
    });
  }
});
