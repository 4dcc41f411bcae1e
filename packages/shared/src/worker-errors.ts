/** What a queue worker does about Redis's own refusals, and how often it speaks of them. */
import type { Worker } from 'bullmq';
import type { Logger } from 'pino';

const restMs = 1_000;
const sameWordsMs = 60_000;

/**
 * Logs a worker's errors, the same words once a minute, and lets it rest where Redis answers but takes nothing (full, a
 * replica, its disk fails): BullMQ waits between attempts to connect only, and would ask thousands of times a second.
 *
 * @param rest instead of a pause of a second.
 */
export function heedErrors(worker: Worker, log: Logger, rest: () => void = () => restAWhile(worker)): void {
  const said = new Map<string, number>();
  worker.on('error', (error) => {
    // The rest of it differs from script to script.
    const words = error.message.split(' script: ')[0]!;
    const now = performance.now();
    if (now - (said.get(words) ?? -Infinity) > sameWordsMs) {
      if (said.size > 100) said.clear();
      said.set(words, now);
      log.warn({ err: error }, 'queue worker');
    }
    if (/^(OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|LOADING|NOPERM|CLUSTERDOWN)\b/.test(words)) rest();
  });
}

const resting = new WeakSet<Worker>();

function restAWhile(worker: Worker): void {
  if (resting.has(worker)) return;
  resting.add(worker);
  void worker.pause(true);
  setTimeout(() => {
    resting.delete(worker);
    if (worker.closing === undefined) void worker.resume();
  }, restMs).unref();
}
