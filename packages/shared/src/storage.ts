/**
 * Object storage: audio, tensors and spectrograms. Two real drivers behind one contract suite
 * (`storage.test.ts`): a directory for one machine, S3 for many; `open-storage.ts` chooses by URL.
 */
import { createWriteStream } from 'node:fs';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import type { S3ClientConfig } from '@aws-sdk/client-s3';

export interface StoredObject {
  readonly key: string;
  readonly size: number;
  readonly lastModified: Date;
  /** Differs whenever the content was replaced; opaque, to be handed back as `ifMatch`. */
  readonly etag: string;
}

/** What of an object is read, and on which condition. */
export interface ReadOptions {
  /** Only this content: another etag is {@link ObjectChanged}. All bytes of one read are of one content. */
  readonly ifMatch?: string;
  /** First byte; 0 when absent. Behind the end of the object there is nothing: an empty read. */
  readonly start?: number;
  /** The byte after the last one, as in `subarray`; the object's end when absent or behind it. */
  readonly end?: number;
}

export interface Storage {
  /** What it is, without credentials; for logs. */
  readonly description: string;
  /**
   * Stores a stream or bytes under `key`, replacing what was there. All or nothing: a reader never sees a part,
   * and a stream that fails or an aborted signal leaves no object (and no multipart upload) behind.
   * @returns the new object's etag.
   */
  put(key: string, body: Readable | Uint8Array, signal?: AbortSignal): Promise<string>;
  /** @throws {ObjectNotFound | ObjectChanged} RangeError: an empty or negative range. */
  get(key: string, signal?: AbortSignal, options?: ReadOptions): Promise<Readable>;
  /** In memory: for small objects and parts of large ones. @throws as {@link get} */
  read(key: string, signal?: AbortSignal, options?: ReadOptions): Promise<Buffer>;
  stat(key: string): Promise<StoredObject | undefined>;
  /** Deleting what is not there is no error. */
  delete(key: string): Promise<void>;
  /** Every object whose key begins with `prefix`, in no promised order. */
  list(prefix: string): AsyncIterable<StoredObject>;
  /**
   * Ends the multipart uploads to keys under `prefix` that were begun before `before` and are not complete: their
   * parts cost money, and no list shows them. A driver without such has nothing to do. @returns how many.
   */
  abandonParts(prefix: string, before: Date): Promise<number>;
  /** Writes and deletes a small object. @throws when the storage cannot be used now. */
  probe(): Promise<void>;
  close(): void;
  /** Where callers can send bytes to the store itself; absent where the store is a directory. */
  readonly presigned?: PresignedUploads;
  /** What lies underneath, for a library that brings its own access to it (tus). */
  readonly backing: Backing;
}

export type Backing =
  | { readonly kind: 'directory'; readonly directory: string }
  | {
      readonly kind: 'bucket';
      readonly bucket: string;
      /** Before every key: empty, or with a slash at its end. */
      readonly root: string;
      readonly client: S3ClientConfig;
    };

export interface UploadedPart {
  readonly number: number;
  readonly etag: string;
  readonly size: number;
}

/**
 * URLs by which a caller who has no credentials may send bytes. The length is signed: the store refuses a body of
 * another one. A URL may be used again until it ends, by anybody who has it: who completes an upload states the
 * etags of what was sent.
 */
export interface PresignedUploads {
  /** @param seconds from now, within which the PUT must begin. */
  putUrl(key: string, size: number, seconds: number): Promise<string>;
  /** @returns the id of a new multipart upload. */
  beginParts(key: string): Promise<string>;
  /** @param number from 1 to 10,000. */
  partUrl(key: string, multipartId: string, number: number, size: number, seconds: number): Promise<string>;
  /**
   * The parts that have arrived, in order, after the number `after`.
   * @throws {ObjectNotFound} the multipart upload was completed or ended.
   */
  listParts(key: string, multipartId: string, after?: number): AsyncIterable<UploadedPart>;
  /**
   * @returns the object's etag.
   * @throws {ObjectNotFound} the multipart upload was completed or ended before.
   * @throws {ObjectChanged} a part is not the one that is stated.
   */
  completeParts(
    key: string,
    multipartId: string,
    parts: readonly Pick<UploadedPart, 'number' | 'etag'>[],
  ): Promise<string>;
  /** Ending what has ended is no error. */
  endParts(key: string, multipartId: string): Promise<void>;
}

/** One for all processes: what one that was killed left behind goes with the next probe of any other. */
export const probeKey = 'probe/write';

export class ObjectNotFound extends Error {
  override readonly name = 'ObjectNotFound';
  readonly key: string;
  constructor(key: string) {
    super(`no object at ${key}`);
    this.key = key;
  }
}

/** The object is there, with other content than the caller knew. */
export class ObjectChanged extends Error {
  override readonly name = 'ObjectChanged';
  readonly key: string;
  constructor(key: string) {
    super(`the object at ${key} has been replaced`);
    this.key = key;
  }
}

/** @throws RangeError: an empty or negative range. */
export function checkRange({ start = 0, end }: ReadOptions): void {
  if (start < 0 || (end !== undefined && end <= start))
    throw new RangeError(`no bytes from ${start} to ${end}`);
}

/** Streams an object into a local file, which is complete once this returns. @throws {ObjectNotFound | ObjectChanged} */
export async function toScratch(
  storage: Pick<Storage, 'get'>,
  key: string,
  file: string,
  signal: AbortSignal,
  options: ReadOptions = {},
): Promise<void> {
  await pipeline(await storage.get(key, signal, options), createWriteStream(file), { signal });
}

export async function deletePrefix(storage: Storage, prefix: string): Promise<number> {
  let deleted = 0;
  for await (const { key } of storage.list(prefix)) {
    await storage.delete(key);
    deleted += 1;
  }
  return deleted;
}
