/**
 * Resumable uploads by tus 1.0 (https://tus.io/protocols/resumable-upload), in either storage. The library speaks
 * the protocol and keeps the bytes; whose an upload is, when it is finished and when it goes is decided in
 * `uploads.ts`.
 */
import { open } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import path from 'node:path';
import { Readable } from 'node:stream';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { uploadKey } from '@acousticsense/shared/object-keys';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { isUploadId, type UploadRecord } from '@acousticsense/shared/uploads';
import { FileStore } from '@tus/file-store';
import { S3Store } from '@tus/s3-store';
import { DataStore, ERRORS, type ServerOptions, Server as TusServer, type Upload } from '@tus/server';
import type { Logger } from 'pino';
import type { UploadLocks } from './upload-locks.ts';

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
    return new PartByPartStore({
      s3ClientConfig: { ...backing.client, bucket: backing.bucket },
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
      const upload = await store.getUpload(file).catch(async (error) => {
        // The library calls an upload unknown whatever kept it from looking; a client would start all over.
        if (error === ERRORS.FILE_NOT_FOUND && (await storage.stat(`${file.slice(root.length)}.info`)))
          throw new InfrastructureFault('storage', 'The state of an upload could not be read', error);
        throw error;
      });
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
      for (const ending of ['.info', '.part']) await storage.delete(uploadKey(tenant, id) + ending);
    },
  };
}

/**
 * The library sends parts side by side. A process that dies then leaves a gap between them, and the sum of what is
 * there passes for the offset: the upload would be completed with bytes missing. One after the other there is none.
 */
class PartByPartStore extends S3Store {
  override write(source: Readable, file: string, offset: number): Promise<number> {
    const alone = Object.create(this, { partUploadSemaphore: { value: oneAtATime() } }) as S3Store;
    return super.write.call(alone, source, file, offset);
  }
}

function oneAtATime() {
  let last: Promise<void> = Promise.resolve();
  return {
    async acquire() {
      const { promise, resolve } = Promise.withResolvers<void>();
      const before = last;
      last = promise;
      await before;
      return { release: async () => resolve() };
    },
  };
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
