/**
 * `Idempotency-Key`: the same request sent twice is carried out once, and answered alike (after
 * draft-ietf-httpapi-idempotency-key-header-07).
 *
 * - A key belongs to a tenant and a route, and is kept for 24 hours after its answer.
 * - Only an answer of success is kept. A request that was refused (4xx) has made nothing, so it leaves no trace: sent
 *   again with the same key it is judged anew, and may by then be right (a quota, an option). A fault of ours (5xx)
 *   is no answer to keep either.
 * - What such a fault has left behind may be unknown: Redis can carry out a command whose reply never came, and the
 *   process can die between making something and saying so. So before something is made, its id is written down with
 *   the fingerprint of its request ({@link Bind}); the next attempt looks there first and answers with what it finds.
 * - While a request runs its key is leased. The lease is renewed, and expires soon when the process dies: until then a
 *   second one is told `idempotency_in_flight`. A lease that was lost is noticed before anything is made.
 */
import { createHash, randomUUID } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { ProblemError } from '@acousticsense/shared/errors';
import { withRedis } from '@acousticsense/shared/redis';
import type { Response } from 'express';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';

export interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  /** Sent as JSON. */
  readonly body: unknown;
}

/**
 * To be called when the request is found good, right before making what it asks for: ties the key to this request and
 * to the id of what is about to be made. Does nothing for a request without a key.
 *
 * Rejects when it is not to be made (it was before, or the key is another's): clean up, and let the error pass.
 * @throws {ProblemError} idempotency_key_reused, idempotency_in_flight
 */
export type Bind = (fingerprint: string, id: string) => Promise<void>;

export interface Work {
  readonly tenant: string;
  /** `POST /v1/jobs`. */
  readonly route: string;
  /** Reads the body for its fingerprint only: the answer is there already. */
  readonly read: () => Promise<string>;
  /** The answer for something that was made under this id; undefined when it was not. */
  readonly recall: (id: string) => Promise<Answer | undefined>;
  /** Carries the request out. */
  readonly make: (bind: Bind) => Promise<Answer>;
}

export interface Idempotency {
  /** Carries the request out, or answers as the one before it was; with or without an `Idempotency-Key`. */
  answer(request: IncomingMessage, response: Response, work: Work): Promise<void>;
}

const keptMs = 24 * 3_600_000;
const retrySeconds = 1;
const longestKey = 255;

/** KEYS: what is known of the key, its lease; both of one tenant. ARGV[1]: who asks. */
const scripts = {
  /** ARGV: owner, lease ms. @returns [what, fingerprint, id or answer] */
  idempotencyBegin: `
local known = redis.call('HMGET', KEYS[1], 'fingerprint', 'id', 'answer')
if known[3] then return { 'answered', known[1], known[3] } end
if not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return { 'busy', '', '' } end
return { 'begun', known[1] or '', known[2] or '' }`,
  /** ARGV: owner, lease ms. */
  idempotencyRenew: `
if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return 0`,
  /** ARGV: owner, lease ms, id that was known at the beginning, fingerprint, id, kept ms. @returns 0: it is another's */
  idempotencyBind: `
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', KEYS[1], 'answer') == 1 then return 0 end
if (redis.call('HGET', KEYS[1], 'id') or '') ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[4], 'id', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return 1`,
  /** ARGV: owner, id, answer or '', kept ms, 1: forget what is known. */
  idempotencyEnd: `
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if ARGV[2] == '' or redis.call('HGET', KEYS[1], 'id') ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'answer', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
elseif ARGV[5] == '1' then redis.call('DEL', KEYS[1]) end
return 1`,
} as const;

type Scripted = Redis & {
  [Name in keyof typeof scripts]: (...keysAndArguments: (string | number)[]) => Promise<unknown>;
};

/** Thrown by {@link Bind} to leave the work: this is its answer, given before. */
class Replay extends Error {
  readonly answer: Answer;
  constructor(answer: Answer) {
    super('answered before');
    this.answer = answer;
  }
}

