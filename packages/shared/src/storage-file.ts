/** Object storage in a directory: the embedded default, for one machine. */
import { randomUUID } from 'node:crypto';
import { type BigIntStats, createReadStream, createWriteStream } from 'node:fs';
import { mkdir, open, opendir, rename, rm, rmdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { InfrastructureFault, StartupError } from './errors.ts';
import {
  checkRange,
  ObjectChanged,
  ObjectNotFound,
  probeKey,
  type ReadOptions,
  type Storage,
  type StoredObject,
} from './storage.ts';

/**
 * Unfinished writes; on the same file system, so that the rename is atomic. Never listed. Made once, at the first use:
 * from then on it also tells a storage from the empty place that is left when a disk is not mounted any more. Without
 * that every object would seem to be deleted, and what is written would come to lie beneath the disk.
 */
const partsDirectory = '.parts';

export function createFileStorage(url: URL): Storage {
  if (url.host !== '')
    throw new StartupError(`STORAGE_URL ${url.href} needs three slashes: file:///absolute/directory.`);
  const root = path.resolve(fileURLToPath(url));
  const parts = path.join(root, partsDirectory);
  void clearOldParts(parts).catch(() => {});

  let isMade = false;
  async function makeOnce(): Promise<void> {
    if (isMade) return;
    await mkdir(parts, { recursive: true });
    isMade = true;
  }

  /** Of what was not found. @throws {InfrastructureFault} the whole storage is not there. */
  async function checkThere(): Promise<void> {
    if (isMade && !(await isThere(parts)))
      throw new InfrastructureFault('storage', `The storage directory ${root} is not there.`);
  }

  /** With its parents, but not the storage's own directory. */
  async function makeFolder(folder: string): Promise<void> {
    if (folder === root) return;
    const make = () =>
      mkdir(folder).catch((error) => {
        if (error.code !== 'EEXIST') throw error;
      });
    try {
      await make();
    } catch (error) {
      if (!isAbsent(error)) throw error;
      await makeFolder(path.dirname(folder));
      await make();
    }
  }

  /** A concurrent delete may remove the directory between mkdir and rename: then once more. */
  async function renameInto(part: string, file: string): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      await makeFolder(path.dirname(file));
      try {
        return await rename(part, file);
      } catch (error) {
        if (!isAbsent(error) || attempt === 10) throw error;
      }
    }
  }

  function fileOf(key: string): string {
    const segments = key.split('/');
    if (
      segments.some(
        (segment) => segment === '' || segment === '.' || segment === '..' || segment.includes('\0'),
      )
    ) {
      throw new TypeError(`not an object key: ${JSON.stringify(key)}`);
    }
    return path.join(root, ...segments);
  }

  async function put(key: string, body: Readable | Uint8Array, signal?: AbortSignal): Promise<string> {
    const file = fileOf(key);
    signal?.throwIfAborted();
    // The source may fail before the pipeline listens; it then finds the stream's stored error.
    if (body instanceof Readable) body.on('error', () => {});
    const part = path.join(parts, randomUUID());
    try {
      await onDisk(makeOnce);
      const source = body instanceof Uint8Array ? Readable.from([body]) : body;
      await pipeline(source, createWriteStream(part), { signal });
      return await onDisk(async () => {
        // The object must be on disk before the record says that it is there.
        await using handle = await open(part, 'r+');
        await handle.sync();
        await renameInto(part, file);
        const folder = await open(path.dirname(file));
        await folder.sync().finally(() => folder.close());
        return etagOf(await handle.stat({ bigint: true }));
      });
    } catch (error) {
      await rm(part, { force: true });
      if (isAbsent(error)) await onDisk(checkThere);
      throw normalise(error);
    }
  }

  async function get(key: string, signal?: AbortSignal, options: ReadOptions = {}): Promise<Readable> {
    checkRange(options);
    const file = fileOf(key);
    return onDisk(async () => {
      const handle = await open(file).catch(async (error) => {
        if (!isAbsent(error)) throw error;
        await checkThere();
        throw new ObjectNotFound(key);
      });
      try {
        // Of the opened file, not of the name: what is put meanwhile under the name is another file.
        if (options.ifMatch !== undefined && etagOf(await handle.stat({ bigint: true })) !== options.ifMatch)
          throw new ObjectChanged(key);
      } catch (error) {
        await handle.close();
        throw error;
      }
      return createReadStream('', {
        fd: handle,
        start: options.start ?? 0,
        ...(options.end === undefined ? {} : { end: options.end - 1 }),
        ...(signal ? { signal } : {}),
      });
    });
  }

  async function* list(prefix: string): AsyncIterable<StoredObject> {
    const lastSlash = prefix.lastIndexOf('/') + 1;
    yield* walk(prefix.slice(0, lastSlash), prefix);
  }

  async function* walk(directory: string, prefix: string): AsyncGenerator<StoredObject> {
    const entries = await onDisk(async () => {
      const found = [];
      for await (const entry of await opendir(path.join(root, directory))) found.push(entry);
      return found;
    }).catch(async (error) => {
      if (!isAbsent(error)) throw error;
      await onDisk(checkThere);
      return [];
    });
    for (const entry of entries) {
      const key = directory + entry.name;
      if (directory === '' && entry.name === partsDirectory) continue;
      if (entry.isDirectory()) {
        if (`${key}/`.startsWith(prefix) || prefix.startsWith(`${key}/`)) yield* walk(`${key}/`, prefix);
      } else if (key.startsWith(prefix)) {
        const found = await describe(key);
        if (found) yield found;
      }
    }
  }

  async function describe(key: string): Promise<StoredObject | undefined> {
    const file = fileOf(key);
    try {
      const stats = await onDisk(() => stat(file, { bigint: true }));
      return { key, size: Number(stats.size), lastModified: stats.mtime, etag: etagOf(stats) };
    } catch (error) {
      if (!isAbsent(error)) throw error;
      await onDisk(checkThere);
      return undefined;
    }
  }

  async function remove(key: string): Promise<void> {
    const file = fileOf(key);
    await onDisk(() =>
      rm(file).catch((error) => {
        if (!isAbsent(error)) throw error;
        return checkThere();
      }),
    );
    // Empty directories would pile up, one a job; a directory in use again is no error.
    for (
      let folder = path.dirname(file);
      folder !== root && folder.startsWith(root);
      folder = path.dirname(folder)
    ) {
      if (
        !(await rmdir(folder).then(
          () => true,
          () => false,
        ))
      )
        break;
    }
  }

  async function read(key: string, signal?: AbortSignal, options?: ReadOptions): Promise<Buffer> {
    const stream = await get(key, signal, options);
    return onDisk(async () => Buffer.concat(await stream.toArray()));
  }

  return {
    description: `directory ${root}`,
    put,
    get,
    read,
    stat: describe,
    delete: remove,
    list,
    // Unfinished writes lie in a directory of their own, which is cleared at every start.
    abandonParts: () => Promise.resolve(0),
    backing: { kind: 'directory', directory: root },
    async probe() {
      await put(probeKey, Buffer.from('probe'));
      await remove(probeKey);
    },
    close() {},
  };
}

