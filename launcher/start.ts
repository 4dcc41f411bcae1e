/**
 * `npm start`: the private Redis and every service as processes of their own, one URL when all are ready, and
 * nothing left behind when it ends.
 */
import { networkInterfaces } from 'node:os';
import path from 'node:path';
import { loadBundle } from '@acousticsense/shared/bundle';
import { StartupError } from '@acousticsense/shared/errors';
import { type LauncherConfig, loadConfig } from './config.ts';
import {
  keptApiKey,
  keptSecretsKey,
  lockDataDirectory,
  prepareDataDirectory,
  type RunFile,
  removeRunFile,
  writeRunFile,
} from './data-directory.ts';
import { checkPortIsFree } from './listening-port.ts';
import { placeSocket, redisCommand, waitForRedis } from './private-redis.ts';
import { createProcessLog } from './process-log.ts';
import { type ProcessSpec, type SupervisedProcess, superviseProcess } from './supervised-process.ts';

const root = path.dirname(import.meta.dirname);
const services = ['api', 'decoder', 'inference', 'fetch', 'feeder', 'webhook'] as const;

/** Loading a large append-only file takes Redis a while; a Redis elsewhere answers at once or not. */
const privateRedisPatienceMs = 120_000;
const otherRedisPatienceMs = 5_000;
const serviceGraceMs = 30_000;
const waitingNoticeMs = 15_000;
/** A terminal and npm both pass one Ctrl-C on: what follows within this time is the same one. */
const sameSignalMs = 1_000;

async function start(
  stopRequested: Promise<void>,
  processes: SupervisedProcess[],
  say: Speech,
): Promise<void> {
  const config = loadConfig(process.env, process.argv.slice(2));
  say.verbose = config.verbose;
  prepareDataDirectory(config.dataDir);
  const lockFd = await lockDataDirectory(config.dataDir);
  if (config.port !== 0) await checkPortIsFree(config.host, config.port);
  await loadBundle(config.modelUrl, { verifyFiles: false });
  const socket = config.redisUrl === undefined ? placeSocket(config.dataDir) : undefined;
  const redisUrl = config.redisUrl ?? socket!.url;
  const secretsKey = config.secretsKey ?? keptSecretsKey(config.dataDir);
  const apiKey = config.apiKey ?? (config.loopback ? undefined : keptApiKey(config.dataDir));

  const run: RunFile = { launcher: process.pid, redisUrl, processes: {} };
  let ended = false;
  function noteRun(): void {
    if (ended) return;
    const running = processes.filter(({ pid }) => pid !== undefined);
    run.processes = Object.fromEntries(
      running.map(({ name, pid, port }) => [name, { pid: pid!, ...(port === undefined ? {} : { port }) }]),
    );
    writeRunFile(config.dataDir, run);
  }
  function add(spec: Omit<ProcessSpec, 'log' | 'lockFd' | 'graceMs'>): SupervisedProcess {
    const log = createProcessLog(path.join(config.dataDir, 'logs', `${spec.name}.log`), (level, text) =>
      say.line(spec.name, level, text),
    );
    const added = superviseProcess({ ...spec, log, lockFd, graceMs: serviceGraceMs }, noteRun);
    processes.push(added);
    noteRun();
    if (config.verbose) console.log(`${spec.name}: process ${added.pid}, log ${log.file}`);
    return added;
  }
  /** What `work` gives, unless a process gives up first (then its sentence) or the user stops (then nothing). */
  async function unlessStopped<T>(work: Promise<T>): Promise<T | 'stopped'> {
    return Promise.race([
      work,
      stopRequested.then(() => 'stopped' as const),
      ...processes.map((p) => p.gaveUp),
    ]);
  }

  try {
    if (socket !== undefined) {
      const command = redisCommand(config.dataDir, socket);
      const readiness = () => waitForRedis(redisUrl, privateRedisPatienceMs);
      const redis = add({ name: 'redis', command, env: process.env, readiness });
      if ((await unlessStopped(redis.ready)) === 'stopped') return;
    } else if ((await unlessStopped(waitForRedis(redisUrl, otherRedisPatienceMs))) === 'stopped') return;

    const started = services.map((name, index) =>
      add({
        name,
        command: [process.execPath, path.join(root, 'services', name, 'src', 'main.ts')],
        env: {
          ...process.env,
          HOST: config.host,
          PORT: String(config.port),
          DATA_DIR: config.dataDir,
          REDIS_URL: redisUrl,
          STORAGE_URL: config.storageUrl,
          MODEL_URL: config.modelUrl,
          SECRETS_KEY: secretsKey,
          METRICS_PORT: String(config.metricsPort === 0 ? 0 : config.metricsPort + index - 1),
          ...(apiKey === undefined ? {} : { API_KEY: apiKey }),
        },
        readiness: 'ipc',
      }),
    );
    const notice = setInterval(() => tellWhatIsAwaited(started), waitingNoticeMs);
    try {
      if ((await unlessStopped(Promise.all(started.map((p) => p.ready)))) === 'stopped') return;
    } finally {
      clearInterval(notice);
    }
    say.warnings = true;
    const port = started[0]?.port ?? config.port;
    run.url = localUrl(config, port);
    noteRun();
    announce(config, port, apiKey);
    await unlessStopped(new Promise<never>(() => {}));
  } finally {
    say.silent = true;
    await stopAll(processes);
    socket?.remove();
    ended = true;
    removeRunFile(config.dataDir);
  }
}

