/** The webhook service as a process, with a Redis and a directory of its own, for tests that tell it events. */
import { type ChildProcess, fork } from 'node:child_process';
import { randomUUIDv7 } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import {
  createEndpoints,
  type Endpoint,
  type EndpointDefinition,
  type Endpoints,
} from '@acousticsense/shared/endpoints';
import { createEventLog, type EventLog } from '@acousticsense/shared/event-log';
import { type JobData, jobEventId, type StoredEvent } from '@acousticsense/shared/events';
import type { Callback } from '@acousticsense/shared/job';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import type { Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import { startRedis, type TestRedis } from '../../../../test/redis.ts';

export const publicUrl = 'https://acousticsense.example';
const secretsKey = Buffer.alloc(32, 'test').toString('base64');

export interface Running extends AsyncDisposable {
  readonly server: TestRedis;
  readonly redis: Redis;
  readonly storage: Storage;
  readonly endpoints: Endpoints;
  readonly events: EventLog;
  /** Origin of its health and metrics. */
  readonly healthUrl: string;
  /** Of the process that was started last. */
  readonly pid: number;
  start(env?: Record<string, string>): Promise<void>;
  stop(signal?: NodeJS.Signals): Promise<void>;
  /** An endpoint that has proven itself. */
  endpoint(
    url: string,
    definition?: Partial<EndpointDefinition>,
    tenant?: string,
  ): Promise<Endpoint & { secret: string }>;
  /** A job ended. @returns the event's id. */
  tell(data?: Partial<JobData>, tenant?: string, callback?: Callback): Promise<string>;
}

export async function startWebhookService(
  env: Record<string, string> = {},
  { appendOnly = false, appendFsync = 'always' as 'always' | 'everysec' } = {},
): Promise<Running> {
  const server = await startRedis(appendOnly ? { appendOnly, args: ['--appendfsync', appendFsync] } : {});
  const directory = await mkdtemp(path.join(tmpdir(), 'as-webhook-'));
  const storageUrl = pathToFileURL(directory).href;
  const storage = openStorage(storageUrl);
  const redis = connectRedisForWorker(server.url);
  const endpoints = createEndpoints({ redis, secrets: createSecrets(secretsKey) });
  const events = createEventLog({ redis, storage });
  await redis.set('as:public-url', publicUrl);
  let service: ChildProcess | undefined;
  let port = 0;

  async function start(more: Record<string, string> = {}): Promise<void> {
    const child = fork(path.join(import.meta.dirname, '../main.ts'), [], {
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: [],
      env: {
        PATH: process.env['PATH'],
        REDIS_URL: server.url,
        STORAGE_URL: storageUrl,
        SECRETS_KEY: secretsKey,
        EGRESS_ALLOW: '127.0.0.0/8',
        ...env,
        ...more,
      },
    });
    service = child;
    await new Promise<void>((resolve, reject) => {
      child.on('message', (message: { type: string; port?: number; message?: string }) => {
        if (message.type === 'listening') port = message.port!;
        if (message.type === 'ready') resolve();
        if (message.type === 'failed') reject(new Error(message.message));
      });
      child.on('exit', (code) => reject(new Error(`the service exited with ${code}`)));
    });
  }

  async function stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (!service || service.exitCode !== null || service.signalCode !== null) return;
    const exited = once(service, 'exit');
    service.kill(signal);
    await exited;
  }

  const running: Running = {
    ...{ server, redis, storage, endpoints, events, start, stop },
    get healthUrl() {
      return `http://127.0.0.1:${port}`;
    },
    get pid() {
      return service!.pid!;
    },
    async endpoint(url, definition = {}, tenant = 'acme') {
      const { endpoint, secret } = await endpoints.create(tenant, {
        ...{ url, types: [], maxInFlight: 8, maxPerSecond: 1_000 },
        ...definition,
      });
      await endpoints.verified(tenant, endpoint.id, { at: Date.now(), ok: true, url });
      return { ...(await endpoints.get(tenant, endpoint.id))!, secret };
    },
    async tell(data = {}, tenant = 'acme', callback) {
      const event = jobEnded(data);
      const id = jobEventId({ jobId: (event.data as JobData).jobId, generation: 1 }, event.type);
      await events.append(tenant, { id, event, ...(callback ? { callback } : {}) });
      return id;
    },
    async [Symbol.asyncDispose]() {
      await stop();
      redis.disconnect();
      await server[Symbol.asyncDispose]();
      await rm(directory, { recursive: true, force: true });
    },
  };
  try {
    await start();
  } catch (error) {
    await running[Symbol.asyncDispose]();
    throw error;
  }
  return running;
}

export function jobEnded(data: Partial<JobData> = {}): StoredEvent {
  return {
    type: 'job.completed',
    timestamp: new Date().toISOString(),
    data: {
      ...{ jobId: randomUUIDv7(), batchId: null, row: null, ref: null, revision: null, state: 'completed' },
      genres: [{ label: 'jazz', confidence: 0.9 }],
      ...{ uncertain: false, uncertainBecause: null, warnings: [], error: null },
      model: { name: 'm', version: '1', digest: 'd'.repeat(64), profile: 'p'.repeat(16) },
      ...data,
    },
  };
}

export async function until(condition: () => unknown, ms = 20_000): Promise<void> {
  for (const end = Date.now() + ms; Date.now() < end; await sleep(20)) if (await condition()) return;
  throw new Error(`never: ${condition}`);
}
