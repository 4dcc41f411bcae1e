/** The inference service: wiring only. */
import { openBackends } from '@acousticsense/shared/backends';
import { loadBundle } from '@acousticsense/shared/bundle';
import { startService } from '@acousticsense/shared/service';
import { announceWorker, describeModel } from '@acousticsense/shared/serving';
import { runStage } from '@acousticsense/shared/stage';
import { createBatcher } from './batcher.ts';
import { type InferenceConfig, loadConfig } from './config.ts';
import { createInferenceMetrics } from './metrics.ts';
import { createModelProcess, proveExplainGraph } from './model-process.ts';
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
    await Promise.all([model.start(), proveExplainGraph({ bundle, threads: config.threads, log })]);

    const backends = openBackends(service, config);

    const { melBands, windowFrames } = manifest.profile;
    const batcher = createBatcher({
      model,
      windowBytes: melBands * windowFrames,
      maxBatch: config.maxBatch,
      maxDelayMs: config.maxBatchDelayMs,
      maxWindowBytes: config.maxWindowBytes,
      metrics,
      log,
    });

    const { concurrency, candidate } = config;
    announceWorker(service, backends.redis, bundle, { kind: 'inference', concurrency, candidate }, () => {
      const { ready } = model.status;
      return ready && { provider: ready.provider };
    });
    runStage({
      service,
      name: 'inference',
      route: { profileHash: bundle.profileHash, modelDigest: bundle.digest },
      stage: createInferenceStage({
        manifest,
        storage: backends.storage,
        batcher,
        provider: () => model.status.ready?.provider ?? 'none',
      }),
      concurrency: config.concurrency,
      backends,
      description: describeModel(bundle),
    });
  },
);
