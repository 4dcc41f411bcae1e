/** `acousticsense` as a user types it: the real program, on a real system, with real audio. */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { copyFile, cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { loadBundle } from '@acousticsense/shared/bundle';
import type { Vectors } from '@acousticsense/shared/job';
import { noise, sine, song, wav } from './audio.ts';
import { finished, type Job, upload } from './client.ts';
import { type System, startSystem } from './system.ts';

const root = path.resolve(import.meta.dirname, '..');
const program = path.join(root, 'packages/cli/bin/acousticsense.mjs');
const defaultBundle = path.join(root, 'models/default');
const key = 'a-key-of-this-test-run';
const rate = 22_050;

let directory: string;
/** Where private systems put their data: empty when nothing was left behind. */
let scratch: string;
before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'as-cli-'));
  scratch = path.join(directory, 'tmp');
  await mkdir(scratch);
});
after(() => rm(directory, { recursive: true }));

interface Run {
  readonly child: ChildProcess;
  stderr(): string;
  readonly ended: Promise<{ code: number | null; stdout: string; stderr: string }>;
}

function start(args: readonly string[], env: Record<string, string> = {}): Run {
  const child = spawn(process.execPath, [program, ...args], {
    cwd: directory,
    env: { ...process.env, TMPDIR: scratch, NO_COLOR: '1', ACOUSTICSENSE_KEY: '', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (chunk) => {
    stdout += chunk;
  });
  child.stderr.setEncoding('utf8').on('data', (chunk) => {
    stderr += chunk;
  });
  const ended = once(child, 'close').then(([code]) => ({ code: code as number | null, stdout, stderr }));
  return { child, stderr: () => stderr, ended };
}

const run = (args: readonly string[], env: Record<string, string> = {}) => start(args, env).ended;

/** It ends with this code and, on standard error, a sentence instead of a stack trace. */
async function refused(
  args: readonly string[],
  code: number,
  sentence: RegExp,
  env?: Record<string, string>,
) {
  const { stderr, stdout, ...ended } = await run(args, env);
  assert.equal(ended.code, code, stderr);
  assert.match(stderr, sentence);
  assert.doesNotMatch(stderr, /\n\s+at /, 'a stack trace');
  assert.equal(stdout, '');
}

const dataDirectories = async () =>
  (await readdir(scratch)).filter((name) => name.startsWith('acousticsense-'));

/** Processes that were started with the scratch directory as theirs, services of a private system included. */
async function leftOver(): Promise<string[]> {
  const found: string[] = [];
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    const environment = await readFile(`/proc/${pid}/environ`, 'latin1').catch(() => '');
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    if (environment.includes(scratch) || command.includes(`${scratch}/`))
      found.push(`${pid} ${command.replaceAll('\0', ' ')}`);
  }
  return found;
}

async function assertNothingRuns(withinMs: number): Promise<void> {
  for (const deadline = Date.now() + withinMs; ; await sleep(100)) {
    const left = await leftOver();
    if (left.length === 0) return;
    if (Date.now() > deadline) assert.fail(`still running: ${left.join('; ')}`);
  }
}

async function until<T>(what: () => Promise<T | undefined> | T | undefined, patienceMs = 60_000): Promise<T> {
  for (const deadline = Date.now() + patienceMs; Date.now() < deadline; await sleep(20)) {
    const found = await what();
    if (found !== undefined) return found;
  }
  throw new Error(`it did not come within ${patienceMs} ms`);
}

/** Writes short pieces that differ from each other; `names` may hold folders. */
async function placeSongs(where: string, names: readonly string[], seconds = 1.5): Promise<string> {
  const target = path.join(directory, where);
  for (const [index, name] of names.entries()) {
    await mkdir(path.dirname(path.join(target, name)), { recursive: true });
    const sound =
      index % 2 === 0
        ? song({ seconds, sampleRate: rate, seed: index })
        : noise({ seconds, sampleRate: rate, seed: index });
    await writeFile(path.join(target, name), wav([sound], { sampleRate: rate }));
  }
  return target;
}

const many = (label: string, count: number) =>
  Array.from({ length: count }, (_, index) => `${label}/${String(index).padStart(2, '0')}.wav`);

interface Report {
  files: number;
  judged: number;
  failed: Record<string, number>;
  failures: { file: string; code: string }[];
  unknownLabels: Record<string, number>;
  accuracy: { clips: number; top1: number };
  recall: { label: string; clips: number; right: number }[];
  matrix: { labels: string[]; counts: number[][] };
  reliability: { clips: number }[];
  uncertain: { clips: number };
}

const readLines = async (file: string) =>
  (await readFile(file, 'utf8').catch(() => '')).split('\n').filter((line) => line.endsWith('}'));

describe('the starter', () => {
  test('runs the program of the pinned Node and hands its exit code on', async () => {
    const { code, stdout } = await run(['--version']);
    assert.equal(code, 0);
    assert.match(stdout, /^\d+\.\d+\.\d+\n$/);
    await refused(['evalute'], 2, /Did you mean evaluate\?/);
  });

  test('says what to run where the npm packages are not installed', async () => {
    const clone = path.join(directory, 'clone');
    await mkdir(path.join(clone, 'packages/cli/bin'), { recursive: true });
    const copy = path.join(clone, 'packages/cli/bin/acousticsense.mjs');
    await copyFile(program, copy);
    const { status, stderr } = spawnSync(process.execPath, [copy, '--version'], { encoding: 'utf8' });
    assert.equal(status, 1);
    assert.match(stderr, /not installed yet: run `npm start` once in .*clone/);
  });
});

describe('acousticsense evaluate on a running service', () => {
  let system: System;
  before(async () => {
    system = await startSystem({ env: { API_KEY: key } });
  });
  after(() => system?.stop());

  const evaluate = (...args: string[]) => ['evaluate', ...args, '--url', system.url];
  const accepted = async () => (await system.log('api')).filter(({ msg }) => msg === 'accepted').length;

  test('broken, silent and strange files among good ones: the good ones are judged, the others are named', async () => {
    const set = await placeSongs('mixed', [
      ...many('rock', 3),
      ...many('JAZZ', 2),
      ...many('constructor', 1),
    ]);
    await writeFile(path.join(set, 'rock/broken.mp3'), 'this is no music');
    await writeFile(path.join(set, 'rock/empty.flac'), '');
    await writeFile(
      path.join(set, 'rock/silent.wav'),
      wav([new Float32Array(2 * rate)], { sampleRate: rate }),
    );
    const out = path.join(directory, 'mixed-out');
    const { code, stdout, stderr } = await run([...evaluate(set), '--out', out, '--json'], {
      ACOUSTICSENSE_KEY: key,
    });
    assert.equal(code, 0, stderr);
    const report = JSON.parse(stdout) as Report;
    assert.equal(report.files, 9);
    assert.equal(report.judged, 5);
    assert.deepEqual(report.unknownLabels, { constructor: 1 });
    assert.deepEqual(report.failed, { not_audio: 1, empty_file: 1, silent: 1 });
    assert.deepEqual(report.failures.map(({ file }) => file).sort(), [
      'rock/broken.mp3',
      'rock/empty.flac',
      'rock/silent.wav',
    ]);
    assert.deepEqual(
      report.recall.map(({ label, clips }) => [label, clips]),
      [
        ['Jazz', 2],
        ['Rock', 3],
      ],
    );
    // The figures follow from the kept answers.
    const answers = (await readLines(path.join(out, 'answers.jsonl'))).map((line) => JSON.parse(line)) as {
      path: string;
      result?: { probabilities: Record<string, number>; silent: boolean };
    }[];
    const right = answers.filter(({ path: file, result }) => {
      if (!result || result.silent) return false;
      const [best] = Object.entries(result.probabilities).sort(([, a], [, b]) => b - a)[0]!;
      return best.toLowerCase() === path.basename(path.dirname(file)).toLowerCase();
    });
    assert.equal(report.accuracy.top1, right.length / 5);
    assert.equal(
      report.matrix.counts.flat().reduce((a, b) => a + b, 0),
      5,
    );
    assert.equal(
      report.reliability.reduce((sum, { clips }) => sum + clips, 0),
      5,
    );

    assert.deepEqual(JSON.parse(await readFile(path.join(out, 'report.json'), 'utf8')), report);
    assert.match(await readFile(path.join(out, 'report.md'), 'utf8'), /\| Rock \| 3 \|/);
    for (const picture of ['confusion', 'reliability']) {
      const png = await readFile(path.join(out, `${picture}.png`));
      assert.equal(png.subarray(1, 4).toString(), 'PNG');
      // Drawn with its letters: a picture without the font would hold hardly more than boxes.
      assert.ok(png.length > 8_000, `${picture}.png has ${png.length} bytes`);
      assert.match(await readFile(path.join(out, `${picture}.svg`), 'utf8'), /^<svg /);
    }

    // Nothing of it stays in the service.
    const objects = await readdir(path.join(system.directory, 'objects/jobs'), { recursive: true }).catch(
      () => [],
    );
    assert.deepEqual(
      objects.filter((name) => name.endsWith('audio')),
      [],
    );

    const before = await accepted();
    const again = await run([...evaluate(set), '--out', out, '--threshold', '1'], { ACOUSTICSENSE_KEY: key });
    assert.equal(again.code, 0, again.stderr);
    assert.match(again.stderr, /Every file was answered before; none is sent/);
    assert.match(again.stdout, /9 files, 5 judged, 3 failed .*not_audio 1/);
    assert.match(again.stdout, /uncertain \(under 1, .*\n.* 100\.0 %$/m);
    assert.equal(await accepted(), before);

    // Other options are another question.
    const other = await run([...evaluate(set), '--out', out, '--duration', '1'], { ACOUSTICSENSE_KEY: key });
    assert.equal(other.code, 0, other.stderr);
    assert.ok((await accepted()) > before);
  });

  test('two runs may keep their answers in one place; what cannot be written there is named', async () => {
    const set = await placeSongs('shared', many('rock', 3));
    const out = path.join(directory, 'shared-out');
    const args = [...evaluate(set), '--key', key, '--out', out];
    for (const { code, stderr } of await Promise.all([run(args), run(args)])) assert.equal(code, 0, stderr);
    const report = JSON.parse(await readFile(path.join(out, 'report.json'), 'utf8')) as Report;
    assert.equal(report.judged, 3);
    const names = ['answers.jsonl', 'confusion.png', 'confusion.svg', 'reliability.png', 'reliability.svg'];
    assert.deepEqual((await readdir(out)).sort(), [...names, 'report.json', 'report.md']);

    await rm(path.join(out, 'report.json'));
    await mkdir(path.join(out, 'report.json'));
    await refused(args, 1, /report\.json cannot be written \(EISDIR\)\.\n$/);
    assert.deepEqual((await readdir(out)).sort(), [...names, 'report.json', 'report.md']);
  });

  test('an address that takes connections and never answers is given up', async () => {
    const set = await placeSongs('mute', many('rock', 1));
    await using server = createServer(() => {}).listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address() as AddressInfo;
    const { code, stderr } = await run(['evaluate', set, '--url', `http://127.0.0.1:${port}`]);
    assert.equal(code, 1);
    assert.match(stderr, /cannot be reached \(no answer in time\)/);
    server.closeAllConnections();
  });

  test('a run that is killed goes on where it was', async () => {
    const set = await placeSongs('long', [...many('rock', 8), ...many('jazz', 8)]);
    const out = path.join(directory, 'long-out');
    const args = [...evaluate(set), '--out', out, '--concurrency', '2'];
    const journal = path.join(out, 'answers.jsonl');
    const first = start(args, { ACOUSTICSENSE_KEY: key });
    await until(async () => (await readLines(journal)).length >= 5 || undefined);
    first.child.kill('SIGKILL');
    await first.ended;
    await assertNothingRuns(5_000);
    // As if it had died in the middle of a line.
    const known = (await readLines(journal)).length;
    assert.ok(known < 16, 'it was finished before it was killed');
    await writeFile(journal, '{"v":1,"path":"/cut/in/the/mid', { flag: 'a' });

    const before = await accepted();
    const { code, stdout, stderr } = await run(args, { ACOUSTICSENSE_KEY: key });
    assert.equal(code, 0, stderr);
    assert.match(stderr, new RegExp(`${known} files were answered before; ${16 - known} are sent`));
    assert.equal((await accepted()) - before, 16 - known);
    assert.match(stdout, /16 files, 16 judged, 0 failed/);
  });

  test('a service that goes away and comes back costs no answer', async () => {
    const set = await placeSongs('outage', many('rock', 6));
    const out = path.join(directory, 'outage-out');
    const going = start([...evaluate(set), '--out', out, '--concurrency', '1'], { ACOUSTICSENSE_KEY: key });
    await until(async () => (await readLines(path.join(out, 'answers.jsonl'))).length >= 1 || undefined);
    await system.kill('api');
    await sleep(500);
    await system.start('api');
    const { code, stdout, stderr } = await going.ended;
    assert.equal(code, 0, stderr);
    assert.match(stdout, /6 files, 6 judged, 0 failed/);
  });

  test('Ctrl-C ends it with 130, takes its jobs back, and says where the answers are', async () => {
    const set = await placeSongs('stopped', many('rock', 30), 8);
    const before = await accepted();
    const going = start([...evaluate(set), '--out', 'stopped-out', '--concurrency', '4'], {
      ACOUSTICSENSE_KEY: key,
    });
    await until(
      async () =>
        (await readLines(path.join(directory, 'stopped-out/answers.jsonl'))).length >= 1 || undefined,
    );
    going.child.kill('SIGINT');
    const { code, stderr, stdout } = await going.ended;
    assert.equal(code, 130, stderr);
    assert.equal(stdout, '');
    assert.match(stderr, /The answers so far are in .*stopped-out.*Stopped\.\n$/s);
    const sent = (await system.log('api')).filter(({ msg }) => msg === 'accepted').slice(before);
    assert.ok(sent.length > 1, 'none was under way');
    for (const { jobId: id } of sent) {
      const answer = await fetch(`${system.url}/v1/jobs/${id}`, {
        headers: { authorization: `Bearer ${key}` },
      });
      const state = answer.status === 404 ? 'deleted' : ((await answer.json()) as Job).state;
      assert.ok(['deleted', 'cancelled'].includes(state), `${id} is ${state}`);
    }
  });

  test('labels that the model does not know at all are refused before a file is sent, and an alias helps', async () => {
    const set = await placeSongs('strange', many('polka', 2));
    const before = await accepted();
    await refused(
      [...evaluate(set), '--key', key],
      1,
      /knows none of the labels \(polka\): it has Blues, .*--aliases/,
    );
    assert.equal(await accepted(), before);
    const aliases = path.join(directory, 'aliases.json');
    await writeFile(aliases, '{"Polka": "folk"}');
    const { code, stdout } = await run([
      ...evaluate(set),
      '--key',
      key,
      '--aliases',
      aliases,
      '--out',
      'strange-out',
    ]);
    assert.equal(code, 0);
    assert.match(stdout, /Folk +2 /);
    await writeFile(aliases, '["polka"]');
    await refused(
      [...evaluate(set), '--key', key, '--aliases', aliases],
      1,
      /must be JSON that leads from labels/,
    );
  });

  test('a set of which nothing can be answered ends with 1', async () => {
    const set = path.join(directory, 'broken');
    await mkdir(path.join(set, 'rock'), { recursive: true });
    await writeFile(path.join(set, 'rock/a.mp3'), 'no music');
    const { code, stderr } = await run([...evaluate(set), '--key', key, '--out', 'broken-out']);
    assert.equal(code, 1);
    assert.match(stderr, /Nothing could be judged: rock\/a\.mp3: /);
    assert.equal(existsSync(path.join(directory, 'broken-out/confusion.png')), false);
  });

  test('what is typed or given wrongly is one sentence', async () => {
    const set = await placeSongs('one', many('rock', 1));
    const list = path.join(directory, 'list.csv');
    await writeFile(list, 'path,genre\none/rock/00.wav,rock\n');
    await refused(evaluate(path.join(directory, 'nowhere')), 1, /There is no file or directory .*nowhere/);
    await refused(evaluate(list), 1, /no column "label"/);
    await refused(evaluate(set), 1, /needs a key: give it with --key KEY, or in .*ACOUSTICSENSE_KEY/);
    await refused([...evaluate(set), '--key', 'wrong'], 1, /does not accept this key/);
    await refused(
      ['evaluate', set, '--url', 'http://127.0.0.1:1'],
      1,
      /cannot be reached \(ECONNREFUSED|bad port/,
    );
    await refused(['evaluate', set, '--url', 'localhost:8000'], 1, /is no address: it begins with http/);
    await refused(['evaluate', set, '--url', system.healthUrl('decoder')], 1, /is no AcousticSense/);
    await refused([...evaluate(set), '--bundle', 'x'], 2, /--bundle or --url, not both/);
    await refused(['evaluate', set, '--windows', 'some'], 2, /--windows some/);
    await refused(['evaluate', set, '--threshold', '1.5'], 2, /--threshold 1\.5 .*from 0 to 1/);
    await refused(['evaluate', set, '--bundle', 'missing'], 1, /There is no model bundle at .*missing/);
    await refused(['evaluate', set, '--bundle', set], 1, /is no model bundle: it holds no model\.json/);
    await refused(
      [...evaluate(set), '--key', key, '--out', path.join(list, 'x')],
      1,
      /cannot be written \(ENOTDIR\)/,
    );
    await refused(
      [...evaluate(set), '--key', key, '--start', '1000000000'],
      1,
      /does not take these options: "start"/,
    );
  });

  test('a CSV names files anywhere; one that is missing fails alone', async () => {
    const set = await placeSongs('anywhere', ['x/a, b.wav']);
    const list = path.join(directory, 'anywhere.csv');
    await writeFile(list, 'label,path\nRock,"anywhere/x/a, b.wav"\nRock,anywhere/gone.wav\n');
    assert.ok(set);
    const { code, stdout, stderr } = await run([
      ...evaluate(list),
      '--key',
      key,
      '--json',
      '--out',
      'csv-out',
    ]);
    assert.equal(code, 0, stderr);
    const report = JSON.parse(stdout) as Report;
    assert.deepEqual([report.judged, report.failed], [1, { file_missing: 1 }]);
  });
});

describe('acousticsense with a private system', () => {
  let set: string;
  before(async () => {
    set = await placeSongs('private', [...many('rock', 2), ...many('jazz', 2)]);
  });

  test('evaluates a bundle, and leaves neither a process nor a file', async () => {
    const { code, stdout, stderr } = await run(['evaluate', set, '--out', 'private-out'], {
      // Of another system: the private one must not touch it.
      REDIS_URL: 'redis://127.0.0.1:1',
      STORAGE_URL: 's3://elsewhere/prefix',
      PORT: '1',
      API_KEY: 'of-another-system-altogether',
    });
    assert.equal(code, 0, stderr);
    assert.match(stdout, /4 files, 4 judged/);
    await assertNothingRuns(0);
    assert.deepEqual(await dataDirectories(), []);
  });

  test('Ctrl-C while it works stops it: exit code 130, no process, no file', async () => {
    const long = await placeSongs('private-long', many('rock', 20), 8);
    const going = start(['evaluate', long, '--out', 'private-long-out', '--concurrency', '4']);
    await until(
      async () =>
        (await readLines(path.join(directory, 'private-long-out/answers.jsonl'))).length >= 1 || undefined,
    );
    going.child.kill('SIGINT');
    assert.equal((await going.ended).code, 130);
    await assertNothingRuns(0);
    assert.deepEqual(await dataDirectories(), []);
  });

  test('Ctrl-C while it starts stops it too', async () => {
    const going = start(['evaluate', set, '--out', 'starting-out']);
    await until(async () => (await dataDirectories()).length > 0 || undefined);
    going.child.kill('SIGINT');
    assert.equal((await going.ended).code, 130);
    await assertNothingRuns(0);
    assert.deepEqual(await dataDirectories(), []);
  });

  test('kill -9 leaves neither a process nor a file', async () => {
    const going = start(['evaluate', set, '--out', 'killed-out']);
    await until(async () => (await dataDirectories()).length > 0 || undefined);
    await sleep(500);
    going.child.kill('SIGKILL');
    await going.ended;
    await assertNothingRuns(40_000);
    assert.deepEqual(await dataDirectories(), []);
  });

  test('kill -9 of the program behind the starter leaves its data only until the next run', async () => {
    const going = start(['evaluate', set, '--out', 'killed-out']);
    await until(async () => {
      const [data] = await dataDirectories();
      return (data !== undefined && existsSync(path.join(scratch, data, 'lock'))) || undefined;
    });
    const { pid } = going.child;
    const children = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8');
    process.kill(Number.parseInt(children, 10), 'SIGKILL');
    await going.ended;
    await assertNothingRuns(40_000);
    assert.equal((await dataDirectories()).length, 1);
    const { code, stderr } = await run(['evaluate', set, '--out', 'killed-out']);
    assert.equal(code, 0, stderr);
    assert.deepEqual(await dataDirectories(), []);
  });

  test('a bundle that does not load ends it with the reason', async () => {
    const bundle = path.join(directory, 'flipped');
    await flippedBundle(bundle);
    await refused(
      ['evaluate', set, '--bundle', bundle, '--out', 'flipped-out'],
      1,
      /private system did not run: .*inference.*SHA-256.*damaged or was changed/,
    );
    assert.deepEqual(await dataDirectories(), []);
  });
});

/** The default bundle with one byte of its graph changed. */
async function flippedBundle(target: string): Promise<void> {
  await cp(defaultBundle, target, { recursive: true });
  const { manifest } = await loadBundle(defaultBundle, { verifyFiles: false });
  const graph = path.join(target, manifest.graph.file);
  const bytes = await readFile(graph);
  bytes[bytes.length >> 1]! ^= 1;
  await writeFile(graph, bytes);
}

describe('acousticsense model', () => {
  test('check: a bundle in order is 0, one with a flipped byte 1, and both say why', async () => {
    const good = await run(['model', 'check', defaultBundle, '--provider', 'cpu']);
    assert.equal(good.code, 0, good.stdout + good.stderr);
    assert.match(good.stdout, /self-test/);
    const bundle = path.join(directory, 'flipped-check');
    await flippedBundle(bundle);
    const bad = await run(['model', 'check', bundle, '--json']);
    assert.equal(bad.code, 1);
    assert.equal((JSON.parse(bad.stdout) as { ok: boolean }).ok, false);
    assert.match(bad.stdout, /SHA-256/);
    await refused(['model', 'check', path.join(directory, 'nothing')], 1, /There is no model bundle/);
  });

  test('calibrate: fits on labelled files and writes model.json in one step', async () => {
    const bundle = path.join(directory, 'uncalibrated');
    await cp(defaultBundle, bundle, { recursive: true });
    const file = path.join(bundle, 'model.json');
    const manifest = JSON.parse(await readFile(file, 'utf8')) as Record<string, unknown>;
    await writeFile(
      file,
      JSON.stringify({ ...manifest, calibration: 'none', accuracy: 'none', threshold: 0.9 }),
    );
    const set = await placeSongs(
      'calibration',
      [...many('electronic', 25), ...many('jazz', 25), ...many('polka', 1)],
      1.1,
    );
    await rm(path.join(set, 'jazz/24.wav'));
    await refused(['model', 'calibrate', bundle, '--data', set], 1, /49 files .* too few to calibrate/);
    await placeSongs('calibration', ['jazz/99.wav'], 1.1);

    const before = await loadBundle(bundle);
    const answers = path.join(directory, 'calibration-out');
    const { code, stdout, stderr } = await run([
      ...['model', 'calibrate', bundle, '--data', set],
      ...['--out', answers],
    ]);
    assert.equal(code, 0, stderr);
    assert.equal((await readLines(path.join(answers, 'answers.jsonl'))).length, 50);
    assert.match(stderr, /1 files have labels that the model does not know/);
    const now = await loadBundle(bundle);
    const { calibration, accuracy, threshold, ...rest } = now.manifest;
    assert.ok(calibration !== 'none' && accuracy !== 'none');
    assert.equal(calibration.clips, 50);
    assert.equal(
      calibration.reliability.reduce((sum, { clips }) => sum + clips, 0),
      50,
    );
    assert.equal(accuracy.clips, 50);
    assert.match(stdout, new RegExp(`temperature ${calibration.temperature}`));
    assert.match(stdout, new RegExp(`digest is now ${now.digest}`));
    assert.notEqual(now.digest, before.digest);
    assert.ok(threshold >= 0.1 && threshold <= 0.9);
    const { calibration: _, accuracy: __, threshold: ___, ...restBefore } = before.manifest;
    assert.deepEqual(rest, restBefore);
    assert.deepEqual((await readdir(bundle)).sort(), (await readdir(defaultBundle)).sort());
    await assertNothingRuns(0);
  });

  test('calibrate: what cannot be fitted on is refused before anything is started', async () => {
    const set = await placeSongs('few', many('rock', 3));
    await refused(['model', 'calibrate', defaultBundle], 2, /needs --data/);
    await refused(['model', 'calibrate', defaultBundle, '--data', set], 1, /3 files .* too few to calibrate/);
    await refused(['model', 'calibrate', 'nothing', '--data', set], 1, /There is no model bundle/);
  });

  describe('parity', () => {
    let songs: string;
    /** The pipeline's own logits, as another script would write them. */
    let reference: { labels: string[]; rows: { file: string; window: number; logits: number[] }[] };
    before(async () => {
      songs = await placeSongs('parity', ['a.wav', 'b.wav'], 2);
      // Longer than one window, so that there are several.
      await writeFile(
        path.join(songs, 'long.wav'),
        wav([sine({ hz: 330, seconds: 65, sampleRate: 8_000, level: 0.4 })], { sampleRate: 8_000 }),
      );
      await using system = await startSystem();
      const rows = [];
      let labels: string[] = [];
      for (const file of (await readdir(songs)).sort()) {
        const audio = await readFile(path.join(songs, file));
        const { id } = await upload(system.url, audio, {
          name: file,
          fields: { windows: 'all', vectors: 'true' },
        });
        assert.equal((await finished(system.url, id)).state, 'completed');
        const vectors = (await (await fetch(`${system.url}/v1/jobs/${id}/vectors`)).json()) as Vectors;
        labels = vectors.labels;
        rows.push(...vectors.windows.map(({ logits }, window) => ({ file, window, logits: logits! })));
      }
      reference = { labels, rows };
      assert.ok(rows.filter(({ file }) => file === 'long.wav').length > 1);
    });

    async function write(rows: typeof reference.rows, labels = reference.labels): Promise<string> {
      const csv = path.join(directory, 'logits.csv');
      const lines = rows.map(({ file, window, logits }) => [file, window, ...logits].join(','));
      await writeFile(csv, `${['file', 'window', ...labels].join(',')}\n${lines.join('\n')}\n`);
      return csv;
    }
    const parity = (csv: string, ...more: string[]) =>
      run(['model', 'parity', defaultBundle, '--reference', csv, '--audio', songs, ...more]);

    test('the same numbers pass', async () => {
      const { code, stdout, stderr } = await parity(await write(reference.rows), '--json');
      assert.equal(code, 0, stdout + stderr);
      const found = JSON.parse(stdout) as Record<string, unknown>;
      assert.equal(found['windows'], reference.rows.length);
      assert.equal(found['top1Agreement'], 1);
    });

    test('a logit that is off, a missing window and a missing file fail, and are named', async () => {
      const wrong = reference.rows.map((row) => ({ ...row, logits: [...row.logits] }));
      wrong[0]!.logits[3]! += 0.01;
      const long = wrong.findLastIndex(({ file }) => file === 'long.wav');
      wrong.splice(long, 1);
      wrong.push({ file: 'gone.wav', window: 0, logits: wrong[0]!.logits });
      const { code, stdout } = await parity(await write(wrong));
      assert.equal(code, 1, stdout);
      assert.match(stdout, /largest difference 1\.00e-2/);
      assert.match(stdout, new RegExp(`largest at a\\.wav, window 0, ${reference.labels[3]}:`));
      assert.match(stdout, /long\.wav: \d+ windows in the reference, \d+ here/);
      assert.match(stdout, /gone\.wav: There is no file/);
      assert.match(stdout, /FAILED: .*0\.001/);
      await assertNothingRuns(0);
    });

    test('a reference that does not fit the bundle is refused before anything is started', async () => {
      const csv = await write(reference.rows, reference.labels.with(0, 'Polka'));
      await refused(
        ['model', 'parity', defaultBundle, '--reference', csv, '--audio', songs],
        1,
        /the bundle has no label Polka/,
      );
      const good = await write(reference.rows);
      await refused(
        ['model', 'parity', defaultBundle, '--reference', good, '--audio', 'nowhere'],
        1,
        /no directory nowhere/,
      );
      await refused(['model', 'parity', defaultBundle, '--audio', songs], 2, /needs --reference/);
    });
  });

  describe('import', () => {
    const python = process.env['ACOUSTICSENSE_PYTHON'] ?? path.join(root, 'training/.venv/bin/python');
    const skip = existsSync(python) ? false : 'no Python with training/requirements.txt';

    test('says how to make the Python environment, or that the named one is not there', async () => {
      const args = ['model', 'import', 'save.pt', '--profile', 'ccmusic-mel', '--out', 'imported'];
      await refused(args, 1, /There is no Python at \/no\/python/, { ACOUSTICSENSE_PYTHON: '/no/python' });
      if (!existsSync(path.join(root, 'training/.venv'))) {
        await refused(args, 1, /python3 -m venv training\/\.venv && .*pip install -r/, {
          ACOUSTICSENSE_PYTHON: '',
        });
      }
      await refused(['model', 'import', 'save.pt', '--out', 'imported'], 2, /needs --profile NAME\|FILE/);
      assert.equal(existsSync(path.join(directory, 'imported')), false);
    });

    test('a Python without the packages is named, and so is the package', async () => {
      const bare = path.join(directory, 'bare-python');
      await writeFile(
        bare,
        '#!/bin/sh\necho "Traceback (most recent call last):\n  File\nModuleNotFoundError: No module named \'numpy\'" >&2\nexit 1\n',
        { mode: 0o755 },
      );
      const args = ['model', 'import', 'save.pt', '--profile', 'ccmusic-mel', '--out', 'imported'];
      const { code, stderr } = await run(args, { ACOUSTICSENSE_PYTHON: bare });
      assert.equal(code, 1);
      assert.match(stderr, /^The Python at .*bare-python has no package numpy: install [^\n]*\n$/);
      assert.deepEqual(await dataDirectories(), []);
    });

    test('what is no checkpoint is refused with a sentence, and nothing is written', { skip }, async () => {
      await writeFile(path.join(directory, 'song.pt'), 'no weights at all');
      const { code, stderr } = await run(
        ['model', 'import', 'song.pt', '--profile', 'ccmusic-mel', '--out', 'imported'],
        { ACOUSTICSENSE_PYTHON: python },
      );
      assert.equal(code, 1);
      assert.match(stderr, /song\.pt/);
      assert.doesNotMatch(stderr, /Traceback/);
      assert.equal(existsSync(path.join(directory, 'imported')), false);
    });
  });
});
