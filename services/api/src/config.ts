import path from 'node:path';
import {
  type CommonConfig,
  commonConfig,
  commonVariables,
  readVariables,
} from '@acousticsense/shared/common-config';
import { StartupError } from '@acousticsense/shared/errors';
import type { ServiceConfig } from '@acousticsense/shared/service';
import { z } from 'zod';

const schema = z.object({
  ...commonVariables,
  /** Where to listen. */
  PORT: z.coerce.number().int().min(0).max(65_535).default(8000),
  /** Address to listen on; anything but a loopback address needs API_KEY. */
  HOST: z.string().default('127.0.0.1'),
  /** Further host names under which the service may be called, separated by commas. */
  ALLOWED_HOSTS: z.string().default(''),
  /** Where callers reach the service, for links that they are told; default: where it listens. */
  PUBLIC_URL: z
    .string()
    .refine(
      isPublicUrl,
      'must begin with http:// or https:// and have no credentials, no query and no fragment',
    )
    .transform((url) => url.replace(/\/+$/, ''))
    .optional(),
  /** When set, every request must carry it. */
  API_KEY: z.string().min(16, 'must have at least 16 characters').optional(),
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
  /**
   * Of a tenant, in Redis: where nobody puts them away, its further jobs wait until somebody does, since no event may be
   * lost.
   */
  EVENTS_WAITING_MOST: z.coerce.number().int().min(1_000).default(200_000),
  /** How many requests a tenant may send in a minute; 0: any number. */
  REQUESTS_PER_MINUTE: z.coerce.number().int().min(0).default(0),
  /** How many jobs and rows of batches are accepted of a tenant in a day; 0: any number. */
  ROWS_PER_DAY: z.coerce.number().int().min(0).default(0),
  /** How many bytes a tenant may upload in a day; 0: any number. */
  BYTES_PER_DAY: z.coerce.number().int().min(0).default(0),
  /** How many rows a manifest may have. */
  MAX_BATCH_ROWS: z.coerce.number().int().positive().default(1_000_000),
  /** How many batches of a tenant may be under way before further ones are refused. */
  MAX_ACTIVE_BATCHES: z.coerce.number().int().positive().default(100),
  /** Directory of the local copies of the index of known answers; default: `index` in DATA_DIR. */
  INDEX_DIR: z.string().optional(),
  /** How long POST /api/predict/ waits for the result. */
  PREDICT_TIMEOUT_SECONDS: z.coerce.number().positive().default(120),
  /** How long an uploaded file is kept after it came. */
  AUDIO_RETENTION_HOURS: z.coerce.number().positive().default(24),
  /** How long an upload by tus or signed URLs may stay unfinished. */
  UPLOAD_EXPIRY_HOURS: z.coerce.number().positive().default(24),
  /** How long a signed URL of an upload can be used. */
  UPLOAD_URL_SECONDS: z.coerce
    .number()
    .int()
    .min(1)
    .max(7 * 24 * 3_600)
    .default(3_600),
  /** How long a decoded tensor is kept to save decoding the same audio again. */
  TENSOR_RETENTION_HOURS: z.coerce.number().positive().default(24),
  /** Finished jobs that a tenant may have, rows of batches aside: each takes about 3 kB of Redis. */
  JOBS_KEPT: z.coerce.number().int().min(1).default(100_000),
  /** How many decoded tensors are kept; the oldest go first. 0: any number. */
  TENSORS_KEPT: z.coerce.number().int().min(0).default(0),
  /** How often the reconciler looks. */
  RECONCILE_SECONDS: z.coerce.number().positive().default(15),
  /** How old an unfinished record must be before its queue job is looked for. */
  RECONCILE_AFTER_SECONDS: z.coerce.number().positive().default(60),
});

