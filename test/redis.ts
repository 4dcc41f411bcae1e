/** A private Redis for a test: real server, own directory, own socket, gone afterwards. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';

export interface TestRedis extends AsyncDisposable {
  readonly url: string;
  readonly pid: number;
  /** Ends the server as a power cut would, or politely; the data directory stays. */
  stop(signal?: NodeJS.Signals): Promise<void>;
  /** Starts it again on the same data. */
  start(): Promise<void>;
}

export async function startRedis({ args = [] as string[], appendOnly = false } = {}): Promise<TestRedis> {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-redis-'));
  const socket = path.join(directory, 's');
  const url = `unix://${socket}`;
  let server: ChildProcess;

  async function start(): Promise<void> {
    const options = ['--port', '0', '--unixsocket', socket, '--dir', directory, '--save', '', '--appendonly'];
    server = spawn('redis-server', [...options, appendOnly ? 'yes' : 'no', ...args], { stdio: 'ignore' });
    const redis = connectRedisForWorker(url);
    await Promise.race([
      redis.ping(),
      sleep(15_000, undefined, { ref: false }).then(() =>
        Promise.reject(new Error('redis-server did not start')),
      ),
    ]).finally(() => redis.disconnect());
  }

  async function stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (server.exitCode !== null || server.signalCode !== null) return;
    const exited = once(server, 'exit');
    server.kill(signal);
    await exited;
  }

  await start();
  return {
    url,
    get pid() {
      return server.pid!;
    },
    start,
    stop,
    async [Symbol.asyncDispose]() {
      await stop('SIGKILL');
      await rm(directory, { recursive: true, force: true });
    },
  };
}
