import { setTimeout } from 'node:timers/promises';

/** Waits `ms`, or until the signal is aborted, and never throws. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await setTimeout(ms, undefined, { signal }).catch(() => {});
}
