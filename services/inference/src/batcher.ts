/**
 * Dynamic batching across jobs.
 *
 * Windows of all jobs share batches. They are taken round-robin, one window a job and turn, so a long recording
 * does not delay a short one. A batch goes out when it is full or when its oldest job has waited long enough;
 * while the model is busy with one, the next fills up.
 *
 * The classifier and the explain graph share the model's process, which runs one batch at a time. Each has a lane of
 * its own, and while both have a batch due they take turns: however many attention maps are wished for, a batch to
 * classify waits for one batch of the other lane at most, and the reverse.
 *
 * When the model's process dies over a batch, nobody knows which window did it: every window of that batch is
 * then run by itself, and only a window that kills a process ALONE accuses its job. Even that counts only after
 * the next process has passed its self-test: a model that does not come back is the machine's fault.
 */
import { InfrastructureFault } from '@acousticsense/shared/errors';
import type { Logger } from 'pino';
import type { InferenceMetrics } from './metrics.ts';
import { CannotExplain, type ModelProcess, ModelProcessCrashed } from './model-process.ts';
import type { GraphName, GraphOutputs } from './model-session.ts';

export interface BatcherOptions {
  readonly model: Pick<ModelProcess, 'run' | 'whenReady' | 'openExplainer'>;
  /** Bytes of one window. */
  readonly windowBytes: number;
  readonly maxBatch: number;
  readonly maxDelayMs: number;
  /** Room for windows of admitted jobs. */
  readonly maxWindowBytes: number;
  readonly metrics: InferenceMetrics;
  readonly log: Logger;
  /** How long jobs wait for a model that is away (a restart takes a second) before they are given back. */
  readonly graceMs?: number;
}

export interface Inferred<G extends GraphName> {
  /** Per window, in the order given. */
  readonly windows: GraphOutputs[G][];
  /** From submission to the start of the batch that held the last window. */
  readonly batchWaitMs: number;
  /** Run time of that batch. */
  readonly runMs: number;
  readonly provider: string;
}

export interface SubmitOptions {
  readonly signal: AbortSignal;
  /** Share no batch with others: this job was near a crash before. */
  readonly alone: boolean;
}

export interface Batcher {
  /**
   * Waits until there is room for the windows of one more job, first come first served. A job larger than all
   * the room there is gets in when it is alone. To be taken before the windows are read, and disposed of when
   * they are no longer held.
   */
  admit(bytes: number, signal: AbortSignal): Promise<Disposable>;
  /**
   * @param windows each uint8 [bands, frames]; at least one.
   * @throws {CrashedAlone} when a window of this job killed the model's process by itself;
   *   {@link InfrastructureFault} when the model is away; the signal's reason when aborted.
   */
  submit(
    jobId: string,
    windows: readonly Uint8Array[],
    options: SubmitOptions,
  ): Promise<Inferred<'classify'>>;
  /**
   * The attention maps of windows.
   * @throws as {@link submit}; {@link CannotExplain} when the model's explain graph cannot be used.
   */
  explain(
    jobId: string,
    windows: readonly Uint8Array[],
    options: SubmitOptions,
  ): Promise<Inferred<'explain'>>;
}

export class CrashedAlone extends Error {
  override readonly name = 'CrashedAlone';
}

type Row = GraphOutputs[GraphName];

interface Submission {
  readonly jobId: string;
  readonly graph: GraphName;
  readonly windows: readonly Uint8Array[];
  readonly rows: Row[];
  readonly submittedAt: number;
  /** Next window to take from the ordinary turn. */
  next: number;
  missing: number;
  settled: boolean;
  readonly settle: (outcome: { value: Inferred<GraphName> } | { error: unknown }) => void;
}

interface Window {
  readonly of: Submission;
  readonly index: number;
}

/** What waits for one graph. */
interface Lane {
  readonly graph: GraphName;
  /** Submissions with windows left to take; the first one's turn is next. */
  turns: Submission[];
  /** Windows that must run by themselves. */
  suspects: Window[];
  lastWasSuspect: boolean;
}

interface Run {
  readonly startedAt: number;
  readonly runMs: number;
  readonly provider: string;
}

