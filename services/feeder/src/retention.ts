/** Batches that have had their time: their objects go, what remains is the date. */
import type { AnswerIndex } from '@acousticsense/shared/answer-index';
import { type BatchRecord, batchRecordSchema, isEnded } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { batchesPrefix, batchKey, batchPrefix } from '@acousticsense/shared/object-keys';
import { deletePrefix, ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Logger } from 'pino';

export interface RetentionDeps {
  readonly records: Pick<JobRecords, 'tenants'>;
  readonly batches: BatchRecords;
  readonly storage: Storage;
  readonly index: Pick<AnswerIndex, 'writeTombstone' | 'compact'>;
  readonly log: Logger;
  readonly resultRetentionMs: number;
  /** Rows of ended batches that a tenant may have stored; 0: any number. */
  readonly resultsKept: number;
}

const hour = 3_600_000;
/** A batch that nobody knows, of which only objects are left. */
const orphanMs = 24 * hour;

export function createRetention(deps: RetentionDeps) {
  const { records, batches, storage, index, log, resultRetentionMs, resultsKept } = deps;
  let lastAt = Date.now();
  let running: Promise<void> | undefined;

  /** Once an hour, beside the feeding. */
  async function maybe(): Promise<void> {
    if (running !== undefined || Date.now() - lastAt < hour) return;
    lastAt = Date.now();
    running = sweep()
      .then(() => undefined)
      .catch((error) => log.warn({ err: error }, 'retention of batches'))
      .finally(() => {
        running = undefined;
      });
  }

  /** @returns the batches that were deleted. */
  async function sweep(now = Date.now()): Promise<string[]> {
    const deleted: string[] = [];
    const ended = new Map<string, BatchRecord[]>();
    for await (const { tenant, id, youngest } of stored()) {
      const batch = await read(tenant, id);
      if (batch === undefined) {
        if (now - youngest <= orphanMs || (await batches.get({ tenant, id }))) continue;
        await remove(tenant, id, now);
        deleted.push(id);
      } else if (isEnded(batch.state)) ended.set(tenant, [...(ended.get(tenant) ?? []), batch]);
    }
    for (const [tenant, all] of ended) {
      all.sort((a, b) => (b.endedAt ?? 0) - (a.endedAt ?? 0));
      let rows = 0;
      for (const batch of all) {
        rows += batch.rows;
        const old = now - (batch.endedAt ?? now) > resultRetentionMs;
        if (!old && (resultsKept === 0 || rows <= resultsKept)) continue;
        // Being tried again: it has not ended.
        const live = await batches.get({ tenant, id: batch.id });
        if (live && !isEnded(live.state)) continue;
        await remove(tenant, batch.id, now);
        deleted.push(batch.id);
      }
    }
    for (const tenant of await records.tenants()) await index.compact(tenant);
    if (deleted.length > 0) log.info({ batches: deleted.length }, 'past their retention: deleted');
    return deleted;
  }

  /** The batches of which objects are stored. */
  async function* stored(): AsyncGenerator<{ tenant: string; id: string; youngest: number }> {
    const found = new Map<string, { tenant: string; id: string; youngest: number }>();
    for await (const { key, lastModified } of storage.list(batchesPrefix)) {
      const [, , tenant, id] = key.split('/');
      if (!tenant || !id) continue;
      const known = found.get(id);
      const youngest = Math.max(known?.youngest ?? 0, lastModified.getTime());
      found.set(id, { tenant, id, youngest });
    }
    yield* found.values();
  }

  /** As it was when it ended; or as it is now, while Redis has it. */
  async function read(tenant: string, id: string): Promise<BatchRecord | undefined> {
    const live = await batches.get({ tenant, id });
    if (live) return live;
    try {
      return batchRecordSchema.parse(JSON.parse((await storage.read(batchKey(tenant, id))).toString('utf8')));
    } catch (error) {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    }
  }

  /** The tombstone first: from then on nothing of the batch is found, however much of it is still there. */
  async function remove(tenant: string, id: string, now: number): Promise<void> {
    await index.writeTombstone(tenant, id, now);
    await batches.remove({ tenant, id }, now);
    await deletePrefix(storage, batchPrefix(tenant, id));
  }

  return { maybe, sweep };
}
