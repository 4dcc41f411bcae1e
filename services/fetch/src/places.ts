/**
 * Who may read now: so many downloads in all, so many at one host, none at a host that asked to be left alone.
 * Those who wait hold no connection; one whose host has room passes those whose host has none.
 */

export interface Places {
  /** Resolves when there is room; disposing of the place gives it back. @throws the signal's reason. */
  take(host: string, signal: AbortSignal): Promise<Disposable>;
  /** Nobody is let in at this host for so long (HTTP's Retry-After). */
  rest(host: string, milliseconds: number): void;
}

interface Waiter {
  readonly host: string;
  enter(): void;
}

/** A host that asks for more is asked again after this long. */
const longestRestMs = 60_000;

export function createPlaces({ total, perHost }: { total: number; perHost: number }): Places {
  const taken = new Map<string, number>();
  const resting = new Map<string, NodeJS.Timeout>();
  let waiting: Waiter[] = [];
  let inAll = 0;

  const hasRoom = (host: string) => inAll < total && (taken.get(host) ?? 0) < perHost && !resting.has(host);

  function letIn(): void {
    waiting = waiting.filter((waiter) => {
      if (!hasRoom(waiter.host)) return true;
      waiter.enter();
      return false;
    });
  }

  function enter(host: string): Disposable {
    inAll += 1;
    taken.set(host, (taken.get(host) ?? 0) + 1);
    let left = false;
    return {
      [Symbol.dispose]() {
        if (left) return;
        left = true;
        inAll -= 1;
        const rest = taken.get(host)! - 1;
        if (rest > 0) taken.set(host, rest);
        else taken.delete(host);
        letIn();
      },
    };
  }

  return {
    take(host, signal) {
      signal.throwIfAborted();
      const { promise, resolve, reject } = Promise.withResolvers<Disposable>();
      const leave = () => {
        waiting = waiting.filter((other) => other !== waiter);
        reject(signal.reason);
      };
      const waiter: Waiter = {
        host,
        enter() {
          signal.removeEventListener('abort', leave);
          resolve(enter(host));
        },
      };
      signal.addEventListener('abort', leave, { once: true });
      waiting.push(waiter);
      letIn();
      return promise;
    },

    rest(host, milliseconds) {
      clearTimeout(resting.get(host));
      const timer = setTimeout(
        () => {
          resting.delete(host);
          letIn();
        },
        Math.min(milliseconds, longestRestMs),
      );
      timer.unref();
      resting.set(host, timer);
    },
  };
}
