/**
 * What a tenant may do: requests a minute, accepted rows and uploaded bytes a day, open jobs. The service's own
 * limits hold for every tenant whose settings say nothing else; 0 is no limit. Counted in Redis: all API processes
 * together keep to them.
 *
 * A minute and a day begin with the first request or row that they count, and end as a whole.
 */
import { ProblemError } from '@acousticsense/shared/errors';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { withRedis } from '@acousticsense/shared/redis';
import type { Tenants } from '@acousticsense/shared/tenants';
import type { RequestHandler } from 'express';
import type { Redis } from 'ioredis';
import { RateLimiterRedis, RateLimiterRes } from 'rate-limiter-flexible';
import { tenantOf } from './access.ts';

export interface LimitsDeps {
  readonly redis: Redis;
  readonly tenants: Tenants;
  readonly records: Pick<JobRecords, 'countOpen' | 'countEvents'>;
  /** 0: none. */
  readonly requestsPerMinute: number;
  readonly rowsPerDay: number;
  readonly bytesPerDay: number;
  readonly maxOpenJobs: number;
  /** Of a tenant, in Redis: kept there on purpose, and waiting to be put away. */
  readonly eventsWaitingMost: number;
}

/** Part of a tenant's day. */
export interface Charge {
  /** Accepted jobs and rows of batches. */
  readonly rows?: number;
  /** Uploaded. */
  readonly bytes?: number;
}

export interface Limits {
  /** Counts a request. @throws {ProblemError} rate_limited */
  countRequest(tenant: string): Promise<void>;
  /**
   * Whether a charge would fit now, before its bytes are received; nothing is charged.
   * @throws {ProblemError} quota_exceeded
   */
  foresee(tenant: string, charge: Charge): Promise<void>;
  /** Charges all of it or nothing. @throws {ProblemError} quota_exceeded */
  charge(tenant: string, charge: Charge): Promise<void>;
  /** Gives back what was charged for something that did not come about. */
  refund(tenant: string, charge: Charge): Promise<void>;
  /** @throws {ProblemError} too_busy */
  refuseWhenFull(tenant: string): Promise<void>;
}

/**
 * Instead of the library's own script, which counts what it refuses too: a batch that did not fit would use up the
 * day of those that would. KEYS[1] counter; ARGV: amount (negative gives back), seconds, limit.
 * Every limiter on a connection runs the script of the last one that was made, so this one is for all of them.
 */
const countWhatFits = `
local used, amount, limit = tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[1]), tonumber(ARGV[3])
if amount > 0 and used + amount > limit then return { limit + 1, redis.call('PTTL', KEYS[1]) } end
if amount < 0 then
  if used == 0 then return { 0, -2 } end
  if used + amount < 0 then amount = -used end
end
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[1], 0, 'EX', ARGV[2]) end
return { redis.call('INCRBY', KEYS[1], string.format('%.0f', amount)), redis.call('PTTL', KEYS[1]) }
`;

const kinds = {
  requests: { seconds: 60, code: 'rate_limited', says: (n: number) => `${n} requests a minute` },
  rows: { seconds: 86_400, code: 'quota_exceeded', says: (n: number) => `${n} songs a day` },
  bytes: { seconds: 86_400, code: 'quota_exceeded', says: (n: number) => `${n} uploaded bytes a day` },
} as const;
type Kind = keyof typeof kinds;

const fullRetrySeconds = 30;

