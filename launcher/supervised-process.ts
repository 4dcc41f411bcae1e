/**
 * One child process that is kept running: started, restarted when it dies, stopped without leaving anything
 * behind.
 *
 * Every child leads a process group of its own, so that Ctrl-C at the terminal reaches the launcher alone and
 * the order of stopping is the launcher's; and so that what a child started itself (ffmpeg, the model's
 * process) goes with it. The kernel ends a child whose launcher was killed (setpriv), a service also notices
 * by its closed channel.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { StartupError } from '@acousticsense/shared/errors';
import type { ProcessLog } from './process-log.ts';

export interface ProcessSpec {
  readonly name: string;
  readonly command: readonly [string, ...string[]];
  readonly env: NodeJS.ProcessEnv;
  /** 'ipc': the process tells of its state (packages/shared/src/service.ts); else a probe that resolves when it is up. */
  readonly readiness: 'ipc' | (() => Promise<void>);
  readonly log: ProcessLog;
  /** Held open by the child: the lock on the data directory lasts until the last process has ended. */
  readonly lockFd: number | undefined;
  /** Milliseconds between SIGTERM and SIGKILL. */
  readonly graceMs: number;
}

export interface SupervisedProcess {
  readonly name: string;
  /** Undefined while it is not running. */
  readonly pid: number | undefined;
  readonly port: number | undefined;
  /** What it is waiting for, as it last said; empty when it waits for nothing. */
  readonly waitingFor: Record<string, string>;
  /** Resolves when it is ready for the first time. Rejects never: see `gaveUp`. */
  readonly ready: Promise<void>;
  /** Rejects with a sentence when it cannot be kept running. */
  readonly gaveUp: Promise<never>;
  stop(): Promise<void>;
  /** At once, the whole group. */
  kill(): void;
}

/** What a service says over its channel: packages/shared/src/service.ts. */
type StateMessage =
  | { type: 'listening'; port: number }
  | { type: 'not-ready'; reasons: Record<string, string> }
  | { type: 'ready' }
  | { type: 'failed'; message: string };

/** The fifth death within a minute is the last: something is wrong that restarting does not mend. */
const deathsAllowed = 5;
const deathWindowMs = 60_000;
const firstBackoffMs = 250;

const dieWithParent = existsSync('/usr/bin/setpriv') ? ['/usr/bin/setpriv', '--pdeathsig', 'TERM'] : [];

export function superviseProcess(spec: ProcessSpec, onChange: () => void): SupervisedProcess {
  const ready = Promise.withResolvers<void>();
  const gaveUp = Promise.withResolvers<never>();
  gaveUp.promise.catch(() => {});
  let child: ChildProcess | undefined;
  let exited: Promise<void> = Promise.resolve();
  let port: number | undefined;
  let waitingFor: Record<string, string> = {};
  let refusal: string | undefined;
  let stopping = false;
  let restart: NodeJS.Timeout | undefined;
  let deaths: number[] = [];

  function killGroup(leader: number): void {
    try {
      process.kill(-leader, 'SIGKILL');
    } catch {
      // ESRCH: nobody is left in it.
    }
  }

  function start(): void {
    const { promise, resolve } = Promise.withResolvers<void>();
    exited = promise;
    const [program, ...args] = [...dieWithParent, ...spec.command] as [string, ...string[]];
    const channel = spec.readiness === 'ipc' ? 'ipc' : 'ignore';
    const started = spawn(program, args, {
      env: spec.env,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe', channel, spec.lockFd ?? 'ignore'],
    });
    child = started;
    spec.log.follow(started.stdout!);
    spec.log.follow(started.stderr!);
    started.on('message', (message: StateMessage) => {
      if (message.type === 'listening') port = message.port;
      if (message.type === 'not-ready') waitingFor = message.reasons;
      if (message.type === 'failed') refusal = message.message;
      if (message.type === 'ready') {
        waitingFor = {};
        ready.resolve();
      }
      onChange();
    });
    started.on('error', (error) => {
      gaveUp.reject(new StartupError(`${spec.name} could not be started: ${error.message}.`));
      resolve();
    });
    // What it left behind would hold its output open, and 'close' would never come.
    started.on('exit', () => started.pid !== undefined && killGroup(started.pid));
    // 'close', not 'exit': its last lines have been read by then.
    started.on('close', (code, signal) => {
      child = undefined;
      port = undefined;
      resolve();
      onChange();
      if (!stopping) died(code, signal);
    });
    if (spec.readiness !== 'ipc') {
      spec.readiness().then(ready.resolve, (error: unknown) => {
        if (!stopping && child === started) gaveUp.reject(error);
      });
    }
    onChange();
  }

  function died(code: number | null, signal: NodeJS.Signals | null): void {
    if (refusal !== undefined) {
      gaveUp.reject(new StartupError(`The ${spec.name} process could not start: ${refusal}`));
      return;
    }
    const now = Date.now();
    deaths = [...deaths.filter((at) => now - at < deathWindowMs), now];
    const how = signal === null ? `exit code ${code}` : `signal ${signal}`;
    if (deaths.length >= deathsAllowed) {
      const last = spec.log.lastWords();
      gaveUp.reject(
        new StartupError(
          `The ${spec.name} process has died ${deaths.length} times within a minute (${how}${last === '' ? '' : `: ${last}`}): look into ${spec.log.file}, mend the cause and start again; jobs are kept.`,
        ),
      );
      return;
    }
    const backoff = firstBackoffMs * 2 ** (deaths.length - 1);
    console.error(`The ${spec.name} process died (${how}); starting it again. Jobs are kept.`);
    restart = setTimeout(start, backoff);
  }

  start();
  return {
    name: spec.name,
    get pid() {
      return child?.pid;
    },
    get port() {
      return port;
    },
    get waitingFor() {
      return waitingFor;
    },
    ready: ready.promise,
    gaveUp: gaveUp.promise,
    async stop() {
      stopping = true;
      clearTimeout(restart);
      const running = child;
      if (running === undefined) return;
      running.kill('SIGTERM');
      const overtime = setTimeout(() => running.pid !== undefined && killGroup(running.pid), spec.graceMs);
      await exited;
      clearTimeout(overtime);
    },
    kill() {
      stopping = true;
      clearTimeout(restart);
      if (child?.pid !== undefined) killGroup(child.pid);
    },
  };
}
