/**
 * What waits of each batch: its chunks are opened one after another, and their rows prepared ahead of their turn, so
 * that whoever hands out turns never waits.
 */
import { type BatchRecord, isEnded } from '@acousticsense/shared/batch';
import { type BatchRecords, rowsOfChunk } from '@acousticsense/shared/batch-records';
import type { NewJobRecord } from '@acousticsense/shared/job-records';
import { decodeChunk } from '@acousticsense/shared/manifest';
import { chunkKey } from '@acousticsense/shared/object-keys';
import type { Storage } from '@acousticsense/shared/storage';
import type { Logger } from 'pino';
import type { Parts } from './parts.ts';
import type { ChunkRow, Rows } from './rows.ts';

export interface FeedDeps {
  readonly storage: Storage;
  readonly batches: BatchRecords;
  readonly rows: Rows;
  readonly parts: Pick<Parts, 'readPart'>;
  readonly log: Logger;
  /** Chunks that one batch may have open. */
  readonly openChunks: number;
  readonly signal: AbortSignal;
}

export interface Feed {
  readonly batch: BatchRecord;
  /** As it was read last; a commit refuses what has changed since. */
  update(batch: BatchRecord): void;
  /** Takes up to `most` rows whose turn it is; none while nothing is prepared. */
  take(most: number): NewJobRecord[];
  /** Of a row that could not be handed over: its chunk is looked through again. */
  giveBack(row: NewJobRecord): void;
  readonly ready: number;
}

/** Rows prepared ahead. */
const aheadRows = 1_000;
/** Rows whose sources are asked for at once; a stop waits for no more than these. */
const groupRows = 250;
const retryMs = 1_000;

export function createFeed(first: BatchRecord, deps: FeedDeps): Feed {
  const { storage, batches, rows, parts, log, openChunks, signal } = deps;
  let batch = first;
  let ready: NewJobRecord[] = [];
  /** Rows of open chunks that were found waiting, in their order. */
  let found: ChunkRow[] = [];
  /** Open chunks that were looked through; a chunk comes into it when this process opens it. */
  const seen = new Set<number>();
  let working = false;
  let pausedUntil = 0;
  /** Nothing more can be opened until the batch is another. */
  let exhausted = false;

  function wake(): void {
    if (working || batch.state !== 'running' || signal.aborted) return;
    if (ready.length >= aheadRows || exhausted || Date.now() < pausedUntil) return;
    working = true;
    work()
      .catch((error) => {
        pausedUntil = Date.now() + retryMs;
        if (!signal.aborted) log.warn({ err: error, batchId: batch.id }, 'rows could not be prepared');
      })
      .finally(() => {
        working = false;
      });
  }

  async function work(): Promise<void> {
    while (ready.length < aheadRows && batch.state === 'running' && !signal.aborted) {
      if (found.length === 0) {
        const chunk = await nextChunk();
        if (chunk === undefined) {
          exhausted = true;
          return;
        }
        found = chunk;
        continue;
      }
      const group = found.slice(0, groupRows);
      const jobs = await rows.prepare(batch, group, signal);
      found = found.slice(group.length);
      ready.push(...jobs);
    }
  }

  /** @returns the waiting rows of a chunk; undefined when there is none to be had now. */
  async function nextChunk(): Promise<ChunkRow[] | undefined> {
    const ref = { tenant: batch.tenant, id: batch.id };
    const open = await batches.openChunks(ref);
    for (const known of seen) if (!open.includes(known)) seen.delete(known);
    const unseen = open.find((chunk) => !seen.has(chunk));
    if (unseen !== undefined) {
      seen.add(unseen);
      return waitingRows(unseen);
    }
    if (open.length >= openChunks) return undefined;
    const now = await batches.get(ref);
    if (now === undefined || isEnded(now.state)) return undefined;
    if (now.retryNext !== undefined && now.retryNext < now.chunks) {
      await reopen(now, now.retryNext);
      return [];
    }
    if (now.opened >= now.chunks) return undefined;
    const step = { chunk: now.opened, rows: rowsOfChunk(now, now.opened) };
    const { outcome } = await batches.open(ref, step);
    return outcome === 'done' || outcome === 'already' ? [] : undefined;
  }

  async function reopen(now: BatchRecord, chunk: number): Promise<void> {
    const ref = { tenant: now.tenant, id: now.id };
    const states = (await parts.readPart(now.tenant, now.id, chunk))
      .map(({ state }) => (state === 'failed' ? '.' : 'k'))
      .join('');
    const failed = states.replaceAll('k', '').length;
    if (failed === 0) await batches.skip(ref, { chunk });
    else await batches.reopen(ref, { chunk, states, failed });
  }

  async function waitingRows(chunk: number): Promise<ChunkRow[]> {
    const { tenant, id } = batch;
    try {
      const states = await batches.rowStates({ tenant, id }, chunk);
      if (states?.includes('.') !== true) return [];
      const manifest = decodeChunk(await storage.read(chunkKey(tenant, id, chunk), signal));
      return manifest.flatMap((of, row) => (states[row] === '.' ? [{ chunk, row, manifest: of }] : []));
    } catch (error) {
      seen.delete(chunk);
      throw error;
    }
  }

  return {
    get batch() {
      return batch;
    },
    update(now) {
      // Under another round, or after a pause, what was prepared is not what is to be done.
      if (now.round !== batch.round || now.state !== 'running') {
        ready = [];
        found = [];
        seen.clear();
      }
      batch = now;
      exhausted = false;
      wake();
    },
    take(most) {
      const taken = ready.splice(0, most);
      wake();
      return taken;
    },
    giveBack(row) {
      if (row.batch) seen.delete(row.batch.chunk);
    },
    get ready() {
      return ready.length;
    },
  };
}
