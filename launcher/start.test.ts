/** `npm start` as a user meets it: the real services, a private Redis, signals, and the sentences when it cannot. */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { networkInterfaces, tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { sine, wav } from '../test/audio.ts';
import { finished, upload } from '../test/client.ts';
import { type RunFile, readRunFile } from './data-directory.ts';
import { createProcessLog } from './process-log.ts';
import { superviseProcess } from './supervised-process.ts';

const song = wav([sine({ seconds: 10, hz: 440, sampleRate: 22_050 })], { sampleRate: 22_050 });

interface Launch {
  readonly child: ChildProcess;
  output(): string;
  /** Resolves with the match when the output has it; rejects when the launcher ends before. */
  printed(pattern: RegExp): Promise<RegExpExecArray>;
  exit: Promise<number | null>;
}

function launch(env: Record<string, string>): Launch {
  const child = spawn(process.execPath, [path.join(import.meta.dirname, 'start.ts')], {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let text = '';
  const exit = once(child, 'close').then(([code]) => code as number | null);
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (text += chunk));
  return {
    child,
    exit,
    output: () => text,
    async printed(pattern) {
      for (;;) {
        const match = pattern.exec(text);
        if (match) return match;
        if (child.exitCode !== null || child.signalCode !== null)
          throw new Error(`the launcher ended: ${text}`);
        await sleep(20);
      }
    },
  };
}

/** Every process that was started for this data directory, the model's process and ffmpeg included. */
async function processesOf(dataDir: string): Promise<string[]> {
  const found: string[] = [];
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    const environment = await readFile(`/proc/${pid}/environ`, 'latin1').catch(() => '');
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    // Redis writes its title, with the path of its socket, over its environment.
    const variable = Buffer.from(`DATA_DIR=${dataDir}\0`).toString('latin1');
    if (environment.includes(variable) || command.includes(`${dataDir}/`)) found.push(`${pid} ${command}`);
  }
  return found;
}

async function assertNothingRuns(dataDir: string, withinMs: number): Promise<void> {
  for (const deadline = Date.now() + withinMs; ; await sleep(100)) {
    const left = await processesOf(dataDir);
    if (left.length === 0) return;
    if (Date.now() > deadline) assert.fail(`still running: ${left.join('; ')}`);
  }
}

async function freePort(): Promise<string> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  return String(port);
}

async function refused(env: Record<string, string>): Promise<string> {
  const { exit, output } = launch(env);
  assert.equal(await exit, 1, output());
  assert.equal(output().trim().split('\n').length, 1, `more than one sentence: ${output()}`);
  return output().trim();
}

describe('npm start', () => {
  let dataDir: string;
  let port: string;
  let running: Launch;
  let jobId: string;
  const url = () => `http://127.0.0.1:${port}`;
  const run = () => readRunFile(dataDir) as RunFile;

  before(async () => {
    dataDir = await mkdtemp(path.join(tmpdir(), 'as-start-'));
    port = await freePort();
  });
  after(async () => {
    running?.child.kill('SIGKILL');
    await assertNothingRuns(dataDir, 40_000);
    await rm(dataDir, { recursive: true });
  });

  test('prints the local URL when everything is ready, and a song gets its genres', async () => {
    running = launch({ DATA_DIR: dataDir, PORT: port });
    const [, printed] = await running.printed(/^Running on local URL: (\S+)$/m);
    assert.equal(printed, `http://localhost:${port}`);
    assert.equal((await fetch(`${url()}/readyz`)).status, 200);
    assert.deepEqual(Object.keys(run().processes).sort(), [
      'api',
      'decoder',
      'feeder',
      'fetch',
      'inference',
      'redis',
      'webhook',
    ]);
    const job = await finished(url(), (await upload(url(), song)).id);
    assert.equal(job.state, 'completed');
    jobId = job.id;
  });

  test('a second start on the same DATA_DIR says who has it', async () => {
    const sentence = await refused({ DATA_DIR: dataDir, PORT: await freePort() });
    assert.match(
      sentence,
      new RegExp(`already runs on ${dataDir} at http://localhost:${port} \\(process ${running.child.pid}\\)`),
    );
  });

  test('a taken port is named with the process that has it and the way out', async () => {
    const other = await mkdtemp(path.join(tmpdir(), 'as-start-'));
    const sentence = await refused({ DATA_DIR: other, PORT: port });
    assert.match(
      sentence,
      new RegExp(`^Port ${port} is taken by .+ \\(process ${run().processes.api!.pid}\\)`),
    );
    assert.match(sentence, /PORT=\d+ npm start/);
    await rm(other, { recursive: true });
  });

  for (const name of ['decoder', 'inference', 'fetch', 'feeder', 'webhook', 'redis', 'api']) {
    test(`a killed ${name} process is started again, and the next song gets its genres`, async () => {
      const killed = run().processes[name]!.pid;
      process.kill(killed, 'SIGKILL');
      await running.printed(new RegExp(`The ${name} process died`));
      while ((run().processes[name]?.pid ?? killed) === killed) await sleep(20);
      for (let ready = false; !ready; await sleep(50)) {
        ready = await fetch(`${url()}/readyz`).then(
          ({ ok }) => ok,
          () => false,
        );
      }
      const job = await finished(url(), (await upload(url(), song)).id);
      assert.equal(job.state, 'completed', JSON.stringify(job.error));
    });
  }

  test('Ctrl-C stops it with exit code 0 and leaves no process', async () => {
    running.child.kill('SIGINT');
    assert.equal(await running.exit, 0);
    assert.match(running.output(), /Stopped\.\n$/);
    assert.deepEqual(await processesOf(dataDir), []);
    assert.equal(readRunFile(dataDir), undefined);
  });

  test('jobs and results survive a restart', async () => {
    running = launch({ DATA_DIR: dataDir, PORT: port });
    await running.printed(/Running on/);
    const job = await finished(url(), jobId);
    assert.equal(job.state, 'completed');
    const picture = await fetch(`${url()}/v1/jobs/${jobId}/spectrogram.png`);
    assert.equal(picture.status, 200);
  });

  test('kill -9 of the launcher leaves no process, and the next start goes on', async () => {
    const killed = running;
    killed.child.kill('SIGKILL');
    await killed.exit;
    running = launch({ DATA_DIR: dataDir, PORT: port });
    await running.printed(/Running on/);
    const pids = Object.values(run().processes).map(({ pid }) => pid);
    const strangers = (await processesOf(dataDir))
      .filter((line) => !/model|child/.test(line))
      .map((line) => Number.parseInt(line, 10));
    assert.deepEqual(strangers.sort(), [...pids, running.child.pid!].sort());
  });

  test('a second Ctrl-C ends everything at once', async () => {
    const inference = run().processes.inference!.pid;
    // A service that does not react: only the second signal can end this quickly.
    process.kill(inference, 'SIGSTOP');
    running.child.kill('SIGINT');
    await running.printed(/Stopping/);
    await sleep(1_200);
    running.child.kill('SIGINT');
    assert.equal(await running.exit, 130);
    await assertNothingRuns(dataDir, 2_000);
  });
});

