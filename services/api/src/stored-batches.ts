/** A batch by its id, for as long as anything of it is kept: Redis forgets those that have ended, the storage later. */
import { type BatchRecord, batchRecordSchema } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { ProblemError } from '@acousticsense/shared/errors';
import { batchKey } from '@acousticsense/shared/object-keys';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';

export interface StoredBatchesDeps {
  readonly batches: Pick<BatchRecords, 'get' | 'deletedAt'>;
  readonly storage: Pick<Storage, 'read'>;
}

export interface StoredBatches {
  /**
   * As it is now; or as it was when it ended, once Redis has forgotten it.
   * @param id as a caller gave it: anything.
   * @throws {ProblemError} batch_not_found; batch_gone, which says when
   */
  read(tenant: string, id: string): Promise<BatchRecord>;
}

export function createStoredBatches({ batches, storage }: StoredBatchesDeps): StoredBatches {
  async function readObject(tenant: string, id: string): Promise<BatchRecord | undefined> {
    try {
      const json = await storage.read(batchKey(tenant, id));
      return batchRecordSchema.parse(JSON.parse(json.toString('utf8')));
    } catch (error) {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    }
  }

  return {
    async read(tenant, id) {
      const ref = { tenant, id };
      const live = isBatchId(id) ? await batches.get(ref) : undefined;
      if (live) return live;
      if (isBatchId(id)) {
        // Before the object is looked for: of a batch that is being deleted it may still be there.
        const deletedAt = await batches.deletedAt(ref);
        if (deletedAt !== undefined) throw goneBatch(deletedAt);
        const stored = await readObject(tenant, id);
        if (stored) return stored;
      }
      throw new ProblemError('batch_not_found', 'There is no batch with this id.');
    },
  };
}

function goneBatch(deletedAt: number): ProblemError {
  return new ProblemError(
    'batch_gone',
    `The batch and its results were deleted on ${new Date(deletedAt).toISOString()}.`,
    { deletedAt },
  );
}

/** The id becomes part of keys in Redis and in the storage. */
function isBatchId(id: string): boolean {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(id);
}
