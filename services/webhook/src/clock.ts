/** The time by which messages are signed, retried and given up; three days pass in seconds under {@link fastClock}. */
export interface Clock {
  /** ms since 1970. */
  now(): number;
  /** Real milliseconds that `ms` of this clock take. */
  realMs(ms: number): number;
}

export const systemClock: Clock = { now: Date.now, realMs: (ms) => ms };

/** Begins now and runs `factor` times as fast. */
export function fastClock(factor: number): Clock {
  const from = Date.now();
  return {
    now: () => from + (Date.now() - from) * factor,
    realMs: (ms) => ms / factor,
  };
}
