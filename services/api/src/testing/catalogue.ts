/** Batches for tests: real Redis, real storage, chunks closed as the feeder closes them, results served over HTTP. */
import { randomUUIDv7 } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import {
  type BatchRecord,
  type batchRecordSchema,
  encodePart,
  type PartRow,
} from '@acousticsense/shared/batch';
import { createBatchRecords, type NewBatch, rowJobId } from '@acousticsense/shared/batch-records';
import type { Mapping } from '@acousticsense/shared/house-genres';
import type { Decoded, Outcome } from '@acousticsense/shared/job';
import { createJobRecords, firstGeneration, refOf } from '@acousticsense/shared/job-records';
import { chunkRows, encodeChunk, type ManifestRow, rowIndex } from '@acousticsense/shared/manifest';
import { batchKey, chunkKey, type JobPlace, mappingKey, partKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Storage } from '@acousticsense/shared/storage';
import express from 'express';
import type { Redis } from 'ioredis';
import { pino } from 'pino';
import type { z } from 'zod';
import { startRedis } from '../../../../test/redis.ts';
import { startS3 } from '../../../../test/s3.ts';
import { createParts } from '../../../feeder/src/parts.ts';
import { answerProblem } from '../app.ts';
import { createDiff } from '../batch-diff.ts';
import { createBatchRows } from '../batch-rows.ts';
import { createResultRoutes } from '../result-routes.ts';
import { createResults } from '../results.ts';
import { createStoredBatches } from '../stored-batches.ts';
import { createUploadedRefs } from '../uploaded-refs.ts';

export const labels = ['Blues', 'Hip-Hop', 'Jazz', 'Pop', 'Rap', 'Rock'];
export const digest = 'd'.repeat(64);
export const description = {
  digest,
  name: 'ears',
  version: '3',
  licence: '',
  provenance: '',
  labels,
  profileHash: 'p'.repeat(16),
  windowSeconds: 30,
  stepSeconds: 30,
  threshold: 0.5,
  calibrated: false,
  accuracy: 'none' as const,
};

/** @param confidence of the label; the others share the rest. */
export function heard(label: string, confidence: number): Outcome {
  const rest = (1 - confidence) / (labels.length - 1);
  const probabilities = labels.map((name) => (name === label ? confidence : rest));
  return { probabilities, windows: [probabilities], provider: 'cpu' };
}

export const decoded: Decoded = {
  contentId: 'c'.repeat(64),
  tensorKey: 'tensors/x',
  windows: [{ start: 10, end: 40, validFrames: 1_290, dbAt0: -80, dbAt255: 0, peakDbfs: -1, silent: false }],
  input: {
    container: 'mp3',
    codec: 'mp3',
    sampleRate: 44_100,
    channels: 2,
    duration: 200,
    analysedStart: 10,
    analysedEnd: 40,
    bandwidth: 16_000,
  },
  warnings: [{ code: 'clipped', message: 'Some samples are clipped.', value: 12 }],
};

export const badAudio = { code: 'not_audio', message: 'This is no audio.', retryable: false } as const;

/** How a row of a test ends, or that it does not yet. */
export type Ending =
  | { readonly outcome: Outcome; readonly decoded?: Decoded }
  | { readonly error: typeof badAudio }
  | 'cancelled'
  | 'running';

export type TestCatalogue = Awaited<ReturnType<typeof startCatalogue>>;

