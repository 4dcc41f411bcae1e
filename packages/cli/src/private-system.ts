/** A whole AcousticSense of the command's own: started on a bundle, used, stopped, its data thrown away. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Failure, systemCode } from './failure.ts';

const root = path.resolve(import.meta.dirname, '../../..');
export const defaultBundle = path.join(root, 'models/default');

export interface PrivateSystem extends AsyncDisposable {
  readonly url: string;
  /** Aborted with a {@link Failure} when it ends without being asked to. */
  readonly ended: AbortSignal;
}

const setpriv = '/usr/bin/setpriv';
const prefix = 'acousticsense-private-';
const pollMs = 50;
/** The launcher gives its services 30 s; then it is killed, and the kernel ends the rest. */
const graceMs = 45_000;
/** Of what a service may still finish when it is stopped: nobody will read it. */
const drainSeconds = '1';

/** @returns the directory, absolute. @throws {Failure} when no bundle is there. */
export function findBundle(location: string): string {
  const directory = path.resolve(location);
  if (existsSync(path.join(directory, 'model.json'))) return directory;
  throw new Failure(
    existsSync(directory)
      ? `${directory} is no model bundle: it holds no model.json.`
      : `There is no model bundle at ${directory}.`,
  );
}

/**
 * @param bundle its directory.
 * @throws {Failure} with the launcher's own sentence when it does not start.
 */
export async function startPrivateSystem(
  bundle: string,
  env: NodeJS.ProcessEnv,
  signal: AbortSignal,
): Promise<PrivateSystem> {
  checkPrograms(env['PATH'] ?? '');
  await removeAbandoned();
  const dataDir = await mkdtemp(path.join(tmpdir(), prefix)).catch((error: unknown) => {
    throw new Failure(
      `${tmpdir()} cannot be written (${systemCode(error)}): name another directory for temporary files in TMPDIR.`,
    );
  });
  const launcher = launch(dataDir, bundle, env);
  const ended = new AbortController();
  let stopping = false;
  launcher.child.once('close', () => {
    if (!stopping) ended.abort(new Failure(launcher.lastWords()));
  });

  const stop = async () => {
    stopping = true;
    const { child } = launcher;
    if (child.exitCode === null && child.signalCode === null) {
      const closed = new Promise((resolve) => child.once('close', resolve));
      child.kill('SIGTERM');
      const overtime = setTimeout(() => child.kill('SIGKILL'), graceMs);
      await closed;
      clearTimeout(overtime);
    }
    await rm(dataDir, { recursive: true, force: true, maxRetries: 3 });
  };

  try {
    const url = await readyUrl(dataDir, AbortSignal.any([signal, ended.signal]));
    return { url, ended: ended.signal, [Symbol.asyncDispose]: stop };
  } catch (error) {
    await stop();
    throw ended.signal.aborted ? ended.signal.reason : error;
  }
}

function launch(
  dataDir: string,
  bundle: string,
  env: NodeJS.ProcessEnv,
): { child: ChildProcess; lastWords: () => string } {
  const dieWithParent = existsSync(setpriv) ? [setpriv, '--pdeathsig', 'TERM'] : [];
  const command = [...dieWithParent, process.execPath, path.join(root, 'launcher/start.ts')];
  const child = spawn(command[0]!, command.slice(1), {
    cwd: root,
    env: {
      ...env,
      DATA_DIR: dataDir,
      // What its parts leave lying about goes with the rest.
      TMPDIR: dataDir,
      MODEL_URL: bundle,
      PORT: '0',
      METRICS_PORT: '0',
      HOST: '127.0.0.1',
      DRAIN_SECONDS: drainSeconds,
      // Empty is their default: what is set here, or stands in a .env file, belongs to another system.
      REDIS_URL: '',
      STORAGE_URL: '',
      API_KEY: '',
      LOG_TO_STDOUT: '',
    },
    // A group of its own: Ctrl-C reaches this command, which stops it when nothing is under way any more.
    detached: true,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let said = '';
  child.stderr!.setEncoding('utf8').on('data', (chunk: string) => {
    said = (said + chunk).slice(-4_000);
  });
  child.once('error', (error) => {
    said += error.message;
  });
  return {
    child,
    lastWords: () => `The private system did not run: ${said.trim() || 'it ended without a word'}`,
  };
}

/** `run.json` holds the address from the moment on when every process is ready. */
async function readyUrl(dataDir: string, signal: AbortSignal): Promise<string> {
  for (;;) {
    signal.throwIfAborted();
    const text = await readFile(path.join(dataDir, 'run.json'), 'utf8').catch(() => '{}');
    const { url } = JSON.parse(text) as { url?: string };
    // Not its `localhost`: that may be looked up as ::1 first.
    if (url !== undefined) return url.replace('//localhost:', '//127.0.0.1:');
    await sleep(pollMs, undefined, { signal });
  }
}

/**
 * Throws away what commands that were killed outright could not: their data directories whose lock (the launcher's,
 * freed by the kernel when its last process has ended) nobody holds.
 */
async function removeAbandoned(): Promise<void> {
  const names = await readdir(tmpdir()).catch(() => []);
  for (const name of names.filter((one) => one.startsWith(prefix))) {
    const directory = path.join(tmpdir(), name);
    const lock = path.join(directory, 'lock');
    // Without a lock it is being made.
    if (!existsSync(lock) || spawnSync('flock', ['-n', lock, 'true'], { stdio: 'ignore' }).status !== 0)
      continue;
    await rm(directory, { recursive: true, force: true }).catch(() => {});
  }
}

function checkPrograms(searchPath: string): void {
  const missing = ['ffmpeg', 'ffprobe', 'redis-server'].filter(
    (program) =>
      !searchPath.split(':').some((directory) => {
        try {
          accessSync(path.join(directory, program), constants.X_OK);
          return true;
        } catch {
          return false;
        }
      }),
  );
  if (missing.length > 0) {
    throw new Failure(
      `${missing.join(' and ')} cannot be found: run \`npm start\` once, which installs what is missing, or give the --url of a running service.`,
    );
  }
}