/** @param leaseMs how long after the death of a process its key is free again. */
export function createIdempotency(redis: Redis, log: Logger, leaseMs = 10_000): Idempotency {
  for (const [name, lua] of Object.entries(scripts)) redis.defineCommand(name, { numberOfKeys: 2, lua });
  const scripted = redis as Scripted;

  async function answerOnce(key: string, work: Work): Promise<{ answer: Answer; replayed: boolean }> {
    const name = createHash('sha256').update(`${work.route}\n${key}`).digest('base64url');
    const known = `as:{${work.tenant}}:idempotency:${name}`;
    const keys = [known, `${known}:lease`] as const;
    const owner = randomUUID();

    const [what, fingerprint, rest] = (await withRedis(() =>
      scripted.idempotencyBegin(...keys, owner, leaseMs),
    )) as [string, string, string];
    if (what === 'busy') throw inFlight();
    if (what === 'answered') {
      if ((await work.read()) !== fingerprint) throw reused();
      return { answer: JSON.parse(rest) as Answer, replayed: true };
    }

    const earlier = rest;
    let bound = '';
    const bind: Bind = async (ours, id) => {
      if (earlier !== '') {
        if (ours !== fingerprint) throw reused();
        const made = await work.recall(earlier);
        if (made) {
          bound = earlier;
          throw new Replay(made);
        }
      }
      const held = await withRedis(() =>
        scripted.idempotencyBind(...keys, owner, leaseMs, earlier, ours, id, keptMs),
      );
      if (held === 0) throw inFlight();
      bound = id;
    };
    const end = (answer: Answer | undefined, forget: boolean) =>
      withRedis(() =>
        scripted.idempotencyEnd(
          ...keys,
          owner,
          bound,
          answer === undefined ? '' : JSON.stringify(answer),
          keptMs,
          forget ? 1 : 0,
        ),
      ).catch((error) => log.warn({ err: error }, 'Idempotency-Key could not be settled'));

    const renew = () => void scripted.idempotencyRenew(...keys, owner, leaseMs).catch(() => {});
    const renewal = setInterval(renew, leaseMs / 3);
    try {
      const answer = await work.make(bind);
      // Its end is waited for, so that whoever has the answer finds it kept. It is given even if it could not be.
      await end(answer, false);
      return { answer, replayed: false };
    } catch (error) {
      if (error instanceof Replay) {
        await end(error.answer, false);
        return { answer: error.answer, replayed: true };
      }
      await end(undefined, error instanceof ProblemError && error.status < 500);
      throw error;
    } finally {
      clearInterval(renewal);
    }
  }

  return {
    async answer(request, response, work) {
      const key = keyOf(request);
      const { answer, replayed } =
        key === undefined
          ? { answer: await work.make(async () => {}), replayed: false }
          : await answerOnce(key, work);
      if (replayed) response.set('idempotent-replayed', 'true');
      response.status(answer.status).set(answer.headers).json(answer.body);
    },
  };
}

/**
 * What makes two requests the same: the query, the form's fields in any order, and the SHA-256 of the file; or that of
 * the body as it is. Not the bytes of a form, whose boundary differs each time.
 */
export function fingerprintOf(request: {
  readonly url?: string | undefined;
  readonly fields?: Readonly<Record<string, string>>;
  readonly sha256: string;
}): string {
  const query = request.url?.split('?')[1] ?? '';
  const fields = Object.entries(request.fields ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));
  return createHash('sha256')
    .update(JSON.stringify([query, fields, request.sha256]))
    .digest('hex');
}

/** The draft wants a quoted string (RFC 8941); most clients send the bare one, which means the same here. */
function keyOf(request: IncomingMessage): string | undefined {
  const header = request.headers['idempotency-key'];
  if (header === undefined) return undefined;
  const given = String(header).trim();
  const key = /^"((?:[^"\\]|\\["\\])*)"$/.exec(given)?.[1]?.replace(/\\(["\\])/g, '$1') ?? given;
  if (key.length >= 1 && key.length <= longestKey && /^[\x20-\x7e]+$/.test(key)) return key;
  throw new ProblemError(
    'bad_option',
    `The Idempotency-Key must be 1 to ${longestKey} letters, digits or signs of ASCII; a UUID is best.`,
    { field: 'Idempotency-Key' },
  );
}

function inFlight(): ProblemError {
  return new ProblemError(
    'idempotency_in_flight',
    'A request with this Idempotency-Key is being carried out; send it again in a moment to get its answer.',
    { retryAfter: retrySeconds },
  );
}

function reused(): ProblemError {
  return new ProblemError(
    'idempotency_key_reused',
    'This Idempotency-Key came before with another body or other options; take a new key for a new request.',
    { field: 'Idempotency-Key' },
  );
}
