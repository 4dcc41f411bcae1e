/**
 * Endpoints: where a tenant wants to be told of events. Each is one hash in Redis, of which the API and the webhook
 * service change different fields at the same time; every change is one step that does nothing to an endpoint that
 * was removed meanwhile.
 *
 *   as:{tenant}:endpoints                  set     ids
 *   as:{tenant}:endpoint:<id>              hash    the endpoint; its secrets sealed
 *   as:{tenant}:endpoint:<id>:attempts     list    the last 10 attempts, newest first
 *   as:{tenant}:endpoint:<id>:resend       zset    events to tell once more; score: when they happened
 *   as:{tenant}:endpoint:<id>:test:<order> string  what became of a test; an hour
 *   as:endpoint-tenants                    set     tenants that have, or had, endpoints
 *
 *   unverified --verified()--> enabled --disable()--> disabled --enable()--> enabled
 *   another url leads from anywhere back to unverified.
 */
import { randomBytes, randomInt } from 'node:crypto';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { ProblemError } from './errors.ts';
import { disabledReasons, type EventType, eventTypes } from './events.ts';
import { withRedis } from './redis.ts';
import { type Secrets, SecretUnreadable } from './secrets.ts';

export const endpointStatuses = ['unverified', 'enabled', 'disabled'] as const;
export type EndpointStatus = (typeof endpointStatuses)[number];

/** Why an endpoint is told nothing: two that it brought upon itself, and by hand. */
export const endpointDisabledReasons = [...disabledReasons, 'operator'] as const;
export type EndpointDisabledReason = (typeof endpointDisabledReasons)[number];

const typesSchema = z
  .array(z.enum(eventTypes))
  .max(eventTypes.length)
  .transform((types) => eventTypes.filter((type) => types.includes(type)))
  .describe('which events; empty: all but batch.progress');
const urlSchema = z.string().min(1).max(2_000).describe('https://; callback URLs of jobs lie under it');
const descriptionSchema = z.string().max(500);
const maxInFlightSchema = z.int().min(1).max(100).describe('messages that wait for its answer at once');
const maxPerSecondSchema = z.int().min(1).max(1_000);
const secretTextSchema = z
  .string()
  .refine(isSecret, 'must be "whsec_" and 24 to 64 bytes in base64')
  .describe('`whsec_` and base64 of 24 to 64 bytes; a random one when absent');

/** What a tenant says of an endpoint. Whether the url may be called is judged by {@link endpointUrl}. */
export const endpointDefinitionSchema = z.strictObject({
  url: urlSchema,
  types: typesSchema.default([]),
  description: descriptionSchema.optional(),
  maxInFlight: maxInFlightSchema.default(8),
  maxPerSecond: maxPerSecondSchema.default(50),
  secret: secretTextSchema.optional(),
});
export type EndpointDefinition = z.infer<typeof endpointDefinitionSchema>;

/** What is named is changed; an empty description is none. */
export const endpointChangeSchema = z.strictObject({
  url: urlSchema.optional(),
  types: typesSchema.optional(),
  description: descriptionSchema.optional(),
  maxInFlight: maxInFlightSchema.optional(),
  maxPerSecond: maxPerSecondSchema.optional(),
});
export type EndpointChange = z.infer<typeof endpointChangeSchema>;

export const rotationSchema = z.strictObject({
  secret: secretTextSchema.optional(),
  overlapHours: z
    .number()
    .min(0)
    .max(168)
    .default(24)
    .describe('for so long the older secrets sign too; 0: they end now'),
});

const replaySchema = z.object({
  id: z.string(),
  /** Cursor, exclusive: where it stands. */
  after: z.string(),
  /** Cursor, inclusive. */
  until: z.string(),
  /** Those of the endpoint when absent. */
  types: z.array(z.enum(eventTypes)).optional(),
});
/** A range of events that is told once more. */
export type Replay = Readonly<z.infer<typeof replaySchema>>;

const verificationSchema = z.object({
  at: z.int(),
  ok: z.boolean(),
  status: z.int().optional(),
  problem: z.string().optional(),
});
export type EndpointVerification = Readonly<z.infer<typeof verificationSchema>>;

const sealedSecretSchema = z.object({
  sealed: z.string(),
  createdAt: z.int(),
  /** Signs until then; the newest has no end. */
  until: z.int().optional(),
});
type SealedSecret = z.infer<typeof sealedSecretSchema>;

