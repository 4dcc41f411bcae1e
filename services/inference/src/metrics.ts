/** What this service tells Prometheus, beside what every stage does. */
import { Counter, Gauge, Histogram, type Registry } from 'prom-client';
import type { SessionReport } from './model-child.ts';

const waitBuckets = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];
const runBuckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];

export function createInferenceMetrics(registry: Registry) {
  const registers = [registry];
  const provider = new Gauge({
    name: 'acousticsense_inference_provider_info',
    help: 'Always 1: the execution provider that really runs, and why it is not the one that was wanted.',
    labelNames: ['provider', 'fallback'],
    registers,
  });
  return {
    batchWindows: new Histogram({
      name: 'acousticsense_inference_batch_windows',
      help: 'Windows in a batch, padding not counted.',
      buckets: [1, 2, 4, 8, 16, 32, 64],
      registers,
    }),
    waitSeconds: new Histogram({
      name: 'acousticsense_inference_batch_wait_seconds',
      help: "Time from a job's submission to the start of the batch that held its last window.",
      buckets: waitBuckets,
      registers,
    }),
    runSeconds: new Histogram({
      name: 'acousticsense_inference_run_seconds',
      help: 'Time that the model took for a batch.',
      buckets: runBuckets,
      registers,
    }),
    explainBatchWindows: new Histogram({
      name: 'acousticsense_inference_explain_batch_windows',
      help: 'Windows in a batch of the explain graph, padding not counted.',
      buckets: [1, 2, 4, 8, 16, 32, 64],
      registers,
    }),
    explainWaitSeconds: new Histogram({
      name: 'acousticsense_inference_explain_batch_wait_seconds',
      help: "Time from a job's wish for attention maps to the start of the batch that held its last window.",
      buckets: waitBuckets,
      registers,
    }),
    explainRunSeconds: new Histogram({
      name: 'acousticsense_inference_explain_run_seconds',
      help: 'Time that the explain graph took for a batch.',
      buckets: runBuckets,
      registers,
    }),
    explainWindows: new Counter({
      name: 'acousticsense_inference_explain_windows_total',
      help: 'Windows with an attention map.',
      labelNames: ['provider'],
      registers,
    }),
    windows: new Counter({
      name: 'acousticsense_inference_windows_total',
      help: 'Windows classified.',
      labelNames: ['provider'],
      registers,
    }),
    childRestarts: new Counter({
      name: 'acousticsense_inference_child_restarts_total',
      help: "Restarts of the model's process.",
      registers,
    }),
    admittedBytes: new Gauge({
      name: 'acousticsense_inference_admitted_bytes',
      help: 'Bytes of windows held for jobs that were let in.',
      registers,
    }),
    setProvider(report: SessionReport): void {
      provider.reset();
      provider.set({ provider: report.provider, fallback: report.fallback ?? '' }, 1);
    },
  };
}

export type InferenceMetrics = ReturnType<typeof createInferenceMetrics>;
