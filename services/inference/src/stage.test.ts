import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { loadBundle } from '@acousticsense/shared/bundle';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import type { Service } from '@acousticsense/shared/service';
import { runStage } from '@acousticsense/shared/stage';
import { npyHeader } from '@acousticsense/shared/tensor';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { startRedis } from '../../../test/redis.ts';
import { calibratedSoftmax } from './aggregate.ts';
import { createBatcher } from './batcher.ts';
import { createInferenceMetrics } from './metrics.ts';
import { createModelProcess } from './model-process.ts';
import { createInferenceStage } from './stage.ts';
import { addDecodedJob, settled, tenant } from './testing/decoded-job.ts';
import {
  labels,
  logitsOf,
  moodyChild,
  windowBytes,
  windowOf,
  writeMeansBundle,
} from './testing/means-model.ts';
import { moods } from './testing/moods.ts';

/** Everything that `main.ts` wires, in this process and with a child process that has moods. */
async function open() {
  const server = await startRedis();
  const directory = await mkdtemp(path.join(tmpdir(), 'acousticsense-objects-'));
  const storage = openStorage(pathToFileURL(directory).href);
  const means = await writeMeansBundle();
  const bundle = await loadBundle(means.directory);
  const log = pino({ level: 'silent' });
  const registry = new Registry();
  const metrics = createInferenceMetrics(registry);
  let restarts = 0;
  const model = createModelProcess({
    bundle,
    provider: 'cpu',
    requireGpu: false,
    threads: 1,
    log,
    childScript: moodyChild,
    onRestart: () => (restarts += 1),
  });
  await model.start();
  const connections: ReturnType<typeof connectRedisForWorker>[] = [];
  const connect = () => {
    const connection = connectRedisForWorker(server.url);
    connections.push(connection);
    return connection;
  };
  const redis = connect();
  const records = createJobRecords(redis, { resultSeconds: 3_600, events: 100 });
  const queues = createQueues(redis);
  const closers: (() => unknown)[] = [];
  const service: Service = {
    name: 'inference',
    log,
    registry,
    closing: new AbortController().signal,
    onClose: (_what, close) => closers.push(close),
    addCheck: () => {},
    notReady: async () => ('reason' in model.status ? { model: model.status.reason } : {}),
    handleHealth: async () => false,
    announcePort: () => {},
    distrust: () => {},
  };
  const { profile, calibration, aggregation } = bundle.manifest;
  const batcher = createBatcher({
    model,
    windowBytes,
    labels: labels.length,
    maxBatch: 8,
    maxDelayMs: 0,
    maxWindowBytes: 1_000_000,
    metrics,
    log,
  });
  runStage({
    service,
    name: 'inference',
    route: { profileHash: bundle.profileHash, modelDigest: bundle.digest },
    stage: createInferenceStage({
      manifest: { profile, calibration, aggregation },
      storage,
      batcher,
      provider: () => model.status.ready?.provider ?? 'none',
    }),
    concurrency: 8,
    backends: { redis, records, queues, storage, connect },
  });
  return {
    parts: { records, queues, storage },
    records,
    storage,
    bundle,
    model,
    restarts: () => restarts,
    async [Symbol.asyncDispose]() {
      for (const close of closers.reverse()) await close();
      await queues.close();
      for (const connection of connections) connection.disconnect();
      await model.close();
      storage.close();
      await server[Symbol.asyncDispose]();
      await means[Symbol.asyncDispose]();
      await rm(directory, { recursive: true, force: true });
    },
  };
}

const probabilitiesOf = (window: Uint8Array) =>
  calibratedSoftmax(Float32Array.from(logitsOf(window)), 'none');
const near = (actual: readonly number[] | null | undefined, expected: readonly number[]) =>
  actual?.length === expected.length && expected.every((value, i) => Math.abs(value - actual[i]!) < 2e-6);

