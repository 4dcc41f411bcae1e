/**
 * Work that goes on beside the feeding: one at a time under each name, a few at a time in all. What fails is tried again
 * whenever it is asked for, at first soon, then more and more seldom.
 */
import type { Logger } from 'pino';

export interface Errands {
  /** Begins it, unless it is under way, has failed just now, or too many are under way. */
  run(name: string, work: () => Promise<void>): void;
  /** Waits for what is under way. */
  settle(): Promise<void>;
}

const firstRetryMs = 500;
const lastRetryMs = 60_000;

/**
 * @param what it is, for the log.
 * @param most at a time.
 */
export function createErrands(what: string, most: number, log: Logger, signal: AbortSignal): Errands {
  const running = new Map<string, Promise<void>>();
  const failures = new Map<string, { times: number; nextAt: number }>();
  return {
    run(name, work) {
      const now = performance.now();
      const failed = failures.get(name);
      if (running.has(name) || running.size >= most || signal.aborted || (failed?.nextAt ?? 0) > now) return;
      const done = work()
        .then(
          () => void failures.delete(name),
          (error) => {
            if (signal.aborted) return;
            const times = (failed?.times ?? 0) + 1;
            const waitMs = Math.min(lastRetryMs, firstRetryMs * 2 ** (times - 1));
            failures.set(name, { times, nextAt: performance.now() + waitMs });
            log.warn({ err: error, what, name, times, waitMs }, 'not done; trying again');
            // Those that nobody asks for any more.
            for (const [other, { nextAt }] of failures)
              if (nextAt < now - 10 * lastRetryMs) failures.delete(other);
          },
        )
        .finally(() => running.delete(name));
      running.set(name, done);
    },
    async settle() {
      await Promise.all(running.values());
    },
  };
}
