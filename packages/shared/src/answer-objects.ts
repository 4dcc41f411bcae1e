/** Access to the objects of one tenant's index of known answers: by name, several at once. */
import type { Readable } from 'node:stream';
import {
  type IndexObject,
  indexPrefix,
  type MergedPart,
  readMerged,
  readName,
  UnreadableObject,
} from './answer-segment.ts';
import { InfrastructureFault } from './errors.ts';
import { ObjectNotFound, type Storage } from './storage.ts';

const callsAtOnce = 8;

export type AnswerObjects = ReturnType<typeof openAnswerObjects>;

/** @throws {TypeError} not a tenant. */
export function openAnswerObjects(storage: Storage, tenant: string, signal: AbortSignal) {
  const prefix = indexPrefix(tenant);

  return {
    tenant,

    /** @param within a day or an hour; everything when empty. */
    async *list(within = ''): AsyncGenerator<IndexObject> {
      for await (const { key } of storage.list(prefix + within)) {
        signal.throwIfAborted();
        const object = readName(key.slice(prefix.length));
        if (object) yield object;
      }
    },

    async put(name: string, body: Readable | Buffer): Promise<void> {
      await storage.put(prefix + name, body, signal);
    },

    /** In the order of the names; without bytes when there is no such object any more. */
    read: (names: readonly string[]): AsyncGenerator<{ name: string; bytes: Buffer | undefined }> =>
      inOrder(names, async (name) => ({
        name,
        bytes: await storage.read(prefix + name, signal).catch(unlessGone),
      })),

    /**
     * Reads a merged object only as far as the caller goes, who may meet an `UnreadableObject`.
     * @returns undefined when there is no such object any more.
     */
    async openMerged(name: string): Promise<AsyncGenerator<MergedPart> | undefined> {
      const stream = await storage.get(prefix + name, signal).catch(unlessGone);
      return stream && partsOf(name, stream);
    },

    async remove(names: readonly string[]): Promise<number> {
      for await (const _ of inOrder(names, (name) => storage.delete(prefix + name)));
      return names.length;
    },
  };

  async function* partsOf(name: string, stream: Readable): AsyncGenerator<MergedPart> {
    try {
      yield* readMerged(stream);
    } catch (error) {
      signal.throwIfAborted();
      throw error instanceof InfrastructureFault || error instanceof UnreadableObject
        ? error
        : new InfrastructureFault('storage', `${prefix}${name} cannot be read: ${error}`, error);
    } finally {
      stream.destroy();
    }
  }
}

function unlessGone(error: unknown): undefined {
  if (error instanceof ObjectNotFound) return undefined;
  throw error;
}

/** The results in the order of the items, while the calls for the next ones are under way. */
async function* inOrder<T, R>(items: readonly T[], call: (item: T) => Promise<R>): AsyncGenerator<R> {
  const running: Promise<R>[] = [];
  for (const item of items) {
    const started = call(item);
    // One that fails while an earlier one is waited for is told when its turn comes.
    started.catch(() => {});
    running.push(started);
    if (running.length >= callsAtOnce) yield await running.shift()!;
  }
  for (const started of running) yield await started;
}