test('HOST=0.0.0.0 makes a key and serves the network with it, from a directory with a long and odd name', async () => {
  const parent = await mkdtemp(path.join(tmpdir(), 'as-start-'));
  const dataDir = path.join(parent, `${'long '.repeat(20)}ü`);
  const port = await freePort();
  const running = launch({ DATA_DIR: dataDir, PORT: port, HOST: '0.0.0.0' });
  try {
    await running.printed(/Running on local URL/);
    const key = (await readFile(path.join(dataDir, 'api-key'), 'utf8')).trim();
    assert.equal((await stat(path.join(dataDir, 'api-key'))).mode & 0o777, 0o600);
    assert.equal((await fetch(`http://127.0.0.1:${port}/v1/model`)).status, 401);
    const headers = { authorization: `Bearer ${key}` };
    assert.equal((await fetch(`http://127.0.0.1:${port}/v1/model`, { headers })).status, 200);
    const lan = Object.values(networkInterfaces())
      .flat()
      .find((one) => one?.family === 'IPv4' && !one.internal);
    if (lan)
      assert.match(running.output(), new RegExp(`network URL: http://${lan.address}:${port}/\\?key=${key}`));
  } finally {
    running.child.kill('SIGTERM');
    assert.equal(await running.exit, 0);
    await rm(parent, { recursive: true });
  }
});

describe('what keeps npm start from starting is one sentence that says what to do', () => {
  let dataDir: string;
  before(async () => {
    dataDir = await mkdtemp(path.join(tmpdir(), 'as-start-'));
  });
  after(() => rm(dataDir, { recursive: true }));

  test('a missing model', async () => {
    const sentence = await refused({ DATA_DIR: dataDir, PORT: '0', MODEL_URL: '/nowhere/model' });
    assert.match(sentence, /No model bundle at \/nowhere\/model: .* Set MODEL_URL/);
  });

  test('a damaged model', async () => {
    const bundle = path.join(import.meta.dirname, '../models/default');
    const copy = path.join(dataDir, 'model');
    await cp(bundle, copy, { recursive: true });
    const { graph } = JSON.parse(await readFile(path.join(copy, 'model.json'), 'utf8')) as {
      graph: { file: string };
    };
    await writeFile(path.join(copy, graph.file), 'not a graph');
    const sentence = await refused({ DATA_DIR: dataDir, PORT: '0', MODEL_URL: copy });
    assert.match(sentence, /inference.*SHA-256.*damaged or was changed/);
    await assertNothingRuns(dataDir, 0);
  });

  test('a variable that cannot be used', async () => {
    assert.match(await refused({ DATA_DIR: dataDir, PORT: 'http' }), /^PORT=http cannot be used/);
    assert.match(await refused({ DATA_DIR: dataDir, PORT: '0', API_KEY: 'short' }), /API_KEY: must have/);
  });

  test('a DATA_DIR that cannot be written', async () => {
    assert.match(
      await refused({ DATA_DIR: '/proc/data', PORT: '0' }),
      /^DATA_DIR \/proc\/data cannot be written/,
    );
    await writeFile(path.join(dataDir, 'file'), '');
    const inside = path.join(dataDir, 'file', 'data');
    assert.match(await refused({ DATA_DIR: inside, PORT: '0' }), /cannot be written \(ENOTDIR\)/);
  });

  test('a Redis that cannot be reached, without its password', async () => {
    const sentence = await refused({
      DATA_DIR: dataDir,
      PORT: '0',
      REDIS_URL: 'redis://me:secret@127.0.0.1:1',
    });
    assert.match(sentence, /^Redis cannot be reached at redis:\/\/127\.0\.0\.1:1 .*ECONNREFUSED/);
  });

  test('a process that dies again and again, with its last words', async () => {
    const script = 'console.error("Error: no such thing"); process.exit(3)';
    const log = createProcessLog(path.join(dataDir, 'dies.log'), () => {});
    const command = [process.execPath, '-e', script] as [string, ...string[]];
    const dying = superviseProcess(
      {
        name: 'decoder',
        command,
        env: process.env,
        readiness: 'ipc',
        log,
        lockFd: undefined,
        graceMs: 1_000,
      },
      () => {},
    );
    await assert.rejects(
      dying.gaveUp,
      /decoder process has died 5 times .*exit code 3: Error: no such thing.*dies\.log/,
    );
  });
});
