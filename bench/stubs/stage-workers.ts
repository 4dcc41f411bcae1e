/**
 * Decoder and inference workers without decoding and without a model, for benchmarks of everything around them: real
 * queue jobs, real commits, results of the real size. Nothing else is left out.
 */

import { Registry } from 'prom-client';
import { z } from 'zod';
import { openBackends } from '../../packages/shared/src/backends.ts';
import { loadBundle } from '../../packages/shared/src/bundle.ts';
import { readVariables, workerConfig, workerVariables } from '../../packages/shared/src/common-config.ts';
import type { Decoded, JobRecord, Outcome } from '../../packages/shared/src/job.ts';
import { startService } from '../../packages/shared/src/service.ts';
import { announceWorker } from '../../packages/shared/src/serving.ts';
import { runStage } from '../../packages/shared/src/stage.ts';

const variables = readVariables(
  z.object({ ...workerVariables, STUB_CONCURRENCY: z.coerce.number().int().min(1).default(64) }),
  process.env,
);
const concurrency = variables.STUB_CONCURRENCY;

await startService(
  'stub',
  () => workerConfig(variables),
  async (service) => {
    const bundle = await loadBundle(variables.MODEL_URL, { verifyFiles: false });
    const backends = openBackends(service, workerConfig(variables));
    const { queues, redis } = backends;
    const route = { profileHash: bundle.profileHash, modelDigest: bundle.digest };
    for (const kind of ['decoder', 'inference'] as const)
      announceWorker(service, redis, bundle, { kind, concurrency }, () => ({ provider: 'stub' }));
    runStage({
      ...{ service, route, concurrency, backends },
      name: 'decode',
      stage: {
        async run(job) {
          await job.commit('decoded', { decoded: decodedOf(job.record), timings: { decode: 0 } });
          await queues.add('inference', job.record);
        },
        handOn: ({ record }) => queues.add('inference', record),
      },
    });
    runStage({
      ...{ route, concurrency, backends },
      // The metrics of a stage are those of its service: two stages in one process need two registries.
      service: { ...service, registry: new Registry() },
      name: 'inference',
      stage: {
        async run(job) {
          await job.commit('completed', {
            outcome: outcomeOf(job.record, bundle.manifest.labels.length),
            timings: { inference: 0 },
          });
        },
        async handOn() {},
      },
    });
  },
);

function decodedOf({ tenant, id }: JobRecord): Decoded {
  const sha256 = id.replaceAll('-', '').padEnd(64, '0');
  return {
    contentId: sha256,
    tensorKey: `tensors/${tenant}/${sha256}/d17dd67797f7dbe2/0123456789abcdef.1`,
    windows: [
      {
        start: 105.3,
        end: 135.3,
        validFrames: 128,
        dbAt0: -12.25,
        dbAt255: 57.75,
        peakDbfs: -0.4,
        silent: false,
      },
    ],
    input: {
      container: 'mp3',
      codec: 'mp3',
      sampleRate: 44_100,
      channels: 2,
      duration: 240.6,
      bitRate: 256_000,
      analysedStart: 105.3,
      analysedEnd: 135.3,
      bandwidth: 16_021,
    },
    warnings: [],
  };
}

/** The same for the same job, and another for another. */
function outcomeOf({ id }: JobRecord, labels: number): Outcome {
  const best = Number.parseInt(id.slice(-4), 16) % labels;
  const probabilities = Array.from({ length: labels }, (_, label) =>
    label === best ? 0.718_283 : Math.round((0.281_717 / (labels - 1)) * 1e6) / 1e6,
  );
  return { probabilities, windows: [probabilities], outliers: [0.1234], outlier: 0.1234, provider: 'stub' };
}
