/** A running AcousticSense, spoken to over HTTP as any caller does. */
import { openAsBlob } from 'node:fs';
import { access, constants, stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Vectors, vectorsSchema } from '@acousticsense/shared/job';
import { z } from 'zod';
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

const problemSchema = z.object({ code: z.string(), detail: z.string(), retryable: z.boolean() });

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

/** How long a service that was there may be away. */
const goneAfterMs = 60_000;
/** How long one answer may take, uploads apart; the first one, of a program that may be any, less. */
const answerMs = 30_000;
const firstAnswerMs = 10_000;
/** How long a service may say that nobody serves its model. */
const unservedAfterMs = 120_000;
const firstPollMs = 40;
const longestPollMs = 500;
/** How long an upload may go on after the user has stopped: with its answer the job can be taken back. */
const farewellMs = 2_000;
/** Attempts on what the service calls its own fault. */
const attempts = 3;

/** @throws {Failure} one sentence: not reachable, another program, the key refused. */
export async function connect(
  { url, apiKey }: { url: string; apiKey: string | undefined },
  signal: AbortSignal,
): Promise<Service> {
  const base = baseUrl(url);
  const headers: Record<string, string> =
    apiKey === undefined ? {} : { authorization: `Bearer ${printable(apiKey)}` };
  let reachable = false;

  /** One request, repeated while the service is away or asks for patience. */
  async function request(
    at: string,
    signal: AbortSignal,
    init: () => Promise<RequestInit> | RequestInit = () => ({}),
  ): Promise<{ response: Response; body: unknown }> {
    const from = Date.now();
    for (let attempt = 0; ; attempt += 1) {
      signal.throwIfAborted();
      const given = await init();
      let response: Response;
      let text: string;
      try {
        using limit = given.method === 'POST' ? later(signal, farewellMs) : undefined;
        const patience = AbortSignal.timeout(reachable ? answerMs : firstAnswerMs);
        const until = limit?.signal ?? AbortSignal.any([signal, patience]);
        response = await fetch(base + at, { ...given, headers, signal: until });
        text = await response.text();
      } catch (error) {
        signal.throwIfAborted();
        const why = causeOf(error);
        if (!reachable) {
          throw new Failure(
            `${base} cannot be reached (${why}): is the address right, and does the service run?`,
          );
        }
        if (Date.now() - from > goneAfterMs) {
          throw new Failure(`${base} has not answered for ${goneAfterMs / 1_000} s (${why}).`);
        }
        await sleep(Math.min(5_000, 250 * 2 ** attempt), undefined, { signal });
        continue;
      }
      const body = parseJson(text);
      if (response.status === 429 || response.status === 503) {
        const { data } = problemSchema.safeParse(body);
        // A day's quota: waiting for it here would look like work.
        if (data?.code === 'quota_exceeded') throw new Failure(`${base} refuses: ${data.detail}`);
        if (data?.code === 'model_not_served' && Date.now() - from > unservedAfterMs) {
          throw new Failure(
            `${base} has had no worker for its model for ${unservedAfterMs / 1_000} s: ${data.detail}`,
          );
        }
        if (data !== undefined || response.headers.has('retry-after')) {
          reachable = true;
          await sleep(retryAfterMs(response), undefined, { signal });
          continue;
        }
      }
      const { data: problem } = problemSchema.safeParse(body);
      if (response.status === 401) {
        throw new Failure(
          apiKey === undefined
            ? `${base} needs a key: give it with --key KEY, or in the variable ACOUSTICSENSE_KEY.`
            : `${base} does not accept this key.`,
        );
      }
      if (response.status === 403)
        throw new Failure(`${base} refuses: ${problem?.detail ?? response.status}`);
      if (problem === undefined && !response.ok && response.status !== 404 && !reachable) {
        throw new Failure(`${base} answers ${response.status}, which is not how AcousticSense answers.`);
      }
      reachable = true;
      return { response, body };
    }
  }

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

/** A signal that follows another one after some time. */
function later(signal: AbortSignal, ms: number): { signal: AbortSignal } & Disposable {
  const follower = new AbortController();
  let timer: NodeJS.Timeout | undefined;
  const follow = () => {
    timer = setTimeout(() => follower.abort(signal.reason), ms);
  };
  signal.addEventListener('abort', follow, { once: true });
  return {
    signal: follower.signal,
    [Symbol.dispose]() {
      clearTimeout(timer);
      signal.removeEventListener('abort', follow);
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

function baseUrl(given: string): string {
  const url = URL.canParse(given) ? new URL(given) : undefined;
  if (url === undefined || !['http:', 'https:'].includes(url.protocol)) {
    throw new Failure(`--url ${given} is no address: it begins with http:// or https://.`);
  }
  return url.origin + url.pathname.replace(/\/+$/, '');
}

/** A header holds Latin letters only; anything else could never be the key. */
function printable(key: string): string {
  if (/^[\x21-\x7e]+$/.test(key)) return key;
  throw new Failure('The key holds characters that no key has.');
}

/** Seconds, or a date (RFC 9110, 10.2.3); 2 s when the header says neither. */
function retryAfterMs(response: Response): number {
  const header = response.headers.get('retry-after') ?? '';
  const ms = /^\d+$/.test(header) ? Number(header) * 1_000 : Date.parse(header) - Date.now();
  return Number.isFinite(ms) ? Math.min(120_000, Math.max(100, ms)) : 2_000;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** `fetch` hides what happened in the cause of its error; several addresses tried give one each. */
function causeOf(error: unknown): string {
  const { cause } = error as { cause?: NodeJS.ErrnoException & { errors?: NodeJS.ErrnoException[] } };
  const first = cause?.errors?.[0] ?? cause;
  if ((error as Error).name === 'TimeoutError') return 'no answer in time';
  return first?.code ?? first?.message ?? (error as Error).message;
}