/** The services first, all at once; Redis last, so that they can give back what they were at. */
async function stopAll(processes: readonly SupervisedProcess[]): Promise<void> {
  const [redis, others] = [
    processes.filter((p) => p.name === 'redis'),
    processes.filter((p) => p.name !== 'redis'),
  ];
  await Promise.all(others.map((p) => p.stop()));
  await Promise.all(redis.map((p) => p.stop()));
}

function tellWhatIsAwaited(started: readonly SupervisedProcess[]): void {
  for (const { name, waitingFor } of started) {
    const reasons = Object.entries(waitingFor).map(([part, reason]) => `${part}: ${reason}`);
    if (reasons.length > 0) console.log(`Waiting: ${name} is not ready (${reasons.join('; ')}).`);
  }
}

function localUrl(config: LauncherConfig, port: number): string {
  const everywhere = ['0.0.0.0', '::'].includes(config.host);
  const host = config.loopback || everywhere ? 'localhost' : config.host;
  return `http://${host.includes(':') ? `[${host}]` : host}:${port}`;
}

function announce(config: LauncherConfig, port: number, apiKey: string | undefined): void {
  const key = apiKey === undefined ? '' : `/?key=${encodeURIComponent(apiKey)}`;
  console.log(`Running on local URL: ${localUrl(config, port)}${key}`);
  if (['0.0.0.0', '::'].includes(config.host)) {
    const addresses = Object.values(networkInterfaces()).flatMap((list) => list ?? []);
    for (const { address } of addresses.filter(({ internal, family }) => !internal && family === 'IPv4')) {
      console.log(`Running on network URL: http://${address}:${port}${key}`);
    }
  }
  console.log(`Ctrl-C stops it. Jobs, results and logs are kept in ${config.dataDir}.`);
}

/** What of the services' logs reaches the terminal. */
class Speech {
  verbose = false;
  /** Off while starting: that a part is not there yet is no news then. */
  warnings = false;
  /** While stopping. */
  silent = false;

  line(from: string, level: number, text: string): void {
    if (this.verbose) console.log(`${from}: ${text}`);
    else if (this.silent) return;
    else if (level >= 50 && level < 60) console.error(`${from}: error: ${text}`);
    else if (level === 40 && this.warnings) console.error(`${from}: warning: ${text}`);
  }
}

async function main(): Promise<void> {
  const processes: SupervisedProcess[] = [];
  const stop = Promise.withResolvers<void>();
  const say = new Speech();
  let firstSignalAt: number | undefined;
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      if (firstSignalAt === undefined) {
        firstSignalAt = Date.now();
        console.log('\nStopping: running work is given back, nothing is lost...');
        stop.resolve();
      } else if (Date.now() - firstSignalAt > sameSignalMs) process.exit(130);
    });
  }
  // The terminal or the pipe that was printed to has gone: no reason to stop, and none to crash.
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => {});
  // Whatever ends this process, a second Ctrl-C or a bug of ours: no child outlives it.
  process.on('exit', () => {
    for (const running of processes) running.kill();
  });

  try {
    process.loadEnvFile(path.join(root, '.env'));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  await start(stop.promise, processes, say);
  console.log('Stopped.');
}

try {
  await main();
  process.exit(0);
} catch (error) {
  console.error(error instanceof StartupError ? error.message : error);
  process.exit(1);
}
