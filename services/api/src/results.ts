/** Results of batches as callers see them: of one row, of all, and the latest of a ref. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { AnswerIndex, Locator } from '@acousticsense/shared/answer-index';
import type { BatchRecord, PartRow } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { judgedRow } from '@acousticsense/shared/ended-row';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { createHouse, type House, mappingSchema, ownNames } from '@acousticsense/shared/house-genres';
import { type JobRecord, type Timeline, timelineSchema } from '@acousticsense/shared/job';
import { type JobRecords, keys } from '@acousticsense/shared/job-records';
import { chunkRows, decodeChunk, type ManifestAudio, rowIndex } from '@acousticsense/shared/manifest';
import { chunkKey, mappingKey, modelKey, timelineKey } from '@acousticsense/shared/object-keys';
import { withRedis } from '@acousticsense/shared/redis';
import { knownModel, type ModelDescription, modelDescriptionSchema } from '@acousticsense/shared/serving';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { BatchRows, UnendedRow } from './batch-rows.ts';
import { type Extra, extras, isAskedFor, readExtra } from './extras.ts';
import { hasTimeline, presentJob, presentResult } from './presentation.ts';
import type { LatestResult, ResultRow, ResultsQuery, View } from './result-schemas.ts';
import type { StoredBatches } from './stored-batches.ts';
import type { UploadedRefs } from './uploaded-refs.ts';

export interface ResultsDeps {
  readonly redis: Redis;
  readonly storage: Pick<Storage, 'read'>;
  readonly records: Pick<JobRecords, 'getMany'>;
  readonly batches: Pick<BatchRecords, 'getMany' | 'active' | 'openChunks'>;
  readonly stored: StoredBatches;
  readonly rows: BatchRows;
  readonly index: Pick<AnswerIndex, 'refresh' | 'findRef'>;
  readonly uploadedRefs: Pick<UploadedRefs, 'jobsOf'>;
}

/** A batch with what its rows are told in. */
export interface OpenBatch {
  readonly batch: BatchRecord;
  /** Without it rows have no labels. */
  readonly model: ModelDescription | undefined;
  readonly house: House | undefined;
  readonly topK: number;
  readonly threshold: number;
}

export type Results = ReturnType<typeof createResults>;

/** Without a sign that anything was closed, the index is believed for this long. */
const indexAgeMs = 5_000;
/** After a start it may take a minute, which nobody should wait for. */
const indexPatienceMs = 5_000;
/** Open chunks that are looked through for a ref, those of the newest batches first. */
const mostOpenChunks = 64;
/** What is remembered of their manifests: some 100 kB each. */
const rememberedChunks = 128;

