/**
 * The whole product for a test: private Redis and every service as processes of their own, in a data
 * directory of their own. Any of them can be killed and started again.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { startRedis, type TestRedis } from './redis.ts';

const root = path.resolve(import.meta.dirname, '..');

/** Seals the credentials of tests. */
const testSecretsKey = Buffer.alloc(32, 'test').toString('base64');

export type ServiceName = 'api' | 'decoder' | 'inference' | 'fetch' | 'feeder' | 'webhook';

export interface System extends AsyncDisposable {
  /** `http://127.0.0.1:PORT` of the API. */
  readonly url: string;
  readonly directory: string;
  readonly redis: TestRedis;
  pid(name: ServiceName): number;
  /** Where a service tells its health and metrics. */
  healthUrl(name: ServiceName): string;
  kill(name: ServiceName, signal?: NodeJS.Signals): Promise<void>;
  /** Starts a service that was killed; the API on its old port. Resolves when it is ready. */
  start(name: ServiceName, env?: Record<string, string>): Promise<void>;
  /** The log lines of a service so far. */
  log(name: ServiceName): Promise<Record<string, unknown>[]>;
  stop(): Promise<void>;
}

export interface SystemOptions {
  readonly env?: Record<string, string>;
  readonly storageUrl?: string;
  /** A Redis of the test's own, instead of a private one. */
  readonly redisUrl?: string;
  /** Do not start these. */
  readonly without?: readonly ServiceName[];
}

export async function startSystem({
  env = {},
  storageUrl,
  redisUrl,
  without = [],
}: SystemOptions = {}): Promise<System> {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-system-'));
  const scratch = path.join(directory, 'scratch');
  await mkdir(scratch);
  const redis = await startRedis({ appendOnly: true, args: ['--appendfsync', 'always'] });
  const running = new Map<ServiceName, { child: ChildProcess; port: number }>();
  let apiPort = 0;

  const common = {
    ...process.env,
    REDIS_URL: redisUrl ?? redis.url,
    STORAGE_URL: storageUrl ?? pathToFileURL(path.join(directory, 'objects')).href,
    MODEL_URL: path.join(root, 'models/default'),
    DATA_DIR: directory,
    SCRATCH_DIR: scratch,
    METRICS_PORT: '0',
    SECRETS_KEY: testSecretsKey,
    LOG_LEVEL: 'debug',
  };

  async function start(name: ServiceName, more: Record<string, string> = {}): Promise<void> {
    const child = spawn(process.execPath, [path.join(root, 'services', name, 'src/main.ts')], {
      env: { ...common, PORT: String(apiPort), ...env, ...more },
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    });
    const log = createWriteStream(path.join(directory, `${name}.log`), { flags: 'a' });
    child.stdout!.pipe(log, { end: false });
    child.stderr!.pipe(log, { end: false });
    const entry = { child, port: 0 };
    running.set(name, entry);
    await new Promise<void>((resolve, reject) => {
      child.on('message', (message: { type: string; port?: number; message?: string }) => {
        if (message.type === 'listening') entry.port = message.port!;
        if (message.type === 'ready') resolve();
        if (message.type === 'failed') reject(new Error(`${name}: ${message.message}`));
      });
      child.once('exit', (code, signal) =>
        reject(new Error(`${name} ended with ${code ?? signal} before it was ready`)),
      );
      // The API is ready only when workers are there: without them, listening has to do.
      if (without.length > 0 && name === 'api') {
        child.on('message', (message: { type: string }) => message.type === 'listening' && resolve());
      }
    });
    if (name === 'api') apiPort = entry.port;
  }

  async function kill(name: ServiceName, signal: NodeJS.Signals = 'SIGKILL'): Promise<void> {
    const child = running.get(name)?.child;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const exited = once(child, 'exit');
    child.kill(signal);
    await exited;
  }

  async function stop(): Promise<void> {
    await Promise.all([...running.keys()].map((name) => kill(name, 'SIGTERM')));
    await redis[Symbol.asyncDispose]();
    await rm(directory, { recursive: true, force: true });
  }

  try {
    const names = (['decoder', 'inference', 'fetch', 'feeder', 'webhook', 'api'] as const).filter(
      (name) => !without.includes(name),
    );
    await Promise.all(names.map((name) => start(name)));
  } catch (error) {
    const logs = await Promise.all([...running.keys()].map(async (name) => `${name}: ${await tail(name)}`));
    await stop();
    throw new Error(`the system did not start: ${(error as Error).message}\n${logs.join('\n')}`, {
      cause: error,
    });
  }

  async function tail(name: ServiceName): Promise<string> {
    return (await readFile(path.join(directory, `${name}.log`), 'utf8').catch(() => '')).slice(-1_500);
  }

  return {
    get url() {
      return `http://127.0.0.1:${apiPort}`;
    },
    directory,
    redis,
    pid: (name) => running.get(name)!.child.pid!,
    healthUrl: (name) => `http://127.0.0.1:${running.get(name)!.port}`,
    kill,
    start,
    async log(name) {
      const text = await readFile(path.join(directory, `${name}.log`), 'utf8').catch(() => '');
      return text
        .split('\n')
        .filter((line) => line.startsWith('{'))
        .map((line) => JSON.parse(line));
    },
    stop,
    [Symbol.asyncDispose]: stop,
  };
}