export const attemptOutcomes = ['delivered', 'failed', 'gone'] as const;
const outcomeShape = {
  at: z.int().describe('epoch milliseconds'),
  outcome: z.enum(attemptOutcomes),
  status: z.int().optional(),
  ms: z.number(),
  problem: z.string().optional(),
  excerpt: z.string().optional(),
};
/** Not strict, as all that several processes write and read. */
export const attemptSchema = z.object({
  ...outcomeShape,
  eventId: z.string(),
  type: z.string(),
  attempt: z.int().describe('from 1'),
});
/** One attempt to deliver one event. */
export type Attempt = Readonly<z.infer<typeof attemptSchema>>;

const testOutcomeSchema = z.object(outcomeShape);
/** What became of one test message. */
export type TestOutcome = Readonly<z.infer<typeof testOutcomeSchema>>;

const resendSchema = z.object({
  /** First, so that what is encoded begins with it. */
  cursor: z.string(),
  eventId: z.string(),
  /** A callback URL under the endpoint's, when it goes there; to the endpoint's own when absent. */
  url: z.string().optional(),
  /** Of its dead letter: whoever has queued the event deletes the letter (`object-keys.ts` has its key). */
  day: z.string().optional(),
});
/** One event that is told once more, whether or not the endpoint subscribes to its type. */
export type Resend = Readonly<z.infer<typeof resendSchema>>;

export interface Endpoint {
  readonly tenant: string;
  readonly id: string;
  readonly url: string;
  /** Empty: {@link subscribes}. */
  readonly types: readonly EventType[];
  readonly description?: string;
  readonly maxInFlight: number;
  readonly maxPerSecond: number;
  readonly status: EndpointStatus;
  readonly disabledReason?: EndpointDisabledReason;
  /** Epoch milliseconds: when it disabled itself, as long as no event has told of it ({@link Endpoints.toldDisabled}). */
  readonly disabledUntold?: number;
  /** Epoch milliseconds: the first failure since the last success. */
  readonly failingSince?: number;
  /** To the second. */
  readonly lastSuccessAt?: number;
  /** Events up to here were handed to its queue; there is one from the beginning. */
  readonly cursor?: string;
  readonly replays: readonly Replay[];
  readonly verification?: EndpointVerification;
  /** When each was made, newest first; the secrets themselves are not told. */
  readonly secrets: readonly { readonly createdAt: number; readonly until?: number }[];
  readonly createdAt: number;
  readonly updatedAt: number;
}

export interface Endpoints {
  /**
   * Registers an endpoint, unverified; its cursor stands at the newest event.
   * @param definition its url as {@link endpointUrl} gave it.
   * @returns also the secret, which is never told again.
   * @throws {ProblemError} endpoint_exists, too_many_endpoints, secrets_not_kept
   */
  create(tenant: string, definition: EndpointDefinition): Promise<{ endpoint: Endpoint; secret: string }>;
  /** Oldest first. */
  list(tenant: string): Promise<Endpoint[]>;
  get(tenant: string, id: string): Promise<Endpoint | undefined>;
  /**
   * Another url makes it unverified again.
   * @throws {ProblemError} endpoint_not_found, endpoint_exists
   */
  update(tenant: string, id: string, change: EndpointChange): Promise<Endpoint>;
  /** With all that Redis has of it but its queue. @returns false when there was none. */
  remove(tenant: string, id: string): Promise<boolean>;
  /** That have endpoints, or had some. */
  tenants(): Promise<string[]>;
  /**
   * Secrets that sign now (epoch milliseconds), the newest first: `whsec_...`. One round trip. Those that no key of
   * this process opens are left aside.
   * @returns none for an endpoint that is not there.
   * @throws {SecretUnreadable} when none of them can be opened.
   */
  signingSecrets(tenant: string, id: string, now: number): Promise<string[]>;
  /**
   * A new secret; the older ones sign beside it for `overlapMs`, ten in all at most.
   * @returns the new secret. @throws {ProblemError} endpoint_not_found, secrets_not_kept
   */
  rotate(
    tenant: string,
    id: string,
    rotation: { readonly secret?: string | undefined; readonly overlapMs: number },
  ): Promise<string>;
  /** Seals with the current key what an older one sealed. @returns how many secrets were. */
  reseal(): Promise<number>;
  setCursor(tenant: string, id: string, cursor: string): Promise<void>;
  /**
   * @param replay `until` is the newest event when absent.
   * @returns its id. @throws {ProblemError} endpoint_not_found, too_many_replays
   */
  addReplay(
    tenant: string,
    id: string,
    replay: {
      readonly after: string;
      readonly until?: string | undefined;
      readonly types?: readonly EventType[] | undefined;
    },
  ): Promise<string>;
  /** Where a replay stands now. @param after undefined: it is done. */
  setReplay(tenant: string, id: string, replayId: string, after: string | undefined): Promise<void>;
  /**
   * Adds events to tell once more; one that waits already is not added again. 10,000 wait at most.
   * @returns of how many it is true now that they wait: the first of `resends`.
   */
  addResends(tenant: string, id: string, resends: readonly Resend[]): Promise<number>;
  /** Those that wait, the oldest events first. They stay until {@link dropResends}, so that none is lost in between. */
  resends(tenant: string, id: string, limit: number): Promise<Resend[]>;
  /** Of what {@link resends} gave: they are queued now. */
  dropResends(tenant: string, id: string, resends: readonly Resend[]): Promise<void>;
  /** An attempt that ended at `at` (epoch milliseconds) was answered 2xx. */
  succeeded(tenant: string, id: string, at: number): Promise<void>;
  /** An attempt that ended at `at` was not. */
  failed(tenant: string, id: string, at: number): Promise<void>;
  recordAttempt(tenant: string, id: string, attempt: Attempt): Promise<void>;
  /** The last 10, newest first. */
  attempts(tenant: string, id: string): Promise<Attempt[]>;
  /** A test is known from now on, for an hour. */
  beginTest(tenant: string, id: string, orderId: string): Promise<void>;
  endTest(tenant: string, id: string, orderId: string, outcome: TestOutcome): Promise<void>;
  /** @returns `waiting` before it ended, undefined when there is no such test (any more). */
  test(tenant: string, id: string, orderId: string): Promise<TestOutcome | 'waiting' | undefined>;
  /**
   * What the challenge of ownership brought. A proof enables an endpoint that was unverified; one that is disabled
   * stays so.
   * @param result its `url` is the one that was asked: of another than it has now nothing is kept.
   */
  verified(
    tenant: string,
    id: string,
    result: EndpointVerification & { readonly url: string },
  ): Promise<void>;
  /**
   * Freezes it: its cursor and its queue stay.
   * @param url only while this is still its url.
   * @returns whether it was not disabled before.
   */
  disable(tenant: string, id: string, reason: EndpointDisabledReason, url?: string): Promise<boolean>;
  /** The event that it was disabled is in the log. */
  toldDisabled(tenant: string, id: string, disabledAt: number): Promise<void>;
  /**
   * It goes on where it stood. @throws {ProblemError} endpoint_not_found, endpoint_unverified
   */
  enable(tenant: string, id: string): Promise<Endpoint>;
}

