/**
 * Supervises the model's child process: starts it, hands it batches, restarts it after a death, and tells the
 * truth about it. The process that holds the queue's locks is never the one that may hang or crash.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import type { Bundle } from '@acousticsense/shared/bundle';
import { InfrastructureFault, StartupError } from '@acousticsense/shared/errors';
import type { Logger } from 'pino';
import type { LoadRequest, ProviderChoice, Reply, RunRequest, SessionReport } from './model-child.ts';

export interface ModelProcessOptions {
  readonly bundle: Bundle;
  readonly provider: ProviderChoice;
  readonly requireGpu: boolean;
  readonly threads: number;
  readonly log: Logger;
  /** A batch that takes longer is a hung process: it is killed and counts as crashed. */
  readonly runDeadlineMs?: number;
  readonly loadDeadlineMs?: number;
  readonly onReady?: (report: SessionReport) => void;
  readonly onRestart?: () => void;
  /** The program that the child runs; tests wrap the real one to make it hang or die. */
  readonly childScript?: URL;
}

export interface BatchResult {
  /** float32 [count, labels] */
  readonly logits: Float32Array;
  readonly runMs: number;
  readonly provider: string;
}

export interface ModelProcess {
  /**
   * Resolves when the first attempt to load the model has ended, well or (for reasons that may pass, such as a
   * missing GPU) not: `status` tells, and the attempts go on.
   * @throws {StartupError} when the bundle itself is at fault.
   */
  start(): Promise<void>;
  readonly status: { readonly ready: SessionReport } | { readonly ready: undefined; readonly reason: string };
  /** @throws {InfrastructureFault} with the reason, when the model is not ready within the time. */
  whenReady(withinMs: number): Promise<SessionReport>;
  /**
   * Runs one batch; one at a time.
   * @param windows uint8 [count, bands, frames]
   * @throws {ModelProcessCrashed} when the process died, hung or failed over it; {@link InfrastructureFault}
   *   when there is no process to ask.
   */
  run(windows: Uint8Array, count: number): Promise<BatchResult>;
  /** Process id of the child, while there is one. */
  readonly pid: number | undefined;
  close(): Promise<void>;
}

export class ModelProcessCrashed extends Error {
  override readonly name = 'ModelProcessCrashed';
}

const firstDelayMs = 250;
const longestDelayMs = 30_000;

