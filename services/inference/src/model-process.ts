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
import type { ExplainReport, LoadRequest, Reply, Request, SessionReport } from './model-child.ts';
import type { GraphName, GraphOutputs, ProviderChoice } from './model-session.ts';

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

type Answer = Extract<Reply, { type: 'explain-ready' | 'explain-refused' | 'result' }>;
type WithoutId<R> = R extends { id: number } ? Omit<R, 'id'> : never;
type Asked = WithoutId<Request>;

export interface BatchResult<G extends GraphName> {
  /** Each with the batch first. */
  readonly outputs: GraphOutputs[G];
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
   * Opens the explain graph in the present process, if it is not open yet, and proves it on the bundle's self-test.
   * A process that dies over it is followed by another try: no window had to do with it.
   * @throws {CannotExplain} when it will never open; {@link InfrastructureFault} when the model is not ready
   *   within the time.
   */
  openExplainer(withinMs: number): Promise<ExplainReport>;
  /**
   * Runs one batch; one at a time.
   * @param windows uint8 [count, bands, frames]
   * @param graph `explain` needs {@link openExplainer} first.
   * @throws {ModelProcessCrashed} when the process died, hung or failed over it; {@link InfrastructureFault}
   *   when there is no process to ask.
   */
  run(windows: Uint8Array, count: number): Promise<BatchResult<'classify'>>;
  run<G extends GraphName>(windows: Uint8Array, count: number, graph: G): Promise<BatchResult<G>>;
  /** Process id of the child, while there is one. */
  readonly pid: number | undefined;
  close(): Promise<void>;
}

export class ModelProcessCrashed extends Error {
  override readonly name = 'ModelProcessCrashed';
}

/** The explain graph cannot be used while this service runs; classifying is not touched by it. */
export class CannotExplain extends Error {
  override readonly name = 'CannotExplain';
  /** The graph itself was refused; otherwise its process died, which another machine or hour may not repeat. */
  readonly bundleAtFault: boolean;
  constructor(message: string, bundleAtFault: boolean) {
    super(message);
    this.bundleAtFault = bundleAtFault;
  }
}

/** Processes that may die in a row over opening the explain graph: it may need more memory than there is. */
const maxDeathsOpening = 3;
/** Loading a model takes no longer. */
export const loadWaitMs = 120_000;
const firstDelayMs = 250;
const longestDelayMs = 30_000;

export function createModelProcess(options: ModelProcessOptions): ModelProcess {
  const { bundle, log, runDeadlineMs = 60_000, loadDeadlineMs = loadWaitMs } = options;
  const childScript = options.childScript ?? new URL('./model-child.ts', import.meta.url);

  let child: ChildProcess | undefined;
  let report: SessionReport | undefined;
  let reason = 'the model is being loaded';
  let explainReport: ExplainReport | undefined;
  let cannotExplain = bundle.manifest.graph.explain ? undefined : 'the bundle has no explain graph';
  let deathsOpening = 0;
  let running: { id: number; resolve: (answer: Answer) => void; reject: (error: Error) => void } | undefined;
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
      // ONNX Runtime 1.30 carries a telemetry client that uploads over HTTPS. Nothing of this service leaves the machine.
      env: { ...globalThis.process.env, ORT_DISABLE_TELEMETRY: '1' },
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
    const { graph, selfTest, files } = bundle.manifest;
    const { provider, requireGpu, threads } = options;
    const request: LoadRequest = {
      type: 'load',
      directory: bundle.directory,
      manifest: { graph, selfTest, files },
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
      case 'explain-ready':
      case 'explain-refused':
      case 'result':
        if (message.id !== running?.id) return;
        clearTimeout(deadline);
        failures = 0;
        running.resolve(message);
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
    explainReport = undefined;
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

  /** @throws as {@link ModelProcess.run}. */
  async function ask(request: Asked, deadlineMs: number, what: string): Promise<Answer> {
    if (!child || !report) throw new InfrastructureFault('model', `The model is not ready: ${reason}`);
    if (running) throw new Error('a batch is already running');
    const { promise, resolve, reject } = Promise.withResolvers<Answer>();
    lastId += 1;
    running = { id: lastId, resolve, reject };
    setDeadline(child, deadlineMs, `${what} took longer than ${deadlineMs / 1_000} s`);
    // A failed send is followed by the child's end.
    child.send({ ...request, id: lastId } satisfies Request, () => {});
    return promise;
  }

  async function whenReady(withinMs: number): Promise<SessionReport> {
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
  }

  async function openExplainer(withinMs: number): Promise<ExplainReport> {
    while (cannotExplain === undefined) {
      await whenReady(withinMs);
      if (explainReport) return explainReport;
      try {
        const answer = await ask({ type: 'open-explain' }, loadDeadlineMs, 'opening the explain graph');
        if (answer.type === 'explain-refused') cannotExplain = answer.message;
        if (answer.type !== 'explain-ready') break;
        deathsOpening = 0;
        explainReport = answer.report;
        log.info({ child: child?.pid, ...answer.report }, 'explain graph ready');
        return answer.report;
      } catch (error) {
        if (!(error instanceof ModelProcessCrashed) || closed) throw error;
        deathsOpening += 1;
        if (deathsOpening === maxDeathsOpening)
          cannotExplain = `opening the explain graph failed ${deathsOpening} times: ${error.message}`;
      }
    }
    throw new CannotExplain(cannotExplain ?? reason, deathsOpening < maxDeathsOpening);
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

    whenReady,
    openExplainer,

    async run<G extends GraphName>(windows: Uint8Array, count: number, graph = 'classify' as G) {
      const request = { type: 'run', graph, windows, count } as const;
      const answer = await ask(request, runDeadlineMs, 'a batch');
      if (answer.type !== 'result') throw new Error(`a batch was answered with ${answer.type}`);
      return {
        outputs: answer.outputs as GraphOutputs[G],
        runMs: answer.runMs,
        provider: answer.provider,
      };
    },

    close,
  };
}

/**
 * Proves at start that the explain graph will open when it is first wished for, in a process of its own: its
 * memory goes with it. On the CPU, whatever runs the classifier: this is about the bundle, not about the machine.
 *
 * @throws {StartupError} when the explain graph is at fault. Whatever may pass (no memory, a process killed) proves
 *   nothing and is left to the first wish.
 */
export async function proveExplainGraph(
  options: Pick<ModelProcessOptions, 'bundle' | 'threads' | 'log' | 'childScript'>,
): Promise<void> {
  if (!options.bundle.manifest.graph.explain) return;
  const model = createModelProcess({ ...options, provider: 'cpu', requireGpu: false });
  try {
    await model.start();
    await model.openExplainer(loadWaitMs);
  } catch (error) {
    if (error instanceof StartupError) throw error;
    if (error instanceof CannotExplain && error.bundleAtFault)
      throw new StartupError(error.message, { cause: error });
    options.log.warn({ err: error }, 'the explain graph could not be tried; the first wish for it will tell');
  } finally {
    await model.close();
  }
}
