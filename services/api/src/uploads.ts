/**
 * Uploads that are sent before a job is made of them: resumable through the API (tus), or straight to the bucket by
 * signed URLs. An upload is a record and the bytes beside it (`packages/shared/src/uploads.ts`).
 */
import { randomUUIDv7 } from 'node:crypto';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { timeOf, uploadKey, uploadPrefix } from '@acousticsense/shared/object-keys';
import {
  ObjectChanged,
  ObjectNotFound,
  type PresignedUploads,
  type Storage,
} from '@acousticsense/shared/storage';
import {
  findUpload,
  isUploadId,
  type OpenUpload,
  readUpload,
  readUploadRecord,
  type UploadedAudio,
  type UploadRecord,
  uploadNotFound,
  uploadRecordKey,
  writeUpload,
} from '@acousticsense/shared/uploads';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { StatedPart, UploadPart, UploadResource } from './schemas.ts';
import { createTus, type Tus, tusPath } from './tus.ts';
import { displayName, tooLarge } from './upload.ts';
import { createUploadLocks } from './upload-locks.ts';

export interface UploadsDeps {
  readonly redis: Redis;
  readonly storage: Storage;
  readonly log: Logger;
  readonly maxUploadBytes: number;
  /** How long an unfinished upload is kept, and a finished one after that. */
  readonly uploadExpiryMs: number;
  readonly audioRetentionMs: number;
  /** How long a signed URL can be used. */
  readonly uploadUrlMs: number;
  /** Counts announced bytes towards the tenant's quota. @throws {ProblemError} quota_exceeded */
  charge(tenant: string, bytes: number): Promise<void>;
}

export type Uploads = ReturnType<typeof createUploads>;

const mebibyte = 1024 * 1024;
/** S3's own limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html */
const minPartBytes = 5 * mebibyte;
const maxPartBytes = 5 * 1024 * mebibyte;
const maxParts = 10_000;
/** Without a wish of the caller's. */
const usualPartBytes = 16 * mebibyte;
/** Parts for which one answer holds URLs. */
const page = 100;
const hour = 3_600_000;

