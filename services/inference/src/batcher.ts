/**
 * Dynamic batching across jobs.
 *
 * Windows of all jobs share batches. They are taken round-robin, one window a job and turn, so a long recording
 * does not delay a short one. A batch goes out when it is full or when its oldest job has waited long enough;
 * while the model is busy with one, the next fills up.
 *
 * When the model's process dies over a batch, nobody knows which window did it: every window of that batch is
 * then run by itself, and only a window that kills a process ALONE accuses its job. Even that counts only after
 * the next process has passed its self-test: a model that does not come back is the machine's fault.
 */
import { InfrastructureFault } from '@acousticsense/shared/errors';
import type { Logger } from 'pino';
import type { InferenceMetrics } from './metrics.ts';
import { type ModelProcess, ModelProcessCrashed } from './model-process.ts';

export interface BatcherOptions {
  readonly model: Pick<ModelProcess, 'run' | 'whenReady'>;
  /** Bytes of one window. */
  readonly windowBytes: number;
  readonly labels: number;
  readonly maxBatch: number;
  readonly maxDelayMs: number;
  /** Room for windows of admitted jobs. */
  readonly maxWindowBytes: number;
  readonly metrics: InferenceMetrics;
  readonly log: Logger;
  /** How long jobs wait for a model that is away (a restart takes a second) before they are given back. */
  readonly graceMs?: number;
}

export interface Inferred {
  /** Per window, in the order given: float32 [labels]. */
  readonly logits: Float32Array[];
  /** From submission to the start of the batch that held the last window. */
  readonly batchWaitMs: number;
  /** Run time of that batch. */
  readonly runMs: number;
  readonly provider: string;
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
   * @param alone true: share no batch with others (this job was near a crash before).
   * @throws {CrashedAlone} when a window of this job killed the model's process by itself;
   *   {@link InfrastructureFault} when the model is away; the signal's reason when aborted.
   */
  submit(
    jobId: string,
    windows: readonly Uint8Array[],
    options: { signal: AbortSignal; alone: boolean },
  ): Promise<Inferred>;
}

export class CrashedAlone extends Error {
  override readonly name = 'CrashedAlone';
}

interface Submission {
  readonly jobId: string;
  readonly windows: readonly Uint8Array[];
  readonly logits: Float32Array[];
  readonly submittedAt: number;
  /** Next window to take from the ordinary turn. */
  next: number;
  missing: number;
  settled: boolean;
  readonly settle: (outcome: { value: Inferred } | { error: unknown }) => void;
}

interface Window {
  readonly of: Submission;
  readonly index: number;
}

