/**
 * Resumable uploads by tus 1.0 (https://tus.io/protocols/resumable-upload), in either storage. The library speaks
 * the protocol and keeps the bytes; whose an upload is, when it is finished and when it goes is decided in
 * `uploads.ts`.
 */
import { randomUUID } from 'node:crypto';
import { type FileHandle, open, rm } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { uploadKey } from '@acousticsense/shared/object-keys';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { isUploadId, type UploadRecord, uploadRecordKey } from '@acousticsense/shared/uploads';
import { FileStore } from '@tus/file-store';
import { S3Store } from '@tus/s3-store';
import { DataStore, ERRORS, type ServerOptions, Server as TusServer, type Upload } from '@tus/server';
import type { Logger } from 'pino';
import type { UploadLocks } from './upload-locks.ts';

/** The smallest that S3 takes; more would only wait longer in scratch. */
const partSize = 5 * 1024 * 1024;

export const tusPath = '/v1/uploads/tus';

export interface TusDeps {
  readonly storage: Storage;
  readonly locks: UploadLocks;
  readonly log: Logger;
  readonly maxBytes: number;
  readonly expiryMs: number;
  readonly newId: () => string;
  readonly hooks: {
    /** Before the first byte. @throws {ProblemError} when there shall be no such upload. */
    begin(tenant: string, id: string, size: number, filename: string | undefined): Promise<void>;
    read(tenant: string, id: string): Promise<UploadRecord | undefined>;
    /** All bytes are in the object. Repeating it is harmless. */
    finish(tenant: string, id: string): Promise<void>;
    remove(tenant: string, id: string): Promise<void>;
  };
}

export interface Tus {
  /** Answers the request; its body must not have been read. */
  handle(request: IncomingMessage, response: ServerResponse, tenant: string): Promise<void>;
  /** Bytes that are stored. Finishes an upload that nobody writes to and whose bytes are all there. */
  offset(tenant: string, id: string): Promise<number>;
  /** Forgets what the library keeps of an upload. */
  remove(tenant: string, id: string): Promise<void>;
}

