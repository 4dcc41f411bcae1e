/** What the launcher itself reads; every service reads its own part of the same environment. */
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { StartupError } from '@acousticsense/shared/errors';
import { z } from 'zod';

const root = path.dirname(import.meta.dirname);
const flag = z.stringbool().default(false);
/** `NAME=` in a .env file means the default, as if the line were not there. */
const optional = z
  .string()
  .optional()
  .transform((value) => value || undefined);

const variables = z.object({
  /** Port of the page and the API. 0 takes a free one. */
  PORT: z.coerce.number().int().min(0).max(65_535).default(8000),
  /** Address to listen on. Anything but loopback needs a key, which is made when API_KEY gives none. */
  HOST: z.string().min(1).default('127.0.0.1'),
  /** Where Redis, objects, logs and the key are kept. Relative to the project's folder. */
  DATA_DIR: z.string().min(1).default('data'),
  /** A Redis of your own: redis://, rediss:// or unix://. Without it a private one runs in DATA_DIR. */
  REDIS_URL: optional,
  /** file:///dir or s3://bucket/prefix. Without it: DATA_DIR/objects. */
  STORAGE_URL: optional,
  /** Directory of the model bundle. Relative to the project's folder. */
  MODEL_URL: z.string().min(1).default('models/default'),
  /** The key that callers must send. */
  API_KEY: optional,
  /** Seals the credentials of tenants. Without it: one is made and kept in DATA_DIR. */
  SECRETS_KEY: optional,
  /** First of consecutive ports for the health and metrics of the services behind the API. 0: free ones. */
  METRICS_PORT: z.coerce.number().int().min(0).max(65_500).default(0),
  /** 1: every log line of every service on the terminal, not only warnings and errors. */
  LOG_TO_STDOUT: flag,
});

export interface LauncherConfig {
  readonly port: number;
  readonly host: string;
  readonly loopback: boolean;
  readonly dataDir: string;
  readonly redisUrl: string | undefined;
  readonly storageUrl: string;
  readonly modelUrl: string;
  readonly apiKey: string | undefined;
  readonly secretsKey: string | undefined;
  readonly metricsPort: number;
  readonly verbose: boolean;
}

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv, args: readonly string[] = []): LauncherConfig {
  const unknown = args.find((argument) => argument !== '--verbose');
  if (unknown !== undefined)
    throw new StartupError(`${unknown} is not an option here: there is only --verbose.`);
  const given = Object.fromEntries(
    Object.keys(variables.shape).map((name) => [name, env[name] === '' ? undefined : env[name]]),
  );
  const parsed = variables.safeParse(given);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    const name = String(issue.path[0]);
    throw new StartupError(`${name}=${env[name]} cannot be used: ${issue.message}.`);
  }
  const {
    PORT,
    HOST,
    DATA_DIR,
    REDIS_URL,
    STORAGE_URL,
    MODEL_URL,
    API_KEY,
    SECRETS_KEY,
    METRICS_PORT,
    LOG_TO_STDOUT,
  } = parsed.data;
  const dataDir = path.resolve(root, DATA_DIR);
  return {
    port: PORT,
    host: HOST,
    loopback: /^(127(\.\d+){3}|::1|localhost)$/.test(HOST),
    dataDir,
    redisUrl: REDIS_URL,
    storageUrl: STORAGE_URL ?? pathToFileURL(path.join(dataDir, 'objects')).href,
    modelUrl: /^[a-z0-9]+:/i.test(MODEL_URL) ? MODEL_URL : path.resolve(root, MODEL_URL),
    apiKey: API_KEY,
    secretsKey: SECRETS_KEY,
    metricsPort: METRICS_PORT,
    verbose: LOG_TO_STDOUT || args.length > 0,
  };
}