export function createBatcher(options: BatcherOptions): Batcher {
  const { model, windowBytes, labels, maxBatch, maxDelayMs, maxWindowBytes, metrics, log } = options;
  const graceMs = options.graceMs ?? 10_000;
  const buckets = bucketsUpTo(maxBatch);

  /** Submissions with windows left to take; the first one's turn is next. */
  let turns: Submission[] = [];
  /** Windows that must run by themselves. */
  let suspects: Window[] = [];
  /** Killed a process alone; accused once the next process is healthy. */
  let blamed: { of: Submission; crash: ModelProcessCrashed }[] = [];
  let lastWasSuspect = false;
  let busy = false;
  let delay: NodeJS.Timeout | undefined;

  let admitted = 0;
  let queue: { bytes: number; enter: () => void }[] = [];

  function kick(): void {
    clearTimeout(delay);
    if (busy || turns.length + suspects.length + blamed.length === 0) return;
    const wait = timeToWait();
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

  function timeToWait(): number {
    if (suspects.length + blamed.length > 0) return 0;
    const waiting = turns.reduce((sum, { windows, next }) => sum + windows.length - next, 0);
    if (waiting >= maxBatch) return 0;
    const oldest = Math.min(...turns.map(({ submittedAt }) => submittedAt));
    return oldest + maxDelayMs - performance.now();
  }

  async function runNext(): Promise<void> {
    let provider: string;
    try {
      ({ provider } = await model.whenReady(graceMs));
    } catch (fault) {
      return settleAll(fault);
    }
    for (const { of, crash } of blamed.splice(0)) {
      of.settle({
        error: new CrashedAlone(`a window of this job alone ended the model's process: ${crash.message}`),
      });
    }
    // By turns, so that a job whose windows all run alone does not hold up the others.
    const alone = suspects.length > 0 && (turns.length === 0 || !lastWasSuspect);
    lastWasSuspect = alone;
    const batch = alone ? [suspects.shift()!] : take(provider);
    if (batch.length > 0) await runBatch(batch, alone, provider);
  }

  async function runBatch(batch: Window[], alone: boolean, provider: string): Promise<void> {
    const startedAt = performance.now();
    const size = bucketFor(batch.length);
    const bytes = new Uint8Array(size * windowBytes);
    batch.forEach(({ of, index }, row) => {
      bytes.set(of.windows[index]!, row * windowBytes);
    });
    try {
      const { logits, runMs } = await model.run(bytes, size);
      metrics.batchWindows.observe(batch.length);
      metrics.runSeconds.observe(runMs / 1_000);
      metrics.windows.inc({ provider }, batch.length);
      batch.forEach((window, row) => {
        deliver(window, logits.slice(row * labels, (row + 1) * labels), { startedAt, runMs, provider });
      });
    } catch (error) {
      if (error instanceof ModelProcessCrashed) return suspect(batch, alone, error);
      // Nothing was run: the model went away in between. What was taken goes back with the rest.
      for (const { of } of batch) of.settle({ error });
    }
  }

  function deliver(
    { of, index }: Window,
    logits: Float32Array,
    run: { startedAt: number; runMs: number; provider: string },
  ): void {
    of.logits[index] = logits;
    of.missing -= 1;
    if (of.missing > 0) return;
    const batchWaitMs = run.startedAt - of.submittedAt;
    metrics.waitSeconds.observe(batchWaitMs / 1_000);
    of.settle({ value: { logits: of.logits, batchWaitMs, runMs: run.runMs, provider: run.provider } });
  }

  function suspect(batch: Window[], alone: boolean, crash: ModelProcessCrashed): void {
    const open = batch.filter(({ of }) => !of.settled);
    log.warn(
      { jobs: [...new Set(open.map(({ of }) => of.jobId))], alone, reason: crash.message },
      'the model process died over a batch',
    );
    if (alone) blamed.push(...open.map(({ of }) => ({ of, crash })));
    else suspects.push(...open);
  }

  /** One window a job and turn, until the batch is full. */
  function take(provider: string): Window[] {
    const waiting = turns.reduce((sum, { windows, next }) => sum + windows.length - next, 0);
    const size = provider === 'cpu' ? buckets.findLast((bucket) => bucket <= waiting) : maxBatch;
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

  function settleAll(error: unknown): void {
    const all = new Set([...turns, ...suspects.map(({ of }) => of), ...blamed.map(({ of }) => of)]);
    for (const submission of all) submission.settle({ error });
  }

  function forget(submission: Submission): void {
    turns = turns.filter((other) => other !== submission);
    suspects = suspects.filter(({ of }) => of !== submission);
    blamed = blamed.filter(({ of }) => of !== submission);
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

    async submit(jobId, windows, { signal, alone }) {
      signal.throwIfAborted();
      const { promise, resolve, reject } = Promise.withResolvers<Inferred>();
      const abort = () => submission.settle({ error: signal.reason });
      const submission: Submission = {
        jobId,
        windows,
        logits: new Array(windows.length),
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
          else resolve(outcome.value);
        },
      };
      signal.addEventListener('abort', abort, { once: true });
      if (alone) suspects.push(...windows.map((_, index) => ({ of: submission, index })));
      else turns.push(submission);
      kick();
      return promise;
    },
  };
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
