/** The inference service: wiring only. */
import { hostname } from 'node:os';
import { loadBundle } from '@acousticsense/shared/bundle';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { queueName } from '@acousticsense/shared/pipeline';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedis, connectRedisForWorker, redisCheck } from '@acousticsense/shared/redis';
import { startService, storageTrustMs } from '@acousticsense/shared/service';
import { announce, describeModel } from '@acousticsense/shared/serving';
import { runStage } from '@acousticsense/shared/stage';
import { createBatcher } from './batcher.ts';
import { type InferenceConfig, loadConfig } from './config.ts';
import { createInferenceMetrics } from './metrics.ts';
import { createModelProcess } from './model-process.ts';
import { createInferenceStage } from './stage.ts';

let config: InferenceConfig;

await startService(
  'inference',
  () => {
    config = loadConfig(process.env);
    return config;
  },
  async (service) => {
    const { log, registry } = service;
    const metrics = createInferenceMetrics(registry);
    const bundle = await loadBundle(config.modelUrl);
    const { manifest } = bundle;

    const model = createModelProcess({
      bundle,
      provider: config.provider,
      requireGpu: config.requireGpu,
      threads: config.threads,
      log,
      onReady: metrics.setProvider,
      onRestart: () => metrics.childRestarts.inc(),
    });
    service.onClose('model process', () => model.close());
    service.addCheck('model', async () => {
      const { status } = model;
      if (!status.ready) throw new Error(status.reason);
    });
    await model.start();

    const redis = connectRedis(config.redisUrl);
    const workerRedis = connectRedisForWorker(config.redisUrl);
    const subscriber = connectRedisForWorker(config.redisUrl);
    for (const connection of [redis, workerRedis, subscriber]) {
      service.onClose('redis connection', () => connection.disconnect());
    }
    service.addCheck('redis', redisCheck(redis));

    const storage = openStorage(config.storageUrl);
    service.onClose('storage', () => storage.close());
    service.addCheck('storage', () => storage.probe(), storageTrustMs);

    const queues = createQueues(redis);
    service.onClose('queues', () => queues.close());

    const { melBands, windowFrames } = manifest.profile;
    const batcher = createBatcher({
      model,
      windowBytes: melBands * windowFrames,
      labels: manifest.labels.length,
      maxBatch: config.maxBatch,
      maxDelayMs: config.maxBatchDelayMs,
      maxWindowBytes: config.maxWindowBytes,
      metrics,
      log,
    });

    const route = { profileHash: bundle.profileHash, modelDigest: bundle.digest };
    const since = Date.now();
    // A model that is not ready is not announced: the API then refuses what nobody would take.
    const announcement = announce(redis, describeModel(bundle), () => {
      const { ready } = model.status;
      if (!ready) return undefined;
      return {
        kind: 'inference',
        queue: queueName('inference', route),
        workerId: `${hostname()}-${process.pid}`,
        since,
        ...route,
        provider: ready.provider,
      };
    });
    service.onClose('announcement', () => announcement.stop());

    runStage({
      service,
      name: 'inference',
      route,
      stage: createInferenceStage({
        manifest,
        storage,
        batcher,
        provider: () => model.status.ready?.provider ?? 'none',
      }),
      concurrency: config.concurrency,
      records: createJobRecords(redis, config.retention),
      queues,
      storage,
      workerRedis,
      subscriber,
    });
  },
);
