/**
 * What waits of each batch: its chunks are opened one after another, and their rows prepared ahead of their turn, so
 * that whoever hands out turns never waits.
 */
import type { BatchRecord } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { InfrastructureFault } from '@acousticsense/shared/errors';
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
  /** @param ahead rows to be prepared ahead. */
  update(batch: BatchRecord, ahead: number): void;
  /** The row whose turn it is; undefined while none is prepared. */
  readonly next: NewJobRecord | undefined;
  /** Takes up to `most` rows in their order, up to the first that is not let in. */
  take(most: number, letIn: (row: NewJobRecord) => boolean): NewJobRecord[];
  /** Of rows that could not be handed over: they come next. */
  giveBack(rows: readonly NewJobRecord[]): void;
  /** What is prepared is not what is to be done any more: the batch is looked through again. */
  reset(): void;
}

/** Rows whose sources are asked for at once. */
const groupRows = 250;
const firstRetryMs = 500;
const lastRetryMs = 60_000;
/** A batch that waits for so long with nothing prepared is looked through again: whatever it was, it must not stay. */
const forgottenMs = 60_000;

export function createFeed(first: BatchRecord, deps: FeedDeps): Feed {
  const { storage, batches, rows, parts, log, openChunks, signal } = deps;
  let batch = first;
  let ahead = 0;
  let ready: NewJobRecord[] = [];
  /** Rows of open chunks that were found waiting, in their order. */
  let found: ChunkRow[] = [];
  /** Chunks that were looked through, ... */
  const seen = new Set<number>();
  /** ... and the row at which the next one goes on, where not all of it was taken into memory. */
  let resumeAt = 0;
  /** Raised by every reset: what was begun before it comes to nothing. */
  let epoch = 0;
  let working = false;
  let failures = 0;
  let retryAt = 0;
  /** Nothing can be had until the batch is another. */
  let exhausted = false;
  let lastTaken = performance.now();

  function wake(): void {
    if (working || exhausted || ready.length >= ahead || batch.state !== 'running' || signal.aborted) return;
    if (performance.now() < retryAt) return;
    working = true;
    const mine = epoch;
    work(mine)
      .then(
        () => {
          failures = 0;
        },
        (error) => {
          if (signal.aborted || mine !== epoch) return;
          failures += 1;
          retryAt = performance.now() + Math.min(lastRetryMs, firstRetryMs * 2 ** (failures - 1));
          log.warn({ err: error, batchId: batch.id, failures }, 'rows could not be prepared; trying again');
        },
      )
      .finally(() => {
        working = false;
        wake();
      });
  }

  async function work(mine: number): Promise<void> {
    while (ready.length < ahead && !signal.aborted) {
      if (found.length === 0) {
        const chunk = await nextRows(mine);
        if (mine !== epoch) return;
        if (chunk === undefined) {
          exhausted = true;
          return;
        }
        found = chunk;
        continue;
      }
      const group = found.slice(0, Math.min(groupRows, ahead));
      const jobs = await rows.prepare(batch, group, signal);
      if (mine !== epoch) return;
      found = found.slice(group.length);
      ready.push(...jobs);
    }
  }

  /** @returns the waiting rows of a chunk, or none when one was opened; undefined when there is nothing to be had. */
  async function nextRows(mine: number): Promise<ChunkRow[] | undefined> {
    const unseen = batch.openChunks.find((chunk) => !seen.has(chunk));
    if (unseen !== undefined) {
      const waiting = (await waitingRows(unseen)).filter(({ row }) => row >= resumeAt);
      const some = waiting.slice(0, ahead);
      if (mine !== epoch) return undefined;
      if (some.length < waiting.length) resumeAt = some.at(-1)!.row + 1;
      else {
        seen.add(unseen);
        resumeAt = 0;
      }
      return some;
    }
    if (batch.openChunks.length >= openChunks) return undefined;
    if (batch.retryNext !== undefined) await reopen(batch.retryNext);
    else if (batch.opened < batch.chunks) await batches.open(batch, { chunk: batch.opened });
    else return undefined;
    const now = await batches.get(batch);
    if (now === undefined || now.state !== 'running' || now.round !== batch.round || mine !== epoch)
      return undefined;
    batch = now;
    return [];
  }

  async function reopen(chunk: number): Promise<void> {
    const { tenant, id } = batch;
    const part = await parts.readPart(tenant, id, chunk).catch((error) => {
      if (error instanceof InfrastructureFault) throw error;
      log.error(
        { err: error, batchId: id, chunk },
        'part cannot be read: what failed in it is not tried again',
      );
      return [];
    });
    const states = part.map(({ state }) => (state === 'failed' ? '.' : 'k')).join('');
    await batches.reopen(batch, { chunk, states });
  }

  async function waitingRows(chunk: number): Promise<ChunkRow[]> {
    const { tenant, id } = batch;
    const states = await batches.rowStates(batch, chunk);
    if (states?.includes('.') !== true) return [];
    const manifest = decodeChunk(await storage.read(chunkKey(tenant, id, chunk), signal));
    return manifest.flatMap((of, row) => (states[row] === '.' ? [{ chunk, row, manifest: of }] : []));
  }

  function reset(): void {
    epoch += 1;
    ready = [];
    found = [];
    seen.clear();
    resumeAt = 0;
    exhausted = false;
    retryAt = 0;
    lastTaken = performance.now();
  }

  return {
    get batch() {
      return batch;
    },
    update(now, rowsAhead) {
      const isForgotten =
        now.waiting > 0 && ready.length === 0 && !working && performance.now() - lastTaken > forgottenMs;
      if (now.round !== batch.round || now.state !== 'running' || isForgotten) reset();
      batch = now;
      ahead = rowsAhead;
      exhausted = false;
      wake();
    },
    get next() {
      return ready[0];
    },
    take(most, letIn) {
      let count = 0;
      while (count < most && count < ready.length && letIn(ready[count]!)) count += 1;
      const taken = ready.slice(0, count);
      ready = ready.slice(count);
      if (count > 0) lastTaken = performance.now();
      wake();
      return taken;
    },
    giveBack(taken) {
      ready = [...taken, ...ready];
    },
    reset,
  };
}