export interface EndpointsOptions {
  readonly redis: Redis;
  readonly secrets: Secrets;
  /** Epoch milliseconds. */
  readonly now?: () => number;
}

const maxEndpoints = 50;
const maxReplays = 5;
const maxSecrets = 10;
const attemptsKept = 10;
const maxResends = 10_000;
const testSeconds = 3_600;

const keys = {
  tenants: 'as:endpoint-tenants',
  ids: (tenant: string) => `as:{${tenant}}:endpoints`,
  endpoint: (tenant: string, id: string) => `as:{${tenant}}:endpoint:${id}`,
  attempts: (tenant: string, id: string) => `as:{${tenant}}:endpoint:${id}:attempts`,
  resend: (tenant: string, id: string) => `as:{${tenant}}:endpoint:${id}:resend`,
  test: (tenant: string, id: string, orderId: string) => `as:{${tenant}}:endpoint:${id}:test:${orderId}`,
  events: (tenant: string) => `as:{${tenant}}:events`,
};

type Fields = Readonly<Record<string, string>>;
/** `changed` is a look at what was read before that is no longer true: read again. */
type Written = 'done' | 'missing' | 'changed';

export function createEndpoints({ redis, secrets, now = Date.now }: EndpointsOptions): Endpoints {
  /**
   * One step.
   * @param expected fields as they were read; '' is one that is absent.
   */
  const write = (
    tenant: string,
    id: string,
    step: { expected?: Fields; set?: Fields; clear?: readonly string[]; url?: string },
  ) =>
    withRedis(
      () =>
        redis.eval(
          writeScript,
          2,
          keys.endpoint(tenant, id),
          keys.ids(tenant),
          JSON.stringify({ expected: {}, set: {}, clear: [], ...step }),
          keys.endpoint(tenant, ''),
          id,
        ) as Promise<Written | 'taken'>,
    );

  const read = (tenant: string, id: string): Promise<Record<string, string>> =>
    withRedis(() => redis.hgetall(keys.endpoint(tenant, id)));

  async function get(tenant: string, id: string): Promise<Endpoint | undefined> {
    const hash = await read(tenant, id);
    return hash['url'] === undefined ? undefined : fromHash(tenant, id, hash);
  }

  async function existing(tenant: string, id: string): Promise<Endpoint> {
    const endpoint = await get(tenant, id);
    if (endpoint === undefined) throw notFound();
    return endpoint;
  }

  /**
   * Replaces one field by what `next` makes of it, however many do so at once.
   * @param next returns undefined to leave it as it is.
   * @returns false when there is no such endpoint.
   */
  async function replace(
    tenant: string,
    id: string,
    field: string,
    next: (json: string | null) => string | undefined,
  ): Promise<boolean> {
    for (;;) {
      const before = await withRedis(() => redis.hget(keys.endpoint(tenant, id), field));
      const after = next(before);
      if (after === undefined) return true;
      const result = await write(tenant, id, {
        expected: { [field]: before ?? '' },
        set: { [field]: after },
      });
      if (result !== 'changed') return result === 'done';
    }
  }

  const seal = (tenant: string, id: string, secret: string) => secrets.seal(secret, placeOf(tenant, id));

  return {
    async create(tenant, { url, types, description, maxInFlight, maxPerSecond, secret = newSecret() }) {
      const id = newId();
      const at = now();
      const sealed: SealedSecret = { sealed: seal(tenant, id, secret), createdAt: at };
      const hash = {
        url,
        types: JSON.stringify(types),
        ...(description ? { description } : {}),
        maxInFlight: String(maxInFlight),
        maxPerSecond: String(maxPerSecond),
        status: 'unverified',
        secrets: JSON.stringify([sealed]),
        createdAt: String(at),
        updatedAt: String(at),
      };
      // Before the endpoint, so that none is unknown to those who go through all tenants.
      await withRedis(() => redis.sadd(keys.tenants, tenant));
      const answer = await withRedis(
        () =>
          redis.eval(
            createScript,
            3,
            ...[keys.endpoint(tenant, id), keys.ids(tenant), keys.events(tenant)],
            ...[JSON.stringify(hash), keys.endpoint(tenant, ''), id, String(maxEndpoints)],
          ) as Promise<string>,
      );
      if (answer === 'taken') throw taken(url);
      if (answer === 'full') {
        throw new ProblemError(
          'too_many_endpoints',
          `${maxEndpoints} endpoints are registered already; remove one that is not used.`,
        );
      }
      return { endpoint: fromHash(tenant, id, { ...hash, cursor: answer }), secret };
    },

    async list(tenant) {
      const ids = await withRedis(() => redis.smembers(keys.ids(tenant)));
      const found = await Promise.all(ids.map((id) => get(tenant, id)));
      return found
        .filter((endpoint) => endpoint !== undefined)
        .sort((a, b) => a.createdAt - b.createdAt || (a.id < b.id ? -1 : 1));
    },

    get,

    async update(tenant, id, { url, description, types, maxInFlight, maxPerSecond }) {
      const before = await existing(tenant, id);
      const moves = url !== undefined && url !== before.url;
      const result = await write(tenant, id, {
        set: {
          ...(moves ? { url, status: 'unverified' } : {}),
          ...(description ? { description } : {}),
          ...(types === undefined ? {} : { types: JSON.stringify(types) }),
          ...(maxInFlight === undefined ? {} : { maxInFlight: String(maxInFlight) }),
          ...(maxPerSecond === undefined ? {} : { maxPerSecond: String(maxPerSecond) }),
          updatedAt: String(now()),
        },
        clear: [
          ...(description === '' ? ['description'] : []),
          ...(moves ? ['verifiedUrl', 'verification', 'disabledReason', 'failingSince'] : []),
        ],
        ...(moves ? { url } : {}),
      });
      if (result === 'taken') throw taken(url!);
      return existing(tenant, id);
    },

    async remove(tenant, id) {
      const [removed] = await withRedis(() =>
        Promise.all([
          redis.del(keys.endpoint(tenant, id)),
          redis.srem(keys.ids(tenant), id),
          redis.del(keys.attempts(tenant, id), keys.resend(tenant, id)),
        ]),
      );
      return removed === 1;
    },

    tenants: () => withRedis(() => redis.smembers(keys.tenants)),

    async signingSecrets(tenant, id, at) {
      const json = await withRedis(() => redis.hget(keys.endpoint(tenant, id), 'secrets'));
      const signing = parseSecrets(json).filter(({ until }) => until === undefined || until > at);
      const opened: string[] = [];
      let unreadable: SecretUnreadable | undefined;
      for (const { sealed } of signing) {
        try {
          opened.push(secrets.open(sealed, placeOf(tenant, id)));
        } catch (error) {
          if (!(error instanceof SecretUnreadable)) throw error;
          unreadable ??= error;
        }
      }
      if (opened.length === 0 && unreadable) throw unreadable;
      return opened;
    },

    async rotate(tenant, id, { secret = newSecret(), overlapMs }) {
      const at = now();
      const next: SealedSecret = { sealed: seal(tenant, id, secret), createdAt: at };
      const there = await replace(tenant, id, 'secrets', (json) => {
        const older = parseSecrets(json)
          .map((one) => ({ ...one, until: Math.min(one.until ?? Number.POSITIVE_INFINITY, at + overlapMs) }))
          .filter(({ until }) => until > at);
        return JSON.stringify([next, ...older].slice(0, maxSecrets));
      });
      if (!there) throw notFound();
      return secret;
    },

    async reseal() {
      let resealed = 0;
      for (const tenant of await withRedis(() => redis.smembers(keys.tenants))) {
        for (const id of await withRedis(() => redis.smembers(keys.ids(tenant)))) {
          let done = 0;
          await replace(tenant, id, 'secrets', (json) => {
            done = 0;
            const next = parseSecrets(json).map((one) => {
              const sealed = secrets.isCurrent(one.sealed)
                ? undefined
                : sealedAnew(secrets, one.sealed, tenant, id);
              if (sealed === undefined) return one;
              done += 1;
              return { ...one, sealed };
            });
            return done === 0 ? undefined : JSON.stringify(next);
          });
          resealed += done;
        }
      }
      return resealed;
    },

    async setCursor(tenant, id, cursor) {
      await write(tenant, id, { set: { cursor } });
    },

    async addReplay(tenant, id, { after, until, types }) {
      const replayId = `rp_${base62(16)}`;
      const end = until ?? (await withRedis(() => redis.eval(newestScript, 1, keys.events(tenant))));
      const replay: Replay = replaySchema.parse({
        ...{ id: replayId, after, until: end },
        ...(types === undefined ? {} : { types }),
      });
      const there = await replace(tenant, id, 'replays', (json) => {
        const replays = parseReplays(json);
        if (replays.length >= maxReplays) {
          throw new ProblemError(
            'too_many_replays',
            `${maxReplays} ranges are being told again already; wait until one is done.`,
          );
        }
        return JSON.stringify([...replays, replay]);
      });
      if (!there) throw notFound();
      return replayId;
    },

    async setReplay(tenant, id, replayId, after) {
      await replace(tenant, id, 'replays', (json) => {
        const replays = parseReplays(json);
        if (!replays.some((replay) => replay.id === replayId)) return undefined;
        const next =
          after === undefined
            ? replays.filter((replay) => replay.id !== replayId)
            : replays.map((replay) => (replay.id === replayId ? { ...replay, after } : replay));
        return JSON.stringify(next);
      });
    },

    async addResends(tenant, id, resends) {
      if (resends.length === 0) return 0;
      const members = resends.flatMap((one) => [String(Number.parseInt(one.cursor, 10)), encodeResend(one)]);
      return withRedis(
        () =>
          redis.eval(
            resendScript,
            2,
            ...[keys.endpoint(tenant, id), keys.resend(tenant, id), String(maxResends)],
            // Not as arguments: Lua's unpack takes some thousands only.
            JSON.stringify(members),
          ) as Promise<number>,
      );
    },

    async resends(tenant, id, limit) {
      if (limit < 1) return [];
      const members = await withRedis(() => redis.zrange(keys.resend(tenant, id), '0', String(limit - 1)));
      return members.map((json) => resendSchema.parse(JSON.parse(json)));
    },

    async dropResends(tenant, id, resends) {
      if (resends.length === 0) return;
      await withRedis(() => redis.zrem(keys.resend(tenant, id), ...resends.map(encodeResend)));
    },

    async succeeded(tenant, id, at) {
      await withRedis(() => redis.eval(succeededScript, 1, keys.endpoint(tenant, id), String(at)));
    },

    async failed(tenant, id, at) {
      await withRedis(() => redis.eval(failedScript, 1, keys.endpoint(tenant, id), String(at)));
    },

    async recordAttempt(tenant, id, attempt) {
      await withRedis(() =>
        redis.eval(
          attemptScript,
          2,
          ...[keys.endpoint(tenant, id), keys.attempts(tenant, id)],
          ...[JSON.stringify(attempt), String(attemptsKept)],
        ),
      );
    },

    async attempts(tenant, id) {
      const list = await withRedis(() => redis.lrange(keys.attempts(tenant, id), 0, attemptsKept - 1));
      return list.map((json) => attemptSchema.parse(JSON.parse(json)));
    },

    async beginTest(tenant, id, orderId) {
      // Not over an outcome, should that be quicker.
      await withRedis(() => redis.set(keys.test(tenant, id, orderId), 'null', 'EX', testSeconds, 'NX'));
    },

    async endTest(tenant, id, orderId, outcome) {
      await withRedis(() =>
        redis.set(keys.test(tenant, id, orderId), JSON.stringify(outcome), 'EX', testSeconds),
      );
    },

    async test(tenant, id, orderId) {
      const json = await withRedis(() => redis.get(keys.test(tenant, id, orderId)));
      if (json === null) return undefined;
      return testOutcomeSchema.nullable().parse(JSON.parse(json)) ?? 'waiting';
    },

    async verified(tenant, id, { url, ...verification }) {
      const set: Fields = { verification: JSON.stringify(verification) };
      for (;;) {
        const [is, status] = await withRedis(() => redis.hmget(keys.endpoint(tenant, id), 'url', 'status'));
        if (is !== url) return;
        const enables = verification.ok && status === 'unverified';
        const result = await write(tenant, id, {
          expected: { url, status: status ?? '' },
          set: {
            ...set,
            ...(verification.ok ? { verifiedUrl: url } : {}),
            ...(enables ? { status: 'enabled' } : {}),
          },
          clear: enables ? ['disabledReason', 'failingSince'] : [],
        });
        if (result !== 'changed') return;
      }
    },

    async disable(tenant, id, reason, url) {
      for (;;) {
        const [is, status] = await withRedis(() => redis.hmget(keys.endpoint(tenant, id), 'url', 'status'));
        if (!is || status === 'disabled' || is !== (url ?? is)) return false;
        const result = await write(tenant, id, {
          expected: { url: is, status: status ?? '' },
          set: {
            status: 'disabled',
            disabledReason: reason,
            updatedAt: String(now()),
            ...(reason === 'operator' ? {} : { disabledUntold: String(now()) }),
          },
        });
        if (result !== 'changed') return result === 'done';
      }
    },

    async toldDisabled(tenant, id, disabledAt) {
      await write(tenant, id, {
        expected: { disabledUntold: String(disabledAt) },
        clear: ['disabledUntold'],
      });
    },

    async enable(tenant, id) {
      for (;;) {
        const { url, status, verifiedUrl } = await read(tenant, id);
        if (url === undefined) throw notFound();
        if (verifiedUrl !== url) {
          throw new ProblemError(
            'endpoint_unverified',
            'This endpoint has not proven yet that it is yours: let it answer the challenge, then verify it.',
          );
        }
        if (status === 'enabled') return existing(tenant, id);
        const result = await write(tenant, id, {
          expected: { url, status: status ?? '' },
          // Its failures are forgotten: else the next one would disable it at once.
          set: { status: 'enabled', updatedAt: String(now()) },
          clear: ['disabledReason', 'failingSince'],
        });
        if (result !== 'changed') return existing(tenant, id);
      }
    },
  };
}

