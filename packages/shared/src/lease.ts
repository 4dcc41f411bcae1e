/**
 * A lease in Redis: of many processes one works at a time. It saves work that would be done twice; nothing may
 * rely on it for being right, since a process can be held up beyond its lease and go on.
 */
import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { withRedis } from './redis.ts';

export interface Lease {
  /** Takes or renews it. @returns whether this process holds it now, for `ms` from here. */
  hold(): Promise<boolean>;
  /** So that another need not wait. */
  release(): Promise<void>;
}

const renew = `
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1`;
const give = `if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0`;

export function createLease(redis: Redis, key: string, ms: number): Lease {
  const me = randomUUID();
  return {
    hold: async () => (await withRedis(() => redis.eval(renew, 1, key, me, ms))) === 1,
    async release() {
      await withRedis(() => redis.eval(give, 1, key, me));
    },
  };
}
