/** The variables that every service reads alike, and how variables are read. */
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { z } from 'zod';
import type { BackendsConfig } from './backends.ts';
import { StartupError } from './errors.ts';

export const commonVariables = {
  /** Redis of the queues and records: redis://, rediss://, unix:// or redis+sentinel://host,host/NAME. */
  REDIS_URL: z.string().default('redis://127.0.0.1:6379'),
  /** Only for the default of STORAGE_URL. */
  DATA_DIR: z.string().default('data'),
  /** Object storage: file:///directory or s3://bucket/prefix; default: the directory `objects` in DATA_DIR. */
  STORAGE_URL: z.string().optional(),
  /** How long a finished job's record is kept. */
  RESULT_RETENTION_DAYS: z.coerce.number().positive().default(30),
  /**
   * Seals what tenants trust the service with: 32 bytes in base64; of several, separated by commas, the first seals
   * and all open. Without it no credentials are taken.
   */
  SECRETS_KEY: z.string().optional(),
  /** Private targets that may be read from, separated by commas: host, host:port, CIDR. Never metadata services. */
  EGRESS_ALLOW: z.string().default(''),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal']).default('info'),
  /** Seconds that running work may take after SIGTERM before it is given back. */
  DRAIN_SECONDS: z.coerce.number().positive().default(20),
};

/** Of every service but the API, which tells its health where it is served. */
export const healthVariables = {
  ...commonVariables,
  /** Where /healthz, /readyz and /metrics are served; port 0 takes a free one. */
  METRICS_HOST: z.string().default('127.0.0.1'),
  METRICS_PORT: z.coerce.number().int().min(0).max(65_535).default(0),
};

export const workerVariables = {
  ...healthVariables,
  /** Directory of the model bundle; the decoder needs only its profile. */
  MODEL_URL: z.string().default(path.resolve(import.meta.dirname, '../../../models/default')),
  /** 1: this worker's model is on trial: jobs come to it only when they name it. */
  MODEL_CANDIDATE: z.stringbool().default(false),
};

/**
 * A variable that is set to nothing (compose files do that) means its default.
 * @throws {StartupError} naming the variable.
 */
export function readVariables<T extends z.ZodType>(schema: T, env: NodeJS.ProcessEnv): z.infer<T> {
  const given = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== ''));
  const parsed = schema.safeParse(given);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  throw new StartupError(`${issue.path.join('.')}: ${issue.message}.`);
}

const common = z.object(commonVariables);
const health = z.object(healthVariables);
const worker = z.object(workerVariables);

export interface CommonConfig extends BackendsConfig {
  readonly secretsKey: string | undefined;
  readonly egressAllow: string;
  readonly logLevel: string;
  readonly drainSeconds: number;
}

export function commonConfig(read: z.infer<typeof common>): CommonConfig {
  return {
    redisUrl: read.REDIS_URL,
    storageUrl: read.STORAGE_URL ?? pathToFileURL(path.resolve(read.DATA_DIR, 'objects')).href,
    retention: { resultSeconds: Math.ceil(read.RESULT_RETENTION_DAYS * 24 * 3_600) },
    secretsKey: read.SECRETS_KEY,
    egressAllow: read.EGRESS_ALLOW,
    logLevel: read.LOG_LEVEL,
    drainSeconds: read.DRAIN_SECONDS,
  };
}

export function healthConfig(read: z.infer<typeof health>) {
  return { ...commonConfig(read), metricsHost: read.METRICS_HOST, metricsPort: read.METRICS_PORT };
}

export function workerConfig(read: z.infer<typeof worker>) {
  return {
    ...healthConfig(read),
    modelUrl: read.MODEL_URL,
    candidate: read.MODEL_CANDIDATE,
  };
}