/** Each endpoint has a queue of its own (prefix: `queuePrefix` of its name). */
export const endpointQueueName = (id: string) => `webhook-${id}`;

/** Whether an endpoint that names these types is told of this one. */
export function subscribes({ types }: Pick<Endpoint, 'types'>, type: EventType): boolean {
  return types.length === 0 ? type !== 'batch.progress' : types.includes(type);
}

/** What judges addresses: the egress guard. */
export interface AddressRules {
  opens(host: string, port: number): boolean;
  refusalOf(host: string, port?: number): unknown;
}

/**
 * The url of an endpoint, in its one spelling: https://, or http:// where EGRESS_ALLOW opens the very host and port.
 * A name is judged when it is looked up, at every delivery; an address here too.
 * @throws {ProblemError} url_not_allowed
 */
export function endpointUrl(text: string, guard: AddressRules): string {
  const refuse = (why: string) =>
    new ProblemError('url_not_allowed', `The URL of the endpoint ${why}.`, { field: 'url' });
  const url = URL.parse(text);
  if (url === null) throw refuse('is no URL');
  const { hostname, protocol } = url;
  if (protocol !== 'https:' && !(protocol === 'http:' && guard.opens(hostname, Number(url.port) || 80)))
    throw refuse('does not begin with https://');
  if (hasCredentials(text)) throw refuse('has a user or a password in it');
  if (text.includes('#')) throw refuse('has a fragment (#), which is never sent');
  if (hasOddPath(text)) throw refuse('has a path that can be read in more than one way');
  const port = Number(url.port) || (protocol === 'https:' ? 443 : 80);
  if (guard.refusalOf(hostname, port) !== undefined)
    throw refuse('leads to an address that is not on the public internet');
  return url.href;
}