export function createTus({ storage, locks, log, maxBytes, expiryMs, newId, hooks }: TusDeps): Tus {
  const { backing } = storage;
  const root = backing.kind === 'bucket' ? backing.root : '';
  const tenants = new WeakMap<object, string>();

  /** The library's id of an upload is where its bytes lie. */
  const fileOf = (tenant: string, id: string) => root + uploadKey(tenant, id);
  function ownerOf(file: string): [tenant: string, id: string] {
    const [tenant = '', id = ''] = file.split('/').slice(-2);
    return [tenant, id];
  }

  const store = backing.kind === 'bucket' ? bucketStore() : directoryStore(backing.directory);

  function directoryStore(directory: string) {
    return new FileStore({
      directory,
      // Written as a whole, and apart from our own record, which would have the library's usual name.
      configstore: {
        async get(file) {
          const text = await storage.read(`${file}.info`).catch((error) => {
            if (!(error instanceof ObjectNotFound)) throw error;
          });
          return text && JSON.parse(text.toString('utf8'));
        },
        async set(file, upload) {
          await storage.put(`${file}.info`, Buffer.from(JSON.stringify(upload)));
        },
        delete: (file) => storage.delete(`${file}.info`),
      },
    });
  }

  function bucketStore() {
    if (backing.kind !== 'bucket') throw new TypeError('no bucket');
    return new BucketStore(storage, (file) => file.slice(root.length), {
      s3ClientConfig: { ...backing.client, bucket: backing.bucket },
      partSize,
      useTags: false,
      // Nothing remembered: another process may have changed it.
      cache: { get: async () => undefined, set: async () => {}, delete: async () => {} },
    });
  }

  class UploadStore extends DataStore {
    override extensions = ['creation', 'creation-with-upload', 'termination', 'expiration'];

    override async create(upload: Upload): Promise<Upload> {
      const [tenant, id] = ownerOf(upload.id);
      await hooks.begin(tenant, id, upload.size!, upload.metadata?.['filename'] ?? undefined);
      return store.create(upload);
    }

    override async write(stream: Readable, file: string, offset: number): Promise<number> {
      const record = await hooks.read(...ownerOf(file));
      if (record === undefined) throw ERRORS.FILE_NOT_FOUND;
      const reached = offset === record.size ? offset : await store.write(stream, file, offset);
      if (reached === record.size) await finish(file, record);
      return reached;
    }

    override async getUpload(file: string): Promise<Upload> {
      const record = await hooks.read(...ownerOf(file));
      if (record === undefined) throw ERRORS.FILE_NOT_FOUND;
      const upload = await store.getUpload(file);
      // Who is told that everything has come relies on a finished upload, also after a death in between.
      if (upload.offset === record.size) await finish(file, record);
      return upload;
    }

    override remove(file: string): Promise<void> {
      return hooks.remove(...ownerOf(file));
    }

    override getExpiration(): number {
      return expiryMs;
    }
  }

  async function finish(file: string, record: UploadRecord): Promise<void> {
    if (record.state === 'finished') return;
    if (backing.kind === 'directory') await sync(path.join(backing.directory, file));
    else if ((await storage.stat(file.slice(root.length))) === undefined) {
      // All parts are there, and whoever was to put them together died.
      await store.write(Readable.from([]), file, record.size);
    }
    await hooks.finish(...ownerOf(file));
  }

  const server = new TusServer({
    path: tusPath,
    datastore: new UploadStore(),
    locker: { newLock: (file) => locks.newLock(ownerOf(file).join('/')) },
    lockDrainTimeout: 1_000,
    maxSize: maxBytes,
    // An empty list: no page of another origin is let in (access.ts).
    allowedOrigins: [],
    namingFunction: (request) => fileOf(tenantOf(request), newId()),
    generateUrl: (_request, { id: file }) => `${tusPath}/${ownerOf(file)[1]}`,
    getFileIdFromRequest: (request, id) =>
      id !== undefined && isUploadId(id) ? fileOf(tenantOf(request), id) : undefined,
    async onUploadCreate(_request, { size }) {
      if (size === 0) throw { status_code: 400, body: 'An upload holds at least one byte\n' };
      return {};
    },
    onResponseError: (_request, error) => tusErrorOf(error, log),
  });

  function tenantOf(request: Parameters<NonNullable<ServerOptions['onIncomingRequest']>>[0]): string {
    const tenant = request.runtime?.node && tenants.get(request.runtime.node.req);
    if (tenant === undefined) throw new TypeError('a request without a tenant');
    return tenant;
  }

  return {
    async handle(request, response, tenant) {
      tenants.set(request, tenant);
      await server.handle(request, response);
    },
    async offset(tenant, id) {
      const file = fileOf(tenant, id);
      const offset = await store.getUpload(file).then(
        (upload) => upload.offset,
        (error) => {
          if (error !== ERRORS.FILE_NOT_FOUND) throw error;
          return 0;
        },
      );
      const record = await hooks.read(tenant, id);
      if (record?.state === 'open' && offset === record.size) {
        await locks.tryRun(`${tenant}/${id}`, () => finish(file, record));
      }
      return offset;
    },
    async remove(tenant, id) {
      await store.remove(fileOf(tenant, id)).catch((error) => {
        // Nothing was begun in it, or it is complete: then its object is all there is.
        if (error !== ERRORS.FILE_NOT_FOUND) throw error;
      });
      for await (const { key } of storage.list(`${uploadKey(tenant, id)}.`))
        if (key !== uploadRecordKey(tenant, id)) await storage.delete(key);
    },
  };
}

/**
 * The library's store for S3, with a writing of its own:
 * - Parts go one after the other. Side by side, a process that dies leaves a gap between them, and the sum of what is
 *   there passes for the offset: the upload would be completed with bytes missing.
 * - Bytes too few for a part wait in an object that is named after the offset at which they begin. So it counts only
 *   until the part that holds them is there, and is never deleted before.
 * - What came before a cut is stored, then the cut is told.
 * - No file outlives its process, and no handle is left to the garbage collector, which ends a process for it.
 */
class BucketStore extends S3Store {
  readonly #storage: Storage;
  readonly #keyOf: (file: string) => string;

  constructor(
    storage: Storage,
    keyOf: (file: string) => string,
    options: ConstructorParameters<typeof S3Store>[0],
  ) {
    super(options);
    this.#storage = storage;
    this.#keyOf = keyOf;
  }

  override async getUpload(file: string): Promise<Upload> {
    const { upload, start } = await this.#look(file);
    if (start === undefined) return Object.assign(upload, { offset: upload.size! });
    const rest = await this.#storage.stat(this.#restKey(file, start));
    return Object.assign(upload, { offset: start + (rest?.size ?? 0) });
  }

