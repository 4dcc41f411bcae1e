/** Configuration of the inference service, from the environment. */
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { StartupError } from '@acousticsense/shared/errors';
import { z } from 'zod';

const whole = (smallest: number, otherwise: number) =>
  z.coerce.number().int().min(smallest).default(otherwise);

const schema = z.object({
  /** Redis of the queues and records: redis://, rediss:// or unix://. */
  REDIS_URL: z.string().default('redis://127.0.0.1:6379'),
  /** Only for the default of STORAGE_URL. */
  DATA_DIR: z.string().default('data'),
  /** Object storage: file:///directory or s3://bucket/prefix; default: the directory `objects` in DATA_DIR. */
  STORAGE_URL: z.string().optional(),
  /** Directory of the model bundle. */
  MODEL_URL: z.string().default(path.resolve(import.meta.dirname, '../../../models/default')),
  /** Where /healthz, /readyz and /metrics are served; port 0 takes a free one. */
  METRICS_HOST: z.string().default('127.0.0.1'),
  METRICS_PORT: whole(0, 0),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal']).default('info'),
  /** Seconds that running jobs may take after SIGTERM before they are given back. */
  DRAIN_SECONDS: z.coerce.number().positive().default(20),
  /** How long a finished job's record is kept; the same for every service. */
  RESULT_RETENTION_DAYS: z.coerce.number().positive().default(30),
  /** About how many events a tenant's event stream keeps; the same for every service. */
  EVENTS_KEPT: whole(1, 100_000),
  /**
   * What the model runs on. `auto`: CUDA or WebGPU where this machine has them, else the CPU; a named one that
   * cannot be used falls back to the CPU, which the log, the metrics and every result say.
   */
  PROVIDER: z.enum(['auto', 'cpu', 'webgpu', 'cuda']).default('auto'),
  /** 1: without a GPU the service is not ready, instead of falling back to the CPU. */
  REQUIRE_GPU: z.enum(['0', '1']).default('0'),
  /** Threads that share one batch on the CPU; default: one for each core that this process may use. */
  INFERENCE_THREADS: z.coerce.number().int().min(1).max(256).optional(),
  /**
   * Most windows in a batch. On the CPU more gains nothing and makes newcomers wait longer, on a GPU it is what
   * fills it: 32 is a good start there. Figures: docs/decisions/inference-batches.md.
   */
  MAX_BATCH: z.coerce.number().int().min(1).max(256).default(4),
  /** Milliseconds that an idle model waits for more windows. On the CPU waiting gains nothing; a GPU likes 5. */
  MAX_BATCH_DELAY_MS: z.coerce.number().min(0).max(1_000).default(0),
  /** Jobs taken from the queue at a time: what batches are filled from. */
  INFERENCE_CONCURRENCY: whole(1, 32),
  /** Bytes of windows held for those jobs: the rest of them wait before reading theirs. */
  MAX_WINDOW_BYTES: whole(1, 256 * 1024 * 1024),
});

/**
 * @param cores cores that this process may use.
 * @throws {StartupError} naming the variable.
 */
export function loadConfig(env: NodeJS.ProcessEnv, cores = availableParallelism()) {
  // A variable that is set to nothing (compose files do) means its default.
  const given = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== ''));
  const parsed = schema.safeParse(given);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw new StartupError(`${issue.path.join('.')}: ${issue.message}.`);
  }
  const v = parsed.data;
  if (v.REQUIRE_GPU === '1' && v.PROVIDER === 'cpu') {
    throw new StartupError('REQUIRE_GPU=1 contradicts PROVIDER=cpu: set PROVIDER to auto, cuda or webgpu.');
  }
  return {
    redisUrl: v.REDIS_URL,
    storageUrl: v.STORAGE_URL ?? pathToFileURL(path.resolve(v.DATA_DIR, 'objects')).href,
    modelUrl: v.MODEL_URL,
    metricsHost: v.METRICS_HOST,
    metricsPort: v.METRICS_PORT,
    logLevel: v.LOG_LEVEL,
    drainSeconds: v.DRAIN_SECONDS,
    retention: { resultSeconds: Math.ceil(v.RESULT_RETENTION_DAYS * 24 * 3_600), events: v.EVENTS_KEPT },
    provider: v.PROVIDER,
    requireGpu: v.REQUIRE_GPU === '1',
    threads: v.INFERENCE_THREADS ?? cores,
    maxBatch: v.MAX_BATCH,
    maxBatchDelayMs: v.MAX_BATCH_DELAY_MS,
    concurrency: v.INFERENCE_CONCURRENCY,
    maxWindowBytes: v.MAX_WINDOW_BYTES,
  };
}

export type InferenceConfig = ReturnType<typeof loadConfig>;
