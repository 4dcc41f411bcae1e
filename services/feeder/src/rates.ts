/** How fast a batch goes on, for those who wait for its end. */
import type { BatchRecord } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';

const everyMs = 2_000;
/** After this long an old speed counts for a third (1/e). */
const memoryMs = 20_000;
/** Issue no more news than this: a batch of a million rows may run for days. */
const tellMs = 60_000;

interface Sample {
  at: number;
  ended: number;
  rate: number | undefined;
  toldAt: number;
}

export function createRates(batches: Pick<BatchRecords, 'progress'>) {
  const samples = new Map<string, Sample>();
  return {
    /** @param running all batches that run now; others are forgotten. */
    async measure(running: readonly BatchRecord[], now = Date.now()): Promise<void> {
      for (const id of samples.keys()) if (!running.some((batch) => batch.id === id)) samples.delete(id);
      for (const batch of running) {
        const ended = batch.completed + batch.failed;
        const last = samples.get(batch.id);
        if (last === undefined) samples.set(batch.id, { at: now, ended, rate: batch.rate, toldAt: now });
        else if (now - last.at >= everyMs) {
          const seconds = (now - last.at) / 1_000;
          // A retry takes endings back.
          const speed = Math.max(0, ended - last.ended) / seconds;
          const old = Math.exp(-(now - last.at) / memoryMs);
          const rate = last.rate === undefined ? speed : old * last.rate + (1 - old) * speed;
          const tell = now - last.toldAt >= tellMs;
          samples.set(batch.id, { at: now, ended, rate, toldAt: tell ? now : last.toldAt });
          await batches.progress(batch, { rate: Math.round(rate * 1_000) / 1_000, tell });
        }
      }
    },
  };
}
