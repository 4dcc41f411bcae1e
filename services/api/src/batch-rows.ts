/**
 * The rows of a batch, wherever they lie: those of a closed chunk in its part, those of an open one in their job
 * records, those of a chunk that was never opened in the manifest alone.
 *
 * A chunk may be closed while it is read. Its part is written first; then, in one step, its records vanish and it is
 * open no longer (batch.lua). So a chunk is read whole before any of it is handed out, and when it was not open from
 * the first look to the last one, it is read again, from its part: no row is missed, and none comes twice.
 */
import { setImmediate as turn } from 'node:timers/promises';
import type { BatchRecord, PartRow } from '@acousticsense/shared/batch';
import { type BatchRecords, rowJobId } from '@acousticsense/shared/batch-records';
import { answeredRow, unfedRow } from '@acousticsense/shared/ended-row';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { chunkRows, decodeChunk, type ManifestRow, rowIndex } from '@acousticsense/shared/manifest';
import { chunkKey, partKey } from '@acousticsense/shared/object-keys';
import { isFinished, type JobState } from '@acousticsense/shared/pipeline';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { StoredBatches } from './stored-batches.ts';

export interface BatchRowsDeps {
  readonly batches: Pick<BatchRecords, 'rowStates'>;
  readonly records: Pick<JobRecords, 'getMany'>;
  readonly storage: Pick<Storage, 'read'>;
  readonly stored: StoredBatches;
}

export interface RowRange {
  /** The first row, counted from 0. */
  readonly from?: number | undefined;
  /** The row after the last one. */
  readonly to?: number | undefined;
}

/** A row that has not ended. */
export interface UnendedRow extends ManifestRow {
  readonly row: number;
  readonly jobId: string;
  readonly state: JobState | 'waiting';
}

export type BatchRows = ReturnType<typeof createBatchRows>;

/** Rows that are parsed and handed out at a time, between which the process does other things. */
const sliceRows = 100;
/** Chunks read ahead of the one that is handed out. A chunk is some 2 MB. */
const chunksAhead = 2;
/** Records read in one round trip: some 4 kB each. */
const recordsAtOnce = 200;
/** Looks at a chunk that is closed, or opened again, under the reader's eyes. */
const mostLooks = 4;

