import assert from 'node:assert/strict';
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { loadBundle } from '@acousticsense/shared/bundle';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { knownModel, liveWorkers } from '@acousticsense/shared/serving';
import { childrenOf } from '../../../test/processes.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { addDecodedJob, settled } from './testing/decoded-job.ts';
import { windowOf, writeMeansBundle } from './testing/means-model.ts';

const hasGpu = ['/dev/nvidia0', '/dev/dri/renderD128', '/dev/dxg'].some((node) => existsSync(node));

describe('the inference service as a process', () => {
  let server: TestRedis;
  let means: Awaited<ReturnType<typeof writeMeansBundle>>;
  let objects: string;
  let storageUrl: string;

  before(async () => {
    server = await startRedis();
    means = await writeMeansBundle();
    objects = await mkdtemp(path.join(tmpdir(), 'acousticsense-objects-'));
    storageUrl = pathToFileURL(objects).href;
  });
  after(async () => {
    await server[Symbol.asyncDispose]();
    await means[Symbol.asyncDispose]();
    await rm(objects, { recursive: true, force: true });
  });

  function start(env: Record<string, string> = {}): ChildProcess {
    return fork(path.join(import.meta.dirname, 'main.ts'), [], {
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: [],
      env: {
        PATH: process.env.PATH,
        REDIS_URL: server.url,
        STORAGE_URL: storageUrl,
        MODEL_URL: means.directory,
        PROVIDER: 'cpu',
        ...env,
      },
    });
  }

  type Told = { type: string; port?: number; reasons?: Record<string, string>; message?: string };

  /** Collects what the service tells its parent until `type` has come. */
  function told(service: ChildProcess, type: string): Promise<Map<string, Told>> {
    const all = new Map<string, Told>();
    const { promise, resolve, reject } = Promise.withResolvers<Map<string, Told>>();
    service.on('message', (message: Told) => {
      all.set(message.type, message);
      if (message.type === type) resolve(all);
    });
    service.on('exit', (code) => reject(new Error(`the service exited with ${code}`)));
    return promise;
  }

  async function stop(service: ChildProcess): Promise<number | null> {
    if (service.exitCode !== null) return service.exitCode;
    const exited = once(service, 'exit');
    service.kill('SIGTERM');
    return (await exited)[0] as number | null;
  }

  test('it answers a queued job, tells who it is, and ends without leaving a process', async () => {
    const service = start();
    const redis = connectRedisForWorker(server.url);
    const queues = createQueues(redis);
    const storage = openStorage(storageUrl);
    try {
      const { port } = (await told(service, 'ready')).get('listening')!;
      const bundle = await loadBundle(means.directory);
      const records = createJobRecords(redis, { resultSeconds: 3_600 });
      const job = await addDecodedJob({ records, queues, storage }, bundle, [windowOf(120)]);
      assert.equal((await settled(records, job)).outcome?.provider, 'cpu');

      const [worker] = await liveWorkers(redis);
      assert.equal(worker?.kind, 'inference');
      assert.equal(worker?.provider, 'cpu');
      assert.equal(worker?.modelDigest, bundle.digest);
      assert.deepEqual((await knownModel(redis, bundle.digest))?.labels, bundle.manifest.labels);

      assert.equal((await fetch(`http://127.0.0.1:${port}/readyz`)).status, 200);
      const metrics = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
      assert.match(metrics, /acousticsense_inference_provider_info\{.*provider="cpu".*\} 1/);
      assert.match(metrics, /acousticsense_inference_child_restarts_total\{.*\} 0/);
      assert.match(metrics, /acousticsense_inference_run_seconds_count\{.*\} 1/);

      const children = await childrenOf(service.pid!);
      assert.equal(children.length, 1);
      assert.equal(await stop(service), 0);
      assert.equal(existsSync(`/proc/${children[0]}`), false);
      assert.deepEqual(await liveWorkers(redis), []);
    } finally {
      service.kill('SIGKILL');
      await queues.close();
      redis.disconnect();
      storage.close();
    }
  });

  test('a bundle that fails its checks ends it with one sentence', async () => {
    await using wrong = await writeMeansBundle({
      selfTest: [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
      ],
    });
    const service = start({ MODEL_URL: wrong.directory });
    const exited = once(service, 'exit');
    const said = (await told(service, 'failed')).get('failed')!;
    assert.match(said.message!, /fails its self-test/);
    assert.equal((await exited)[0], 1);
  });

  test('an explain graph that will never open ends it too, though nobody has asked for one yet', async () => {
    await using wrong = await writeMeansBundle({
      full: true,
      change: ({ graph }) => Object.assign(graph.explain!.output, { shape: ['batch', 14, 14] }),
    });
    const service = start({ MODEL_URL: wrong.directory });
    const exited = once(service, 'exit');
    const said = (await told(service, 'failed')).get('failed')!;
    assert.match(said.message!, /attention of the explain graph explain\.onnx is float32/);
    assert.equal((await exited)[0], 1);
  });

  test('the process that proved the explain graph is gone when the service is ready', async () => {
    await using full = await writeMeansBundle({ full: true });
    const service = start({ MODEL_URL: full.directory });
    try {
      await told(service, 'ready');
      assert.equal((await childrenOf(service.pid!)).length, 1);
    } finally {
      await stop(service);
    }
  });

  test('with REQUIRE_GPU=1 and no GPU it stays up, and /readyz says why', { skip: hasGpu }, async () => {
    const service = start({ PROVIDER: 'auto', REQUIRE_GPU: '1' });
    try {
      const { port } = (await told(service, 'not-ready')).get('listening')!;
      const response = await fetch(`http://127.0.0.1:${port}/readyz`);
      assert.equal(response.status, 503);
      const { reasons } = (await response.json()) as { reasons: Record<string, string> };
      assert.match(reasons.model ?? '', /^REQUIRE_GPU=1, and no GPU can be used/);
      assert.equal((await fetch(`http://127.0.0.1:${port}/healthz`)).status, 200);
      const redis = connectRedisForWorker(server.url);
      assert.deepEqual(await liveWorkers(redis), []);
      redis.disconnect();
    } finally {
      await stop(service);
    }
  });
});
