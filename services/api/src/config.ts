import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { StartupError } from '@acousticsense/shared/errors';
import type { ServiceConfig } from '@acousticsense/shared/service';
import { z } from 'zod';

const schema = z.object({
  /** Where to listen. */
  PORT: z.coerce.number().int().min(0).max(65_535).default(8000),
  /** Address to listen on; anything but a loopback address needs API_KEY. */
  HOST: z.string().default('127.0.0.1'),
  /** Further host names under which the service may be called, separated by commas. */
  ALLOWED_HOSTS: z.string().default(''),
  /** When set, every request must carry it. */
  API_KEY: z.string().min(16, 'must have at least 16 characters').optional(),
  REDIS_URL: z.string().default('redis://127.0.0.1:6379'),
  /** Only for the default of STORAGE_URL. */
  DATA_DIR: z.string().default('data'),
  STORAGE_URL: z.string().optional(),
  /** Directory of the built page. */
  WEB_DIR: z.string().default(path.resolve(import.meta.dirname, '../../web/dist')),
  /** Largest upload in bytes. */
  MAX_UPLOAD_BYTES: z.coerce
    .number()
    .int()
    .positive()
    .default(512 * 1024 * 1024),
  /** For /v1/model: the decoder enforces it. */
  MAX_DURATION_SECONDS: z.coerce
    .number()
    .positive()
    .default(4 * 3_600),
  /** How many unfinished jobs a tenant may have before further ones are refused. */
  MAX_OPEN_JOBS: z.coerce.number().int().positive().default(10_000),
  /** How long POST /api/predict/ waits for the result. */
  PREDICT_TIMEOUT_SECONDS: z.coerce.number().positive().default(120),
  /** How long an uploaded file is kept after it came. */
  AUDIO_RETENTION_HOURS: z.coerce.number().positive().default(24),
  /** How long a finished job's record and spectrogram are kept. */
  RESULT_RETENTION_DAYS: z.coerce.number().positive().default(30),
  /** How long a decoded tensor is kept to save decoding the same audio again. */
  TENSOR_RETENTION_HOURS: z.coerce.number().positive().default(24),
  /** About how many events a tenant's event stream keeps. */
  EVENTS_KEPT: z.coerce.number().int().positive().default(100_000),
  /** How often the reconciler looks. */
  RECONCILE_SECONDS: z.coerce.number().positive().default(15),
  /** How old an unfinished record must be before its queue job is looked for. */
  RECONCILE_AFTER_SECONDS: z.coerce.number().positive().default(60),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal']).default('info'),
  DRAIN_SECONDS: z.coerce.number().positive().default(20),
});

export interface ApiConfig extends ServiceConfig {
  readonly port: number;
  readonly host: string;
  readonly allowedHosts: readonly string[];
  readonly apiKey: string | undefined;
  readonly redisUrl: string;
  readonly storageUrl: string;
  readonly webDirectory: string;
  readonly maxUploadBytes: number;
  readonly maxDurationSeconds: number;
  readonly maxOpenJobs: number;
  readonly predictTimeoutMs: number;
  readonly audioRetentionMs: number;
  readonly resultRetentionMs: number;
  readonly tensorRetentionMs: number;
  readonly eventsKept: number;
  readonly reconcileMs: number;
  readonly reconcileAfterMs: number;
}

const hour = 3_600_000;

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv): ApiConfig {
  const given = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== ''));
  const parsed = schema.safeParse(given);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw new StartupError(`${issue.path.join('.')}: ${issue.message}.`);
  }
  const read = parsed.data;
  if (!isLoopback(read.HOST) && read.API_KEY === undefined) {
    throw new StartupError(
      `HOST=${read.HOST} is reachable from other machines: set API_KEY, or use HOST=127.0.0.1.`,
    );
  }
  return {
    port: read.PORT,
    host: read.HOST,
    allowedHosts: read.ALLOWED_HOSTS.split(',')
      .map((name) => name.trim().toLowerCase())
      .filter(Boolean),
    apiKey: read.API_KEY,
    redisUrl: read.REDIS_URL,
    storageUrl: read.STORAGE_URL ?? pathToFileURL(path.resolve(read.DATA_DIR, 'objects')).href,
    webDirectory: read.WEB_DIR,
    maxUploadBytes: read.MAX_UPLOAD_BYTES,
    maxDurationSeconds: read.MAX_DURATION_SECONDS,
    maxOpenJobs: read.MAX_OPEN_JOBS,
    predictTimeoutMs: read.PREDICT_TIMEOUT_SECONDS * 1_000,
    audioRetentionMs: read.AUDIO_RETENTION_HOURS * hour,
    resultRetentionMs: read.RESULT_RETENTION_DAYS * 24 * hour,
    tensorRetentionMs: read.TENSOR_RETENTION_HOURS * hour,
    eventsKept: read.EVENTS_KEPT,
    reconcileMs: read.RECONCILE_SECONDS * 1_000,
    reconcileAfterMs: read.RECONCILE_AFTER_SECONDS * 1_000,
    logLevel: read.LOG_LEVEL,
    metricsHost: '',
    metricsPort: undefined,
    drainSeconds: read.DRAIN_SECONDS,
  };
}

export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || /^127\.\d+\.\d+\.\d+$/.test(host);
}