export function createBatchRows({ batches, records, storage, stored }: BatchRowsDeps) {
  /**
   * The rows that have ended, in the order of the manifest, a slice at a time. Chunks that are opened after `batch` was
   * read are left out.
   * @throws {ProblemError} batch_gone, of a batch that is deleted meanwhile
   */
  async function* ended(batch: BatchRecord, range: RowRange, signal: AbortSignal): AsyncGenerator<PartRow[]> {
    const { from = 0, to = Number.POSITIVE_INFINITY } = range;
    const first = Math.floor(from / chunkRows);
    const end = Math.min(batch.opened, Math.ceil(to / chunkRows));
    const stop = new AbortController();
    const either = AbortSignal.any([signal, stop.signal]);
    const reading: Promise<Chunk>[] = [];
    try {
      for (let next = first, chunk = first; chunk < end; chunk += 1) {
        for (; next < end && next <= chunk + chunksAhead; next += 1) {
          const begun = readChunk(batch, next, either);
          // One that fails while an earlier one is waited for is told when its turn comes.
          begun.catch(() => {});
          reading.push(begun);
        }
        const rows = await reading.shift()!;
        for (let at = 0; at < rows.length; at += sliceRows) {
          const slice = rows.slice(at, at + sliceRows).map(parsed);
          const wanted = slice.filter(({ row }) => row >= from && row < to);
          if (wanted.length > 0) yield wanted;
          await turn();
          signal.throwIfAborted();
        }
      }
    } finally {
      stop.abort();
    }
  }

  /**
   * One row, ended or not.
   * @param index within the batch, from 0
   * @returns undefined when the batch has no such row.
   */
  async function find(
    batch: BatchRecord,
    index: number,
    signal?: AbortSignal,
  ): Promise<PartRow | UnendedRow | undefined> {
    if (index >= batch.rows) return undefined;
    const chunk = Math.floor(index / chunkRows);
    const at = index % chunkRows;
    for (let look = 1; look <= mostLooks; look += 1) {
      const states = await batches.rowStates(batch, chunk);
      if (states === undefined && chunk < batch.opened) {
        const line = (await readPart(batch, chunk, signal))[at];
        return line === undefined ? undefined : parsed(line);
      }
      const state = states?.[at];
      if (state === 'k') return parsed((await readPart(batch, chunk, signal))[at]!);
      const manifest = decodeChunk(await storage.read(chunkKey(batch.tenant, batch.id, chunk), signal))[at]!;
      const jobId = rowJobId(batch.id, index);
      const never = batch.state === 'cancelled' || batch.state === 'cancelling';
      if (states === undefined && never) return unfedRow(batch, manifest, index, true);
      if (states === undefined || state === '.') return { ...manifest, row: index, jobId, state: 'waiting' };
      const [record] = await records.getMany(batch.tenant, [jobId]);
      if (record && isFinished(record.state)) return answeredRow(batch, manifest, index, record);
      if (record) return { ...manifest, row: index, jobId, state: record.state };
      if (state === 'x' && (await batches.rowStates(batch, chunk)))
        return unfedRow(batch, manifest, index, true);
    }
    throw restless(batch, chunk);
  }

  /**
   * A row of a chunk that was closed at least once, as its part has it.
   * @throws {ProblemError} batch_gone
   */
  async function storedRow(
    batch: BatchRecord,
    { chunk, row }: { chunk: number; row: number },
  ): Promise<PartRow> {
    const line = (await readPart(batch, chunk))[row];
    if (line === undefined) throw new Error(`part ${chunk} of ${batch.id} has no row ${row}`);
    return parsed(line);
  }

  async function readChunk(batch: BatchRecord, chunk: number, signal: AbortSignal): Promise<Chunk> {
    for (let look = 1; look <= mostLooks; look += 1) {
      const states = await batches.rowStates(batch, chunk);
      if (states === undefined) return readPart(batch, chunk, signal);
      const rows = await readOpen(batch, chunk, states, signal);
      if (rows) return rows;
    }
    throw restless(batch, chunk);
  }

  /** @returns undefined when the chunk was closed meanwhile. */
  async function readOpen(
    batch: BatchRecord,
    chunk: number,
    states: string,
    signal: AbortSignal,
  ): Promise<PartRow[] | undefined> {
    const { tenant, id } = batch;
    const manifest = decodeChunk(await storage.read(chunkKey(tenant, id, chunk), signal));
    // Of a retry: what did not fail stands in the part of the round before.
    const kept = states.includes('k') ? await readPart(batch, chunk, signal) : [];
    const rows: PartRow[] = [];
    const endedAt = [...states].flatMap((state, at) => ('kcfx'.includes(state) ? [at] : []));
    for (let begin = 0; begin < endedAt.length; begin += recordsAtOnce) {
      const page = endedAt.slice(begin, begin + recordsAtOnce);
      const jobIds = page.map((row) => rowJobId(id, rowIndex({ chunk, row })));
      const found = await records.getMany(tenant, jobIds);
      for (const [n, row] of page.entries()) {
        const [index, record] = [rowIndex({ chunk, row }), found[n]];
        if (states[row] === 'k') rows.push(parsed(kept[row]!));
        else if (record && isFinished(record.state))
          rows.push(answeredRow(batch, manifest[row]!, index, record));
        else if (states[row] === 'x') rows.push(unfedRow(batch, manifest[row]!, index, true));
        else return undefined;
      }
    }
    return (await batches.rowStates(batch, chunk)) === undefined ? undefined : rows;
  }

  /** @throws {ProblemError} batch_gone {InfrastructureFault} `storage`: it should be there and is not. */
  async function readPart(
    { tenant, id }: BatchRecord,
    chunk: number,
    signal?: AbortSignal,
  ): Promise<string[]> {
    try {
      const lines = (await storage.read(partKey(tenant, id, chunk), signal)).toString('utf8').split('\n');
      lines.pop();
      return lines;
    } catch (error) {
      if (!(error instanceof ObjectNotFound)) throw error;
      await stored.read(tenant, id);
      throw new InfrastructureFault('storage', `There is no ${error.key}.`, error);
    }
  }

  return { ended, find, stored: storedRow };
}

/** Rows in their order; of a part as its lines, parsed a slice at a time. */
type Chunk = readonly (PartRow | string)[];

/** Parts are written whole and by this service, so their lines are not validated: a million of them are read. */
function parsed(row: PartRow | string): PartRow {
  return typeof row === 'string' ? (JSON.parse(row) as PartRow) : row;
}

/** A record is missing for longer than it takes to close a chunk. */
function restless({ id }: BatchRecord, chunk: number): InfrastructureFault {
  return new InfrastructureFault('redis', `Chunk ${chunk} of ${id} cannot be read in one state.`);
}