export function createUploads(deps: UploadsDeps) {
  const { redis, storage, log } = deps;
  const locks = createUploadLocks(redis);

  const tus: Tus = createTus({
    storage,
    locks,
    log,
    maxBytes: deps.maxUploadBytes,
    expiryMs: deps.uploadExpiryMs,
    newId: randomUUIDv7,
    hooks: {
      async begin(tenant, id, size, filename) {
        await deps.charge(tenant, size);
        await writeUpload(storage, tenant, id, openRecord(id, 'tus', size, filename));
        log.info({ uploadId: id, tenant, bytes: size }, 'upload begun');
      },
      read: (tenant, id) => readUpload(storage, tenant, id),
      async finish(tenant, id) {
        const record = await get(tenant, id);
        if (record.state === 'open') await finish(tenant, id, record);
      },
      remove: async (tenant, id) => removeLocked(tenant, id, await get(tenant, id)),
    },
  });

  function openRecord(
    id: string,
    by: UploadRecord['by'],
    size: number,
    filename: string | undefined,
  ): OpenUpload {
    const createdAt = timeOf(id).getTime();
    return {
      v: 1,
      state: 'open',
      by,
      size,
      filename: displayName(filename),
      createdAt,
      expiresAt: createdAt + deps.uploadExpiryMs,
    };
  }

  /** @throws {ProblemError} upload_not_found */
  async function get(tenant: string, id: string): Promise<UploadRecord> {
    const record = await readUpload(storage, tenant, id);
    if (record === undefined) throw uploadNotFound(id);
    return record;
  }

  /** From here on it can be used: the object is whole, and this is the content that is meant. */
  async function finish(
    tenant: string,
    id: string,
    record: OpenUpload,
    etag?: string,
  ): Promise<UploadRecord> {
    const found = await storage.stat(uploadKey(tenant, id));
    if (found === undefined) throw missing([1]);
    if (etag !== undefined && bare(found.etag) !== etag) throw notAsStated(1);
    if (found.size !== record.size) {
      throw new ProblemError(
        'upload_mismatch',
        `${record.size} bytes were announced and ${found.size} have come; send them again.`,
      );
    }
    const { parts: _, ...rest } = record;
    const completedAt = Date.now();
    const finished: UploadRecord = {
      ...rest,
      state: 'finished',
      etag: found.etag,
      completedAt,
      expiresAt: completedAt + deps.audioRetentionMs,
    };
    await writeUpload(storage, tenant, id, finished);
    log.info({ uploadId: id, tenant, bytes: record.size }, 'upload finished');
    return finished;
  }

  /** @throws {ProblemError} presigned_not_served */
  function signing(): PresignedUploads {
    if (storage.presigned) return storage.presigned;
    throw new ProblemError(
      'presigned_not_served',
      `This service keeps its objects in a directory, which takes no signed uploads: send the file by tus to ${tusPath}.`,
    );
  }

  /**
   * Begins an upload by signed URLs.
   * @param wishedParts how many parts to cut it into; the service chooses when absent.
   * @throws {ProblemError} presigned_not_served, file_too_large, bad_option, quota_exceeded
   */
  async function beginPresigned(
    tenant: string,
    size: number,
    filename: string | undefined,
    wishedParts: number | undefined,
  ): Promise<{ id: string; record: OpenUpload }> {
    const presigned = signing();
    if (size > deps.maxUploadBytes) throw tooLarge(deps.maxUploadBytes);
    const parts = cut(size, wishedParts);
    await deps.charge(tenant, size);
    const id = randomUUIDv7();
    const multipartId = parts.count > 1 ? await presigned.beginParts(uploadKey(tenant, id)) : undefined;
    const record: OpenUpload = {
      ...openRecord(id, 'presigned', size, filename),
      parts: { ...parts, ...(multipartId === undefined ? {} : { multipartId }) },
    };
    await writeUpload(storage, tenant, id, record);
    log.info({ uploadId: id, tenant, bytes: size, parts: parts.count }, 'upload begun');
    return { id, record };
  }

  /**
   * URLs for up to 100 parts after the number `after`, and which of them have come.
   * @throws {ProblemError} upload_not_found, upload_finished, presigned_not_served
   */
  async function signParts(
    tenant: string,
    id: string,
    record: UploadRecord,
    after: number,
  ): Promise<UploadPart[]> {
    const presigned = signing();
    if (record.state === 'finished') throw alreadyFinished();
    if (record.parts === undefined) throw sentByTus();
    const { size, count, multipartId } = record.parts;
    const key = uploadKey(tenant, id);
    const last = Math.min(count, after + page);
    const come = new Map<number, string>();
    if (multipartId === undefined) {
      const found = await storage.stat(key);
      if (found) come.set(1, found.etag);
    } else {
      for await (const part of presigned.listParts(key, multipartId, after)) {
        if (part.number > last) break;
        come.set(part.number, part.etag);
      }
    }
    const seconds = Math.max(
      1,
      Math.floor(Math.min(deps.uploadUrlMs, record.expiresAt - Date.now()) / 1_000),
    );
    return Promise.all(
      Array.from({ length: Math.max(0, last - after) }, async (_, index) => {
        const number = after + index + 1;
        const bytes = number < count ? size : record.size - size * (count - 1);
        const url =
          multipartId === undefined
            ? await presigned.putUrl(key, bytes, seconds)
            : await presigned.partUrl(key, multipartId, number, bytes, seconds);
        const etag = come.get(number);
        return { number, size: bytes, url, ...(etag === undefined ? {} : { etag }) };
      }),
    );
  }

  /**
   * Puts the parts together. Completing again is answered with what was completed.
   * @throws {ProblemError} upload_not_found, upload_unfinished, upload_mismatch, presigned_not_served
   */
  async function complete(tenant: string, id: string, stated: readonly StatedPart[]): Promise<UploadRecord> {
    return locks.run(`${tenant}/${id}`, async () => {
      const record = await get(tenant, id);
      if (record.state === 'finished') return record;
      if (record.parts === undefined) throw sentByTus();
      const etags = statedEtags(stated, record.parts.count);
      const { multipartId } = record.parts;
      if (multipartId === undefined) return finish(tenant, id, record, etags.get(1));
      await assemble(tenant, id, record, multipartId, etags);
      return finish(tenant, id, record);
    });
  }

  async function assemble(
    tenant: string,
    id: string,
    record: OpenUpload,
    multipartId: string,
    etags: Map<number, string>,
  ): Promise<void> {
    const presigned = signing();
    const key = uploadKey(tenant, id);
    const { size, count } = record.parts!;
    try {
      const parts = [];
      for await (const part of presigned.listParts(key, multipartId)) parts.push(part);
      const come = new Map(parts.map((part) => [part.number, part]));
      const absent = [...etags.keys()].filter((number) => !come.has(number));
      if (absent.length > 0) throw missing(absent);
      for (const [number, etag] of etags) {
        const part = come.get(number)!;
        const bytes = number < count ? size : record.size - size * (count - 1);
        if (bare(part.etag) !== etag || part.size !== bytes) throw notAsStated(number);
      }
      await presigned.completeParts(
        key,
        multipartId,
        [...etags.keys()].map((number) => come.get(number)!),
      );
    } catch (error) {
      // Replaced between the look and the completion.
      if (error instanceof ObjectChanged) throw notAsStated();
      // Put together before by one that died before it could say so: the object tells.
      if (!(error instanceof ObjectNotFound)) throw error;
    }
  }

  /** @throws {ProblemError} upload_not_found */
  async function remove(tenant: string, id: string): Promise<void> {
    await get(tenant, id);
    await locks.run(`${tenant}/${id}`, async () => removeLocked(tenant, id, await get(tenant, id)));
    log.info({ uploadId: id, tenant }, 'upload deleted');
  }

  /** The record goes last: what was begun is found again. */
  async function removeLocked(tenant: string, id: string, record: UploadRecord): Promise<void> {
    const key = uploadKey(tenant, id);
    const multipartId = record.state === 'open' ? record.parts?.multipartId : undefined;
    if (multipartId !== undefined) await storage.presigned?.endParts(key, multipartId);
    if (record.by === 'tus') await tus.remove(tenant, id);
    await storage.delete(key);
    await storage.delete(uploadRecordKey(tenant, id));
  }

  function present(id: string, record: UploadRecord): UploadResource {
    const self = `/v1/uploads/${id}`;
    const open = record.state === 'open';
    return {
      id,
      state: record.state,
      by: record.by,
      size: record.size,
      filename: record.filename,
      createdAt: new Date(record.createdAt).toISOString(),
      expiresAt: new Date(record.expiresAt).toISOString(),
      ...(record.state === 'finished'
        ? {
            etag: record.etag,
            ...(record.sha256 === undefined ? {} : { sha256: record.sha256 }),
            completedAt: new Date(record.completedAt).toISOString(),
          }
        : {}),
      links: {
        self,
        ...(record.by === 'tus' ? { tus: `${tusPath}/${id}` } : {}),
        ...(open && record.by === 'presigned'
          ? { parts: `${self}/parts`, complete: `${self}/complete` }
          : {}),
      },
    };
  }

  return {
    handleTus: tus.handle,
    get,
    beginPresigned,
    signParts,
    complete,
    remove,
    present,

    /** @throws {ProblemError} upload_not_found */
    async describe(tenant: string, id: string): Promise<UploadResource> {
      const record = await get(tenant, id);
      if (record.by !== 'tus' || record.state === 'finished') return present(id, record);
      const received = await tus.offset(tenant, id);
      return { ...present(id, await get(tenant, id)), received };
    },

    /** For a job. @throws {ProblemError} upload_not_found, upload_unfinished */
    async find(tenant: string, id: string): Promise<UploadedAudio> {
      const record = await get(tenant, id);
      // Whose last bytes came before a death, and who never asked again.
      if (record.state === 'open' && record.by === 'tus') await tus.offset(tenant, id);
      return findUpload(storage, tenant, id);
    },

    /** Ages (ms) of an hour's uploads at which the first may be deleted; then `sweepHour` says when to come back. */
    ages: [deps.uploadExpiryMs, deps.audioRetentionMs],

    /**
     * Deletes what has expired of the uploads begun in the hour from `time`, and objects that belong to none.
     * @returns how many objects were deleted, and when the last that stays has expired (epoch ms).
     */
    async sweepHour(time: number, now: number): Promise<{ deleted: number; again: number | undefined }> {
      const prefix = uploadPrefix(new Date(time));
      const lives = new Map<string, number | undefined>();
      let deleted = 0;
      let again: number | undefined;
      for await (const { key, lastModified } of storage.list(prefix)) {
        const [, , tenant, name = ''] = key.split('/');
        const id = name.slice(0, 36);
        if (!tenant || !isUploadId(id)) continue;
        const upload = `${tenant}/${id}`;
        if (!lives.has(upload)) lives.set(upload, await expire(tenant, id, now));
        const until = lives.get(upload) ?? lastModified.getTime() + deps.uploadExpiryMs;
        if (until > now) again = Math.max(again ?? 0, until);
        else {
          await storage.delete(key);
          deleted += 1;
        }
      }
      // Those whose record never came to be.
      if (now - (time + hour) >= deps.uploadExpiryMs)
        await storage.abandonParts(prefix, new Date(now - deps.uploadExpiryMs));
      return { deleted, again };
    },
  };

  /** Deletes it if its time has come. @returns until when it lives; undefined when there is none (any more). */
  async function expire(tenant: string, id: string, now: number): Promise<number | undefined> {
    try {
      const record = await readUploadRecord(storage, tenant, id);
      if (record === undefined || record.expiresAt > now) return record?.expiresAt;
      await locks.run(`${tenant}/${id}`, () => removeLocked(tenant, id, record));
      log.info({ uploadId: id, tenant, state: record.state }, 'upload expired');
      return undefined;
    } catch (error) {
      // One record that cannot be read, or that somebody holds on to, must not keep the others waiting.
      if (error instanceof InfrastructureFault) throw error;
      log.error({ err: error, uploadId: id, tenant }, 'upload cannot be looked at');
      // The longest that it can have been meant to live.
      const most = timeOf(id).getTime() + deps.uploadExpiryMs + deps.audioRetentionMs;
      return most;
    }
  }
}

