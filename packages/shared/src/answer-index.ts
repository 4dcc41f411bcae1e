/**
 * The index of known answers: which results there are already, by what was asked and by the caller's ref. It outlives
 * Redis: the truth are immutable objects in the storage (`answer-segment.ts`), one for each closing of a chunk, and
 * each process that asks keeps a copy on its own disk (`answer-copy.ts`), caught up by `refresh`.
 *
 * Losing a copy costs time only. Not having one costs the feeder work (rows are done anew) and the callers an answer
 * for a while (a 503), never a wrong one.
 */
import { setImmediate as turn } from 'node:timers/promises';
import type { Logger } from 'pino';
import { compactAfterMs, compactAnswers, goneMs } from './answer-compaction.ts';
import { type AnswerCopy, createAnswerCopy, type Locator } from './answer-copy.ts';
import { type AnswerObjects, openAnswerObjects } from './answer-objects.ts';
import {
  type AnswerEntry,
  dayName,
  encodeSegment,
  hourName,
  type IndexObject,
  parseSegment,
  type Segment,
  segmentName,
  tombstoneName,
  UnreadableObject,
} from './answer-segment.ts';
import { InfrastructureFault } from './errors.ts';
import type { Storage } from './storage.ts';
import { DatabaseLost } from './throwaway-database.ts';

export type { AnswerEntry, Locator, Segment };

export interface AnswerIndexDeps {
  readonly storage: Storage;
  /** Of the copies; on a local disk. Several processes may share it. */
  readonly directory: string;
  readonly log: Logger;
  /** Epoch milliseconds; the machine's clock when absent. */
  readonly now?: () => number;
}

export interface AnswerIndex {
  /**
   * Catches up with what is written. The first time it reads everything: for millions of entries a minute or so, in
   * which the process goes on.
   * @param maxAgeMs does nothing when the last one began less than this long ago.
   * @throws {InfrastructureFault} `storage`; or `index` when the disk is full or may not be written: the feeder then
   *   goes on without known answers.
   */
  refresh(tenant: string, options?: { readonly maxAgeMs?: number }): Promise<void>;
  /**
   * The results that these keys have, as far as this copy knows; in their order. Blocks for some milliseconds a
   * thousand. When the copy cannot be read, nothing is known.
   */
  find(tenant: string, keys: readonly string[]): (Locator | undefined)[];
  /**
   * The latest result of a ref that there is; when all of its results were deleted, the last date (epoch ms), for a
   * year. Call `refresh` before.
   * @throws {InfrastructureFault} `index`
   */
  findRef(tenant: string, ref: string): Locator | { readonly deletedAt: number } | undefined;
  /** Once a chunk's part is written. Written again it changes nothing. */
  writeSegment(segment: Segment): Promise<void>;
  /**
   * Before a batch's results are deleted: none of them is found any more, whatever segments still come.
   * @param deletedAt epoch ms, the same when it is repeated.
   */
  writeTombstone(tenant: string, batchId: string, deletedAt: number): Promise<void>;
  /**
   * Makes one object of each day's segments once they are two days old, and removes what stands for batches that were
   * deleted more than a year ago. For one process at a time; killed anywhere, or done twice, it loses nothing.
   * @returns how many objects it wrote and removed.
   */
  compact(tenant: string): Promise<{ written: number; removed: number }>;
  /** Ends what is running. */
  close(): Promise<void>;
}

const hour = 3_600_000;
const day = 24 * hour;
/** How late a segment may come into an hour, by a slow writer or a wrong clock, and still be seen at once. */
const lateMs = hour;
const aheadMs = 10 * 60_000;
/** Everything is listed this often: later ones are seen by it. */
const fullListingMs = day;
/**
 * More than this behind, everything is listed at once, too: it is fewer requests, and it finds the merged objects.
 * Well under `compactAfterMs`, for what is merged is in no hour any more.
 */