describe('the inference stage', () => {
  let stage: Awaited<ReturnType<typeof open>>;
  before(async () => {
    stage = await open();
  });
  after(() => stage[Symbol.asyncDispose]());

  test('the windows of a tensor become probabilities of windows and of the track', async () => {
    const [first, last] = [windowOf(30), windowOf(200)];
    const job = await addDecodedJob(stage.parts, stage.bundle, [first, null, last]);
    const { state, outcome, timings } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.ok(near(outcome?.windows[0], probabilitiesOf(first)));
    assert.equal(outcome?.windows[1], null);
    assert.ok(near(outcome?.windows[2], probabilitiesOf(last)));
    const mean = probabilitiesOf(first).map((p, i) => (p + probabilitiesOf(last)[i]!) / 2);
    assert.ok(near(outcome?.probabilities, mean));
    assert.equal(outcome?.provider, 'cpu');
    assert.equal(timings?.decode, 1);
    assert.ok(
      timings?.inference !== undefined &&
        timings.batchWait !== undefined &&
        timings.inferenceWait !== undefined,
    );
  });

  test('a track that is silent throughout has no genre, and is no error', async () => {
    const job = await addDecodedJob(stage.parts, stage.bundle, [null, null]);
    const { state, outcome } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.deepEqual(outcome, { probabilities: null, windows: [null, null], provider: 'cpu' });
  });

  for (const { what, spoil } of [
    { what: 'gone', spoil: (key: string) => stage.storage.delete(key) },
    { what: 'cut short', spoil: (key: string) => stage.storage.put(key, npyHeader([1, 16, 8])) },
    {
      what: 'of another shape',
      spoil: (key: string) => stage.storage.put(key, Buffer.concat([npyHeader([1, 8, 16]), windowOf(1)])),
    },
  ]) {
    test(`a tensor that is ${what} sends the job back to decode`, async () => {
      const windows = [windowOf(1)];
      // The worker must not see it whole: the tensor is spoilt before the job is there.
      const job = await addDecodedJob(
        {
          ...stage.parts,
          storage: {
            ...stage.storage,
            async put(key, body) {
              await stage.storage.put(key, body);
              await spoil(key);
            },
          },
        },
        stage.bundle,
        windows,
      );
      const record = await settled(stage.records, job, ({ generation }) => generation === 2);
      assert.equal(record.state, 'queued');
      assert.equal(record.redecodes, 1);
      assert.equal(record.decoded, undefined);
    });
  }

  test('kill -9 of the model in mid-run: the job is answered all the same, and nobody is accused', async () => {
    const job = await addDecodedJob(stage.parts, stage.bundle, [windowOf(60, moods.slow)]);
    await settled(stage.records, job, ({ state }) => state === 'classifying');
    await sleep(150);
    process.kill(stage.model.pid!, 'SIGKILL');
    const { state, crashes } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.equal(crashes, undefined);
  });

  test('a job that kills the model is set aside after its second crash alone, and those beside it are answered', async () => {
    const before = stage.restarts();
    const poison = await addDecodedJob(stage.parts, stage.bundle, [windowOf(60, moods.dies)]);
    const others = await Promise.all(
      [70, 80, 90].map((v) => addDecodedJob(stage.parts, stage.bundle, [windowOf(v)])),
    );
    const failed = await settled(stage.records, poison);
    assert.equal(failed.state, 'failed');
    assert.equal(failed.error?.code, 'quarantined');
    assert.equal(failed.crashes, 2);
    for (const job of others) assert.equal((await settled(stage.records, job)).state, 'completed');
    // With its batch, alone, and alone again after the retry.
    assert.equal(stage.restarts() - before, 3);
  });

  test('a job cancelled in mid-run stays cancelled', async () => {
    const job = await addDecodedJob(stage.parts, stage.bundle, [windowOf(60, moods.slow)]);
    await settled(stage.records, job, ({ state }) => state === 'classifying');
    const ref = { tenant, jobId: job.id, generation: 1 };
    await stage.records.commit(ref, { from: ['classifying'], to: 'cancelled' });
    await sleep(600);
    const record = await settled(stage.records, job);
    assert.equal(record.state, 'cancelled');
    assert.equal(record.outcome, undefined);
  });
});