export function createResults(deps: ResultsDeps) {
  const { redis, storage, records, batches, stored, rows, index, uploadedRefs } = deps;

  /** @throws {ProblemError} batch_not_found, batch_gone */
  async function open(tenant: string, id: string, view: View = {}): Promise<OpenBatch> {
    const batch = await stored.read(tenant, id);
    const model = (await knownModel(redis, batch.modelDigest)) ?? (await storedModel(batch));
    const mapping = batch.mapped ? await readJson(mappingKey(tenant, id)) : undefined;
    const names = mapping === undefined ? model && ownNames(model.labels) : mappingSchema.parse(mapping);
    return {
      batch,
      model,
      house: names && createHouse(names),
      topK: view.topK ?? batch.presentation.topK,
      threshold: view.threshold ?? batch.presentation.threshold,
    };
  }

  async function storedModel({ tenant, id }: BatchRecord): Promise<ModelDescription | undefined> {
    const json = await readJson(modelKey(tenant, id));
    return json === undefined ? undefined : modelDescriptionSchema.parse(json);
  }

  async function readJson(key: string, signal?: AbortSignal): Promise<unknown> {
    try {
      return JSON.parse((await storage.read(key, signal)).toString('utf8'));
    } catch (error) {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    }
  }

  /** Rows that have ended and that the query asks for, in the order of the manifest, some at a time. */
  async function* ended(
    opened: OpenBatch,
    { state, verdict, from, to }: Pick<ResultsQuery, 'state' | 'verdict' | 'from' | 'to'>,
    signal: AbortSignal,
  ): AsyncGenerator<PartRow[]> {
    for await (const slice of rows.ended(opened.batch, { from, to }, signal)) {
      const wanted = slice
        .filter((row) => !state || state.includes(row.state))
        .map((row) => judged(opened, row))
        .filter((row) => !verdict || (row.verdict !== undefined && verdict.includes(row.verdict)));
      if (wanted.length > 0) yield wanted;
    }
  }

  /** @throws {ProblemError} result_not_found: the batch has no such row */
  async function row(opened: OpenBatch, wanted: string): Promise<PartRow | UnendedRow> {
    const { batch } = opened;
    const found = /^\d{1,9}$/.test(wanted) ? await rows.find(batch, Number(wanted)) : undefined;
    if (found) return isEnded(found) ? judged(opened, found) : found;
    throw new ProblemError(
      'result_not_found',
      `The batch has no row "${wanted.slice(0, 20)}": it has ${batch.rows}, counted from 0.`,
    );
  }

  /**
   * Every window of a row's recording.
   * @throws {ProblemError} job_not_finished, result_not_found
   */
  async function timeline(opened: OpenBatch, row: PartRow | UnendedRow): Promise<ResultRow['windows']> {
    if (!isEnded(row)) throw notEnded(row);
    const windows = present(opened, row, await readTimeline(opened.batch, row)).windows;
    if (windows) return windows;
    throw new ProblemError(
      'result_not_found',
      row.state === 'completed'
        ? `The windows of row ${row.row} are no longer stored.`
        : `Row ${row.row} ended as ${row.state}, so it has no windows.`,
    );
  }

  async function readTimeline(batch: BatchRecord, row: PartRow): Promise<Timeline | undefined> {
    if (!hasTimeline(row)) return undefined;
    const json = await readJson(timelineKey(placeOf(batch, row)));
    return json === undefined ? undefined : timelineSchema.parse(json);
  }

  /** @throws {ProblemError} as `readExtra` */
  function extra({ batch }: OpenBatch, row: PartRow | UnendedRow, which: Extra): Promise<Buffer> {
    const state = row.state === 'waiting' ? 'pending' : row.state;
    return readExtra(storage, { ...placeOf(batch, row), state, extras: batch.extras }, which);
  }

  /**
   * The latest result of a ref, of batches and uploads: the one of the highest revision. Rows of open chunks are seen
   * in the newest {@link mostOpenChunks} of them, others once their chunk is closed.
   *
   * @throws {ProblemError} result_not_found; result_gone, with the date of the last deletion
   * @throws {InfrastructureFault} `redis`, `storage`, `index`
   */
  async function latest(tenant: string, ref: string, view: View = {}): Promise<LatestResult> {
    const live = await findLive(tenant, ref);
    const uploaded = await findUploaded(tenant, ref);
    // After the look at open chunks: what was closed before it shows in the signs, and so is in the index.
    await catchUp(tenant, await signsOfClosing(tenant));
    const located = index.findRef(tenant, ref);
    const found = [live, uploaded, located && 'row' in located ? located : undefined]
      .filter((candidate) => candidate !== undefined)
      .sort((a, b) => (b.revision ?? 0) - (a.revision ?? 0));
    let deletedAt = located && 'deletedAt' in located ? located.deletedAt : undefined;
    for (const candidate of found) {
      if ('audio' in candidate && 'tenant' in candidate) return presentUpload(candidate, view);
      try {
        return await presentFound(tenant, candidate, view);
      } catch (error) {
        // Deleted since the index was caught up; or its record was lost before it was written into the storage.
        if (!(error instanceof ProblemError)) throw error;
        if (error.code !== 'batch_gone' && error.code !== 'batch_not_found') throw error;
        deletedAt = error.details.deletedAt ?? deletedAt;
      }
    }
    if (deletedAt === undefined)
      throw new ProblemError('result_not_found', 'There is no result of this ref, or none yet.');
    throw new ProblemError(
      'result_gone',
      `The results of this ref were deleted, the last one on ${new Date(deletedAt).toISOString()}.`,
      { deletedAt },
    );
  }

  async function presentFound(tenant: string, found: Locator | LiveRow, view: View): Promise<LatestResult> {
    const opened = await open(tenant, found.batchId, view);
    const { batch } = opened;
    const answered = 'found' in found ? found.found : await rows.stored(batch, found);
    const { id, name } = batch;
    return {
      batch: { id, ...(name === undefined ? {} : { name }) },
      ...present(opened, judged(opened, answered)),
    };
  }

  async function presentUpload(record: JobRecord, view: View): Promise<LatestResult> {
    const { topK, threshold } = record.presentation;
    const presentation = { topK: view.topK ?? topK, threshold: view.threshold ?? threshold };
    const model = await knownModel(redis, record.modelDigest);
    const job = presentJob({ ...record, presentation }, model);
    const { windows, ...answer } = job.result ?? {};
    const { self, explanation, vectors } = job.links;
    return {
      ...(record.ref === undefined ? {} : { ref: record.ref }),
      filename: job.filename,
      state: job.state,
      revision: record.revision,
      jobId: job.id,
      finishedAt: job.updatedAt,
      ...answer,
      ...(windows && !hasTimeline(record) ? { windows } : {}),
      ...(job.input ? { input: job.input } : {}),
      warnings: job.warnings,
      ...(job.error ? { error: job.error } : {}),
      model: job.model,
      ...(job.timings ? { timings: job.timings } : {}),
      links: {
        self,
        ...(explanation === undefined ? {} : { explanation }),
        ...(vectors === undefined ? {} : { vectors }),
      },
    };
  }

  /** Batches that have not ended, newest first. */
  async function activeBatches(tenant: string): Promise<BatchRecord[]> {
    const ids = await batches.active(tenant);
    const found = await batches.getMany(ids.map((id) => ({ tenant, id })));
    return found.filter((batch) => batch !== undefined).sort((a, b) => (a.id < b.id ? 1 : -1));
  }

  /**
   * Others, when a chunk was closed since. Every closing raises `closed`, which is lowered only together with a step of
   * `retryNext`; a batch that began and ended, or ran once more, unseen, has taken a revision.
   */
  async function signsOfClosing(tenant: string): Promise<string> {
    const revision = await withRedis(() => redis.get(keys.revision(tenant)));
    const active = await activeBatches(tenant);
    const signs = active.map(({ id, round, retryNext, closed }) => [id, round, retryNext, closed]);
    return JSON.stringify([revision, signs]);
  }

  const seenSigns = new Map<string, string>();
  async function catchUp(tenant: string, signs: string): Promise<void> {
    const unchanged = seenSigns.get(tenant) === signs;
    const refreshed = index.refresh(tenant, { maxAgeMs: unchanged ? indexAgeMs : 0 }).then(() => {
      if (seenSigns.size > 1_000) seenSigns.clear();
      seenSigns.set(tenant, signs);
    });
    const stop = new AbortController();
    // It goes on meanwhile: who asks again joins it.
    const late = sleep(indexPatienceMs, undefined, { signal: stop.signal }).then(() => {
      throw new InfrastructureFault('index', 'The index of known answers is not caught up yet.');
    });
    try {
      await Promise.race([refreshed, late]);
    } finally {
      stop.abort();
      late.catch(() => {});
      refreshed.catch(() => {});
    }
  }

  interface LiveRow {
    readonly batchId: string;
    readonly revision: number;
    readonly found: PartRow;
  }

  async function findLive(tenant: string, ref: string): Promise<LiveRow | undefined> {
    let looked = 0;
    let latest: LiveRow | undefined;
    for (const batch of await activeBatches(tenant)) {
      for (const chunk of await batches.openChunks(batch)) {
        looked += 1;
        if (looked > mostOpenChunks) return latest;
        const at = (await refsOf(batch, chunk)).get(ref);
        // When the chunk is closed meanwhile, the row is read from its part.
        const found = at === undefined ? undefined : await rows.find(batch, rowIndex({ chunk, row: at }));
        if (found === undefined || !isEnded(found) || found.state === 'cancelled') continue;
        const { revision } = found;
        if (latest === undefined || revision > latest.revision)
          latest = { batchId: batch.id, revision, found };
      }
    }
    return latest;
  }

  const refsOfChunks = new Map<string, Promise<ReadonlyMap<string, number>>>();
  /** The manifest of a chunk never changes. */
  function refsOf({ tenant, id }: BatchRecord, chunk: number): Promise<ReadonlyMap<string, number>> {
    const key = chunkKey(tenant, id, chunk);
    const known = refsOfChunks.get(key) ?? readRefs(key);
    // The one that was used last is last.
    refsOfChunks.delete(key);
    refsOfChunks.set(key, known);
    known.catch(() => refsOfChunks.delete(key));
    if (refsOfChunks.size > rememberedChunks) refsOfChunks.delete(refsOfChunks.keys().next().value!);
    return known;
  }

  async function readRefs(key: string): Promise<ReadonlyMap<string, number>> {
    try {
      const manifest = decodeChunk(await storage.read(key));
      return new Map(manifest.flatMap(({ ref }, at) => (ref === undefined ? [] : [[ref, at] as const])));
    } catch (error) {
      // Its batch was deleted.
      if (error instanceof ObjectNotFound) return new Map();
      throw error;
    }
  }

  async function findUploaded(tenant: string, ref: string): Promise<JobRecord | undefined> {
    const found = await records.getMany(tenant, await uploadedRefs.jobsOf(tenant, ref));
    return found
      .filter((record) => record !== undefined)
      .filter(({ state }) => state === 'completed' || state === 'failed')
      .sort((a, b) => (b.revision ?? 0) - (a.revision ?? 0))[0];
  }

  return { open, ended, row, timeline, extra, latest };
}

