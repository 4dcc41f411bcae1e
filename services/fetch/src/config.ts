/** Configuration of the fetch service, from the environment. */
import { readVariables, workerConfig, workerVariables } from '@acousticsense/shared/common-config';
import { z } from 'zod';

const positive = (otherwise: number) => z.coerce.number().positive().default(otherwise);

const schema = z.object({
  ...workerVariables,
  /** Largest file that is fetched, in bytes: 512 MiB. */
  MAX_UPLOAD_BYTES: z.coerce.number().int().positive().default(536_870_912),
  /** Downloads at a time. */
  FETCH_CONCURRENCY: z.coerce.number().int().min(1).max(1_024).default(16),
  /** Connections to one host at a time, of this process. */
  FETCH_PER_HOST: z.coerce.number().int().min(1).max(1_024).default(4),
  /** A server is given up when it sends nothing for this long. */
  FETCH_IDLE_SECONDS: positive(30),
  /** A download is given up after base + per megabyte that has come, in seconds. */
  FETCH_BUDGET_SECONDS: positive(60),
  FETCH_BUDGET_SECONDS_PER_MB: positive(5),
});

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv) {
  const v = readVariables(schema, env);
  return {
    ...workerConfig(v),
    concurrency: v.FETCH_CONCURRENCY,
    perHost: v.FETCH_PER_HOST,
    limits: {
      maxBytes: v.MAX_UPLOAD_BYTES,
      pauseMs: 250,
      idleMs: v.FETCH_IDLE_SECONDS * 1_000,
      budgetBaseMs: v.FETCH_BUDGET_SECONDS * 1_000,
      budgetPerMegabyteMs: v.FETCH_BUDGET_SECONDS_PER_MB * 1_000,
    },
  };
}

export type FetchConfig = ReturnType<typeof loadConfig>;
