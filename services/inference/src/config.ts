/** Configuration of the inference service, from the environment. */
import { availableParallelism } from 'node:os';
import { readVariables, workerConfig, workerVariables } from '@acousticsense/shared/common-config';
import { StartupError } from '@acousticsense/shared/errors';
import { z } from 'zod';

const whole = (smallest: number, otherwise: number) =>
  z.coerce.number().int().min(smallest).default(otherwise);

const schema = z.object({
  ...workerVariables,
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
  const v = readVariables(schema, env);
  if (v.REQUIRE_GPU === '1' && v.PROVIDER === 'cpu') {
    throw new StartupError('REQUIRE_GPU=1 contradicts PROVIDER=cpu: set PROVIDER to auto, cuda or webgpu.');
  }
  return {
    ...workerConfig(v),
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