export interface ApiConfig extends ServiceConfig, CommonConfig {
  readonly port: number;
  readonly host: string;
  readonly allowedHosts: readonly string[];
  readonly apiKey: string | undefined;
  /** Without a slash at its end; undefined: where it listens. */
  readonly publicUrl: string | undefined;
  readonly webDirectory: string;
  readonly maxUploadBytes: number;
  readonly maxDurationSeconds: number;
  readonly maxOpenJobs: number;
  readonly eventsWaitingMost: number;
  readonly requestsPerMinute: number;
  readonly rowsPerDay: number;
  readonly bytesPerDay: number;
  readonly predictTimeoutMs: number;
  readonly audioRetentionMs: number;
  readonly maxBatchRows: number;
  readonly maxActiveBatches: number;
  readonly indexDirectory: string;
  readonly resultRetentionMs: number;
  readonly tensorRetentionMs: number;
  readonly jobsKept: number;
  readonly tensorsKept: number;
  readonly uploadExpiryMs: number;
  readonly uploadUrlMs: number;
  readonly reconcileMs: number;
  readonly reconcileAfterMs: number;
}

const hour = 3_600_000;

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv): ApiConfig {
  const read = readVariables(schema, env);
  if (!isLoopback(read.HOST) && read.API_KEY === undefined) {
    throw new StartupError(
      `HOST=${read.HOST} is reachable from other machines: set API_KEY, or use HOST=127.0.0.1.`,
    );
  }
  return {
    ...commonConfig(read),
    port: read.PORT,
    host: read.HOST,
    allowedHosts: read.ALLOWED_HOSTS.split(',')
      .map((name) => name.trim().toLowerCase())
      .filter(Boolean),
    apiKey: read.API_KEY,
    publicUrl: read.PUBLIC_URL,
    webDirectory: read.WEB_DIR,
    maxUploadBytes: read.MAX_UPLOAD_BYTES,
    maxDurationSeconds: read.MAX_DURATION_SECONDS,
    maxOpenJobs: read.MAX_OPEN_JOBS,
    eventsWaitingMost: read.EVENTS_WAITING_MOST,
    requestsPerMinute: read.REQUESTS_PER_MINUTE,
    rowsPerDay: read.ROWS_PER_DAY,
    bytesPerDay: read.BYTES_PER_DAY,
    predictTimeoutMs: read.PREDICT_TIMEOUT_SECONDS * 1_000,
    audioRetentionMs: read.AUDIO_RETENTION_HOURS * hour,
    maxBatchRows: read.MAX_BATCH_ROWS,
    maxActiveBatches: read.MAX_ACTIVE_BATCHES,
    indexDirectory: path.resolve(read.INDEX_DIR ?? path.join(read.DATA_DIR, 'index'), 'api'),
    resultRetentionMs: read.RESULT_RETENTION_DAYS * 24 * hour,
    tensorRetentionMs: read.TENSOR_RETENTION_HOURS * hour,
    jobsKept: read.JOBS_KEPT,
    tensorsKept: read.TENSORS_KEPT,
    uploadExpiryMs: read.UPLOAD_EXPIRY_HOURS * hour,
    uploadUrlMs: read.UPLOAD_URL_SECONDS * 1_000,
    reconcileMs: read.RECONCILE_SECONDS * 1_000,
    reconcileAfterMs: read.RECONCILE_AFTER_SECONDS * 1_000,
    metricsHost: '',
    metricsPort: undefined,
  };
}

export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || /^127\.\d+\.\d+\.\d+$/.test(host);
}

/** For who is on the same machine, where it listens on all addresses. */
export function urlOf(host: string, port: number): string {
  const name = host === '0.0.0.0' ? '127.0.0.1' : host === '::' ? '::1' : host;
  return `http://${name.includes(':') ? `[${name}]` : name}:${port}`;
}

function isPublicUrl(text: string): boolean {
  if (!URL.canParse(text) || /[?#\s]/.test(text)) return false;
  const { protocol, username, password } = new URL(text);
  return (protocol === 'http:' || protocol === 'https:') && username === '' && password === '';
}
