import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { loadBundle } from '@acousticsense/shared/bundle';
import { explanationSchema, type JobRecord, vectorsSchema } from '@acousticsense/shared/job';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { explanationKey, vectorsKey } from '@acousticsense/shared/object-keys';
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
  attentionOf,
  embeddingOf,
  labels,
  logitsOf,
  moodyChild,
  outlierOf,
  windowBytes,
  windowOf,
  writeMeansBundle,
} from './testing/means-model.ts';
import { moods } from './testing/moods.ts';

/** Everything that `main.ts` wires, in this process and with a child process that has moods. */
async function open({ full = false, spoil = {} }: Parameters<typeof writeMeansBundle>[0] = {}) {
  const server = await startRedis();
  const directory = await mkdtemp(path.join(tmpdir(), 'acousticsense-objects-'));
  const storage = openStorage(pathToFileURL(directory).href);
  const means = await writeMeansBundle({ full, spoil });
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
  const records = createJobRecords(redis, { resultSeconds: 3_600 });
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
  const batcher = createBatcher({
    model,
    windowBytes,
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
      manifest: bundle.manifest,
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
    assert.ok(near(outcome?.windows?.[0], probabilitiesOf(first)));
    assert.equal(outcome?.windows?.[1], null);
    assert.ok(near(outcome?.windows?.[2], probabilitiesOf(last)));
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
              const etag = await stage.storage.put(key, body);
              await spoil(key);
              return etag;
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

describe('the inference stage with a model that embeds, explains and knows strangers', () => {
  let stage: Awaited<ReturnType<typeof open>>;
  before(async () => {
    stage = await open({ full: true });
  });
  after(() => stage[Symbol.asyncDispose]());

  const both = { explain: true, vectors: true };
  const add = (windows: (Uint8Array | null)[], extras?: JobRecord['extras']) =>
    addDecodedJob(stage.parts, stage.bundle, windows, extras ? { extras } : {});
  const json = async (key: string) => JSON.parse((await stage.storage.read(key)).toString('utf8'));
  const explanation = async (id: string) =>
    explanationSchema.parse(await json(explanationKey({ tenant: tenant, id: id })));
  const vectors = async (id: string) =>
    vectorsSchema.parse(await json(vectorsKey({ tenant: tenant, id: id })));

  test('every window heard has its outlier score in the result, and nothing is written that nobody asked for', async () => {
    const job = await add([windowOf(30), null, windowOf(200)]);
    const { outcome } = await settled(stage.records, job);
    const score = (value: number) => Number(outlierOf(windowOf(value)).toFixed(4));
    assert.deepEqual(outcome?.outliers, [score(30), null, score(200)]);
    assert.equal(await stage.storage.stat(explanationKey({ tenant: tenant, id: job.id })), undefined);
    assert.equal(await stage.storage.stat(vectorsKey({ tenant: tenant, id: job.id })), undefined);
  });

  test('attention maps of the windows heard are there when the job is completed', async () => {
    const loud = windowOf(30);
    loud.fill(250, 0, 64);
    const job = await add([loud, null, windowOf(200)], { explain: true, vectors: false });
    const { state } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    const { windows } = await explanation(job.id);
    assert.deepEqual(
      windows.map(({ start, end }) => [start, end]),
      [
        [0, 1],
        [2, 3],
      ],
    );
    const rounded = (map: number[][]) => map.map((row) => row.map((share) => Number(share.toPrecision(4))));
    assert.deepEqual(windows[0]?.attention, rounded(attentionOf(loud)));
    // Row 0 is the lowest in pitch, where this window is loud.
    assert.ok(windows[0]!.attention[0]![0]! > windows[0]!.attention[3]![0]!);
    assert.deepEqual(windows[1]?.attention, rounded(attentionOf(windowOf(200))));
    assert.equal(await stage.storage.stat(vectorsKey({ tenant: tenant, id: job.id })), undefined);
  });

  test('a long recording is explained by sixteen windows from its first to its last', async () => {
    const job = await add(
      Array.from({ length: 40 }, (_, i) => windowOf(i)),
      { explain: true, vectors: false },
    );
    await settled(stage.records, job);
    const { windows } = await explanation(job.id);
    assert.equal(windows.length, 16);
    assert.equal(windows[0]?.start, 0);
    assert.equal(windows[15]?.start, 39);
  });

  test('vectors are the exact logits, the embeddings, and their mean as the style anchor', async () => {
    const [first, last] = [windowOf(30), windowOf(200)];
    const job = await add([first, null, last], { explain: false, vectors: true });
    await settled(stage.records, job);
    const found = await vectors(job.id);
    assert.deepEqual(found.labels, labels);
    const [a, silent, b] = found.windows;
    assert.deepEqual(silent, { start: 1, end: 2, logits: null, embedding: null });
    for (const [window, answer] of [
      [first, a],
      [last, b],
    ] as const) {
      const { outputs } = await stage.model.run(window, 1);
      assert.deepEqual(Float32Array.from(answer!.logits!), outputs.logits);
      assert.ok(answer!.embedding!.every((value, i) => Math.abs(value - embeddingOf(window)[i]!) < 1e-6));
    }
    const sum = embeddingOf(first).map((value, i) => value + embeddingOf(last)[i]!);
    const expected = sum.map((value) => value / Math.hypot(...sum));
    assert.ok(near(found.embedding, expected), String(found.embedding));
  });

  test('a silent track has neither maps nor an anchor, and both objects say so', async () => {
    const job = await add([null, null], both);
    const { state, outcome } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.deepEqual(outcome?.outliers, [null, null]);
    assert.deepEqual((await explanation(job.id)).windows, []);
    const { embedding, windows } = await vectors(job.id);
    assert.equal(embedding, undefined);
    assert.deepEqual(
      windows.map(({ logits }) => logits),
      [null, null],
    );
  });

  test('kill -9 while maps are drawn: the job has its result and its maps all the same', async () => {
    const job = await add([windowOf(60, moods.slowExplaining)], both);
    await settled(stage.records, job, ({ state }) => state === 'classifying');
    await sleep(200);
    process.kill(stage.model.pid!, 'SIGKILL');
    const { state, crashes } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.equal(crashes, undefined);
    assert.equal((await explanation(job.id)).windows.length, 1);
  });

  test('a job whose attention map kills the model is set aside, and those beside it are answered', async () => {
    const poison = await add([windowOf(60, moods.diesExplaining)], both);
    const others = await Promise.all([70, 80].map((value) => add([windowOf(value)], both)));
    const failed = await settled(stage.records, poison);
    assert.equal(failed.error?.code, 'quarantined');
    assert.equal(failed.crashes, 2);
    for (const job of others) {
      assert.equal((await settled(stage.records, job)).state, 'completed');
      assert.equal((await explanation(job.id)).windows.length, 1);
    }
  });

  test('a job cancelled while maps are drawn leaves no object behind', async () => {
    const job = await add([windowOf(60, moods.slowExplaining)], both);
    await settled(stage.records, job, ({ state }) => state === 'classifying');
    await sleep(150);
    const ref = { tenant, jobId: job.id, generation: 1 };
    await stage.records.commit(ref, { from: ['classifying'], to: 'cancelled' });
    await sleep(700);
    assert.equal((await settled(stage.records, job)).state, 'cancelled');
    assert.equal(await stage.storage.stat(explanationKey({ tenant: tenant, id: job.id })), undefined);
    assert.equal(await stage.storage.stat(vectorsKey({ tenant: tenant, id: job.id })), undefined);
  });
});

describe('the inference stage and wishes that its model cannot grant', () => {
  const wish = { extras: { explain: true, vectors: true } };

  test('without an explain graph and an embedding there are logits, and no maps', async () => {
    await using stage = await open();
    const job = await addDecodedJob(stage.parts, stage.bundle, [windowOf(30), null], wish);
    assert.equal((await settled(stage.records, job)).state, 'completed');
    assert.equal(await stage.storage.stat(explanationKey({ tenant: tenant, id: job.id })), undefined);
    const text = (await stage.storage.read(vectorsKey({ tenant: tenant, id: job.id }))).toString('utf8');
    const { embedding, windows } = vectorsSchema.parse(JSON.parse(text));
    assert.equal(embedding, undefined);
    assert.ok(windows[0]!.logits!.every((logit, i) => Math.abs(logit - logitsOf(windowOf(30))[i]!) < 1e-5));
    assert.deepEqual(windows[1], { start: 1, end: 2, logits: null });
  });

  test('an explain graph that cannot be opened costs the maps, not the genre', async () => {
    await using stage = await open({
      full: true,
      spoil: { 'explain.onnx': () => Buffer.from('no graph at all') },
    });
    const job = await addDecodedJob(stage.parts, stage.bundle, [windowOf(30)], wish);
    const { state, outcome, crashes } = await settled(stage.records, job);
    assert.equal(state, 'completed');
    assert.ok(near(outcome?.windows?.[0], probabilitiesOf(windowOf(30))));
    assert.equal(crashes, undefined);
    assert.equal(stage.restarts(), 0);
    assert.equal(await stage.storage.stat(explanationKey({ tenant: tenant, id: job.id })), undefined);
    assert.ok(await stage.storage.stat(vectorsKey({ tenant: tenant, id: job.id })));
  });
});
