/**
 * A lease in Redis: of many processes one works at a time. It saves work that would be done twice; nothing may
 * rely on it for being right, since a process can be held up beyond its lease and go on.
 */
import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import { pause } from './pause.ts';
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

export interface KeptLease {
  /** Whether this process may take itself for the one that works. */
  isHeld(): boolean;
  /** Settles once the signal is aborted and the lease is given back. */
  readonly ended: Promise<void>;
}

const leaseMs = 10_000;
const renewMs = 2_000;

/**
 * Takes a lease whenever it is free and renews it, beside the work, so that a long round does not lose it.
 * @param onTaken before this process takes itself for the holder, after a time in which another may have been it.
 */
export function keepLease({
  redis,
  key,
  log,
  signal,
  onTaken = () => {},
}: {
  redis: Redis;
  key: string;
  log: Pick<Logger, 'warn'>;
  signal: AbortSignal;
  onTaken?: () => void;
}): KeptLease {
  const lease = createLease(redis, key, leaseMs);
  let heldUntil = 0;
  const isHeld = () => performance.now() < heldUntil;

  async function keep(): Promise<void> {
    while (!signal.aborted) {
      const from = performance.now();
      try {
        const held = await lease.hold();
        if (held && !isHeld()) onTaken();
        heldUntil = held ? from + leaseMs : 0;
      } catch (error) {
        log.warn({ err: error, key }, 'the lease could not be renewed');
      }
      await pause(renewMs, signal);
    }
    if (isHeld()) await lease.release().catch(() => {});
    heldUntil = 0;
  }
  return { isHeld, ended: keep() };
}
