/**
 * Uploads: bytes that callers send before, or without, a job. What is known of one lies beside its bytes in object
 * storage, so that it needs no Redis and goes with them.
 *
 * The record is the authority: bytes without a finished record are on their way, whatever their size. It is
 * replaced as a whole, once; a finished upload is never written to by us. A caller with a signed URL still can:
 * every read is on condition of the `etag` of when it was finished.
 */
import { z } from 'zod';
import { ProblemError } from './errors.ts';
import { uploadKey } from './object-keys.ts';
import { ObjectNotFound, type Storage } from './storage.ts';

const common = {
  v: z.literal(1),
  by: z.enum(['tus', 'presigned']),
  size: z.int().min(1).describe('bytes, as announced'),
  filename: z.string().describe('what the caller called it, for display only'),
  createdAt: z.int().describe('epoch milliseconds'),
  expiresAt: z.int().describe('from then on there is no such upload; epoch milliseconds'),
};
const openSchema = z.object({
  ...common,
  state: z.literal('open'),
  parts: z
    .object({
      size: z.int().describe('bytes of each but the last'),
      count: z.int(),
      multipartId: z.string().optional().describe("the store's; absent when one PUT brings it all"),
    })
    .optional()
    .describe('of a presigned one'),
});
const finishedSchema = z.object({
  ...common,
  state: z.literal('finished'),
  etag: z.string(),
  sha256: z.string().optional().describe('where the API saw all bytes pass'),
  completedAt: z.int().describe('epoch milliseconds'),
});
/** Not strict: during a roll-out an older process reads the records of a newer one. */
export const uploadRecordSchema = z.discriminatedUnion('state', [openSchema, finishedSchema]);
export type UploadRecord = z.infer<typeof uploadRecordSchema>;
export type OpenUpload = z.infer<typeof openSchema>;

/** What a job's record says of its audio when that is an upload. */
export interface UploadedAudio {
  readonly key: string;
  readonly size: number;
  readonly etag: string;
  readonly filename: string;
  readonly sha256?: string;
}

export const uploadRecordKey = (tenant: string, id: string) => `${uploadKey(tenant, id)}.json`;

/** A UUIDv7: its time says under which hour the upload lies. */
export function isUploadId(id: string): boolean {
  return /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/.test(id);
}

/** @returns undefined when the tenant has no such upload, or has it no longer. */
export async function readUpload(
  storage: Pick<Storage, 'read'>,
  tenant: string,
  id: string,
  signal?: AbortSignal,
): Promise<UploadRecord | undefined> {
  const record = await readUploadRecord(storage, tenant, id, signal);
  return record && record.expiresAt > Date.now() ? record : undefined;
}

/** What is written of it, expired or not. */
export async function readUploadRecord(
  storage: Pick<Storage, 'read'>,
  tenant: string,
  id: string,
  signal?: AbortSignal,
): Promise<UploadRecord | undefined> {
  if (!isUploadId(id)) return undefined;
  try {
    const text = await storage.read(uploadRecordKey(tenant, id), signal);
    return uploadRecordSchema.parse(JSON.parse(text.toString('utf8')));
  } catch (error) {
    if (error instanceof ObjectNotFound) return undefined;
    throw error;
  }
}

export async function writeUpload(
  storage: Pick<Storage, 'put'>,
  tenant: string,
  id: string,
  record: UploadRecord,
): Promise<void> {
  await storage.put(uploadRecordKey(tenant, id), Buffer.from(JSON.stringify(record)));
}

/**
 * A finished upload of the tenant, to be read in place.
 * @throws {ProblemError} upload_not_found, upload_unfinished
 */
export async function findUpload(
  storage: Pick<Storage, 'read'>,
  tenant: string,
  id: string,
  signal?: AbortSignal,
): Promise<UploadedAudio> {
  const record = await readUpload(storage, tenant, id, signal);
  if (record === undefined) throw uploadNotFound(id);
  if (record.state !== 'finished') {
    throw new ProblemError(
      'upload_unfinished',
      `The upload ${id} is not complete: send the rest of its ${record.size} bytes${record.by === 'presigned' ? ' and complete it' : ''}.`,
      { field: 'upload' },
    );
  }
  const { size, etag, filename, sha256 } = record;
  return { key: uploadKey(tenant, id), size, etag, filename, ...(sha256 === undefined ? {} : { sha256 }) };
}

export function uploadNotFound(id: string): ProblemError {
  return new ProblemError(
    'upload_not_found',
    `There is no upload ${JSON.stringify(id.slice(0, 50))}: it has expired or was deleted, or never was one of yours.`,
    { field: 'upload' },
  );
}
