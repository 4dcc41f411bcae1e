/** Configuration of the feeder, from the environment. */
import path from 'node:path';
import { healthConfig, healthVariables, readVariables } from '@acousticsense/shared/common-config';
import { z } from 'zod';

const schema = z.object({
  ...healthVariables,
  /** Rows of batches in a queue, as a multiple of what its workers hold at a time. */
  FEED_FACTOR: z.coerce.number().min(1).max(1_000).default(4),
  /** Chunks of 1,000 rows that a batch has in Redis at a time. */
  FEED_OPEN_CHUNKS: z.coerce.number().int().min(1).max(1_000).default(16),
  /** Requests to source buckets at a time, of each tenant, for the ETags of rows that come without. */
  FEED_HEADS: z.coerce.number().int().min(1).max(1_024).default(32),
  /**
   * Of a tenant, in Redis: where nobody puts them away, its further jobs wait until somebody does, since no event may be
   * lost.
   */
  EVENTS_WAITING_MOST: z.coerce.number().int().min(1_000).default(200_000),
  /** Of a manifest; here, of a prefix that is walked, rounded up to whole chunks. */
  MAX_BATCH_ROWS: z.coerce.number().int().positive().default(1_000_000),
  /** Directory of the local copies of the index of known answers; default: `index` in DATA_DIR. */
  INDEX_DIR: z.string().optional(),
  /** How many stored results of batches a tenant may have; the oldest batches go first. 0: any number. */
  RESULTS_KEPT: z.coerce.number().int().min(0).default(0),
});

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv) {
  const v = readVariables(schema, env);
  return {
    ...healthConfig(v),
    factor: v.FEED_FACTOR,
    openChunks: v.FEED_OPEN_CHUNKS,
    heads: v.FEED_HEADS,
    maxRows: v.MAX_BATCH_ROWS,
    eventsWaitingMost: v.EVENTS_WAITING_MOST,
    indexDirectory: path.resolve(v.INDEX_DIR ?? path.join(v.DATA_DIR, 'index'), 'feeder'),
    resultsKept: v.RESULTS_KEPT,
    resultRetentionMs: v.RESULT_RETENTION_DAYS * 24 * 3_600_000,
  };
}

export type FeederConfig = ReturnType<typeof loadConfig>;