export async function startCatalogue({ driver = 'directory' as 'directory' | 's3' } = {}) {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-results-'));
  const s3 = driver === 's3' ? await startS3() : undefined;
  const server = await startRedis();
  const redis = connectRedisForWorker(server.url);
  const storage = openStorage(s3?.url ?? pathToFileURL(path.join(directory, 'objects')).href);
  const records = createJobRecords(redis, retention);
  const batches = createBatchRecords(redis, retention);
  const feederIndex = createAnswerIndex({ storage, directory: path.join(directory, 'feeder'), log });
  const sources = { matcher: async () => () => undefined };
  const parts = createParts({
    redis,
    storage,
    records,
    batches,
    index: feederIndex,
    sources,
    log,
  });
  const served = await serveResults({ redis, storage, directory: path.join(directory, 'api') });
  await describeModel();

  const manifests = new Map<string, readonly ManifestRow[]>();

  async function describeModel(): Promise<void> {
    await redis.set(`as:model:${digest}`, JSON.stringify(description));
  }

  /** A batch whose manifest is complete, and none of whose chunks is open. */
  async function batch(
    manifest: readonly ManifestRow[],
    { mapping, ...overrides }: Partial<NewBatch> & { mapping?: Mapping } = {},
  ): Promise<BatchRecord> {
    const ref = { tenant: overrides.tenant ?? 'acme', id: overrides.id ?? randomUUIDv7() };
    await batches.create({
      ...ref,
      name: undefined,
      state: 'receiving',
      origin: { kind: 'manifest' },
      class: 'backfill',
      modelDigest: digest,
      modelName: description.name,
      modelVersion: description.version,
      profileHash: description.profileHash,
      selection: { windows: 'middle', start: 0 },
      presentation: { topK: 3, threshold: 0.5 },
      extras: undefined,
      traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`,
      tensorsOf: undefined,
      mapped: mapping !== undefined,
      force: false,
      revision: await batches.nextRevision(ref.tenant),
      ...overrides,
    });
    if (mapping) await storage.put(mappingKey(ref.tenant, ref.id), Buffer.from(JSON.stringify(mapping)));
    for (let chunk = 0; chunk * chunkRows < manifest.length; chunk += 1) {
      const part = manifest.slice(chunk * chunkRows, (chunk + 1) * chunkRows);
      await storage.put(chunkKey(ref.tenant, ref.id, chunk), encodeChunk(part));
      await batches.append(ref, { chunk, rows: part.length, bad: 0 });
    }
    await batches.seal(ref, { bad: 0 });
    manifests.set(ref.id, manifest);
    return (await batches.get(ref))!;
  }

  async function openChunk(batch: BatchRecord, chunk: number): Promise<void> {
    await batches.open(batch, { chunk });
  }

  /** Feeds a row of an open chunk, and lets it end. @returns its job. */
  async function end(batch: BatchRecord, index: number, ending: Ending): Promise<JobPlace> {
    return endIn((await batches.get(batch))!, index, ending);
  }

  /** @param now the batch as it is: in its round. */
  async function endIn(now: BatchRecord, index: number, ending: Ending): Promise<JobPlace> {
    const { ref, audio } = manifests.get(now.id)![index]!;
    const place = { id: now.id, chunk: Math.floor(index / chunkRows), row: index % chunkRows };
    const { tenant, modelDigest, modelName, modelVersion, profileHash, traceparent } = now;
    const job = {
      ...{ tenant, modelDigest, modelName, modelVersion, profileHash, traceparent },
      id: rowJobId(now.id, rowIndex(place)),
      batch: place,
      generation: firstGeneration(now.round),
      createdAt: Date.now(),
      audio:
        's3' in audio
          ? { source: { ...audio.s3, etag: '"e"' }, filename: 'a.flac' }
          : { key: 'k', size: 1, filename: 'a.flac' },
      selection: now.selection,
      presentation: now.presentation,
      class: now.class,
      revision: now.revision,
      ...(ref === undefined ? {} : { ref }),
      timings: { decode: 5 },
    };
    if (ending === 'running' || ending === 'cancelled') await records.create({ ...job, state: 'decoded' });
    else if ('error' in ending) await records.create({ ...job, state: 'failed', ...ending });
    else await records.create({ ...job, state: 'completed', decoded, ...ending });
    if (ending === 'cancelled') await records.commit(refOf(job), { from: ['decoded'], to: ending });
    return job;
  }

  /** As the feeder does, when every row of the chunk has ended. */
  const close = ({ tenant, id }: BatchRecord, chunk: number) => parts.close(tenant, id, chunk);

  /** All rows end, all chunks are closed, the batch has ended and is stored. */
  async function finish(batch: BatchRecord, endingOf: (index: number) => Ending): Promise<BatchRecord> {
    const { length } = manifests.get(batch.id)!;
    for (let chunk = 0; chunk * chunkRows < length; chunk += 1) {
      await openChunk(batch, chunk);
      const now = (await batches.get(batch))!;
      const count = Math.min(chunkRows, length - chunk * chunkRows);
      await Promise.all(
        Array.from({ length: count }, (_, row) => {
          const index = chunk * chunkRows + row;
          return endIn(now, index, endingOf(index));
        }),
      );
      await close(batch, chunk);
    }
    await parts.save(batch.tenant, batch.id);
    return (await batches.get(batch))!;
  }

  async function get(at: string, headers: Record<string, string> = {}) {
    const answer = await fetch(served.url + at, { headers });
    const text = Buffer.from(await answer.arrayBuffer()).toString('utf8');
    return {
      status: answer.status,
      headers: answer.headers,
      text,
      // biome-ignore lint/suspicious/noExplicitAny: the answers' shapes are what is tested
      json: (): any => JSON.parse(text),
      // biome-ignore lint/suspicious/noExplicitAny: the answers' shapes are what is tested
      lines: (): any[] =>
        text
          .split('\n')
          .filter(Boolean)
          .map((line) => JSON.parse(line)),
    };
  }

  return {
    ...{ redis, storage, records, batches, parts, feederIndex, s3 },
    ...served,
    ...{ get, batch, openChunk, end, close, finish, describeModel },
    async [Symbol.asyncDispose]() {
      await served.close();
      await feederIndex.close();
      redis.disconnect();
      storage.close();
      await server[Symbol.asyncDispose]();
      await s3?.[Symbol.asyncDispose]();
      await rm(directory, { recursive: true, force: true });
    },
  };
}

const log = pino({ level: 'silent' });
const retention = { resultSeconds: 3_600 };

/** @param deps.directory of the copy of the index. */
export async function serveResults({
  redis,
  storage,
  directory,
}: {
  redis: Redis;
  storage: Storage;
  directory: string;
}) {
  const records = createJobRecords(redis, retention);
  const batches = createBatchRecords(redis, retention);
  const index = createAnswerIndex({ storage, directory, log });
  const stored = createStoredBatches({ batches, storage });
  const rows = createBatchRows({ batches, records, storage, stored });
  const uploadedRefs = createUploadedRefs({ redis, batches, retention });
  const results = createResults({
    ...{ redis, storage, records, batches, stored, rows, index, uploadedRefs },
  });
  const diff = createDiff({ results, stored });
  const closing = new AbortController();
  const app = express();
  app.set('query parser', 'simple');
  app.use(
    createResultRoutes({
      ...{ results, diff, closing: closing.signal },
      // The header says who calls.
      tenantOf: (response) => String(response.req.headers['x-tenant'] ?? 'acme'),
    }),
  );
  app.use(answerProblem({ log }));
  const http = createServer(app).listen(0, '127.0.0.1');
  await once(http, 'listening');
  return {
    ...{ index, stored, rows, uploadedRefs, results, diff },
    url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`,
    async close() {
      closing.abort();
      http.closeAllConnections();
      http.close();
      await index.close();
    },
  };
}

/**
 * A batch that has ended long ago: only the storage has it. Its rows were all answered.
 * @param answerOf what is heard in a row.
 * @param parts that are written.
 */
export async function storeBatch(
  storage: Storage,
  count: number,
  answerOf: (row: number) => Partial<PartRow>,
  parts = Math.ceil(count / chunkRows),
): Promise<string> {
  const id = randomUUIDv7();
  const chunks = Math.ceil(count / chunkRows);
  const batch: z.input<typeof batchRecordSchema> = {
    ...{ id, tenant: 'acme', state: 'completed', createdAt: 0, updatedAt: 0, endedAt: 0 },
    ...{ origin: { kind: 'manifest' }, class: 'backfill', modelDigest: digest, modelName: 'ears' },
    ...{ modelVersion: '3', profileHash: description.profileHash, traceparent: '', revision: 1 },
    ...{ selection: { windows: 'middle', start: 0 }, presentation: { topK: 3, threshold: 0.5 } },
    ...{ chunks, opened: chunks, closed: chunks, rows: count, completed: count, sealed: true },
  };
  await storage.put(batchKey('acme', id), Buffer.from(JSON.stringify(batch)));
  for (let chunk = 0; chunk < parts; chunk += 1) {
    const rows = Math.min(chunkRows, count - chunk * chunkRows);
    const part = Array.from({ length: rows }, (_, at): PartRow => {
      const row = chunk * chunkRows + at;
      return {
        ...{ row, line: row + 1, ref: `track-${row}`, jobId: rowJobId(id, row), state: 'completed' },
        ...{ audio: { s3: { bucket: 'b', key: `2026/${row}.flac`, etag: '"e"' } } },
        ...{ revision: 1, finishedAt: 0, generation: 1, decoded, timings: { decode: 5 } },
        ...answerOf(row),
      };
    });
    await storage.put(partKey('acme', id, chunk), encodePart(part));
  }
  return id;
}

/** Rows of a manifest: `s3://b/<n>.flac`, ref `track-<n>`. */
export function tracks(count: number, more: (n: number) => Partial<ManifestRow> = () => ({})): ManifestRow[] {
  return Array.from({ length: count }, (_, n) => ({
    line: n + 1,
    ref: `track-${n}`,
    audio: { s3: { bucket: 'b', key: `${n}.flac` } },
    ...more(n),
  }));
}