/** A replaced object is another file; one that was written in place has another time or size. */
function etagOf({ ino, mtimeNs, size }: BigIntStats): string {
  return `"${ino.toString(36)}-${mtimeNs.toString(36)}-${size.toString(36)}"`;
}

/** What a killed process was writing; a day old, so that nobody is writing it now. */
async function clearOldParts(parts: string): Promise<void> {
  for await (const { name } of await opendir(parts)) {
    const part = path.join(parts, name);
    if (Date.now() - (await stat(part)).mtimeMs > 86_400_000) await rm(part, { force: true });
  }
}

const isThere = (file: string) =>
  stat(file).then(
    () => true,
    (error) => {
      if (isAbsent(error)) return false;
      throw error;
    },
  );

function isAbsent(error: unknown): boolean {
  return (
    error instanceof Error && ['ENOENT', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')
  );
}

/** What the disk says, and what there is to do. */
const diskFaults: Record<string, string> = {
  ENOSPC: 'its disk is full, make room there (it goes on by itself)',
  EDQUOT: 'its quota is used up, make room there or raise it (it goes on by itself)',
  EIO: 'its disk fails',
  EROFS: 'it is mounted read-only',
  EACCES: 'this user has no right to write there',
  EPERM: 'this user has no right to write there',
  EMFILE: 'this process has too many files open (ulimit -n)',
  ENFILE: 'this machine has too many files open',
  ESTALE: 'its file server has lost it',
  ETIMEDOUT: 'its file server does not answer',
};

/** The disk's own troubles become an infrastructure fault; a failing source stream or an abort stays what it is. */
function normalise(error: unknown): unknown {
  const code = error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
  const reason = diskFaults[code ?? ''];
  if (reason === undefined) return error;
  return new InfrastructureFault(
    'storage',
    `The storage directory cannot be used: ${reason}. ${(error as Error).message}`,
    error,
  );
}

async function onDisk<T>(operation: () => Promise<T>): Promise<T> {
  try {
    return await operation();
  } catch (error) {
    throw normalise(error);
  }
}
