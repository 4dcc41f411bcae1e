/** A batch as it was when it ended, for as long as its results are stored: Redis forgets it sooner. */
import { type BatchRecord, batchRecordSchema } from '@acousticsense/shared/batch';
import { batchKey } from '@acousticsense/shared/object-keys';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';

export async function readStoredBatch(
  storage: Pick<Storage, 'read'>,
  tenant: string,
  id: string,
): Promise<BatchRecord | undefined> {
  try {
    const json = await storage.read(batchKey(tenant, id));
    return batchRecordSchema.parse(JSON.parse(json.toString('utf8')));
  } catch (error) {
    if (error instanceof ObjectNotFound) return undefined;
    throw error;
  }
}
