/**
 * Runs one stage of the pipeline: takes queue jobs, begins them on the record, and turns every way in which a
 * stage can end into what must follow.
 *
 *   returned                  the stage committed and handed on
 *   ProblemError              the record fails with that code; a retryable one is tried again first
 *   CommitRefused             cancelled or overtaken meanwhile: what was written is deleted
 *   InfrastructureFault       something was away: the job goes back, no attempt is spent, the worker pauses
 *   anything else             a bug or a crash: BullMQ tries again, the last attempt fails the record
 *   nothing (process killed)  BullMQ delivers again; a job that does that too often is quarantined
 */
import { hostname } from 'node:os';
import { DelayedError, type Job, UnrecoverableError, Worker } from 'bullmq';
import type { Logger } from 'pino';
import { Counter, Histogram } from 'prom-client';
import type { Backends } from './backends.ts';
import { InfrastructureFault, isRedisAway, ProblemError } from './errors.ts';
import { jobData } from './events.ts';
import type { JobRecord } from './job.ts';
import {
  anyOpenState,
  type CommitResult,
  changesChannel,
  firstState,
  type JobRef,
  parseJobChange,
} from './job-records.ts';
import { jobPrefix } from './object-keys.ts';
import {
  isFinished,
  type JobState,
  queueName,
  type StageName,
  type StagePayload,
  stageOf,
  stages,
} from './pipeline.ts';
import { queuePrefix } from './queues.ts';
import type { Service } from './service.ts';
import type { ModelDescription } from './serving.ts';
import { deletePrefix } from './storage.ts';
import { heedErrors } from './worker-errors.ts';

/** A job may kill its worker this often: an innocent one can be near when others die, or be redeployed over. */
const maxStarts = 12;
const maxRedecodes = 2;
const lockMs = 10_000;

export class CommitRefused extends Error {
  override readonly name = 'CommitRefused';
  readonly result: CommitResult;
  constructor(result: CommitResult) {
    super(`commit refused: ${result.outcome}, the job is ${result.state}`);
    this.result = result;
  }
}

export interface StageJob {
  readonly record: JobRecord;
  readonly log: Logger;
  /** @throws {CommitRefused} which the runner handles. */
  commit(
    to: JobState,
    set: Partial<Pick<JobRecord, 'audio' | 'decoded' | 'outcome' | 'timings'>>,
  ): Promise<void>;
  /** Tells a watching page how far this stage is, 0..1. Best effort. */
  progress(fraction: number): void;
  /**
   * The tensor is gone (it is a cache): back to decode under the next generation, at most twice.
   * @throws {ProblemError} `internal_error` after that.
   */
  sendBack(reason: string): Promise<void>;
  /** The model's process died on this job alone. @returns how often that has happened. */
  recordCrash(): Promise<number>;
}

export interface Stage {
  run(job: StageJob, signal: AbortSignal): Promise<void>;
  /** Adds the next stage's queue job; also called alone when the commit was made before a crash. */
  handOn(job: StageJob): Promise<void>;
}

export interface StageRunner {
  readonly service: Service;
  readonly name: StageName;
  readonly route: { readonly profileHash: string; readonly modelDigest: string };
  readonly stage: Stage;
  readonly concurrency: number;
  readonly backends: Backends;
  /** Of the model, for a stage that completes jobs. */
  readonly description?: ModelDescription;
}

const cancelled = Symbol('cancelled');

