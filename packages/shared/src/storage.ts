/**
 * Object storage: audio, tensors and spectrograms. Two real drivers behind one contract suite
 * (`storage.test.ts`): a directory for one machine, S3 for many; `open-storage.ts` chooses by URL.
 */
import { createWriteStream } from 'node:fs';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';

export interface StoredObject {
  readonly key: string;
  readonly size: number;
  readonly lastModified: Date;
}

export interface Storage {
  /** What it is, without credentials; for logs. */
  readonly description: string;
  /**
   * Stores a stream or bytes under `key`, replacing what was there. All or nothing: a reader never sees a part,
   * and a stream that fails or an aborted signal leaves no object (and no multipart upload) behind.
   */
  put(key: string, body: Readable | Uint8Array, signal?: AbortSignal): Promise<void>;
  /** @throws {ObjectNotFound} */
  get(key: string, signal?: AbortSignal): Promise<Readable>;
  /** The whole object in memory: for small ones. @throws {ObjectNotFound} */
  read(key: string, signal?: AbortSignal): Promise<Buffer>;
  stat(key: string): Promise<StoredObject | undefined>;
  /** Deleting what is not there is no error. */
  delete(key: string): Promise<void>;
  /** Every object whose key begins with `prefix`, in no promised order. */
  list(prefix: string): AsyncIterable<StoredObject>;
  /** Writes, reads and deletes a small object. @throws when the storage cannot be used now. */
  probe(): Promise<void>;
  close(): void;
}

export class ObjectNotFound extends Error {
  override readonly name = 'ObjectNotFound';
  readonly key: string;
  constructor(key: string) {
    super(`no object at ${key}`);
    this.key = key;
  }
}

/** Streams an object into a local file, which exists only when it is complete. @throws {ObjectNotFound} */
export async function toScratch(
  storage: Storage,
  key: string,
  file: string,
  signal: AbortSignal,
): Promise<void> {
  await pipeline(await storage.get(key, signal), createWriteStream(file), { signal });
}

export async function deletePrefix(storage: Storage, prefix: string): Promise<number> {
  let deleted = 0;
  for await (const { key } of storage.list(prefix)) {
    await storage.delete(key);
    deleted += 1;
  }
  return deleted;
}