/**
 * @returns bytes of each part but the last, and how many parts.
 * @throws {ProblemError} bad_option
 */
function cut(size: number, wished: number | undefined): { size: number; count: number } {
  const most = Math.max(1, Math.floor(size / minPartBytes));
  if (wished !== undefined && wished > Math.min(most, maxParts)) {
    throw new ProblemError(
      'bad_option',
      `"parts": ${size} bytes can be cut into ${Math.min(most, maxParts)} at most: all but the last hold 5 MiB or more.`,
      { field: 'parts' },
    );
  }
  const bytes = Math.ceil(wished === undefined ? Math.max(usualPartBytes, size / maxParts) : size / wished);
  if (bytes > maxPartBytes)
    throw new ProblemError('bad_option', '"parts": a part holds 5 GiB at most.', { field: 'parts' });
  return { size: bytes, count: Math.ceil(size / bytes) };
}

/** @throws {ProblemError} bad_option */
function statedEtags(stated: readonly StatedPart[], count: number): Map<number, string> {
  const etags = new Map(stated.map(({ number, etag }) => [number, bare(etag)] as const));
  if (etags.size !== stated.length || etags.size !== count || [...etags.keys()].some((n) => n > count)) {
    throw new ProblemError('bad_option', `"parts": name each of the ${count} parts once.`, {
      field: 'parts',
    });
  }
  return new Map([...etags].sort(([a], [b]) => a - b));
}

/** Clients hand an ETag on with its quotes, or without. */
const bare = (etag: string) => etag.replace(/^W\//, '').replaceAll('"', '');

function missing(numbers: readonly number[]): ProblemError {
  const some = numbers.slice(0, 10).join(', ');
  return new ProblemError(
    'upload_unfinished',
    `Not all has come: part ${some}${numbers.length > 10 ? ', ...' : ''} of the upload is missing.`,
  );
}

function notAsStated(number?: number): ProblemError {
  return new ProblemError(
    'upload_mismatch',
    `${number === undefined ? 'A part' : `Part ${number}`} is not the one that its ETag names: it was sent again with other bytes. Send it once more, and complete with the ETag that is answered.`,
  );
}

function alreadyFinished(): ProblemError {
  return new ProblemError('upload_finished', 'The upload is complete; nothing can be sent to it any more.');
}

function sentByTus(): ProblemError {
  return new ProblemError(
    'bad_request',
    'This upload is sent by tus: it has no parts, and is complete with its last byte.',
  );
}
