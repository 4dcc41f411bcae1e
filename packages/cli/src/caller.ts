/** One caller of a running AcousticSense: its address, its key, and patience while it is away or busy. */
import { setTimeout as sleep } from 'node:timers/promises';
import { z } from 'zod';
import { Failure } from './failure.ts';

export const problemSchema = z.object({ code: z.string(), detail: z.string(), retryable: z.boolean() });

export interface Waiting {
  /** How long one answer may take, uploads apart. */
  readonly answerMs?: number;
  /** How long a service that was there may be away. */
  readonly awayMs?: number;
  /** Told once when it goes, and once when it is back. */
  readonly onAway?: (away: boolean) => void;
}

export interface Caller {
  /** Without a slash at its end. */
  readonly base: string;
  readonly headers: Readonly<Record<string, string>>;
  /**
   * One request, repeated while the service is away or asks for patience.
   * @param at path and query.
   * @throws {Failure} not reachable at all, away for too long, another program, the key refused, a quota used up.
   *   @throws the signal's reason.
   */
  request(
    at: string,
    signal: AbortSignal,
    init?: () => Promise<RequestInit> | RequestInit,
    waiting?: Waiting,
  ): Promise<{ response: Response; body: unknown }>;
}

/** How long a service that was there may be away. */
export const goneAfterMs = 60_000;
/** The first answer, of a program that may be any, comes sooner. */
const firstAnswerMs = 10_000;
/** How long a service may say that nobody serves its model. */
const unservedAfterMs = 120_000;
/** How long an upload may go on after the user has stopped: with its answer the job can be taken back. */
const farewellMs = 2_000;

/** @throws {Failure} an address or a key that is none. */
export function createCaller({ url, apiKey }: { url: string; apiKey: string | undefined }): Caller {
  const base = baseUrl(url);
  const headers: Record<string, string> =
    apiKey === undefined ? {} : { authorization: `Bearer ${printable(apiKey)}` };
  let reachable = false;

  async function request(
    at: string,
    signal: AbortSignal,
    init: () => Promise<RequestInit> | RequestInit = () => ({}),
    { answerMs = 30_000, awayMs = goneAfterMs, onAway = () => {} }: Waiting = {},
  ): Promise<{ response: Response; body: unknown }> {
    const from = Date.now();
    let away = false;
    for (let attempt = 0; ; attempt += 1) {
      signal.throwIfAborted();
      const given = await init();
      let response: Response;
      let text: string;
      try {
        using limit = given.method === 'POST' ? later(signal, farewellMs) : undefined;
        const patience = AbortSignal.timeout(reachable ? answerMs : Math.min(answerMs, firstAnswerMs));
        const until = limit?.signal ?? AbortSignal.any([signal, patience]);
        response = await fetch(base + at, {
          ...given,
          headers: { ...given.headers, ...headers } as HeadersInit,
          signal: until,
        });
        text = await response.text();
      } catch (error) {
        signal.throwIfAborted();
        const why = causeOf(error);
        if (!reachable) {
          throw new Failure(
            `${base} cannot be reached (${why}): is the address right, and does the service run?`,
          );
        }
        if (Date.now() - from > awayMs) {
          throw new Failure(`${base} has not answered for ${awayMs / 1_000} s (${why}).`);
        }
        if (!away) onAway(true);
        away = true;
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
      if (away) onAway(false);
      return { response, body };
    }
  }

  return { base, headers, request };
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
