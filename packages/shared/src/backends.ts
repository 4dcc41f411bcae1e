/** What every service stands on: Redis, object storage, the job records, the queues; opened, checked and closed alike. */
import type { Redis } from 'ioredis';
import { createJobRecords, type JobRecords, type Retention } from './job-records.ts';
import { openStorage } from './open-storage.ts';
import { createQueues, type Queues } from './queues.ts';
import { connectRedis, connectRedisForWorker, redisCheck } from './redis.ts';
import type { Service } from './service.ts';
import type { Storage } from './storage.ts';

export interface BackendsConfig {
  readonly redisUrl: string;
  readonly storageUrl: string;
  readonly retention: Retention;
}

export interface Backends {
  /** For commands whose caller waits: fails fast while Redis is away. */
  readonly redis: Redis;
  readonly storage: Storage;
  readonly records: JobRecords;
  readonly queues: Queues;
  /** A further connection, for blocking reads or a subscription: waits for Redis for as long as it takes. */
  connect(): Redis;
}

/** A probe of the storage is a write, which S3 wants paid: a success is believed for this long. */
const storageTrustMs = 15_000;

export function openBackends(
  service: Service,
  { redisUrl, storageUrl, retention }: BackendsConfig,
  redisPatienceMs?: number,
): Backends {
  const storage = openStorage(storageUrl);
  service.onClose('storage', () => storage.close());
  service.addCheck('storage', () => storage.probe(), storageTrustMs);

  const redis = connectRedis(redisUrl, redisPatienceMs);
  service.onClose('redis', () => redis.disconnect());
  service.addCheck('redis', redisCheck(redis));

  const queues = createQueues(redis);
  service.onClose('queues', () => queues.close());
  return {
    redis,
    storage,
    queues,
    records: createJobRecords(redis, retention),
    connect() {
      const connection = connectRedisForWorker(redisUrl);
      service.onClose('redis connection', () => connection.disconnect());
      return connection;
    },
  };
}
