import assert from 'node:assert/strict';
import { rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { loadBundle } from '@acousticsense/shared/bundle';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { type BatcherOptions, CrashedAlone, createBatcher, type Inferred } from './batcher.ts';
import { createInferenceMetrics } from './metrics.ts';
import { CannotExplain, createModelProcess } from './model-process.ts';
import type { GraphName } from './model-session.ts';
import {
  attentionOf,
  distance,
  embeddingOf,
  logitsOf,
  moodyChild,
  outlierOf,
  windowBytes,
  windowOf,
  writeMeansBundle,
} from './testing/means-model.ts';
import { diesOpening, moods } from './testing/moods.ts';

const log = pino({ level: 'silent' });
const never = new AbortController().signal;
const together = { signal: never, alone: false };

/** The real model process, with the sizes of its batches written down. `provider` is what it says it runs on. */
async function open({
  provider,
  full = false,
  ...options
}: Partial<BatcherOptions> & { provider?: 'webgpu'; full?: boolean } = {}) {
  const { directory, ...bundleDirectory } = await writeMeansBundle({ full });
  const bundle = await loadBundle(directory);
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
  const sizes: number[] = [];
  const graphs: GraphName[] = [];
  const seen: BatcherOptions['model'] = {
    openExplainer: model.openExplainer,
    run<G extends GraphName>(windows: Uint8Array, count: number, graph = 'classify' as G) {
      sizes.push(count);
      graphs.push(graph);
      return model.run(windows, count, graph);
    },
    async whenReady(ms) {
      const report = await model.whenReady(ms);
      return provider ? { ...report, provider } : report;
    },
  };
  const registry = new Registry();
  const batcher = createBatcher({
    model: seen,
    windowBytes,
    maxBatch: 8,
    maxDelayMs: 0,
    maxWindowBytes: 1_000 * windowBytes,
    metrics: createInferenceMetrics(registry),
    log,
    ...options,
  });
  return {
    batcher,
    model,
    directory,
    registry,
    sizes,
    graphs,
    restarts: () => restarts,
    async [Symbol.asyncDispose]() {
      await model.close();
      await bundleDirectory[Symbol.asyncDispose]();
    },
  };
}

function assertLogits({ windows: actual }: Inferred<'classify'>, windows: readonly Uint8Array[]): void {
  assert.equal(actual.length, windows.length);
  windows.forEach((window, i) => {
    assert.ok(distance(actual[i]!.logits, logitsOf(window)) < 1e-4, `window ${i}`);
  });
}

/** Keeps the model busy, so that what is submitted next queues up behind it. */
function occupy(batcher: Awaited<ReturnType<typeof open>>['batcher']) {
  return batcher.submit('slow', [windowOf(1, moods.slow)], together);
}

test('jobs that wait at the same time share batches, and each gets the logits of its own windows', async () => {
  await using opened = await open();
  const { batcher, sizes, registry } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const jobs = Array.from({ length: 13 }, (_, i) => [windowOf(10 * i)]);
  const results = await Promise.all(jobs.map((windows, i) => batcher.submit(`job ${i}`, windows, together)));
  results.forEach((result, i) => {
    assertLogits(result, jobs[i]!);
    assert.equal(result.provider, 'cpu');
  });
  await busy;
  assert.deepEqual(sizes, [1, 8, 4, 1]);
  const metrics = await registry.metrics();
  assert.match(metrics, /acousticsense_inference_windows_total{provider="cpu"} 14/);
  assert.match(metrics, /acousticsense_inference_batch_windows_count 4/);
  assert.match(metrics, /acousticsense_inference_batch_wait_seconds_count 14/);
});

test('a job with one window does not wait for all of a long job that came first', async () => {
  await using opened = await open();
  const { batcher } = opened;
  const order: string[] = [];
  const long = Array.from({ length: 400 }, (_, i) => windowOf(i % 250));
  const first = batcher.submit('long', long, together).then((result) => {
    order.push('long');
    assertLogits(result, long);
  });
  await sleep(5);
  const second = batcher.submit('short', [windowOf(42)], together).then((result) => {
    order.push('short');
    assertLogits(result, [windowOf(42)]);
  });
  await Promise.all([first, second]);
  assert.deepEqual(order, ['short', 'long']);
});

test('on a GPU a batch is padded to its bucket, and padding changes no result', async () => {
  const windows = Array.from({ length: 5 }, (_, i) => windowOf(50 * i + 3));
  await using onCpu = await open();
  await using onGpu = await open({ provider: 'webgpu' });
  const exact = await onCpu.batcher.submit('job', windows, together);
  const padded = await onGpu.batcher.submit('job', windows, together);
  assert.deepEqual(onCpu.sizes, [4, 1]);
  assert.deepEqual(onGpu.sizes, [8]);
  assertLogits(padded, windows);
  assert.ok(padded.windows.every(({ logits }, i) => distance(logits, [...exact.windows[i]!.logits]) < 1e-6));
});

test('an idle model waits for more windows until the delay is over, and no longer once the batch is full', async () => {
  await using opened = await open({ maxBatch: 4, maxDelayMs: 300 });
  const { batcher, sizes } = opened;
  const one = batcher.submit('one', [windowOf(1)], together);
  await sleep(20);
  const two = batcher.submit('two', [windowOf(2)], together);
  assert.ok((await one).batchWaitMs >= 290);
  await two;
  assert.deepEqual(sizes, [2]);
  const full = await Promise.all([3, 4, 5, 6].map((i) => batcher.submit(`${i}`, [windowOf(i)], together)));
  assert.ok(full[0]!.batchWaitMs < 290);
  assert.deepEqual(sizes, [2, 4]);
});

test('jobs are let in only while their windows fit, in the order in which they came', async () => {
  await using opened = await open({ maxWindowBytes: 1_000 });
  const { batcher } = opened;
  const inside: string[] = [];
  const enter = async (name: string, bytes: number) => {
    const room = await batcher.admit(bytes, never);
    inside.push(name);
    return room;
  };
  const a = await enter('a', 600);
  const b = enter('b', 500);
  const c = enter('c', 100);
  await sleep(10);
  assert.deepEqual(inside, ['a']);
  a[Symbol.dispose]();
  a[Symbol.dispose]();
  const rooms = [await b, await c];
  assert.deepEqual(inside, ['a', 'b', 'c']);
  const huge = enter('huge', 5_000);
  rooms[0]![Symbol.dispose]();
  await sleep(10);
  assert.deepEqual(inside, ['a', 'b', 'c']);
  rooms[1]![Symbol.dispose]();
  (await huge)[Symbol.dispose]();
});

test('a job that is aborted while it waits to be let in leaves its place to the next', async () => {
  await using opened = await open({ maxWindowBytes: 1_000 });
  const { batcher } = opened;
  const inside = await batcher.admit(600, never);
  const abort = new AbortController();
  const waiting = batcher.admit(600, abort.signal);
  const next = batcher.admit(100, never);
  abort.abort(new Error('cancelled by its owner'));
  await assert.rejects(waiting, /cancelled by its owner/);
  using _next = await next;
  inside[Symbol.dispose]();
});

test('an aborted job gives up its windows at once, and the others go on', async () => {
  await using opened = await open();
  const { batcher, sizes } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const abort = new AbortController();
  const given = Array.from({ length: 100 }, () => windowOf(5));
  const doomed = batcher.submit('doomed', given, { signal: abort.signal, alone: false });
  const other = batcher.submit('other', [windowOf(6)], together);
  abort.abort(new Error('cancelled by its owner'));
  await assert.rejects(doomed, /cancelled by its owner/);
  assertLogits(await other, [windowOf(6)]);
  await busy;
  assert.deepEqual(sizes, [1, 1]);
});

test('when the process is killed in mid-run, every job of the batch still gets its answer', async () => {
  await using opened = await open();
  const { batcher, model, sizes } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const windows = [7, 8, 9, 10].map((value) => windowOf(value));
  const jobs = windows.map((window, i) => batcher.submit(`job ${i}`, [window], together));
  process.kill(model.pid!, 'SIGKILL');
  assertLogits(await busy, [windowOf(1, moods.slow)]);
  const results = await Promise.all(jobs);
  results.forEach((result, i) => {
    assertLogits(result, [windows[i]!]);
  });
  assert.equal(opened.restarts(), 1);
  assert.equal(sizes[1], 1);
});

test('of a batch that killed the process only the job whose window does it alone is rejected', async () => {
  await using opened = await open();
  const { batcher, sizes } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const good = [windowOf(20), windowOf(21), windowOf(22)];
  const jobs = good.map((window, i) => batcher.submit(`good ${i}`, [window, windowOf(30 + i)], together));
  const poison = batcher.submit('poison', [windowOf(40), windowOf(41, moods.dies)], together);
  await assert.rejects(poison, (error) => {
    assert.ok(error instanceof CrashedAlone);
    assert.match(error.message, /SIGKILL/);
    return true;
  });
  const results = await Promise.all(jobs);
  results.forEach((result, i) => {
    assertLogits(result, [good[i]!, windowOf(30 + i)]);
  });
  await busy;
  // The batch of all eight, then one by one.
  assert.deepEqual(sizes, [1, 8, ...Array<number>(8).fill(1)]);
  assert.equal(opened.restarts(), 2);
});

test('a job that was near a crash before shares no batch with others', async () => {
  await using opened = await open();
  const { batcher, sizes } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const near = batcher.submit('near', [windowOf(1), windowOf(2)], { signal: never, alone: true });
  const jobs = Array.from({ length: 4 }, (_, i) => batcher.submit(`${i}`, [windowOf(i)], together));
  assertLogits(await near, [windowOf(1), windowOf(2)]);
  await Promise.all([busy, ...jobs]);
  assert.deepEqual(
    sizes.toSorted((a, b) => a - b),
    [1, 1, 1, 4],
  );
});

test('a crash alone accuses no job when the model does not come back after it', async () => {
  await using opened = await open({ graceMs: 500 });
  const { batcher, directory } = opened;
  await rm(path.join(directory, 'model.onnx'));
  const poison = batcher.submit('poison', [windowOf(1, moods.dies)], { signal: never, alone: true });
  const other = batcher.submit('other', [windowOf(2)], together);
  await assert.rejects(poison, InfrastructureFault);
  await assert.rejects(other, InfrastructureFault);
});

test('of a model with more outputs each window gets its own embedding and outlier score too', async () => {
  await using opened = await open({ full: true });
  const windows = Array.from({ length: 7 }, (_, i) => windowOf(30 * i + 3));
  const result = await opened.batcher.submit('job', windows, together);
  assertLogits(result, windows);
  result.windows.forEach(({ embedding, outlier }, i) => {
    assert.ok(distance(embedding!, embeddingOf(windows[i]!)) < 1e-6, `embedding ${i}`);
    assert.ok(distance(outlier!, [outlierOf(windows[i]!)]) < 1e-6, `outlier ${i}`);
  });
});

function assertMaps({ windows: actual }: Inferred<'explain'>, windows: readonly Uint8Array[]): void {
  assert.equal(actual.length, windows.length);
  windows.forEach((window, i) => {
    assert.ok(distance(actual[i]!.attention, attentionOf(window).flat()) < 1e-6, `window ${i}`);
  });
}

test('attention maps come in batches of their own, counted and timed apart', async () => {
  await using opened = await open({ full: true });
  const { batcher, graphs, sizes, registry } = opened;
  const windows = Array.from({ length: 6 }, (_, i) => windowOf(40 * i, 10));
  const [maps, genres] = await Promise.all([
    batcher.explain('maps', windows, together),
    batcher.submit('genres', windows, together),
  ]);
  assertMaps(maps, windows);
  assertLogits(genres, windows);
  assert.deepEqual(graphs.toSorted(), ['classify', 'classify', 'explain', 'explain']);
  assert.deepEqual(
    sizes.toSorted((a, b) => a - b),
    [2, 2, 4, 4],
  );
  const metrics = await registry.metrics();
  assert.match(metrics, /acousticsense_inference_explain_windows_total{provider="cpu"} 6/);
  assert.match(metrics, /acousticsense_inference_explain_batch_windows_count 2/);
  assert.match(metrics, /acousticsense_inference_explain_run_seconds_count 2/);
  assert.match(metrics, /acousticsense_inference_run_seconds_count 2/);
});

test('a flood of explain requests delays a batch to classify by one batch at most, and is served too', async () => {
  await using opened = await open({ full: true, maxBatch: 2 });
  const { batcher, graphs } = opened;
  await batcher.explain('first', [windowOf(1)], together);
  const busy = occupy(batcher);
  await sleep(50);
  const flood = Array.from({ length: 30 }, (_, i) =>
    batcher.explain(`flood ${i}`, [windowOf(i), windowOf(i, 1)], together),
  );
  const before = graphs.length;
  const genres = Array.from({ length: 10 }, (_, i) =>
    batcher.submit(`genre ${i}`, [windowOf(i), windowOf(i, 2)], together),
  );
  await Promise.all(genres);
  const during = graphs.slice(before);
  // The last may already have been followed by the next of the flood.
  assert.ok(during.length <= 21, during.join());
  assert.ok(!/explain,explain/.test(during.join()), during.join());
  // Neither starves the other.
  assert.ok(during.filter((graph) => graph === 'explain').length >= 9, during.join());
  await Promise.all([busy, ...flood]);
});

test('of an explain batch that killed the process only the job whose window does it alone is rejected', async () => {
  await using opened = await open({ full: true });
  const { batcher } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const good = [windowOf(20), windowOf(21)];
  const maps = good.map((window, i) => batcher.explain(`good ${i}`, [window, windowOf(30 + i)], together));
  const poison = batcher.explain('poison', [windowOf(40), windowOf(41, moods.diesExplaining)], together);
  const genre = batcher.submit('genre', [windowOf(41, moods.diesExplaining)], together);
  await assert.rejects(poison, CrashedAlone);
  const results = await Promise.all(maps);
  results.forEach((result, i) => {
    assertMaps(result, [good[i]!, windowOf(30 + i)]);
  });
  assertLogits(await genre, [windowOf(41, moods.diesExplaining)]);
  await busy;
  assert.equal(opened.restarts(), 2);
});

test('a process that dies while the explain graph opens accuses nobody; after three the wish is refused', async () => {
  await using opened = await open({ full: true });
  const { batcher, directory, graphs } = opened;
  const marker = path.join(directory, diesOpening);
  await writeFile(marker, '');
  const maps = batcher.explain('maps', [windowOf(1)], together);
  while (opened.restarts() === 0) await sleep(5);
  await rm(marker);
  assertMaps(await maps, [windowOf(1)]);
  assert.ok(opened.restarts() < 3);

  await writeFile(marker, '');
  process.kill(opened.model.pid!, 'SIGKILL');
  const refused = batcher.explain('refused', [windowOf(2)], together);
  const genre = batcher.submit('genre', [windowOf(2)], together);
  await assert.rejects(refused, (error) => {
    assert.ok(error instanceof CannotExplain);
    assert.match(error.message, /opening the explain graph failed 3 times: .*SIGKILL/);
    return true;
  });
  assertLogits(await genre, [windowOf(2)]);
  const restarts = opened.restarts();
  await assert.rejects(batcher.explain('later', [windowOf(3)], together), CannotExplain);
  assert.equal(opened.restarts(), restarts);
  assert.equal(graphs.filter((graph) => graph === 'explain').length, 1);
});

test('an aborted wish for attention maps gives up its windows at once', async () => {
  await using opened = await open({ full: true });
  const { batcher, graphs } = opened;
  const busy = occupy(batcher);
  await sleep(50);
  const abort = new AbortController();
  const doomed = batcher.explain('doomed', [windowOf(1)], { signal: abort.signal, alone: false });
  abort.abort(new Error('cancelled by its owner'));
  await assert.rejects(doomed, /cancelled by its owner/);
  await busy;
  assert.deepEqual(graphs, ['classify']);
});
