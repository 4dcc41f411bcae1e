/**
 * One writer at a time for an upload, whichever API process it talks to.
 *
 * A client that was cut comes back before its old connection is known to be dead, perhaps to another process. Who
 * wants the lock says so, and the holder lets go as soon as what it has received is stored. A holder that was killed
 * holds on until its time is over ({@link ttlMs}).
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { ProblemError } from '@acousticsense/shared/errors';
import { withRedis } from '@acousticsense/shared/redis';
import type { Lock, Locker, RequestRelease } from '@tus/server';
import type { Redis } from 'ioredis';

const ttlMs = 10_000;
const renewMs = 500;
const pollMs = 100;
const patienceMs = 30_000;

/** KEYS: lock, wanted. ARGV: token, ttl. */
const renewScript = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'lost' end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('EXISTS', KEYS[2]) == 1 and 'wanted' or 'held'`;
const releaseScript = `
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end`;

export interface UploadLocks extends Locker {
  /**
   * Runs with the lock; whoever holds it is asked to let go.
   * @throws {ProblemError} unavailable: it was not let go in time.
   */
  run<T>(id: string, operation: () => Promise<T>): Promise<T>;
  /** Runs with the lock if nobody holds it. @returns whether it ran. */
  tryRun(id: string, operation: () => Promise<void>): Promise<boolean>;
}

/** In the form in which the tus library tells errors; clients try again on 423. */
const locked = { status_code: 423, body: 'Another request is writing to this upload\n' } as const;

/** An id is `<tenant>/<upload id>`. */
export function createUploadLocks(redis: Redis): UploadLocks {
  function newLock(id: string) {
    const [tenant, upload] = id.split('/');
    const lockKey = `as:{${tenant}}:upload-lock:${upload}`;
    const wantedKey = `${lockKey}:wanted`;
    const token = randomUUID();
    let timer: NodeJS.Timeout | undefined;

    async function take(): Promise<boolean> {
      return (await withRedis(() => redis.set(lockKey, token, 'PX', ttlMs, 'NX'))) !== null;
    }

    /** Goes on holding it; tells once when somebody wants it, or when it may have been lost. */
    function hold(requestRelease: RequestRelease): void {
      let told = false;
      let renewedAt = performance.now();
      const renew = async () => {
        const state = await redis
          .eval(renewScript, 2, lockKey, wantedKey, token, ttlMs)
          .catch(() => (performance.now() - renewedAt > ttlMs / 2 ? 'lost' : 'unknown'));
        if (state === 'held' || state === 'wanted') renewedAt = performance.now();
        if ((state === 'wanted' || state === 'lost') && !told) {
          told = true;
          await requestRelease();
        }
        if (timer !== undefined) timer = setTimeout(() => void renew(), renewMs);
      };
      timer = setTimeout(() => void renew(), renewMs);
    }

    async function lock(stop: AbortSignal, requestRelease: RequestRelease): Promise<void> {
      const until = performance.now() + patienceMs;
      while (!(await take())) {
        if (stop.aborted || performance.now() > until) throw locked;
        await withRedis(() => redis.set(wantedKey, '1', 'PX', 10 * pollMs));
        await sleep(pollMs);
      }
      hold(requestRelease);
    }

    async function unlock(): Promise<void> {
      clearTimeout(timer);
      timer = undefined;
      // Redis is away: the lock ends by itself.
      await redis.eval(releaseScript, 2, lockKey, wantedKey, token).catch(() => {});
    }
    return { take, hold, lock, unlock };
  }

  return {
    newLock(id): Lock {
      return newLock(id);
    },
    async run(id, operation) {
      const lock = newLock(id);
      // What runs here is short: it is not interrupted.
      await lock
        .lock(new AbortController().signal, () => {})
        .catch((error) => {
          if (error !== locked) throw error;
          throw new ProblemError(
            'unavailable',
            'Another request is writing to this upload; try again in a moment.',
            { retryAfter: 2 },
          );
        });
      return operation().finally(lock.unlock);
    },
    async tryRun(id, operation) {
      const lock = newLock(id);
      if (!(await lock.take())) return false;
      lock.hold(() => {});
      await operation().finally(lock.unlock);
      return true;
    },
  };
}
