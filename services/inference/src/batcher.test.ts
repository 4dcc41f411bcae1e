import assert from 'node:assert/strict';
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { loadBundle } from '@acousticsense/shared/bundle';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { type BatcherOptions, CrashedAlone, createBatcher } from './batcher.ts';
import { createInferenceMetrics } from './metrics.ts';
import { createModelProcess, type ModelProcess } from './model-process.ts';
import {
  distance,
  labels,
  logitsOf,
  moodyChild,
  windowBytes,
  windowOf,
  writeMeansBundle,
} from './testing/means-model.ts';
import { moods } from './testing/moods.ts';

const log = pino({ level: 'silent' });
const never = new AbortController().signal;
const together = { signal: never, alone: false };

/** The real model process, with the sizes of its batches written down. `provider` is what it says it runs on. */
async function open({ provider, ...options }: Partial<BatcherOptions> & { provider?: 'webgpu' } = {}) {
  const { directory, ...bundleDirectory } = await writeMeansBundle();
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
  const seen: Pick<ModelProcess, 'run' | 'whenReady'> = {
    run(windows, count) {
      sizes.push(count);
      return model.run(windows, count);
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
    labels: labels.length,
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
    restarts: () => restarts,
    async [Symbol.asyncDispose]() {
      await model.close();
      await bundleDirectory[Symbol.asyncDispose]();
    },
  };
}

function assertLogits(actual: readonly Float32Array[], windows: readonly Uint8Array[]): void {
  assert.equal(actual.length, windows.length);
  windows.forEach((window, i) => {
    assert.ok(distance(actual[i]!, logitsOf(window)) < 1e-4, `window ${i}`);
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
  results.forEach(({ logits, provider }, i) => {
    assertLogits(logits, jobs[i]!);
    assert.equal(provider, 'cpu');
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
  const first = batcher.submit('long', long, together).then(({ logits }) => {
    order.push('long');
    assertLogits(logits, long);
  });
  await sleep(5);
  const second = batcher.submit('short', [windowOf(42)], together).then(({ logits }) => {
    order.push('short');
    assertLogits(logits, [windowOf(42)]);
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
  assertLogits(padded.logits, windows);
  assert.ok(padded.logits.every((logits, i) => distance(logits, [...exact.logits[i]!]) < 1e-6));
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
  assertLogits((await other).logits, [windowOf(6)]);
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
  assertLogits((await busy).logits, [windowOf(1, moods.slow)]);
  const results = await Promise.all(jobs);
  results.forEach(({ logits }, i) => {
    assertLogits(logits, [windows[i]!]);
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
  results.forEach(({ logits }, i) => {
    assertLogits(logits, [good[i]!, windowOf(30 + i)]);
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
  assertLogits((await near).logits, [windowOf(1), windowOf(2)]);
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