export function createModelProcess(options: ModelProcessOptions): ModelProcess {
  const { bundle, log, runDeadlineMs = 60_000, loadDeadlineMs = 120_000 } = options;
  const childScript = options.childScript ?? new URL('./model-child.ts', import.meta.url);

  let child: ChildProcess | undefined;
  let report: SessionReport | undefined;
  let reason = 'the model is being loaded';
  let running:
    | { id: number; resolve: (result: BatchResult) => void; reject: (error: Error) => void }
    | undefined;
  let deadline: NodeJS.Timeout | undefined;
  let restart: NodeJS.Timeout | undefined;
  let lastId = 0;
  /** Ends of the child since it last finished a batch. */
  let failures = 0;
  let closed = false;
  const readyWaiters = new Set<(ready: SessionReport) => void>();
  const start = Promise.withResolvers<void>();
  // Nobody may be waiting for it any more when it fails.
  start.promise.catch(() => {});

  function spawn(): void {
    const process = fork(childScript, [], {
      serialization: 'advanced',
      execArgv: [],
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    });
    child = process;
    for (const stream of [process.stdout!, process.stderr!]) {
      createInterface({ input: stream }).on(
        'line',
        (line) => line.trim() && log.debug({ child: process.pid }, line),
      );
    }
    process.on('message', (message: Reply) => receive(process, message));
    process.on('exit', (code, signal) =>
      ended(process, signal ? `it was ended by ${signal}` : `it exited with code ${code}`),
    );
    // Without a pid it never ran, and no 'exit' follows.
    process.on('error', (error) =>
      process.pid === undefined ? ended(process, error.message) : process.kill('SIGKILL'),
    );
    const { graph, selfTest } = bundle.manifest;
    const { provider, requireGpu, threads } = options;
    const request: LoadRequest = {
      type: 'load',
      directory: bundle.directory,
      manifest: { graph, selfTest },
      provider,
      requireGpu,
      threads,
    };
    setDeadline(process, loadDeadlineMs, `loading the model took longer than ${loadDeadlineMs / 1_000} s`);
    process.send(request, () => {});
  }

  function setDeadline(process: ChildProcess, ms: number, why: string): void {
    clearTimeout(deadline);
    deadline = setTimeout(() => abandon(process, why), ms);
  }

  /** Ends the child for a stated reason at once: what `exit` will say of it later is no news. */
  function abandon(process: ChildProcess, why: string): void {
    process.kill('SIGKILL');
    ended(process, why);
  }

  function receive(from: ChildProcess, message: Reply): void {
    if (from !== child) return;
    switch (message.type) {
      case 'ready':
        clearTimeout(deadline);
        report = message.report;
        log[report.fallback ? 'warn' : 'info']({ child: from.pid, ...report }, 'model ready');
        options.onReady?.(report);
        for (const resolve of readyWaiters) resolve(report);
        readyWaiters.clear();
        start.resolve();
        return;
      case 'refused':
        if (message.because === 'bundle') start.reject(new StartupError(message.message));
        abandon(from, message.message);
        return;
      case 'result':
        if (message.id !== running?.id) return;
        clearTimeout(deadline);
        failures = 0;
        running.resolve({ logits: message.logits, runMs: message.runMs, provider: report!.provider });
        running = undefined;
        return;
      case 'failed':
        // An error out of ONNX Runtime may leave it unusable (a GPU out of memory does): a new process is clean.
        abandon(from, message.message);
    }
  }

  function ended(process: ChildProcess, why: string): void {
    if (process !== child) return;
    clearTimeout(deadline);
    child = undefined;
    report = undefined;
    if (!closed) reason = why;
    running?.reject(new ModelProcessCrashed(`The model's process is gone: ${why}`));
    running = undefined;
    if (closed) return;
    const delay = failures === 0 ? 0 : Math.min(firstDelayMs * 2 ** (failures - 1), longestDelayMs);
    failures += 1;
    log.warn({ child: process.pid, reason: why, delay }, 'the model process ended; starting another');
    restart = setTimeout(() => {
      options.onRestart?.();
      spawn();
    }, delay);
    start.resolve();
  }

  async function close(): Promise<void> {
    closed = true;
    reason = 'the service is stopping';
    clearTimeout(restart);
    const process = child;
    if (!process) return;
    const exited = once(process, 'exit');
    if (process.connected) process.disconnect();
    const impatient = setTimeout(() => process.kill('SIGKILL'), 2_000);
    await exited;
    clearTimeout(impatient);
  }

  return {
    async start() {
      spawn();
      try {
        await start.promise;
      } catch (error) {
        await close();
        throw error;
      }
    },

    get status() {
      return report ? { ready: report } : { ready: undefined, reason };
    },

    get pid() {
      return child?.pid;
    },

    async whenReady(withinMs) {
      if (report) return report;
      if (closed) throw new InfrastructureFault('model', `The model is not ready: ${reason}`);
      const { promise, resolve, reject } = Promise.withResolvers<SessionReport>();
      readyWaiters.add(resolve);
      const timer = setTimeout(
        () => reject(new InfrastructureFault('model', `The model is not ready: ${reason}`)),
        withinMs,
      );
      try {
        return await promise;
      } finally {
        clearTimeout(timer);
        readyWaiters.delete(resolve);
      }
    },

    async run(windows, count) {
      if (!child || !report) throw new InfrastructureFault('model', `The model is not ready: ${reason}`);
      if (running) throw new Error('a batch is already running');
      const process = child;
      const { promise, resolve, reject } = Promise.withResolvers<BatchResult>();
      lastId += 1;
      running = { id: lastId, resolve, reject };
      setDeadline(process, runDeadlineMs, `a batch took longer than ${runDeadlineMs / 1_000} s`);
      // A failed send is followed by the child's end.
      process.send({ type: 'run', id: lastId, windows, count } satisfies RunRequest, () => {});
      return promise;
    },

    close,
  };
}