export function createBatcher(options: BatcherOptions): Batcher {
  const { model, windowBytes, maxBatch, maxDelayMs, maxWindowBytes, metrics, log } = options;
  const graceMs = options.graceMs ?? 10_000;
  const buckets = bucketsUpTo(maxBatch);
  const measured = {
    classify: {
      batch: metrics.batchWindows,
      wait: metrics.waitSeconds,
      run: metrics.runSeconds,
      windows: metrics.windows,
    },
    explain: {
      batch: metrics.explainBatchWindows,
      wait: metrics.explainWaitSeconds,
      run: metrics.explainRunSeconds,
      windows: metrics.explainWindows,
    },
  };

  const lanes: Record<GraphName, Lane> = { classify: lane('classify'), explain: lane('explain') };
  /** The lane whose turn it is when both have a batch due comes first. */
  let order = [lanes.classify, lanes.explain];
  /** Killed a process alone; accused once the next process is healthy. */
  let blamed: { of: Submission; crash: ModelProcessCrashed }[] = [];
  let busy = false;
  let delay: NodeJS.Timeout | undefined;

  let admitted = 0;
  let queue: { bytes: number; enter: () => void }[] = [];

  function kick(): void {
    clearTimeout(delay);
    if (busy) return;
    const wait = blamed.length > 0 ? 0 : Math.min(...order.map(timeToWait));
    if (wait === Number.POSITIVE_INFINITY) return;
    if (wait > 0) {
      delay = setTimeout(kick, wait);
      return;
    }
    busy = true;
    void runNext().finally(() => {
      busy = false;
      kick();
    });
  }

  /** Milliseconds until a batch of this lane is due; infinite when nothing waits. */
  function timeToWait({ turns, suspects }: Lane): number {
    if (suspects.length > 0) return 0;
    if (turns.length === 0) return Number.POSITIVE_INFINITY;
    if (waitingIn(turns) >= maxBatch) return 0;
    const oldest = Math.min(...turns.map(({ submittedAt }) => submittedAt));
    return oldest + maxDelayMs - performance.now();
  }

  async function runNext(): Promise<void> {
    let provider: string;
    try {
      ({ provider } = await model.whenReady(graceMs));
    } catch (fault) {
      return settleAll(order, fault);
    }
    for (const { of, crash } of blamed.splice(0)) {
      of.settle({
        error: new CrashedAlone(`a window of this job alone ended the model's process: ${crash.message}`),
      });
    }
    const lane = order.find((lane) => timeToWait(lane) <= 0);
    if (lane === undefined) return;
    order = [...order.filter((other) => other !== lane), lane];
    if (lane === lanes.explain) {
      try {
        ({ provider } = await model.openExplainer(graceMs));
      } catch (error) {
        return settleAll(error instanceof CannotExplain ? [lane] : order, error);
      }
    }
    // By turns, so that a job whose windows all run alone does not hold up the others.
    const alone = lane.suspects.length > 0 && (lane.turns.length === 0 || !lane.lastWasSuspect);
    lane.lastWasSuspect = alone;
    const batch = alone ? [lane.suspects.shift()!] : take(lane, provider);
    if (batch.length > 0) await runBatch(lane, batch, alone);
  }

  async function runBatch({ graph }: Lane, batch: Window[], alone: boolean): Promise<void> {
    const startedAt = performance.now();
    const size = bucketFor(batch.length);
    const bytes = new Uint8Array(size * windowBytes);
    batch.forEach(({ of, index }, row) => {
      bytes.set(of.windows[index]!, row * windowBytes);
    });
    try {
      const { outputs, runMs, provider } = await model.run(bytes, size, graph);
      const { batch: windowsInBatch, run, windows } = measured[graph];
      windowsInBatch.observe(batch.length);
      run.observe(runMs / 1_000);
      windows.inc({ provider }, batch.length);
      batch.forEach((window, row) => {
        deliver(window, rowOf(outputs, row, size), { startedAt, runMs, provider });
      });
    } catch (error) {
      if (error instanceof ModelProcessCrashed) return suspect(batch, alone, error);
      // Nothing was run: the model went away in between. What was taken goes back with the rest.
      for (const { of } of batch) of.settle({ error });
    }
  }

  function deliver({ of, index }: Window, row: Row, { startedAt, runMs, provider }: Run): void {
    of.rows[index] = row;
    of.missing -= 1;
    if (of.missing > 0) return;
    const batchWaitMs = startedAt - of.submittedAt;
    measured[of.graph].wait.observe(batchWaitMs / 1_000);
    of.settle({ value: { windows: of.rows, batchWaitMs, runMs, provider } });
  }

  function suspect(batch: Window[], alone: boolean, crash: ModelProcessCrashed): void {
    const open = batch.filter(({ of }) => !of.settled);
    log.warn(
      { jobs: [...new Set(open.map(({ of }) => of.jobId))], alone, reason: crash.message },
      'the model process died over a batch',
    );
    if (alone) blamed.push(...open.map(({ of }) => ({ of, crash })));
    else for (const window of open) lanes[window.of.graph].suspects.push(window);
  }

  /** One window a job and turn, until the batch is full. */
  function take({ turns }: Lane, provider: string): Window[] {
    const size = provider === 'cpu' ? buckets.findLast((bucket) => bucket <= waitingIn(turns)) : maxBatch;
    const batch: Window[] = [];
    while (turns.length > 0 && batch.length < (size ?? 0)) {
      const of = turns.shift()!;
      batch.push({ of, index: of.next });
      of.next += 1;
      if (of.next < of.windows.length) turns.push(of);
    }
    return batch;
  }

  function bucketFor(count: number): number {
    return buckets.find((bucket) => bucket >= count)!;
  }

  function settleAll(which: readonly Lane[], error: unknown): void {
    const open = which.flatMap(({ turns, suspects }) => [...turns, ...suspects.map(({ of }) => of)]);
    const accused = which === order ? blamed.map(({ of }) => of) : [];
    for (const submission of new Set([...open, ...accused])) submission.settle({ error });
  }

  function forget(submission: Submission): void {
    const lane = lanes[submission.graph];
    lane.turns = lane.turns.filter((other) => other !== submission);
    lane.suspects = lane.suspects.filter(({ of }) => of !== submission);
    blamed = blamed.filter(({ of }) => of !== submission);
  }

  function submit<G extends GraphName>(
    graph: G,
    jobId: string,
    windows: readonly Uint8Array[],
    { signal, alone }: SubmitOptions,
  ): Promise<Inferred<G>> {
    signal.throwIfAborted();
    const { promise, resolve, reject } = Promise.withResolvers<Inferred<G>>();
    const abort = () => submission.settle({ error: signal.reason });
    const submission: Submission = {
      jobId,
      graph,
      windows,
      rows: new Array(windows.length),
      submittedAt: performance.now(),
      next: alone ? windows.length : 0,
      missing: windows.length,
      settled: false,
      settle(outcome) {
        if (submission.settled) return;
        submission.settled = true;
        signal.removeEventListener('abort', abort);
        forget(submission);
        if ('error' in outcome) reject(outcome.error);
        else resolve(outcome.value as Inferred<G>);
      },
    };
    signal.addEventListener('abort', abort, { once: true });
    const { suspects, turns } = lanes[graph];
    if (alone) suspects.push(...windows.map((_, index) => ({ of: submission, index })));
    else turns.push(submission);
    kick();
    return promise;
  }

  function letIn(): void {
    while (queue.length > 0 && (admitted === 0 || admitted + queue[0]!.bytes <= maxWindowBytes)) {
      const { bytes, enter } = queue.shift()!;
      admitted += bytes;
      enter();
    }
    metrics.admittedBytes.set(admitted);
  }

  return {
    async admit(bytes, signal) {
      signal.throwIfAborted();
      const { promise, resolve, reject } = Promise.withResolvers<void>();
      const place = { bytes, enter: resolve };
      const leave = () => {
        if (!queue.includes(place)) return;
        queue = queue.filter((other) => other !== place);
        reject(signal.reason);
        letIn();
      };
      queue.push(place);
      signal.addEventListener('abort', leave, { once: true });
      letIn();
      await promise.finally(() => signal.removeEventListener('abort', leave));
      let held = true;
      return {
        [Symbol.dispose]() {
          if (!held) return;
          held = false;
          admitted -= bytes;
          letIn();
        },
      };
    },

    submit: async (jobId, windows, options) => submit('classify', jobId, windows, options),
    explain: async (jobId, windows, options) => submit('explain', jobId, windows, options),
  };
}

const lane = (graph: GraphName): Lane => ({ graph, turns: [], suspects: [], lastWasSuspect: false });

function waitingIn(turns: readonly Submission[]): number {
  return turns.reduce((sum, { windows, next }) => sum + windows.length - next, 0);
}

/** One window of every output of a batch, copied: the rest of the batch can go. */
function rowOf(outputs: Row, row: number, size: number): Row {
  const cut = ([role, values]: [string, Float32Array]) => {
    const width = values.length / size;
    return [role, values.slice(row * width, (row + 1) * width)];
  };
  return Object.fromEntries(Object.entries(outputs).map(cut));
}

/**
 * The only batch sizes that are ever run: powers of two and the largest. Few shapes keep the memory of ONNX
 * Runtime's arena (and of a GPU) flat. On the CPU a batch costs what its windows cost, so there a bucket is
 * filled exactly and the rest waits for the next; elsewhere it is padded up.
 */
function bucketsUpTo(maxBatch: number): number[] {
  const buckets: number[] = [];
  for (let size = 1; size < maxBatch; size *= 2) buckets.push(size);
  return [...buckets, maxBatch];
}