  override async write(source: Readable, file: string, offset: number): Promise<number> {
    const metadata = await this.getMetadata(file);
    const size = metadata.file.size!;
    const parts = await this.retrieveParts(file);
    const partBytes = this.calcOptimalPartSize(size);
    let number = parts.length;
    let start = sumOf(parts);
    await using scratch = await openUnnamed();
    /** Bytes from `start` on that lie in scratch. */
    let held = 0;
    let cut: { error: unknown } | undefined;

    const hold = async (bytes: Uint8Array) => {
      await scratch.write(bytes, 0, bytes.length, held);
      held += bytes.length;
    };
    // In memory only while it is sent: a slow client costs disk. As bytes, it can be sent again.
    const read = async () => (await scratch.read({ buffer: Buffer.alloc(held), position: 0 })).buffer;
    const sendPart = async () => {
      number += 1;
      await this.client.uploadPart({
        Bucket: this.bucket,
        Key: file,
        UploadId: metadata['upload-id'],
        PartNumber: number,
        Body: await read(),
      });
      const rest = this.#restKey(file, start);
      start += held;
      held = 0;
      await this.#storage.delete(rest);
    };

    try {
      if (offset > start) {
        for await (const bytes of await this.#storage.get(this.#restKey(file, start))) await hold(bytes);
      }
      if (start + held !== offset) throw ERRORS.INVALID_OFFSET;
      const come = source[Symbol.asyncIterator]();
      for (;;) {
        const next = await come.next().catch((error: unknown) => {
          cut = { error };
        });
        if (!next || next.done) break;
        for (let bytes: Uint8Array = next.value; bytes.length > 0; ) {
          const taken = bytes.subarray(0, partBytes - held);
          await hold(taken);
          if (held === partBytes) await sendPart();
          bytes = bytes.subarray(taken.length);
        }
      }
      if (held >= this.minPartSize || (held > 0 && start + held === size)) await sendPart();
      else if (held > 0 && start + held > offset)
        await this.#storage.put(this.#restKey(file, start), await read());
    } finally {
      source.destroy();
    }
    const reached = start + held;
    if (reached === size) await this.finishMultipartUpload(metadata, await this.retrieveParts(file));
    if (cut) throw cut.error;
    return reached;
  }

  /** @returns the sum of its parts; undefined when they have been put together. */
  async #look(file: string): Promise<{ upload: Upload; start: number | undefined }> {
    const { file: upload } = await this.getMetadata(file).catch((error) => {
      throw isAbsent(error) ? ERRORS.FILE_NOT_FOUND : error;
    });
    try {
      return { upload, start: sumOf(await this.retrieveParts(file)) };
    } catch (error) {
      if (!isAbsent(error)) throw error;
      if ((await this.#storage.stat(this.#keyOf(file))) === undefined) throw ERRORS.FILE_NO_LONGER_EXISTS;
      return { upload, start: undefined };
    }
  }

  #restKey(file: string, start: number): string {
    return `${this.#keyOf(file)}.${start}.part`;
  }
}

const sumOf = (parts: { Size?: number | undefined }[]) => parts.reduce((sum, { Size = 0 }) => sum + Size, 0);
const isAbsent = (error: unknown) =>
  error instanceof Error && ['NoSuchKey', 'NoSuchUpload', 'NotFound'].includes(error.name);

/** A file without a name: gone with its handle, also when the process is killed. */
async function openUnnamed(): Promise<FileHandle> {
  const file = path.join(tmpdir(), `acousticsense-upload-${randomUUID()}`);
  const handle = await open(file, 'wx+', 0o600);
  await rm(file);
  return handle;
}

/** Before the record says that everything is there, it must be there after a power cut too. */
async function sync(file: string): Promise<void> {
  for (const name of [file, path.dirname(file)]) {
    const handle = await open(name);
    await handle.sync().finally(() => handle.close());
  }
}

/** What a client is told; the library's own errors stay as they are. */
function tusErrorOf(error: unknown, log: Logger): { status_code: number; body: string } | undefined {
  if (error instanceof ProblemError) return { status_code: error.status, body: `${error.message}\n` };
  if (typeof error === 'object' && error !== null && 'status_code' in error) return undefined;
  log.error({ err: error }, 'upload request failed');
  // The library brings its own S3 client, whose errors nobody has named.
  const away = error instanceof InfrastructureFault || (error instanceof Error && '$metadata' in error);
  return away
    ? { status_code: 503, body: 'A part of the service is away at present; try again in a moment.\n' }
    : { status_code: 500, body: 'Something went wrong on our side; try again in a moment.\n' };
}
