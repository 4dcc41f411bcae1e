import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, readdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { after, test } from 'node:test';
import { parseNpy } from '@acousticsense/shared/tensor';
import { encode, ffmpeg, song, writeWav } from '../../../test/audio.ts';
import { analyse, ccmusicProfile, openDirectory } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());
await writeWav(at.file('song.wav'), [song({ seconds: 40 })]);
await encode(at.file('song.wav'), at.file('a song.mp3'), '-b:a', '192k');
await writeWav(at.file('short.wav'), [song({ seconds: 5, seed: 4 })]);
await writeFile(at.file('text.mp3'), 'la la la\n'.repeat(999));

const repository = new URL('../../../', import.meta.url).pathname;
const defaultBundle = `${repository}models/default`;
const ccmusicFile = `${repository}models/profiles/ccmusic-mel.json`;

function start(args: string[], env: NodeJS.ProcessEnv = {}) {
  const program = new URL('cut.ts', import.meta.url).pathname;
  return spawn(process.execPath, [program, ...args], { env: { ...process.env, ...env } });
}

/** Runs the program on a list of files. */
async function cut(files: string[], args: string[], env: NodeJS.ProcessEnv = {}) {
  const child = start(args, env);
  const text = { stdout: '', stderr: '' };
  child.stdout.on('data', (part) => {
    text.stdout += part;
  });
  child.stderr.on('data', (part) => {
    text.stderr += part;
  });
  child.stdin.on('error', () => {});
  child.stdin.end(files.map((file) => `${file}\n`).join(''));
  const code = await new Promise<number | null>((resolve) => child.on('close', resolve));
  const lines = text.stdout.split('\n').filter(Boolean);
  return { code, stderr: text.stderr, lines: lines.map((line) => JSON.parse(line)) };
}

test('the windows are the bytes that the service cuts, and bad files between do not stop it', async () => {
  await mkdir(at.file('folder'));
  const files = [
    at.file('a song.mp3'),
    at.file('text.mp3'),
    at.file('missing.wav'),
    at.file('folder'),
    at.file('short.wav'),
  ];
  const out = at.file('out');
  const { code, lines, stderr } = await cut(files, [
    '--profile',
    ccmusicFile,
    '--windows',
    'all',
    '--out',
    out,
  ]);
  assert.equal(code, 0, stderr);
  assert.equal(lines.length, 5);
  const of = (index: number) => lines.find(({ file }) => file === files[index]);
  assert.equal(of(1).error.code, 'not_audio');
  assert.equal(of(2).error.code, 'unreadable');
  assert.match(of(2).error.message, /no such file/);
  assert.equal(of(3).error.code, 'unreadable');
  for (const index of [0, 4]) {
    const { tensor, windows, input, warnings } = of(index);
    assert.equal(tensor, `${out}/${index}.npy`);
    const service = await analyse(files[index]!, { profile: ccmusicProfile, windows: 'all' });
    const cutHere = parseNpy(await readFile(tensor));
    assert.deepEqual(cutHere.shape, [index === 0 ? 3 : 1, 128, 491]);
    assert.ok(Buffer.from(cutHere.data).equals(Buffer.from(service.tensor.data)));
    assert.deepEqual([windows, input, warnings], [service.windows, service.input, service.warnings]);
  }
  assert.deepEqual((await readdir(out)).sort(), ['0.npy', '4.npy'], 'nothing else is left behind');
});

test("a bundle's profile, one middle window, a range, one file at a time", async () => {
  const args = ['--profile', defaultBundle, '--windows', 'middle', '--out', at.file('middle')];
  const { lines } = await cut(
    [at.file('a song.mp3')],
    [...args, '--start', '5', '--duration', '31', '--jobs', '1'],
  );
  assert.deepEqual(parseNpy(await readFile(lines[0].tensor)).shape, [1, 128, 128]);
  assert.equal(lines[0].windows.length, 1);
  assert.ok(lines[0].windows[0].start >= 5 && lines[0].windows[0].end <= 36);
});

test('more files than are in flight each get a tensor of their own', async () => {
  const files = Array.from({ length: 6 }, (_, i) => at.file(`copy-${i}.wav`));
  for (const file of files) await symlink(at.file('short.wav'), file);
  const args = ['--profile', defaultBundle, '--windows', '1', '--out', at.file('many'), '--jobs', '4'];
  const { lines } = await cut(files, args);
  assert.deepEqual(lines.map(({ file }) => file).sort(), [...files].sort());
  assert.equal(new Set(lines.map(({ tensor }) => tensor)).size, 6);
  for (const { file, tensor } of lines) assert.equal(tensor, `${at.file('many')}/${files.indexOf(file)}.npy`);
});

test('when it is stopped it ends at once, and leaves nothing but complete tensors', async () => {
  await ffmpeg('-f', 'lavfi', '-i', 'anoisesrc=d=3600:r=22050:a=0.2', at.file('hour.flac'));
  const out = at.file('stopped');
  const child = start(['--profile', ccmusicFile, '--out', out]);
  child.stdin.write(`${at.file('short.wav')}\n${at.file('hour.flac')}\n`);
  await once(child.stdout, 'data');
  child.kill('SIGTERM');
  const [code] = await once(child, 'close');
  assert.equal(code, 1);
  assert.deepEqual(await readdir(out), ['0.npy']);
});

test('what it cannot begin with is said in a sentence, and nothing is written', async () => {
  await writeFile(at.file('half.json'), JSON.stringify({ profile: { ...ccmusicProfile, hopLength: 0 } }));
  await writeFile(at.file('no.json'), 'profile');
  const out = at.file('never');
  const cases: [string[], RegExp, NodeJS.ProcessEnv?][] = [
    [['--out', out], /--profile and --out are needed/],
    [['--profile', at.file('nowhere'), '--out', out], /nowhere: there is no such file or bundle/],
    [['--profile', at.file('folder'), '--out', out], /No model bundle/],
    [['--profile', at.file('no.json'), '--out', out], /is not JSON/],
    [['--profile', at.file('half.json'), '--out', out], /half\.json: hopLength: /],
    [['--profile', ccmusicFile, '--out', out, '--windows', '0'], /--windows 0: it must be/],
    [['--profile', ccmusicFile, '--out', out, '--jobs', 'x'], /--jobs x: it must be/],
    [['--profile', ccmusicFile, '--out', out, '--colour', 'x'], /--colour/],
    [['--profile', ccmusicFile, '--out', out], /cannot be run/, { FFMPEG_PATH: '/nowhere/ffmpeg' }],
  ];
  for (const [args, sentence, env] of cases) {
    const { code, stderr, lines } = await cut([at.file('short.wav')], args, env);
    assert.equal(code, 1, args.join(' '));
    assert.match(stderr, sentence);
    assert.doesNotMatch(stderr, /\n\s+at /, 'no stack trace');
    assert.deepEqual(lines, []);
  }
  assert.ok(!(await readdir(at.directory)).includes('never'));
});
