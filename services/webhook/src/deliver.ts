/**
 * One attempt to deliver one message: signed, sent, judged by the status line of the answer.
 *
 * The receiver is somebody else's program at an address that a tenant named, so each part of the exchange has a limit:
 * the guard judges the address inside the connection's own look-up, one time limit spans everything from the look-up to
 * the beginning of the body, undici bounds the headers, and of the body no more is read than a receipt shows.
 *
 * An attempt is never repeated here. A receiver that closes an idle connection just when it is used again looks
 * like one that broke off after having accepted; both are failed attempts, and the next one carries the same id.
 */
import { type EgressGuard, EgressRefused } from '@acousticsense/egress/guard';
import type { TestOutcome } from '@acousticsense/shared/endpoints';
import { sign } from '@acousticsense/shared/webhook-signature';
import { type Dispatcher, errors, request } from 'undici';
import type { Clock } from './clock.ts';

export interface Message {
  /** `webhook-id` */
  readonly id: string;
  readonly url: string;
  /** JSON, byte for byte what is signed and sent. */
  readonly body: string;
}

/**
 * Stable codes of receipts. `not_public`: an address inside the operator's network, or plain http to one that is not
 * opened; `protocol`: the answer is not HTTP, or its headers have no end; `status`: neither 2xx, 3xx nor 410.
 */
export type DeliveryProblem =
  | 'timeout'
  | 'connection'
  | 'tls'
  | 'not_public'
  | 'protocol'
  | 'redirect'
  | 'status';

interface Answered {
  readonly status: number;
  /** Real time that the attempt took. */
  readonly ms: number;
  /** Beginning of the body, in one line without control characters. */
  readonly excerpt: string;
}

export type Outcome =
  | ({ readonly kind: 'delivered' } & Answered)
  | ({ readonly kind: 'gone' } & Answered)
  | {
      readonly kind: 'failed';
      /** Absent without an answer, as is the excerpt. */
      readonly status?: number;
      readonly ms: number;
      readonly excerpt?: string;
      readonly problem: DeliveryProblem;
      /** For how long the receiver asked to be left alone, by the clock; at most a day. */
      readonly retryAfterMs?: number;
    };

/**
 * @param secrets that sign now, the newest first.
 * @param signal the service closes. An answer whose status is known is still told, for it would be sent again otherwise.
 * @param options.excerptBytes of the body, 256 unless told.
 * @throws the signal's reason, and nothing for what a receiver does. @throws {Error} for secrets that cannot sign.
 */
export type Deliver = (
  message: Message,
  secrets: readonly string[],
  signal: AbortSignal,
  options?: { readonly excerptBytes?: number },
) => Promise<Outcome>;

export interface DeliverDeps {
  readonly guard: Pick<EgressGuard, 'dispatcher' | 'opens'>;
  readonly clock: Clock;
  /** Real time for everything up to the beginning of the body. */
  readonly timeoutMs?: number;
}

const longestRetryAfterMs = 86_400_000;
/** Interim answers (103 and the like) cost nothing to send: more than these are an attack, not advice. */
const maxInterim = 16;

export function createDeliver({ guard, clock, timeoutMs = 15_000 }: DeliverDeps): Deliver {
  return async (message, secrets, signal, { excerptBytes = 256 } = {}) => {
    signal.throwIfAborted();
    const from = performance.now();
    const ms = () => Math.round(performance.now() - from);
    const url = URL.parse(message.url);
    if (url === null || !maySend(url)) return { kind: 'failed', ms: ms(), problem: 'not_public' };
    const headers = {
      'content-type': 'application/json',
      'user-agent': 'AcousticSense',
      ...sign(message, secrets, clock.now()),
    };

    const attempt = new AbortController();
    const timer = setTimeout(() => attempt.abort(new Broken('timeout')), timeoutMs);
    try {
      let response: Dispatcher.ResponseData;
      try {
        let interim = 0;
        response = await request(url, {
          dispatcher: guard.dispatcher,
          signal: AbortSignal.any([signal, attempt.signal]),
          method: 'POST',
          headers,
          body: message.body,
          onInfo() {
            interim += 1;
            if (interim > maxInterim) attempt.abort(new Broken('protocol'));
          },
          // The attempt has its own clock, which dripping bytes do not set back.
          headersTimeout: 0,
          bodyTimeout: 0,
        });
      } catch (error) {
        signal.throwIfAborted();
        return { kind: 'failed', ms: ms(), problem: problemOf(error) };
      }
      const excerpt = await beginningOf(response, excerptBytes);
      return judge(response, { status: response.statusCode, ms: ms(), excerpt });
    } finally {
      clearTimeout(timer);
    }
  };

  /** Whether a connection is to be tried; its address is judged when it is looked up. */
  function maySend({ protocol, hostname, port }: URL): boolean {
    return protocol === 'https:' || (protocol === 'http:' && guard.opens(hostname, Number(port) || 80));
  }

  function judge(response: Dispatcher.ResponseData, answered: Answered): Outcome {
    const { status } = answered;
    if (status >= 200 && status < 300) return { kind: 'delivered', ...answered };
    if (status === 410) return { kind: 'gone', ...answered };
    const problem = status < 400 ? 'redirect' : 'status';
    const wait = retryAfterMs(header(response, 'retry-after'), clock.now());
    return { kind: 'failed', ...answered, problem, ...(wait === undefined ? {} : { retryAfterMs: wait }) };
  }
}

