/**
 * How long a download is waited for: never longer than `idleMs` at a time, and in all no longer than a fixed time
 * plus some for each megabyte that has COME. What a server declares buys no time, so one that trickles ends soon.
 * Only waiting for the network counts: time in our own storage is not the server's fault.
 */
import { ProblemError } from '@acousticsense/shared/errors';

export interface PatienceLimits {
  readonly idleMs: number;
  readonly budgetBaseMs: number;
  readonly budgetPerMegabyteMs: number;
}

export interface Patience {
  /** Waits for `work`; when it takes too long, `connection` is aborted with the `fetch_timeout` that says why. */
  wait<T>(work: Promise<T>, connection: AbortController): Promise<T>;
  received(bytes: number): void;
  /** Nothing is left: trying again would not help. */
  readonly isOver: boolean;
}

const megabyte = 1_000_000;

export function createPatience({ idleMs, budgetBaseMs, budgetPerMegabyteMs }: PatienceLimits): Patience {
  let waited = 0;
  let bytes = 0;
  let over = false;
  const left = () => budgetBaseMs + (bytes / megabyte) * budgetPerMegabyteMs - waited;

  return {
    async wait(work, connection) {
      const remaining = left();
      const giveUp = () => {
        over = remaining <= idleMs;
        connection.abort(
          over
            ? tooLong(`gave ${bytes} bytes in ${seconds(waited + remaining)}, which is too slow`)
            : tooLong(`sent nothing for ${seconds(idleMs)}`),
        );
      };
      // A timer takes a millisecond at least: bytes that trickle faster than that must not pass it for ever.
      if (remaining <= 0) giveUp();
      const timer = setTimeout(giveUp, Math.max(0, Math.min(idleMs, remaining)));
      const from = performance.now();
      try {
        return await work;
      } finally {
        clearTimeout(timer);
        waited += performance.now() - from;
      }
    },
    received(more) {
      bytes += more;
    },
    get isOver() {
      return over;
    },
  };
}

const seconds = (milliseconds: number) => `${Math.round(milliseconds / 100) / 10} s`;
const tooLong = (what: string) => new ProblemError('fetch_timeout', `The server of this URL ${what}.`);
