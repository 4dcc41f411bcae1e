/**
 * Batches for tests of the feeder: real Redis, real queues, real storage, batches made as the API makes them, and
 * workers that commit without decoding or classifying anything. The feeder is a process of its own, or several.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, fork } from 'node:child_process';
import { randomUUIDv7 } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { openSources } from '@acousticsense/egress/open-sources';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { type Backends, openBackends } from '@acousticsense/shared/backends';
import { type BatchRecord, decodePart, isEnded, type PartRow } from '@acousticsense/shared/batch';
import {
  type BatchRef,
  createBatchRecords,
  type NewBatch,
  rowJobId,
} from '@acousticsense/shared/batch-records';
import { type Bundle, loadBundle } from '@acousticsense/shared/bundle';
import { ProblemError } from '@acousticsense/shared/errors';
import type { Decoded, JobRecord, Outcome } from '@acousticsense/shared/job';
import { keys } from '@acousticsense/shared/job-records';
import { chunkRows, encodeChunk, type ManifestRow } from '@acousticsense/shared/manifest';
import { batchKey, chunkKey, partKey } from '@acousticsense/shared/object-keys';
import { stages } from '@acousticsense/shared/pipeline';
import { createSecrets } from '@acousticsense/shared/secrets';
import type { Service } from '@acousticsense/shared/service';
import { announceWorker } from '@acousticsense/shared/serving';
import { createSources } from '@acousticsense/shared/sources';
import { runStage, type StageJob } from '@acousticsense/shared/stage';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { startRedis } from '../../../../test/redis.ts';
import { type FeederParts, wireFeeder } from '../wiring.ts';

const retention = { resultSeconds: 3_600 };
const testSecrets = Buffer.alloc(32, 'test').toString('base64');

export type TestCatalogue = Awaited<ReturnType<typeof startCatalogue>>;

/** What stands in for the work of a stage; it may throw, or wait. */
export type Work = (job: StageJob, signal: AbortSignal) => Promise<void>;

