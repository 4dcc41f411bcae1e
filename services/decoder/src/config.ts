/** Configuration of the decoder, from the environment. */
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { StartupError } from '@acousticsense/shared/errors';
import { z } from 'zod';

const whole = (smallest: number, otherwise: number) =>
  z.coerce.number().int().min(smallest).default(otherwise);
const positive = (otherwise: number) => z.coerce.number().positive().default(otherwise);

const schema = z.object({
  /** Redis of the queues and records: redis://, rediss:// or unix://. */
  REDIS_URL: z.string().default('redis://127.0.0.1:6379'),
  /** Only for the default of STORAGE_URL. */
  DATA_DIR: z.string().default('data'),
  /** Object storage: file:///directory or s3://bucket/prefix; default: the directory `objects` in DATA_DIR. */
  STORAGE_URL: z.string().optional(),
  /** Directory of the model bundle; the decoder needs only its profile. */
  MODEL_URL: z.string().default(path.resolve(import.meta.dirname, '../../../models/default')),
  /** Where /healthz, /readyz and /metrics are served; port 0 takes a free one. */
  METRICS_HOST: z.string().default('127.0.0.1'),
  METRICS_PORT: whole(0, 0),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal']).default('info'),
  /** Seconds that running jobs may take after SIGTERM before they are given back. */
  DRAIN_SECONDS: positive(20),
  /** How long a finished job's record is kept; the same for every service. */
  RESULT_RETENTION_DAYS: positive(30),
  /** About how many events a tenant's event stream keeps; the same for every service. */
  EVENTS_KEPT: whole(1, 100_000),
  /** Files decoded at a time, one ffmpeg each; default: one for each core that this process may use. */
  DECODE_CONCURRENCY: z.coerce.number().int().min(1).max(256).optional(),
  /** Where audio is copied to and long tracks' frames are spilled: up to 1 GB a job in the worst case. */
  SCRATCH_DIR: z.string().default(tmpdir()),
  /** Longest audio that is read, in seconds: 4 hours. */
  MAX_DURATION_SECONDS: positive(14_400),
  FFMPEG_PATH: z.string().default('ffmpeg'),
  FFPROBE_PATH: z.string().default('ffprobe'),
  /** ffmpeg is killed when it is waited for this long without any output. */
  DECODE_STALL_SECONDS: positive(20),
  /** ffmpeg is killed after base + per megabyte of file, in seconds: room for a busy machine. */
  DECODE_BUDGET_SECONDS: positive(120),
  DECODE_BUDGET_SECONDS_PER_MB: positive(5),
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
  return {
    redisUrl: v.REDIS_URL,
    storageUrl: v.STORAGE_URL ?? pathToFileURL(path.resolve(v.DATA_DIR, 'objects')).href,
    modelUrl: v.MODEL_URL,
    metricsHost: v.METRICS_HOST,
    metricsPort: v.METRICS_PORT,
    logLevel: v.LOG_LEVEL,
    drainSeconds: v.DRAIN_SECONDS,
    retention: { resultSeconds: Math.ceil(v.RESULT_RETENTION_DAYS * 24 * 3_600), events: v.EVENTS_KEPT },
    concurrency: v.DECODE_CONCURRENCY ?? cores,
    scratchDirectory: path.resolve(v.SCRATCH_DIR),
    ffmpeg: {
      ffmpegPath: v.FFMPEG_PATH,
      ffprobePath: v.FFPROBE_PATH,
      stallMs: v.DECODE_STALL_SECONDS * 1000,
      budgetBaseMs: v.DECODE_BUDGET_SECONDS * 1000,
      budgetPerMegabyteMs: v.DECODE_BUDGET_SECONDS_PER_MB * 1000,
      maxDurationSeconds: v.MAX_DURATION_SECONDS,
    },
  };
}

export type DecoderConfig = ReturnType<typeof loadConfig>;
