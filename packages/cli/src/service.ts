/** A running AcousticSense, spoken to over HTTP as any caller does. */
import { openAsBlob } from 'node:fs';
import { access, constants, stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Vectors, vectorsSchema } from '@acousticsense/shared/job';
import { z } from 'zod';
import { createCaller, goneAfterMs, problemSchema } from './caller.ts';
import { Failure } from './failure.ts';

export interface Analysis {
  /** `middle`, `all` or a number; the model's own choice when absent. */
  readonly windows?: string;
  /** Seconds. */
  readonly start?: number;
  readonly duration?: number;
}

/** Of what the service says about its model, the part that is read here. */
const modelSchema = z.object({
  digest: z.string(),
  name: z.string(),
  version: z.string(),
  labels: z.array(z.string()),
  threshold: z.number(),
  calibrated: z.boolean(),
  provider: z.string(),
});
export type Model = z.infer<typeof modelSchema>;

const jobSchema = z.object({
  id: z.string(),
  state: z.string(),
  model: z.object({ digest: z.string() }),
  result: z
    .object({
      top: z.array(z.object({ label: z.string(), confidence: z.number() })),
      probabilities: z.record(z.string(), z.number()),
      uncertain: z.boolean(),
      uncertainBecause: z.string().optional(),
      windows: z.array(z.object({ silent: z.boolean() })),
      provider: z.string(),
    })
    .optional(),
  error: z.object({ code: z.string(), message: z.string(), retryable: z.boolean() }).optional(),
});
type Job = z.infer<typeof jobSchema>;

export interface Fault {
  /** The service's problem codes, and of our own `file_missing` and `file_unreadable`. */
  readonly code: string;
  readonly message: string;
  /** Whether the same file can succeed later. */
  readonly retryable: boolean;
}

export type Answered =
  | {
      readonly ok: true;
      readonly digest: string;
      readonly result: NonNullable<Job['result']>;
      readonly vectors?: Vectors;
    }
  | { readonly ok: false; readonly fault: Fault };

export interface Service {
  readonly url: string;
  readonly model: Model;
  /**
   * Sends one file, waits for its answer, and deletes the job. Waits as long as the service asks for patience.
   *
   * @throws {Failure} when it is no matter of this file: the service is gone, refuses the key or an option.
   */
  analyse(file: string, options: Analysis & { vectors?: boolean }, signal: AbortSignal): Promise<Answered>;
}

const firstPollMs = 40;
const longestPollMs = 500;
/** Attempts on what the service calls its own fault. */
const attempts = 3;

/** @throws {Failure} one sentence: not reachable, another program, the key refused. */
export async function connect(
  { url, apiKey }: { url: string; apiKey: string | undefined },
  signal: AbortSignal,
): Promise<Service> {
  const { base, headers, request } = createCaller({ url, apiKey });

  const { response, body } = await request('/v1/model', signal);
  const served = modelSchema.safeParse(body);
  if (!response.ok || !served.success) {
    throw new Failure(`${base} is no AcousticSense: it answers ${response.status} at /v1/model.`);
  }

  async function submit(
    file: string,
    { windows, start, duration, vectors = false }: Analysis & { vectors?: boolean },
    signal: AbortSignal,
  ): Promise<Job | Fault> {
    const fields = { windows, start, duration, vectors: vectors ? 'true' : undefined };
    const unreadable = await whyUnreadable(file);
    if (unreadable !== undefined) return unreadable;
    for (let attempt = 1; ; attempt += 1) {
      const { response, body } = await request('/v1/jobs', signal, async () => {
        const form = new FormData();
        for (const [name, value] of Object.entries(fields))
          if (value !== undefined) form.append(name, String(value));
        // A reference to the file: it is read while it is sent.
        form.append('file', await openAsBlob(file), path.basename(file));
        return { method: 'POST', body: form };
      });
      if (response.status === 202) return jobSchema.parse(body);
      const { data: problem } = problemSchema.safeParse(body);
      if (problem === undefined) throw new Failure(`${base} answers ${response.status} to an upload.`);
      if (problem.code === 'bad_option' || problem.code === 'bad_request') {
        throw new Failure(`The service does not take these options: ${problem.detail}`);
      }
      if (!problem.retryable || attempt === attempts) {
        return { code: problem.code, message: problem.detail, retryable: problem.retryable };
      }
    }
  }

  async function finished(accepted: Job, signal: AbortSignal): Promise<Job | undefined> {
    let told = Date.now();
    for (let pause = firstPollMs; ; pause = Math.min(longestPollMs, pause * 1.5)) {
      await sleep(pause, undefined, { signal });
      const { response, body } = await request(`/v1/jobs/${accepted.id}`, signal);
      if (response.status === 404) return undefined;
      const { data: job } = jobSchema.safeParse(body);
      if (job !== undefined) told = Date.now();
      else if (Date.now() - told > goneAfterMs) {
        throw new Failure(
          `${base} has not told the state of a job for ${goneAfterMs / 1_000} s: it answers ${response.status}.`,
        );
      }
      if (job !== undefined && ['completed', 'failed', 'cancelled'].includes(job.state)) return job;
    }
  }

  async function answerOf(job: Job, vectors: boolean, signal: AbortSignal): Promise<Answered> {
    if (job.result === undefined) {
      const { code, message, retryable } = job.error ?? {
        code: job.state,
        message: `The job ended as ${job.state}.`,
        retryable: true,
      };
      return { ok: false, fault: { code, message, retryable } };
    }
    const answered = { ok: true, digest: job.model.digest, result: job.result } as const;
    if (!vectors) return answered;
    const { response, body } = await request(`/v1/jobs/${job.id}/vectors`, signal);
    if (!response.ok) throw new Failure(`${base} gives no logits: it answers ${response.status}.`);
    return { ...answered, vectors: vectorsSchema.parse(body) };
  }

  return {
    url: base,
    model: served.data,
    async analyse(file, options, signal) {
      for (let attempt = 1; ; attempt += 1) {
        const accepted = await submit(file, options, signal);
        if ('code' in accepted) return { ok: false, fault: accepted };
        const remove = () =>
          fetch(`${base}/v1/jobs/${accepted.id}`, {
            method: 'DELETE',
            headers,
            signal: AbortSignal.timeout(2_000),
          }).then(
            (response) => response.body?.cancel(),
            () => {},
          );
        try {
          const job = await finished(accepted, signal);
          if (job !== undefined) {
            const answered = await answerOf(job, options.vectors === true, signal);
            const retry = !answered.ok && answered.fault.retryable && attempt < attempts;
            if (!retry) return answered;
          } else if (attempt === attempts) {
            const message = 'The job was deleted before its result was read.';
            return { ok: false, fault: { code: 'job_not_found', message, retryable: true } };
          }
        } finally {
          await remove();
        }
      }
    },
  };
}

async function whyUnreadable(file: string): Promise<Fault | undefined> {
  const there = await stat(file).catch(() => undefined);
  if (there === undefined || !there.isFile()) {
    return { code: 'file_missing', message: `There is no file ${file}.`, retryable: true };
  }
  const allowed = await access(file, constants.R_OK).then(
    () => true,
    () => false,
  );
  if (allowed) return undefined;
  return { code: 'file_unreadable', message: `${file} may not be read.`, retryable: true };
}
