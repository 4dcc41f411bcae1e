import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import { findLabelledAudio } from './labelled-audio.ts';
import { createLabelMatcher } from './labels.ts';

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'as-labelled-'));
});
afterEach(() => rm(directory, { recursive: true }));

const match = createLabelMatcher(['Hip-Hop', 'Rock']);
const find = (name = '.') =>
  findLabelledAudio(path.join(directory, name), (label) => match(label) !== undefined);

async function place(...names: string[]): Promise<void> {
  for (const name of names) {
    await mkdir(path.dirname(path.join(directory, name)), { recursive: true });
    await writeFile(path.join(directory, name), '');
  }
}
const pairs = (files: readonly { name: string; label: string }[]) =>
  files.map(({ name, label }) => `${name}=${label}`);

test('one folder per label: the folder is the label', async () => {
  await place('rock/b.mp3', 'rock/a.FLAC', 'hip hop/x.wav', 'hip hop/cover.jpg', 'rock/.hidden.mp3');
  const { files, rule, notes } = await find();
  assert.deepEqual(pairs(files), ['hip hop/x.wav=hip hop', 'rock/a.FLAC=rock', 'rock/b.mp3=rock']);
  assert.match(rule, /name of its folder/);
  assert.match(notes.join(), /1 files .* left out/);
});

test('files side by side: the first part of the name is the label', async () => {
  await place('rock.00001.mp3', 'Hip-Hop_Somebody - Song.mp3');
  const { files, rule } = await find();
  assert.deepEqual(pairs(files), ['Hip-Hop_Somebody - Song.mp3=Hip-Hop', 'rock.00001.mp3=rock']);
  assert.match(rule, /first part of its name/);
});

test('folders that are no labels, files that are named after some: the names count', async () => {
  await place('gtzan/rock.1.mp3', 'fma/Hip-Hop_x.mp3');
  assert.deepEqual(pairs((await find()).files), ['fma/Hip-Hop_x.mp3=Hip-Hop', 'gtzan/rock.1.mp3=rock']);
});

test('a linked file is audio too', async () => {
  await place('elsewhere.mp3');
  await mkdir(path.join(directory, 'set/rock'), { recursive: true });
  await symlink(path.join(directory, 'elsewhere.mp3'), path.join(directory, 'set/rock/linked.mp3'));
  assert.deepEqual(pairs((await find('set')).files), ['rock/linked.mp3=rock']);
});

test('a CSV: other columns are ignored, quotes are RFC 4180, paths are relative to it', async () => {
  await place('songs/a, b.mp3');
  await writeFile(
    path.join(directory, 'list.csv'),
    '\ufeffid,label,path\r\n1,rock,"songs/a, b.mp3"\r\n\r\n2,"Hip ""Hop""",c.mp3\r\n3,rock,"songs/a, b.mp3"\r\n',
  );
  const { files, notes } = await find('list.csv');
  assert.deepEqual(pairs(files), ['songs/a, b.mp3=rock', 'c.mp3=Hip "Hop"']);
  assert.equal(files[0]!.path, path.join(directory, 'songs/a, b.mp3'));
  assert.match(notes.join(), /1 rows repeat/);
});

test('a CSV that repeats a file with its label in other letters, written as UTF-16 by a spreadsheet', async () => {
  const text = '\ufeffpath,label\r\na.mp3,hip-hop\r\n./a.mp3,Hip Hop\r\nb.mp3,rock\r\n';
  await writeFile(path.join(directory, 'list.csv'), text, 'utf16le');
  const { files, notes } = await find('list.csv');
  assert.deepEqual(pairs(files), ['a.mp3=hip-hop', 'b.mp3=rock']);
  assert.match(notes.join(), /1 rows repeat/);
});

const faults: [string, string, RegExp][] = [
  ['without a label column', 'path,genre\na.mp3,rock\n', /no column "label".*names path, genre/],
  ['without rows', 'path,label\n', /names no file/],
  ['that is empty', '', /is empty/],
  ['with an empty label', 'path,label\na.mp3,rock\nb.mp3,\n', /line 3: the label is empty/],
  [
    'with two labels for a file',
    'path,label\na.mp3,rock\na.mp3,pop\n',
    /"rock" in line 2 and "pop" in line 3/,
  ],
  ['with a row that is too long', 'path,label\na.mp3,rock,pop\n', /is not CSV: .*line 2/],
  ['with an open quote', 'path,label\n"a.mp3,rock\n', /is not CSV/],
];
for (const [what, text, sentence] of faults) {
  test(`a CSV ${what} is refused with a sentence`, async () => {
    await writeFile(path.join(directory, 'list.csv'), text);
    await assert.rejects(find('list.csv'), sentence);
  });
}

test('a directory without audio, and one that is not there', async () => {
  await place('notes.txt');
  await assert.rejects(find(), /holds no audio among its 1 files/);
  await assert.rejects(find('nowhere'), /no file or directory .*nowhere/);
});