/**
 * Whether a callback URL lies under an endpoint: of the same origin, its path equal or below at a '/'. Its query is its
 * own; credentials, a fragment, and paths that a server may read in another way lie under none.
 */
export function isUnder(endpoint: Pick<Endpoint, 'url'>, callbackUrl: string): boolean {
  const url = URL.parse(callbackUrl);
  const base = URL.parse(endpoint.url);
  if (url === null || base === null) return false;
  if (hasCredentials(callbackUrl) || callbackUrl.includes('#') || hasOddPath(callbackUrl)) return false;
  if (url.protocol !== base.protocol || url.host !== base.host) return false;
  const below = base.pathname.endsWith('/') ? base.pathname : `${base.pathname}/`;
  return url.pathname === base.pathname || url.pathname.startsWith(below);
}

/** Also an empty user, of which the parsed URL tells nothing. */
export function hasCredentials(url: string): boolean {
  const [, authority = ''] = /^[^:/?#]*:[\\/]*([^\\/?#]*)/.exec(url) ?? [];
  return authority.includes('@');
}

/**
 * Segments `.` and `..`, written as they may be, and what some servers take for a '/': each is resolved by someone on the
 * way. Tabs and line breaks are dropped by the URL parser, so that none stays in between.
 */
function hasOddPath(text: string): boolean {
  if (/[\s\\\p{Cc}]/u.test(text)) return true;
  const [, path = ''] = /^[^:/?#]*:\/*[^/?#]*([^?#]*)/.exec(text) ?? [];
  return (
    /%(2f|5c|00)/i.test(path) ||
    path.split('/').some((segment) => ['.', '..'].includes(segment.replace(/%2e/gi, '.').split(';')[0]!))
  );
}

/** Whole numbers and short texts; JSON where a field has a shape. */
function fromHash(tenant: string, id: string, hash: Readonly<Record<string, string>>): Endpoint {
  const numberOf = (field: string) => (hash[field] === undefined ? undefined : Number(hash[field]));
  const failingSince = numberOf('failingSince');
  const disabledUntold = numberOf('disabledUntold');
  const lastSuccessAt = numberOf('lastSuccessAt');
  const { description, disabledReason, cursor, verification } = hash;
  // Types of a newer version that this process does not know are nothing to it.
  const types = z.array(z.string()).parse(JSON.parse(hash['types'] ?? '[]'));
  return {
    ...{ tenant, id },
    url: hash['url']!,
    types: eventTypes.filter((type) => types.includes(type)),
    ...(description === undefined ? {} : { description }),
    maxInFlight: numberOf('maxInFlight')!,
    maxPerSecond: numberOf('maxPerSecond')!,
    status: z.enum(endpointStatuses).parse(hash['status']),
    ...(disabledReason === undefined
      ? {}
      : { disabledReason: z.enum(endpointDisabledReasons).parse(disabledReason) }),
    ...(disabledUntold === undefined ? {} : { disabledUntold }),
    ...(failingSince === undefined ? {} : { failingSince }),
    ...(lastSuccessAt === undefined ? {} : { lastSuccessAt }),
    ...(cursor === undefined ? {} : { cursor }),
    replays: parseReplays(hash['replays'] ?? null),
    ...(verification === undefined
      ? {}
      : { verification: verificationSchema.parse(JSON.parse(verification)) as EndpointVerification }),
    secrets: parseSecrets(hash['secrets'] ?? null).map(({ createdAt, until }) =>
      until === undefined ? { createdAt } : { createdAt, until },
    ),
    createdAt: numberOf('createdAt')!,
    updatedAt: numberOf('updatedAt')!,
  };
}

const parseSecrets = (json: string | null): SealedSecret[] =>
  z.array(sealedSecretSchema).parse(JSON.parse(json ?? '[]'));
const parseReplays = (json: string | null): Replay[] => z.array(replaySchema).parse(JSON.parse(json ?? '[]'));

/** Always alike: it is found again by it. */
function encodeResend({ cursor, eventId, url, day }: Resend): string {
  return JSON.stringify({ cursor, eventId, url, day });
}

const placeOf = (tenant: string, id: string) => ({ tenant, name: `endpoint:${id}` });

/** @returns undefined for what no key of this process opens: its tenant must rotate it. */
function sealedAnew(secrets: Secrets, sealed: string, tenant: string, id: string): string | undefined {
  try {
    return secrets.seal(secrets.open(sealed, placeOf(tenant, id)), placeOf(tenant, id));
  } catch (error) {
    if (error instanceof SecretUnreadable) return undefined;
    throw error;
  }
}

const secretPrefix = 'whsec_';

function newSecret(): string {
  return secretPrefix + randomBytes(32).toString('base64');
}

/** Standard Webhooks: 24 to 64 bytes. Canonical, since libraries decode what is not in different ways. */
function isSecret(text: string): boolean {
  if (!text.startsWith(secretPrefix)) return false;
  const base64 = text.slice(secretPrefix.length);
  const bytes = Buffer.from(base64, 'base64');
  return bytes.length >= 24 && bytes.length <= 64 && bytes.toString('base64') === base64;
}

const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789';
const base62 = (length: number) =>
  Array.from({ length }, () => alphabet[randomInt(alphabet.length)]).join('');
/** 131 bits: who does not know an id does not guess it. */
const newId = () => `ep_${base62(22)}`;

const notFound = () => new ProblemError('endpoint_not_found', 'There is no endpoint with this id.');
const taken = (url: string) =>
  new ProblemError(
    'endpoint_exists',
    `An endpoint with the URL ${url.slice(0, 200)} is registered already: change that one.`,
    { field: 'url' },
  );

/** Whether another endpoint has this url: part of a step, since two may be registered at once. */
const takenLua = `
local function taken(ids, prefix, id, url)
  for _, other in ipairs(redis.call('SMEMBERS', ids)) do
    if other ~= id and redis.call('HGET', prefix .. other, 'url') == url then return true end
  end
  return false
end`;

/**
 * The newest event's cursor. By what the stream has given last, not by what is in it: it may have been trimmed. A tenant
 * without a stream has no events: just before now, since the next event's id begins with the server's time.
 */
const newestLua = `
local function newest(stream)
  if redis.call('EXISTS', stream) == 1 then
    local info = redis.call('XINFO', 'STREAM', stream)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then return info[i + 1] end
    end
  end
  local time = redis.call('TIME')
  return string.format('%.0f-0', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) - 1)
end`;

const newestScript = `${newestLua}
return newest(KEYS[1])`;

const createScript = `${takenLua}${newestLua}
if taken(KEYS[2], ARGV[2], ARGV[3], cjson.decode(ARGV[1]).url) then return 'taken' end
if redis.call('SCARD', KEYS[2]) >= tonumber(ARGV[4]) then return 'full' end
for field, value in pairs(cjson.decode(ARGV[1])) do redis.call('HSET', KEYS[1], field, value) end
local cursor = newest(KEYS[3])
redis.call('HSET', KEYS[1], 'cursor', cursor)
redis.call('SADD', KEYS[2], ARGV[3])
return cursor`;

const writeScript = `${takenLua}
if redis.call('EXISTS', KEYS[1]) == 0 then return 'missing' end
local step = cjson.decode(ARGV[1])
for field, value in pairs(step.expected) do
  if (redis.call('HGET', KEYS[1], field) or '') ~= value then return 'changed' end
end
if step.url and taken(KEYS[2], ARGV[2], ARGV[3], step.url) then return 'taken' end
for _, field in ipairs(step.clear) do redis.call('HDEL', KEYS[1], field) end
for field, value in pairs(step.set) do redis.call('HSET', KEYS[1], field, value) end
return 'done'`;

/** Writes only what changes: at most once a second while all is well. */
const succeededScript = `
if redis.call('EXISTS', KEYS[1]) == 0 then return end
local at = tonumber(ARGV[1])
local last = tonumber(redis.call('HGET', KEYS[1], 'lastSuccessAt') or 0)
local since = tonumber(redis.call('HGET', KEYS[1], 'failingSince') or nil)
local recovers = since and since <= at
if recovers then redis.call('HDEL', KEYS[1], 'failingSince') end
if at >= last + 1000 or (recovers and at > last) then redis.call('HSET', KEYS[1], 'lastSuccessAt', ARGV[1]) end`;

/** Attempts end out of order: one that failed before the last success begins nothing. */
const failedScript = `
if redis.call('EXISTS', KEYS[1]) == 0 then return end
if tonumber(redis.call('HGET', KEYS[1], 'lastSuccessAt') or -1) >= tonumber(ARGV[1]) then return end
redis.call('HSETNX', KEYS[1], 'failingSince', ARGV[1])`;

const attemptScript = `
if redis.call('EXISTS', KEYS[1]) == 0 then return end
redis.call('LPUSH', KEYS[2], ARGV[1])
redis.call('LTRIM', KEYS[2], 0, tonumber(ARGV[2]) - 1)`;

const resendScript = `
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local members = cjson.decode(ARGV[2])
local waiting = redis.call('ZCARD', KEYS[2])
local room = tonumber(ARGV[1])
for i = 1, #members, 2 do
  if not redis.call('ZSCORE', KEYS[2], members[i + 1]) then
    if waiting >= room then return (i - 1) / 2 end
    redis.call('ZADD', KEYS[2], members[i], members[i + 1])
    waiting = waiting + 1
  end
end
return #members / 2`;