/** An outcome as it is kept. @param at when the attempt began, by the clock. */
export function receiptOf(outcome: Outcome, at: number): TestOutcome {
  const { kind, ms, status, excerpt } = outcome;
  return {
    at: Math.round(at),
    outcome: kind,
    ms,
    ...(status === undefined ? {} : { status }),
    ...(outcome.kind === 'failed' ? { problem: outcome.problem } : {}),
    ...(excerpt === undefined ? {} : { excerpt }),
  };
}

/** What an outcome means, as a sentence for whoever runs the endpoint. */
export function explain(outcome: Outcome): string {
  if (outcome.kind === 'delivered') return `It answered ${outcome.status}.`;
  if (outcome.kind === 'gone') return 'It answered 410: it wants no more events.';
  switch (outcome.problem) {
    case 'timeout':
      return 'It did not answer in time.';
    case 'connection':
      return 'No connection came about, or it broke off before an answer.';
    case 'tls':
      return 'No secure connection came about: its certificate must be valid, for this host name, and from a public authority.';
    case 'not_public':
      return 'Its address is not on the public internet, or does not begin with https://.';
    case 'protocol':
      return 'What it answered is not HTTP, or its headers are too long.';
    case 'redirect':
      return `It answered ${outcome.status}: redirects are not followed; register the URL that they lead to.`;
    default:
      return `It answered ${outcome.status}, where 2xx was expected.`;
  }
}

/** The attempt was ended from this side. */
class Broken extends Error {
  readonly problem: DeliveryProblem;

  constructor(problem: DeliveryProblem) {
    super(problem);
    this.problem = problem;
  }
}

/** OpenSSL's verdicts on certificates have no prefix in common; those of the handshake have. */
const tlsCode =
  /^(ERR_(TLS|SSL|OSSL)_|EPROTO$|(UNABLE_TO|CERT|CRL|DEPTH_ZERO|SELF_SIGNED|ERROR_IN_C(ERT|RL))_|INVALID_(CA|PURPOSE)$|PATH_LENGTH_EXCEEDED$|HOSTNAME_MISMATCH$)/;
const protocolErrors = [
  errors.HTTPParserError,
  errors.HeadersOverflowError,
  errors.ResponseContentLengthMismatchError,
];
const timeoutCode = /^(UND_ERR_CONNECT_TIMEOUT|ETIMEDOUT)$/;

function problemOf(error: unknown): DeliveryProblem {
  if (error instanceof Broken) return error.problem;
  if (error instanceof EgressRefused) return 'not_public';
  const { code = '', message } = error as NodeJS.ErrnoException;
  if (tlsCode.test(code)) return 'tls';
  if (timeoutCode.test(code)) return 'timeout';
  // undici's words for a 100 or 101 that nobody asked for.
  if (message === 'bad response' || message === 'bad upgrade') return 'protocol';
  if (protocolErrors.some((kind) => error instanceof kind)) return 'protocol';
  return 'connection';
}

/**
 * Reads the beginning of a body, and destroys what follows. That closes the connection, unless the whole answer had come
 * with the beginning: then it serves the next message. However reading ends, the status line stays what it was.
 */
async function beginningOf({ body }: Dispatcher.ResponseData, bytes: number): Promise<string> {
  const parts: Buffer[] = [];
  let size = 0;
  let ended = false;
  try {
    for await (const part of body as AsyncIterable<Buffer>) {
      parts.push(part);
      size += part.length;
      if (size >= bytes) break;
    }
    ended = size < bytes;
  } catch {
    // Out of time, or broken off.
  }
  return asLine(Buffer.concat(parts), bytes, ended);
}

/** At most `bytes` of a text, ending with a whole character. */
function asLine(text: Buffer, bytes: number, ended: boolean): string {
  return (
    new TextDecoder()
      .decode(text.subarray(0, bytes), { stream: !ended })
      .replace(/[\t\n\r]+/g, ' ')
      // Also what turns the direction of writing: receipts are shown beside others.
      .replace(/[\p{Cc}\u2028\u2029\u202a-\u202e\u2066-\u2069]/gu, '\ufffd')
  );
}

function header({ headers }: Dispatcher.ResponseData, name: string): string | undefined {
  const value = headers[name];
  return Array.isArray(value) ? value[0] : value;
}

/** RFC 9110, 10.2.3: seconds, or a date, which begins with the day of the week. */
function retryAfterMs(value: string | undefined, now: number): number | undefined {
  const text = value?.trim() ?? '';
  const wait = /^\d+$/.test(text)
    ? Number(text) * 1_000
    : /^[A-Za-z]/.test(text)
      ? Date.parse(text) - now
      : Number.NaN;
  return wait > 0 ? Math.min(wait, longestRetryAfterMs) : undefined;
}
