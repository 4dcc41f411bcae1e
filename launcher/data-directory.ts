/** The directory that a run keeps everything in: made, checked, locked, and told to others by `run.json`. */
import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { StartupError } from '@acousticsense/shared/errors';

/** `DATA_DIR/run.json` while the product runs: for tests, scripts and people. */
export interface RunFile {
  launcher: number;
  /** Undefined until every process is ready. */
  url?: string;
  redisUrl?: string;
  processes: Record<string, { pid: number; port?: number }>;
}

/** How long the processes of a run whose launcher was killed may take to end by themselves. */
const afterlifeMs = 35_000;

/** @throws {StartupError} when it cannot be made or written. */
export function prepareDataDirectory(dataDir: string): void {
  try {
    for (const part of ['.', 'logs', 'redis', 'objects']) {
      makeDirectory(path.join(dataDir, part));
      accessSync(path.join(dataDir, part), constants.R_OK | constants.W_OK | constants.X_OK);
    }
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    throw new StartupError(
      `DATA_DIR ${dataDir} cannot be written (${code}): give its owner write access, or choose another with DATA_DIR=/path npm start.`,
      { cause },
    );
  }
}

/** Not mkdir's own `recursive`: that never returns where the kernel answers ENOENT below an existing parent (/proc). */
function makeDirectory(directory: string): void {
  if (existsSync(directory)) return;
  makeDirectory(path.dirname(directory));
  mkdirSync(directory, { mode: 0o700 });
}

/**
 * Takes the lock of this directory. It belongs to the open file: the kernel frees it when the last process that
 * holds the descriptor has ended, however that was, so there is no stale lock to clean up.
 *
 * @returns the descriptor, to be handed to every child; undefined where there is no flock program.
 * @throws {StartupError} when another run has it.
 */
export async function lockDataDirectory(dataDir: string): Promise<number | undefined> {
  const file = path.join(dataDir, 'lock');
  const fd = openSync(file, 'a', 0o600);
  const deadline = Date.now() + afterlifeMs;
  for (let told = false; ; ) {
    const { status, error } = spawnSync('flock', ['-n', '3'], { stdio: ['ignore', 'ignore', 'ignore', fd] });
    if (error !== undefined) return undefined;
    if (status === 0) return fd;
    const other = readRunFile(dataDir);
    if (other === undefined || isAlive(other.launcher) || Date.now() > deadline + 5_000) {
      const where = other?.url === undefined ? '' : ` at ${other.url}`;
      const who = other === undefined ? '' : ` (process ${other.launcher})`;
      throw new StartupError(
        `AcousticSense already runs on ${dataDir}${where}${who}: stop it first, or start a second one with DATA_DIR=/another/path PORT=8001 npm start.`,
      );
    }
    if (Date.now() > deadline) endHolders(file, other);
    if (!told) console.log('Waiting for the processes of the run before, which was killed, to end...');
    told = true;
    await sleep(250);
  }
}

/** Kills the processes of a run that still hold its lock: a process that has the file open is no namesake. */
function endHolders(lockFile: string, { processes }: RunFile): void {
  for (const { pid } of Object.values(processes)) {
    try {
      const open = readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`));
      if (open.includes(realpathSync(lockFile))) process.kill(-pid, 'SIGKILL');
    } catch {
      // It has ended meanwhile.
    }
  }
}

export function readRunFile(dataDir: string): RunFile | undefined {
  try {
    return JSON.parse(readFileSync(path.join(dataDir, 'run.json'), 'utf8')) as RunFile;
  } catch {
    return undefined;
  }
}

/** Replaced in one step: a reader never sees a part. */
export function writeRunFile(dataDir: string, run: RunFile): void {
  const file = path.join(dataDir, 'run.json');
  writeFileSync(`${file}.new`, `${JSON.stringify(run, null, 2)}\n`, { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

export function removeRunFile(dataDir: string): void {
  rmSync(path.join(dataDir, 'run.json'), { force: true });
}

/** The key for callers that was made for this directory; the same on every start. */
export function keptApiKey(dataDir: string): string {
  return kept(path.join(dataDir, 'api-key'), () => randomBytes(24).toString('base64url'));
}

/** The key that seals tenants' credentials: what Redis holds in this directory opens with no other. */
export function keptSecretsKey(dataDir: string): string {
  return kept(path.join(dataDir, 'secrets-key'), () => randomBytes(32).toString('base64'));
}

/** Written whole or not at all; the directory's lock keeps others from making another one meanwhile. */
function kept(file: string, make: () => string): string {
  if (!existsSync(file)) {
    writeFileSync(`${file}.new`, `${make()}\n`, { mode: 0o600, flush: true });
    renameSync(`${file}.new`, file);
  }
  return readFileSync(file, 'utf8').trim();
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