export function createLimits(deps: LimitsDeps): Limits {
  const { redis, tenants } = deps;
  const limiters = new Map<string, RateLimiterRedis>();

  /** A limiter is only a view of the counter: those of one kind with different limits share it. */
  function limiterOf(kind: Kind, limit: number): RateLimiterRedis {
    const id = `${kind}/${limit}`;
    const known = limiters.get(id);
    if (known) return known;
    const made = new RateLimiterRedis({
      storeClient: redis,
      keyPrefix: '',
      points: limit,
      duration: kinds[kind].seconds,
      customIncrTtlLuaScript: countWhatFits,
    });
    limiters.set(id, made);
    return made;
  }

  const keyOf = (tenant: string, kind: Kind) => `as:{${tenant}}:used:${kind}`;

  async function limitOf(tenant: string, kind: Kind): Promise<number> {
    const settings = await tenants.getTenant(tenant);
    const name = { requests: 'requestsPerMinute', rows: 'rowsPerDay', bytes: 'bytesPerDay' } as const;
    return settings?.[name[kind]] ?? deps[name[kind]];
  }

  async function consume(tenant: string, kind: Kind, amount: number): Promise<void> {
    const limit = await limitOf(tenant, kind);
    if (limit === 0 || amount === 0) return;
    try {
      await withRedis(() => limiterOf(kind, limit).consume(keyOf(tenant, kind), amount));
    } catch (error) {
      if (error instanceof RateLimiterRes) throw refusal(tenant, kind, limit, amount, error.msBeforeNext);
      throw error;
    }
  }

  async function giveBack(tenant: string, kind: Kind, amount: number): Promise<void> {
    const limit = await limitOf(tenant, kind);
    if (limit === 0 || amount === 0) return;
    await withRedis(() => limiterOf(kind, limit).reward(keyOf(tenant, kind), amount));
  }

  async function look(tenant: string, kind: Kind, amount: number): Promise<void> {
    const limit = await limitOf(tenant, kind);
    if (limit === 0 || amount === 0) return;
    const state = await withRedis(() => limiterOf(kind, limit).get(keyOf(tenant, kind)));
    if (amount > (state?.remainingPoints ?? limit)) {
      throw refusal(tenant, kind, limit, amount, state?.msBeforeNext ?? 0);
    }
  }

  return {
    countRequest: (tenant) => consume(tenant, 'requests', 1),

    async foresee(tenant, { rows = 0, bytes = 0 }) {
      await look(tenant, 'rows', rows);
      await look(tenant, 'bytes', bytes);
    },

    async charge(tenant, { rows = 0, bytes = 0 }) {
      await consume(tenant, 'rows', rows);
      try {
        await consume(tenant, 'bytes', bytes);
      } catch (error) {
        await giveBack(tenant, 'rows', rows);
        throw error;
      }
    },

    async refund(tenant, { rows = 0, bytes = 0 }) {
      await giveBack(tenant, 'rows', rows);
      await giveBack(tenant, 'bytes', bytes);
    },

    async refuseWhenFull(tenant) {
      if ((await deps.records.countEvents(tenant)) > deps.eventsWaitingMost) {
        throw new ProblemError(
          'too_busy',
          'The events of earlier jobs have not been put away yet, and none may be lost; send this one later.',
          { retryAfter: fullRetrySeconds },
        );
      }
      const most = (await tenants.getTenant(tenant))?.openJobs ?? deps.maxOpenJobs;
      if ((await deps.records.countOpen(tenant)) < most) return;
      throw new ProblemError(
        'too_busy',
        `${most} jobs of the tenant ${tenant} are under way, the most that may be at a time; send this one later.`,
        { retryAfter: fullRetrySeconds },
      );
    },
  };
}

function refusal(tenant: string, kind: Kind, limit: number, amount: number, ms: number): ProblemError {
  const { code, says } = kinds[kind];
  // It would be refused on any day: no time is named after which to try again.
  if (amount > limit) {
    return new ProblemError(
      code,
      `The tenant ${tenant} may have ${says(limit)}, and this request alone is ${amount}: send less, or ask the operator for a larger quota.`,
    );
  }
  return new ProblemError(code, `The tenant ${tenant} has used up its ${says(limit)}; try again later.`, {
    retryAfter: Math.max(1, Math.ceil(ms / 1_000)),
  });
}

/** Counts what asks the API for something; the page's own files are free. */
export function limitRequests(limits: Limits): RequestHandler {
  return async (request, response, next) => {
    if (/^\/(v1|api)\//i.test(request.path)) await limits.countRequest(tenantOf(response));
    next();
  };
}