const mostHours = 30;
/** About 40 MB of memory; fewer would mean that more of the file is rewritten for them. */
const gatheredRows = 500_000;
/** Copies that are open; each holds three files and up to 16 MB of cache. */
const mostOpen = 32;

interface Tenant {
  readonly objects: AnswerObjects;
  readonly copy: AnswerCopy;
  /** When the newest refresh that succeeded began, on the clock that never jumps (`performance.now`). */
  refreshedAt: number;
  /** A refresh that began before does not count. */
  staleBefore: number;
  running?: Promise<void> | undefined;
}

export function createAnswerIndex(deps: AnswerIndexDeps): AnswerIndex {
  const { storage, directory, log, now = Date.now } = deps;
  const tenants = new Map<string, Tenant>();
  const closing = new AbortController();

  function tenantOf(name: string): Tenant {
    closing.signal.throwIfAborted();
    const known = tenants.get(name) ?? {
      objects: openAnswerObjects(storage, name, closing.signal),
      copy: createAnswerCopy(directory, name),
      refreshedAt: -Infinity,
      staleBefore: -Infinity,
    };
    // The one that was used last is last.
    tenants.delete(name);
    tenants.set(name, known);
    for (const [other, { copy, running }] of tenants) {
      if (tenants.size <= mostOpen) break;
      if (running || other === name) continue;
      copy.close();
      tenants.delete(other);
    }
    return known;
  }

  async function refresh(name: string, { maxAgeMs = 0 } = {}): Promise<void> {
    const enough = performance.now() - maxAgeMs;
    for (;;) {
      const tenant = tenantOf(name);
      if (tenant.refreshedAt >= Math.max(enough, tenant.staleBefore)) return;
      const began = performance.now();
      // One that is under way may not see what was written before this call: then comes another.
      const joined = tenant.running;
      tenant.running ??= catchUp(tenant)
        .then(() => {
          tenant.refreshedAt = began;
        })
        .finally(() => {
          tenant.running = undefined;
        });
      await (joined ? joined.catch(() => {}) : tenant.running);
      if (!joined) return;
    }
  }

  async function catchUp({ objects, copy }: Tenant): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        // What was listed may be merged before it is read: then it is in an object that is listed now. What a
        // storage goes on listing and does not have, is looked for at the next refresh.
        for (let listings = 1; listings <= 3 && !(await applyNew(objects, copy)); listings += 1);
        return;
      } catch (error) {
        if (!(error instanceof DatabaseLost) || attempt > 1) throw error;
        log.warn({ err: error, tenant: objects.tenant }, 'answer index');
      } finally {
        copy.drop();
      }
    }
  }

  /** @returns false when something was gone before it could be read. */
  async function applyNew(objects: AnswerObjects, copy: AnswerCopy): Promise<boolean> {
    const time = now();
    copy.begin();
    const isDue = Math.abs(time - (copy.get('fullListing') ?? 0)) >= fullListingMs;
    const hours = isDue ? undefined : hoursSince(copy.get('caughtUpTo') ?? 0, time);
    const found: IndexObject[] = [];
    for (const hour of hours ?? ['']) {
      for await (const object of objects.list(hour)) found.push(object);
    }
    copy.bury(found.filter((object) => object.kind === 'tombstone'));
    const unknown = (kind: IndexObject['kind']) =>
      copy.unknown(found.filter((object) => object.kind === kind).map(({ name }) => name));
    let missing = false;

    // Segments first: then a merged object that a compaction has just made of them holds nothing new.
    for await (const { name, bytes } of objects.read(unknown('segment'))) {
      if (bytes === undefined) missing = true;
      else await gather(objects.tenant, copy, name, bytes.toString());
    }
    await copy.flush();
    for (const merged of unknown('merged')) {
      if (!(await applyMerged(objects, copy, merged))) missing = true;
    }
    if (missing) {
      copy.set('fullListing', 0);
      return false;
    }
    if (!hours) {
      const names = new Set(found.map(({ name }) => name));
      await copy.tidy(names, dayName(time - 2 * compactAfterMs), time - goneMs);
      copy.set('fullListing', time);
    }
    copy.set('caughtUpTo', time);
    return true;
  }

  /** @returns whether it could be read. */
  async function gather(tenant: string, copy: AnswerCopy, name: string, text: string): Promise<boolean> {
    let segment: ReturnType<typeof parseSegment>;
    try {
      segment = parseSegment(text, tenant);
    } catch (error) {
      // Not marked as applied: a later version of the service may be able to read it.
      log.error({ err: error, tenant, segment: name }, 'segment of the answer index cannot be read');
      return false;
    }
    if (copy.gather(name, segment.header, segment.lines) > gatheredRows) await copy.flush();
    await turn();
    return true;
  }

  /** @returns false when it is gone. */
  async function applyMerged(objects: AnswerObjects, copy: AnswerCopy, merged: string): Promise<boolean> {
    const parts = await objects.openMerged(merged);
    if (!parts) return false;
    let readable = true;
    try {
      const unknown = new Set<string>();
      for await (const part of parts) {
        if ('names' in part) {
          for (const segment of copy.unknown(part.names)) unknown.add(segment);
        } else if (unknown.delete(part.name) && !(await gather(objects.tenant, copy, part.name, part.text))) {
          readable = false;
        }
        if (unknown.size === 0) break;
      }
    } catch (error) {
      if (!(error instanceof UnreadableObject)) throw error;
      log.error({ err: error, tenant: objects.tenant, merged }, 'object of the answer index cannot be read');
      readable = false;
    }
    await copy.flush(readable ? [merged] : []);
    return true;
  }

  function find(name: string, keys: readonly string[]): (Locator | undefined)[] {
    const tenant = tenantOf(name);
    try {
      return tenant.copy.find(keys);
    } catch (error) {
      if (!(error instanceof InfrastructureFault)) throw error;
      if (error instanceof DatabaseLost) tenant.staleBefore = performance.now();
      log.warn({ err: error, tenant: name }, 'known answers cannot be looked up: nothing is known');
      return keys.map(() => undefined);
    }
  }

  function findRef(name: string, ref: string) {
    const tenant = tenantOf(name);
    try {
      return tenant.copy.findRef(ref, now() - goneMs);
    } catch (error) {
      if (error instanceof DatabaseLost) tenant.staleBefore = performance.now();
      throw error;
    }
  }

  /** Whoever writes sees it at its next refresh, however fresh the copy is. */
  async function write(name: string, object: string, bytes: Buffer): Promise<void> {
    await tenantOf(name).objects.put(object, bytes);
    tenantOf(name).staleBefore = performance.now();
  }

  async function close(): Promise<void> {
    closing.abort();
    await Promise.allSettled([...tenants.values()].map(({ running }) => running));
    for (const { copy } of tenants.values()) copy.close();
    tenants.clear();
  }

  return {
    refresh,
    find,
    findRef,
    writeSegment: (segment) => write(segment.tenant, segmentName(segment, now()), encodeSegment(segment)),
    writeTombstone: (tenant, batchId, deletedAt) =>
      write(tenant, tombstoneName(batchId, deletedAt, now()), Buffer.from('{}')),
    compact: (tenant) => compactAnswers(tenantOf(tenant).objects, now()),
    close,
  };
}

/**
 * From the hour in which late segments may still come, to the one in which writers with a fast clock are.
 * @returns undefined when they are too many.
 */
function hoursSince(caughtUpTo: number, now: number): string[] | undefined {
  const from = Math.floor((Math.min(caughtUpTo, now) - lateMs) / hour);
  const to = Math.floor((now + aheadMs) / hour);
  if (to - from > mostHours) return undefined;
  return Array.from({ length: to - from + 1 }, (_, n) => `${hourName((from + n) * hour)}/`);
}
