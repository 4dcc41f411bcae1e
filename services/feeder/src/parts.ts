/** Closing a chunk: the results of its rows leave Redis and become a part in storage, found by the index. */

import type { AnswerEntry, AnswerIndex } from '@acousticsense/shared/answer-index';
import { answerKey, identityOf } from '@acousticsense/shared/answer-key';
import { type BatchRecord, decodePart, encodePart, type PartRow } from '@acousticsense/shared/batch';
import { type BatchRecords, type BatchRef, rowJobId } from '@acousticsense/shared/batch-records';
import { answeredRow, judgedRow, unfedRow } from '@acousticsense/shared/ended-row';
import {
  createHouse,
  type House,
  mappingSchema,
  ownNames,
  verdicts,
} from '@acousticsense/shared/house-genres';
import type { Selection, SourceObject } from '@acousticsense/shared/job';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { chunkRows, decodeChunk, type ManifestRow, rowIndex } from '@acousticsense/shared/manifest';
import {
  batchKey,
  chunkKey,
  mappingKey,
  modelKey,
  partKey,
  rowsPrefix,
} from '@acousticsense/shared/object-keys';
import { isFinished } from '@acousticsense/shared/pipeline';
import { knownModel } from '@acousticsense/shared/serving';
import type { SourceMatcher, Sources } from '@acousticsense/shared/sources';
import type { Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';

export interface PartsDeps {
  readonly redis: Redis;
  readonly storage: Storage;
  readonly records: JobRecords;
  readonly batches: BatchRecords;
  readonly index: Pick<AnswerIndex, 'writeSegment'>;
  readonly sources: Pick<Sources, 'matcher'>;
  readonly log: Logger;
}

export type Parts = ReturnType<typeof createParts>;

export function createParts({ redis, storage, records, batches, index, sources, log }: PartsDeps) {
  /**
   * Writes the part of a chunk whose rows have all ended, then the index's segment, then lets go of what Redis held.
   * Killed anywhere, the whole is done again and writes the same: until the last step the records are there.
   *
   * Another process may be at the same chunk, and be ahead. So nothing is written before it is known that the records
   * were read while the chunk was not closed yet: what came in between would be taken for lost rows.
   */
  async function close(tenant: string, batchId: string, chunk: number): Promise<void> {
    const ref = { tenant, id: batchId };
    const batch = await batches.get(ref);
    const states = await batches.rowStates(ref, chunk);
    if (batch === undefined) return forgetChunk(ref, chunk);
    if (states === undefined || /[.o]/.test(states)) return;
    const key = partKey(tenant, batchId, chunk);
    const manifest = decodeChunk(await storage.read(chunkKey(tenant, batchId, chunk)));
    const jobIds = manifest.map((_, row) => rowJobId(batchId, rowIndex({ chunk, row })));
    const found = await records.getMany(tenant, jobIds);
    const kept = states.includes('k') ? await readPart(tenant, batchId, chunk) : [];
    const isSame = (await batches.get(ref))?.round === batch.round;
    if (!isSame || (await batches.rowStates(ref, chunk)) !== states) return;

    const judge = await judgeOf(batch);
    const rows = manifest.map((row, at): PartRow => {
      const record = found[at];
      if (states[at] === 'k' && kept[at]) return kept[at];
      if (record !== undefined && isFinished(record.state))
        return judge(answeredRow(batch, row, rowIndex({ chunk, row: at }), record));
      const cancelled = states[at] === 'x';
      if (!cancelled) log.error({ batchId, chunk, row: at, state: states[at] }, 'a row has no record');
      return unfedRow(batch, row, rowIndex({ chunk, row: at }), cancelled);
    });
    await storage.put(key, encodePart(rows));
    // What is kept was counted, and stands in the segment of the round that found it.
    const fresh = rows.filter((_, at) => states[at] !== 'k');
    const endpointOf = endpoints(await sources.matcher(tenant));
    const entries = fresh.flatMap((row) => entryOf(batch, row, endpointOf) ?? []);
    await index.writeSegment({ tenant, batchId, chunk, round: batch.round, entries });
    if (manifest.some(({ audio }) => 'url' in audio)) await deleteFetched(tenant, batchId, chunk);
    const { round } = batch;
    const count = (state: PartRow['state']) => rows.filter((row) => row.state === state).length;
    const part = {
      rows: rows.length,
      completed: count('completed'),
      failed: count('failed'),
      cancelled: count('cancelled'),
    };
    await batches.close(ref, { chunk, round, states, jobIds, tally: tallyOf(fresh), part });
  }

  /** Of a batch that is no more. */
  async function forgetChunk(ref: BatchRef, chunk: number): Promise<void> {
    const part = { rows: 0, completed: 0, failed: 0, cancelled: 0 };
    await batches.close(ref, { chunk, round: 0, states: '', jobIds: [], tally: {}, part });
  }

  /** The fetched audio of a chunk; what explains its results stays. */
  async function deleteFetched(tenant: string, batchId: string, chunk: number): Promise<void> {
    for await (const { key } of storage.list(rowsPrefix(tenant, batchId, chunk))) {
      if (key.endsWith('/audio')) await storage.delete(key);
    }
  }

  /** @throws {ObjectNotFound} */
  async function readPart(tenant: string, batchId: string, chunk: number): Promise<PartRow[]> {
    return decodePart(await storage.read(partKey(tenant, batchId, chunk)));
  }

  /** A batch that has ended is written where it outlives Redis. */
  async function save(tenant: string, batchId: string): Promise<void> {
    const ref = { tenant, id: batchId };
    const batch = await batches.get(ref);
    if (batch?.endedAt !== undefined) {
      const model = await knownModel(redis, batch.modelDigest);
      if (model) await storage.put(modelKey(tenant, batchId), Buffer.from(JSON.stringify(model)));
      await storage.put(batchKey(tenant, batchId), Buffer.from(JSON.stringify(batch)));
    }
    await batches.saved(ref, { endedAt: batch?.endedAt ?? 0 });
  }

  const houses = new Map<string, House>();
  async function judgeOf(batch: BatchRecord): Promise<(row: PartRow) => PartRow> {
    const model = await knownModel(redis, batch.modelDigest);
    if (model === undefined) return (row) => row;
    let house = houses.get(batch.id);
    if (house === undefined) {
      house = createHouse(batch.mapped ? await readMapping(batch) : ownNames(model.labels));
      if (houses.size >= 100) houses.clear();
      houses.set(batch.id, house);
    }
    const known = house;
    const { threshold } = batch.presentation;
    const limits = { threshold, outlierThreshold: model.outlierThreshold };
    return (row) => judgedRow(row, known, limits);
  }

  async function readMapping({ tenant, id }: BatchRecord) {
    return mappingSchema.parse(JSON.parse((await storage.read(mappingKey(tenant, id))).toString('utf8')));
  }

  return { close, save, readPart };
}

function entryOf(batch: BatchRecord, row: PartRow, endpointOf: EndpointOf): AnswerEntry | undefined {
  const { ref, revision, finishedAt } = row;
  if (row.state === 'cancelled') return undefined;
  const keys = row.state === 'completed' ? answerKeysOf(batch, row, endpointOf) : [];
  if (ref === undefined && keys.length === 0) return undefined;
  const at = row.row % chunkRows;
  return { row: at, revision, finishedAt, keys, ...(ref === undefined ? {} : { ref }) };
}

function tallyOf(rows: readonly PartRow[]): Record<string, number> {
  return Object.fromEntries(
    verdicts.map((verdict) => [
      verdict,
      rows.filter((row) => row.state === 'completed' && row.verdict === verdict).length,
    ]),
  );
}

/**
 * By what a row is recognised: its object at this ETag or version, or the caller's word for the sound. What a job
 * stores beside its result cannot be taken over, so a batch that asks for it asks anew.
 *
 * @param endpointOf the source that its bucket is registered with.
 */
export function answerKeysOf(
  batch: Pick<BatchRecord, 'modelDigest' | 'selection' | 'extras'>,
  row: Pick<ManifestRow, 'audio' | 'contentId' | 'selection'>,
  endpointOf: EndpointOf,
): string[] {
  if (batch.extras) return [];
  const references = [
    ...('s3' in row.audio
      ? [identityOf({ s3: row.audio.s3, sourceEndpoint: endpointOf(row.audio.s3) })]
      : []),
    // An upload is written once.
    ...('upload' in row.audio ? [identityOf({ contentId: `upload:${row.audio.upload}` })] : []),
    ...(row.contentId === undefined ? [] : [identityOf({ contentId: row.contentId })]),
  ].filter((identity) => identity !== undefined);
  const selection = selectionOf(batch, row);
  return references.map((identity) => answerKey({ identity, modelDigest: batch.modelDigest, selection }));
}

type EndpointOf = (object: SourceObject) => string | undefined;

export function endpoints(matcher: SourceMatcher): EndpointOf {
  return ({ bucket, key }) => matcher(bucket, key)?.endpoint;
}

export function selectionOf(
  batch: Pick<BatchRecord, 'selection'>,
  row: Pick<ManifestRow, 'selection'>,
): Selection {
  const { windows, start, duration } = { ...batch.selection, ...row.selection };
  return {
    windows: windows ?? batch.selection.windows,
    start: start ?? batch.selection.start,
    ...(duration === undefined ? {} : { duration }),
  };
}
