/** Batches that have had their time: their objects go, what remains is the date. */
import type { AnswerIndex } from '@acousticsense/shared/answer-index';
import { type BatchRecord, isEnded } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { batchesPrefix, batchPrefix } from '@acousticsense/shared/object-keys';
import { deletePrefix, type Storage } from '@acousticsense/shared/storage';
import type { Logger } from 'pino';
import { createErrands } from './errands.ts';
import { readStoredBatch } from './stored-batch.ts';

export interface RetentionDeps {
  readonly records: Pick<JobRecords, 'tenants'>;
  readonly batches: BatchRecords;
  readonly storage: Storage;
  readonly index: Pick<AnswerIndex, 'writeTombstone' | 'compact'>;
  readonly log: Logger;
  readonly signal: AbortSignal;
  readonly resultRetentionMs: number;
  /** Rows of ended batches that a tenant may have stored; 0: any number. */
  readonly resultsKept: number;
}

const hour = 3_600_000;
/** A batch that nobody knows, of which only objects are left. */
const orphanMs = 24 * hour;
/** After a start: another process may have been at it a minute ago. */
const firstMs = 5 * 60_000;

export type Retention = ReturnType<typeof createRetention>;

export function createRetention(deps: RetentionDeps) {
  const { records, batches, storage, index, log, resultRetentionMs, resultsKept } = deps;
  const errands = createErrands('retention', 1, log, deps.signal);
  let nextAt = performance.now() + firstMs;

  /** Once an hour, beside the feeding. */
  function maybe(): void {
    if (performance.now() < nextAt) return;
    errands.run('sweep', async () => {
      await sweep();
      nextAt = performance.now() + hour;
    });
  }

  /**
   * @param now epoch milliseconds.
   * @returns the batches that were deleted.
   */
  async function sweep(now = Date.now()): Promise<string[]> {
    const deleted: string[] = [];
    const ended = new Map<string, BatchRecord[]>();
    for (const { tenant, id, youngest } of await stored()) {
      const ref = { tenant, id };
      const batch = (await batches.get(ref)) ?? (await readStoredBatch(storage, tenant, id));
      const deletedAt = await batches.deletedAt(ref);
      const isOrphan = batch === undefined && now - youngest > orphanMs;
      // Of one that is deleted already, whoever was at it did not come to the end.
      if (deletedAt !== undefined || isOrphan) {
        if (await remove(tenant, id, deletedAt ?? now)) deleted.push(id);
      } else if (batch && isEnded(batch.state)) ended.set(tenant, [...(ended.get(tenant) ?? []), batch]);
    }
    for (const [tenant, all] of ended) {
      all.sort((a, b) => (b.endedAt ?? 0) - (a.endedAt ?? 0));
      let rows = 0;
      for (const { id, endedAt = now, ...batch } of all) {
        rows += batch.rows;
        const isOld = now - endedAt > resultRetentionMs;
        const isTooMany = resultsKept > 0 && rows > resultsKept;
        if ((isOld || isTooMany) && (await remove(tenant, id, now))) deleted.push(id);
      }
    }
    for (const tenant of await records.tenants()) await index.compact(tenant);
    if (deleted.length > 0) log.info({ batches: deleted.length }, 'past their retention: deleted');
    return deleted;
  }

  /** The batches of which objects are stored. */
  async function stored(): Promise<Iterable<{ tenant: string; id: string; youngest: number }>> {
    const found = new Map<string, { tenant: string; id: string; youngest: number }>();
    for await (const { key, lastModified } of storage.list(batchesPrefix)) {
      const [, , tenant, id] = key.split('/');
      if (!tenant || !id) continue;
      const youngest = Math.max(found.get(id)?.youngest ?? 0, lastModified.getTime());
      found.set(id, { tenant, id, youngest });
    }
    return found.values();
  }

  /**
   * First the step that decides: from then on nobody finds the batch. The tombstone lets nobody find its results; what
   * of its objects a process that dies here leaves, the next sweep deletes.
   * @returns false for a batch that is being tried again.
   */
  async function remove(tenant: string, id: string, deletedAt: number): Promise<boolean> {
    if ((await batches.remove({ tenant, id }, deletedAt)).outcome === 'refused') return false;
    await index.writeTombstone(tenant, id, deletedAt);
    await deletePrefix(storage, batchPrefix(tenant, id));
    return true;
  }

  return { maybe, sweep, settle: errands.settle };
}