function isEnded(row: PartRow | UnendedRow): row is PartRow {
  return 'finishedAt' in row;
}

/** As `threshold` has it: what stands in the part was judged by the batch's own. */
function judged({ model, house, threshold }: OpenBatch, row: PartRow): PartRow {
  return house && model
    ? judgedRow(row, house, { threshold, outlierThreshold: model.outlierThreshold })
    : row;
}

/** @param row judged, when it has ended. */
export function present(
  { batch, model, house, topK, threshold }: OpenBatch,
  row: PartRow | UnendedRow,
  timeline?: Timeline,
): ResultRow {
  const self = `/v1/batches/${batch.id}/rows/${row.row}`;
  const ended = isEnded(row) ? row : undefined;
  const probabilities = ended?.outcome?.probabilities;
  const { windows, ...answer } =
    (ended && presentResult({ ...ended, presentation: { topK, threshold } }, model, timeline)) ?? {};
  const long = ended !== undefined && hasTimeline(ended);
  return {
    row: row.row,
    line: row.line,
    ...(row.ref === undefined ? {} : { ref: row.ref }),
    audio: audioName(row.audio),
    state: row.state,
    ...(ended ? { revision: ended.revision } : {}),
    jobId: row.jobId,
    ...answer,
    ...(windows && (!long || timeline) ? { windows } : {}),
    ...(batch.mapped && house && probabilities ? { house: house.rank(probabilities).slice(0, topK) } : {}),
    ...(row.declaredGenre ? { declaredGenre: row.declaredGenre } : {}),
    ...(ended ? judgementOf(ended) : {}),
    ...(ended?.decoded ? { input: ended.decoded.input } : {}),
    warnings: ended?.decoded?.warnings ?? [],
    ...(ended?.error ? { error: ended.error } : {}),
    ...(ended?.reused ? { reused: true } : {}),
    ...(ended ? { finishedAt: new Date(ended.finishedAt).toISOString() } : {}),
    model: modelOf(batch),
    ...(ended?.timings ? { timings: ended.timings } : {}),
    links: {
      self,
      ...(long ? { timeline: `${self}/timeline` } : {}),
      ...(row.state === 'completed'
        ? Object.fromEntries(
            extras.filter((extra) => isAskedFor(batch, extra)).map((extra) => [extra, `${self}/${extra}`]),
          )
        : {}),
    },
  };
}

function judgementOf({ predicted, confidence, verdict, disagreement }: PartRow) {
  return {
    ...(predicted === undefined ? {} : { predicted }),
    ...(confidence === undefined ? {} : { predictedProbability: confidence }),
    ...(verdict === undefined ? {} : { verdict }),
    ...(disagreement === undefined ? {} : { disagreement }),
  };
}

export function modelOf({ modelName, modelVersion, modelDigest, profileHash }: BatchRecord) {
  return { name: modelName, version: modelVersion, digest: modelDigest, profile: profileHash };
}

/** As the caller wrote it. */
export function audioName(audio: ManifestAudio): string {
  if ('s3' in audio) return `s3://${audio.s3.bucket}/${audio.s3.key}`;
  return 'url' in audio ? audio.url : `upload:${audio.upload}`;
}

function placeOf({ tenant, id }: BatchRecord, { row, jobId }: { row: number; jobId: string }) {
  const batch = { id, chunk: Math.floor(row / chunkRows), row: row % chunkRows };
  return { tenant, id: jobId, batch };
}

function notEnded({ row, state }: UnendedRow): ProblemError {
  return new ProblemError('job_not_finished', `Row ${row} has not ended: it is ${state}.`, { retryAfter: 5 });
}