export async function startCatalogue({ appendOnly = false } = {}) {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-feeder-'));
  const server = await startRedis({ appendOnly });
  const storageUrl = pathToFileURL(path.join(directory, 'objects')).href;
  const bundle = await loadBundle(path.resolve(import.meta.dirname, '../../../../models/default'), {
    verifyFiles: false,
  });
  const closers: (() => unknown)[] = [];
  const backends = openBackends(fakeService(closers), { redisUrl: server.url, storageUrl, retention });
  await once(backends.redis, 'ready');
  const { redis, storage, records, queues } = backends;
  const batches = createBatchRecords(redis, retention);
  const sources = createSources({ redis, secrets: createSecrets(testSecrets), storageUrl });
  const feeders = new Set<ChildProcess>();

  /** Registers a bucket that rows may name. */
  async function registerSource(
    tenant: string,
    bucket: string,
    endpoint = 'http://127.0.0.1:9',
  ): Promise<void> {
    const definition = {
      bucket,
      prefix: '',
      endpoint,
      region: 'us-east-1',
      credentials: { accessKeyId: 'S3RVER', secretAccessKey: 'S3RVER' },
    };
    await sources.save(await sources.prepare(tenant, bucket, definition));
  }

  /** A process of its own; ready when this resolves. */
  async function startFeeder(env: Record<string, string> = {}): Promise<ChildProcess> {
    const child = fork(path.join(import.meta.dirname, '../main.ts'), [], {
      stdio: ['ignore', process.env['FEEDER_LOG'] ? 'inherit' : 'ignore', 'inherit', 'ipc'],
      execArgv: [],
      env: {
        PATH: process.env['PATH'],
        REDIS_URL: server.url,
        STORAGE_URL: storageUrl,
        DATA_DIR: directory,
        INDEX_DIR: path.join(directory, 'index'),
        SECRETS_KEY: testSecrets,
        EGRESS_ALLOW: '127.0.0.1',
        ...env,
      },
    });
    feeders.add(child);
    child.once('exit', () => feeders.delete(child));
    await new Promise<void>((resolve, reject) => {
      child.on('message', (message: { type: string; message?: string }) => {
        if (message.type === 'ready') resolve();
        if (message.type === 'failed') reject(new Error(message.message));
      });
      child.once('exit', (code, signal) => reject(new Error(`the feeder ended with ${code ?? signal}`)));
    });
    return child;
  }

  async function stopFeeder(child: ChildProcess, signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const exited = once(child, 'exit');
    child.kill(signal);
    await exited;
  }

  /** One in this process, that asks nobody for a lease; with parts of it replaced. */
  function runFeeder({
    storage,
    queues,
    ...config
  }: Partial<Pick<Backends, 'storage' | 'queues'> & FeederParts['config']> & {
    indexDirectory?: string;
  } = {}) {
    const own: (() => unknown)[] = [];
    const service = fakeService(own);
    const mine = openBackends(service, { redisUrl: server.url, storageUrl, retention });
    const backends = { ...mine, ...(storage ? { storage } : {}), ...(queues ? { queues } : {}) };
    const { log } = service;
    const indexDirectory = config.indexDirectory ?? path.join(directory, `index-${randomUUIDv7()}`);
    const index = createAnswerIndex({ storage: backends.storage, directory: indexDirectory, log });
    own.push(() => index.close());
    const controller = new AbortController();
    const { signal } = controller;
    const { feeder, retention: sweeper } = wireFeeder({
      ...{ backends, index, log, signal },
      ...openSources(service, mine, { secretsKey: testSecrets, egressAllow: '127.0.0.1', storageUrl }),
      config: {
        ...{
          retention,
          factor: 4,
          eventsWaitingMost: 1_000,
          openChunks: 16,
          heads: 32,
          maxRows: 1_000_000,
          resultRetentionMs: 30 * 86_400_000,
          resultsKept: 0,
        },
        ...config,
      },
    });
    const faults: unknown[] = [];
    const running = (async () => {
      while (mine.redis.status !== 'ready') await sleep(5);
      while (!signal.aborted) {
        const busy = await feeder.round().catch((error) => {
          faults.push(error);
          return false;
        });
        if (!busy) await sleep(20);
      }
    })();
    const stop = async () => {
      if (signal.aborted) return;
      controller.abort();
      await running;
      await feeder.settle();
      for (const close of own.reverse()) await close();
    };
    closers.push(stop);
    return { stop, faults, index, sweep: sweeper.sweep };
  }

  /** Decoders and inference services in this process, until they are stopped. */
  function startWorkers({
    concurrency = 8,
    decode = async () => {},
    of = bundle,
  }: {
    concurrency?: number;
    decode?: Work;
    of?: Pick<Bundle, 'digest' | 'profileHash'>;
  } = {}) {
    const own: (() => unknown)[] = [];
    const mine = openBackends(fakeService(own), { redisUrl: server.url, storageUrl, retention });
    const served = { ...bundle, ...of };
    const route = { profileHash: of.profileHash, modelDigest: of.digest };
    for (const kind of ['decoder', 'inference'] as const)
      announceWorker(fakeService(own), mine.redis, served, { kind, concurrency }, () => ({}));
    const common = { route, concurrency, backends: mine };
    runStage({
      ...common,
      service: fakeService(own),
      name: 'decode',
      stage: {
        async run(job, signal) {
          await decode(job, signal);
          await job.commit('decoded', { decoded: decodedOf(job.record) });
          await mine.queues.add('inference', job.record);
        },
        handOn: ({ record }) => mine.queues.add('inference', record),
      },
    });
    runStage({
      ...common,
      service: fakeService(own),
      name: 'inference',
      stage: {
        run: (job) => job.commit('completed', { outcome: outcomeOf(job.record, bundle) }),
        async handOn() {},
      },
    });
    let stopped = false;
    const stop = async () => {
      if (stopped) return;
      stopped = true;
      for (const close of own.reverse()) await close();
    };
    closers.push(stop);
    return { stop };
  }

  /** As the API does it. */
  async function submit(
    rows: readonly ManifestRow[],
    overrides: Partial<NewBatch> = {},
  ): Promise<{ tenant: string; id: string }> {
    const batch = await create({ state: 'receiving', ...overrides });
    for (let chunk = 0; chunk * chunkRows < rows.length; chunk += 1) {
      const some = rows.slice(chunk * chunkRows, (chunk + 1) * chunkRows);
      await storage.put(chunkKey(batch.tenant, batch.id, chunk), encodeChunk(some));
      await batches.append(batch, { chunk, rows: some.length, bad: 0 });
    }
    await batches.seal(batch, { bad: 0 });
    return batch;
  }

  /** Of which the feeder brings the rows. */
  async function create(overrides: Partial<NewBatch> = {}): Promise<{ tenant: string; id: string }> {
    const { tenant = 'acme', id = randomUUIDv7() } = overrides;
    const { name, version } = bundle.manifest;
    await batches.create({
      id,
      tenant,
      name: 'A catalogue',
      state: 'running',
      origin: { kind: 'manifest' },
      class: 'backfill',
      modelDigest: bundle.digest,
      modelName: name,
      modelVersion: version,
      profileHash: bundle.profileHash,
      selection: { windows: 'middle', start: 0 },
      presentation: { topK: 5, threshold: 0.5 },
      extras: undefined,
      traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`,
      tensorsOf: undefined,
      mapped: false,
      force: false,
      revision: await batches.nextRevision(tenant),
      ...overrides,
    });
    return { tenant, id };
  }

  const read = async (ref: BatchRef): Promise<BatchRecord> => {
    const batch = await batches.get(ref);
    assert.ok(batch, 'no such batch');
    return batch;
  };

  async function when(
    ref: BatchRef,
    holds: (batch: BatchRecord) => boolean,
    ms = 60_000,
  ): Promise<BatchRecord> {
    const from = performance.now();
    for (;;) {
      const batch = await read(ref);
      if (holds(batch)) return batch;
      if (performance.now() - from > ms) assert.fail(`never: ${holds}; ${JSON.stringify(batch)}`);
      await sleep(10);
    }
  }

  /** That it has ended and been written. */
  async function ended(ref: BatchRef, ms?: number): Promise<BatchRecord> {
    await when(ref, ({ state }) => isEnded(state), ms);
    const stored = () => storage.stat(batchKey(ref.tenant, ref.id));
    for (let n = 0; n < 500; n += 1) {
      const [{ unsaved, chunks }] = (await batches.pending([ref.tenant])) as [
        Awaited<ReturnType<typeof batches.pending>>[0],
      ];
      if (!unsaved.includes(ref.id) && chunks.length === 0 && (await stored())) break;
      await sleep(10);
    }
    assert.ok(await stored(), 'it was never written');
    return read(ref);
  }

  /** All rows of all parts. */
  async function results(ref: BatchRef): Promise<PartRow[]> {
    const { opened } = await read(ref);
    const parts: PartRow[] = [];
    for (let chunk = 0; chunk < opened; chunk += 1)
      parts.push(...decodePart(await storage.read(partKey(ref.tenant, ref.id, chunk))));
    return parts;
  }

  /** What the reconciler does, without waiting for a minute. */
  async function reconcile(tenant: string): Promise<number> {
    let restored = 0;
    for (const jobId of await records.openSince(tenant, Date.now(), 100_000)) {
      const record = await records.get(tenant, jobId);
      const stage =
        record &&
        Object.entries(stages).find(([, { begins }]) =>
          (begins.from as readonly string[]).includes(record.state),
        )?.[0];
      if (!record || !stage || (await queues.state(stage as 'decode', record)) !== 'gone') continue;
      await queues.add(stage as 'decode', record);
      restored += 1;
    }
    return restored;
  }

  /** Counters equal results, every row stands once and in its place, and Redis has nothing but the batch itself. */
  async function checkWhole(ref: BatchRef): Promise<PartRow[]> {
    const batch = await read(ref);
    const rows = await results(ref);
    const count = (state: PartRow['state']) => rows.filter((row) => row.state === state).length;
    assert.deepEqual(
      rows.map(({ row, jobId }) => [row, jobId]),
      rows.map((_, row) => [row, rowJobId(ref.id, row)]),
    );
    const { waiting, open, completed, failed, cancelled } = batch;
    assert.deepEqual([waiting, open, completed, failed], [0, 0, count('completed'), count('failed')]);
    assert.equal(batch.rows, completed + failed + cancelled);
    if (batch.state !== 'cancelled') assert.equal(rows.length, batch.rows);
    const json = JSON.parse((await storage.read(batchKey(ref.tenant, ref.id))).toString());
    assert.deepEqual([json.state, json.completed, json.endedAt], [batch.state, completed, batch.endedAt]);
    const left = await redis.keys(`as:{${ref.tenant}}:*`);
    // Ids of its jobs begin with the same time as its own.
    const time = ref.id.slice(0, 13);
    const mine = left.filter((key) => key.includes(ref.id) || key.includes(`:job:${time}`));
    assert.deepEqual(mine.slice(0, 3), [keys.batch(ref.tenant, ref.id)]);
    const unfinished = await records.openSince(ref.tenant, Date.now(), 100_000);
    assert.equal(unfinished.filter((id) => id.startsWith(time)).length, 0);
    return rows;
  }

  /** Queue jobs that a worker holds, could take now or is to try again later. */
  async function queued(of: Pick<Bundle, 'digest' | 'profileHash'> = bundle): Promise<number> {
    const route = { profileHash: of.profileHash, modelDigest: of.digest };
    const depths = await Promise.all(
      (['fetch', 'decode', 'inference'] as const).map((stage) => queues.backlog(stage, route)),
    );
    return depths.reduce((sum, { waiting, active, delayed }) => sum + waiting + active + delayed, 0);
  }

  async function stop(): Promise<void> {
    await Promise.all([...feeders].map((child) => stopFeeder(child, 'SIGKILL')));
    for (const close of closers.reverse()) await close();
    await server[Symbol.asyncDispose]();
    await rm(directory, { recursive: true, force: true });
  }

  return {
    ...{ directory, server, storageUrl, bundle, backends, redis, storage, records, queues, batches, sources },
    ...{ registerSource, startFeeder, stopFeeder, runFeeder, startWorkers, submit, create },
    ...{ read, when, ended, results, reconcile, checkWhole, queued },
    [Symbol.asyncDispose]: stop,
  };
}

/** A service that is nothing but what its parts need of one. */
function fakeService(closers: (() => unknown)[]): Service {
  return {
    log: pino({ level: 'silent' }),
    registry: new Registry(),
    closing: new AbortController().signal,
    onClose: (_what: string, close: () => unknown) => closers.push(close),
    addCheck: () => {},
    notReady: async () => ({}),
    distrust: () => {},
  } as unknown as Service;
}

/** Rows on objects of a bucket, known by their ETags. */
export function objects(count: number, { bucket = 'music', from = 0, name = 'track' } = {}): ManifestRow[] {
  return Array.from({ length: count }, (_, n) => ({
    line: n + 1,
    ref: `${name}-${from + n}`,
    audio: { s3: { bucket, key: `${name}-${from + n}.mp3`, etag: `e${from + n}`, size: 1_000 } },
  }));
}

/** A worker that fails what is called so: always, or in the first round only. */
export const failsSome: Work = async ({ record }) => {
  const { filename } = record.audio;
  const firstRound = record.generation < 1_000;
  if (filename.startsWith('bad') || (filename.startsWith('flaky') && firstRound))
    throw new ProblemError('not_audio', 'This is no audio.');
};

function decodedOf({ tenant, id, profileHash }: JobRecord): Decoded {
  const sha256 = id.replaceAll('-', '').padEnd(64, '0');
  return {
    contentId: sha256,
    tensorKey: `tensors/${tenant}/${sha256}/${profileHash}/0123456789abcdef.1`,
    windows: [
      { start: 0, end: 30, validFrames: 128, dbAt0: -12.25, dbAt255: 57.75, peakDbfs: -0.4, silent: false },
    ],
    input: {
      container: 'mp3',
      codec: 'mp3',
      sampleRate: 44_100,
      channels: 2,
      duration: 240.6,
      analysedStart: 0,
      analysedEnd: 30,
      bandwidth: 16_021,
    },
    warnings: [],
  };
}

/** The same for the same job, another for another. */
function outcomeOf({ id }: JobRecord, { manifest }: Bundle): Outcome {
  const { length } = manifest.labels;
  const best = Number.parseInt(id.slice(-4), 16) % length;
  const probabilities = manifest.labels.map((_, label) => (label === best ? 0.75 : 0.25 / (length - 1)));
  return { probabilities, windows: [probabilities], provider: 'cpu' };
}