/** Starts taking jobs; registers its own closers and metrics on the service. */
export function runStage(runner: StageRunner): void {
  const { service, name, route, stage, concurrency, backends } = runner;
  const { records, queues, storage } = backends;
  const { payload: schema, begins } = stages[name];
  const queue = queueName(name, route);
  const running = new Map<string, AbortController>();

  // Of every metric of this process: what a queue costs (processor time, windows a job) is told by who works on it.
  service.registry.setDefaultLabels({ service: service.name, queue });

  const ended = new Counter({
    name: 'acousticsense_stage_jobs_total',
    help: 'Queue jobs that ended in this stage, by what became of them (code: the problem, or none).',
    labelNames: ['stage', 'outcome', 'code'],
    registers: [service.registry],
  });
  const seconds = new Histogram({
    name: 'acousticsense_stage_seconds',
    help: 'Time from taking a queue job to its end.',
    labelNames: ['stage', 'outcome'],
    buckets: [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300],
    registers: [service.registry],
  });

  const startsField = `${name}Starts` as const;

  async function process(job: Job<StagePayload>, token: string | undefined): Promise<void> {
    const from = performance.now();
    const payload = schema.safeParse(job.data);
    if (!payload.success) throw new UnrecoverableError(`payload not understood: ${payload.error.message}`);
    const { tenant, jobId, generation, batch, traceparent } = payload.data;
    const ref: JobRef = { tenant, jobId, generation, batch };
    const log = service.log.child({ jobId, generation, stage: name, traceId: traceparent.split('-')[1] });
    let outcome = 'error';
    let code = 'none';
    try {
      ({ outcome, code } = await attempt(job, ref, log));
    } catch (error) {
      if (isAway(error) || service.closing.aborted) {
        outcome = 'given_back';
        await giveBack(job, token, ref, error, log);
      }
      const last = job.attemptsMade + 1 >= (job.opts.attempts ?? 1);
      log.warn({ err: error, attempt: job.attemptsMade + 1, last }, 'attempt failed');
      if (!last) throw error;
      const problem =
        error instanceof ProblemError
          ? error
          : new ProblemError(
              'internal_error',
              'The job failed on our side several times; it can be sent again.',
            );
      outcome = 'failed';
      code = problem.code;
      await fail(ref, problem);
      // The queue job is done, however it ended; a bug of ours stays in the queue's own list of failures.
      if (error instanceof ProblemError) return;
      throw error;
    } finally {
      ended.inc({ stage: name, outcome, code });
      seconds.observe({ stage: name, outcome }, (performance.now() - from) / 1_000);
    }
  }

  async function attempt(job: Job, ref: JobRef, log: Logger): Promise<{ outcome: string; code: string }> {
    const step = { from: begins.from, to: begins.to, add: { [startsField]: 1 } };
    const { record, ...begun } = await records.commitAndRead(ref, step);
    if (record === undefined || begun.outcome === 'missing' || begun.outcome === 'cancelled') {
      await cleanUp(ref);
      return { outcome: 'cancelled', code: 'none' };
    }
    if (begun.outcome === 'refused' || record.generation !== ref.generation) {
      return { outcome: 'overtaken', code: 'none' };
    }
    const stageJob = createStageJob(ref, record, log);
    if (begun.outcome === 'already') {
      log.info({ state: record.state }, 'step was committed before; handing on again');
      if (!isFinished(record.state) && stageOf(record.state) !== name) await stage.handOn(stageJob);
      return { outcome: 'repeated', code: 'none' };
    }
    const starts = record[startsField] ?? 1;
    if (starts > maxStarts) {
      await fail(
        ref,
        new ProblemError(
          'quarantined',
          `Work on this file stopped ${starts - 1} times without an end: it is set aside.`,
        ),
      );
      return { outcome: 'failed', code: 'quarantined' };
    }
    log.info({ queuedMs: Date.now() - job.timestamp, starts }, 'begun');

    const controller = new AbortController();
    running.set(ref.jobId, controller);
    try {
      await stage.run(stageJob, AbortSignal.any([controller.signal, service.closing]));
      return { outcome: 'done', code: 'none' };
    } catch (error) {
      if (controller.signal.reason === cancelled || error instanceof CommitRefused) {
        log.info(
          { reason: error instanceof Error ? error.message : undefined },
          'given up: cancelled or overtaken',
        );
        // A cancelled row's record may be gone with its chunk already: what this worker wrote is nobody's result.
        if (controller.signal.reason === cancelled) await deletePrefix(storage, jobPrefix(record));
        else await cleanUp(ref);
        return { outcome: 'cancelled', code: 'none' };
      }
      if (error instanceof ProblemError && !error.retryable && !service.closing.aborted) {
        log.info({ code: error.code, detail: error.message }, 'failed');
        await fail(ref, error);
        return { outcome: 'failed', code: error.code };
      }
      throw error;
    } finally {
      running.delete(ref.jobId);
    }
  }

  function createStageJob(ref: JobRef, record: JobRecord, log: Logger): StageJob {
    return {
      record,
      log,
      async commit(to, set) {
        const timings = { ...record.timings, ...set.timings };
        const ended = { ...record, ...set };
        const events =
          to === 'completed'
            ? [{ type: 'job.completed' as const, data: jobData(ended, to, runner.description) }]
            : [];
        const result = await records.commit(ref, { from: [begins.to], to, set: { ...set, timings }, events });
        // `already`: another delivery of this job was faster and wrote the same.
        if (result.outcome !== 'committed' && result.outcome !== 'already') throw new CommitRefused(result);
      },
      progress(fraction) {
        void records.progress(ref, begins.to, record.version, fraction).catch(() => {});
      },
      async sendBack(reason) {
        if ((record.redecodes ?? 0) >= maxRedecodes) {
          throw new ProblemError(
            'internal_error',
            'The decoded audio of this job was lost several times; it can be sent again.',
          );
        }
        log.warn({ reason }, 'tensor gone: back to decode');
        // Of a repeated run the audio itself may never have been here.
        const to = firstState(record.audio);
        const result = await records.commit(ref, {
          from: [begins.to],
          to,
          raiseGeneration: true,
          clear: ['decoded'],
          add: { redecodes: 1 },
        });
        if (result.outcome !== 'committed') throw new CommitRefused(result);
        await queues.add(stageOf(to)!, { ...record, generation: result.generation });
      },
      async recordCrash() {
        const result = await records.commit(ref, { from: [begins.to], to: begins.to, add: { crashes: 1 } });
        if (result.outcome !== 'committed') throw new CommitRefused(result);
        return (await records.get(ref.tenant, ref.jobId))?.crashes ?? 1;
      },
    };
  }

  async function fail(ref: JobRef, problem: ProblemError): Promise<void> {
    const record = await records.get(ref.tenant, ref.jobId);
    const error = problem.toStored();
    const result = await records.commit(ref, {
      from: anyOpenState,
      to: 'failed',
      set: { error },
      // Without a record the step is refused.
      events: record ? [{ type: 'job.failed', data: jobData({ ...record, error }, 'failed') }] : [],
    });
    if (result.outcome === 'cancelled' || result.outcome === 'missing') await cleanUp(ref);
  }

  /**
   * After a cancel nothing of the job may stay; under a raised generation its objects are still in use. A row without
   * a record belongs to a chunk that was closed: what lies there is its result, and goes with the batch.
   */
  async function cleanUp(ref: JobRef): Promise<void> {
    const record = await records.get(ref.tenant, ref.jobId);
    if (record === undefined && ref.batch) return;
    if (record === undefined || record.state === 'cancelled') {
      await deletePrefix(storage, jobPrefix(record ?? { tenant: ref.tenant, id: ref.jobId }));
    }
  }

  async function giveBack(
    job: Job,
    token: string | undefined,
    ref: JobRef,
    error: unknown,
    log: Logger,
  ): Promise<never> {
    log.warn({ err: error }, 'something was away: the job goes back');
    if (!service.closing.aborted) breaker.open();
    // Only deaths of the process count as starts. While Redis is away this fails at once, and must not become the
    // job's failure: the move waits for Redis, and spends no attempt.
    const lowerStarts = () =>
      records.commit(ref, { from: [begins.to], to: begins.to, add: { [startsField]: -1 } }).then(
        () => true,
        () => false,
      );
    const lowered = await lowerStarts();
    await job.moveToDelayed(Date.now() + 500 + Math.random() * 1_000, token);
    if (!lowered) await lowerStarts();
    throw new DelayedError();
  }

  const worker = new Worker<StagePayload>(queue, process, {
    connection: backends.connect(),
    prefix: queuePrefix(queue),
    name: `${hostname()}-${globalThis.process.pid}`,
    concurrency,
    lockDuration: lockMs,
    stalledInterval: lockMs / 2,
    // Redelivery is how work survives a death; it is bounded by `starts` on the record, not here.
    maxStalledCount: 1_000_000,
    skipVersionCheck: true,
    autorun: false,
  });
  const breaker = createBreaker(worker, service);
  heedErrors(worker, service.log, () => breaker.open());

  const subscriber = backends.connect();
  subscriber.on('message', (_channel, message) => {
    const change = parseJobChange(message);
    if (change?.state === 'cancelled') running.get(change.jobId)?.abort(cancelled);
  });
  void subscriber.subscribe(changesChannel).catch(() => {});

  service.onClose(`${name} worker`, async () => {
    breaker.close();
    await worker.close();
  });
  void worker.run().catch((error) => service.log.error({ err: error }, 'queue worker ended'));
}

/** Stops taking jobs while a part that the service needs is away, so that none is touched in vain. */
function createBreaker(worker: Worker, service: Service) {
  let timer: NodeJS.Timeout | undefined;
  const close = () => {
    clearTimeout(timer);
    timer = undefined;
  };
  const look = async () => {
    const reasons = await service.notReady();
    if (timer === undefined) return;
    if (Object.keys(reasons).length === 0) {
      close();
      worker.resume();
      service.log.info('taking jobs again');
    } else timer = setTimeout(() => void look(), 1_000);
  };
  return {
    open() {
      service.distrust();
      if (timer !== undefined) return;
      service.log.warn('not taking jobs until everything is back');
      void worker.pause(true);
      timer = setTimeout(() => void look(), 1_000);
    },
    close,
  };
}

function isAway(error: unknown): boolean {
  return error instanceof InfrastructureFault || isRedisAway(error);
}
