/** Connections to Redis: how each kind behaves while Redis is away. */
import { Redis } from 'ioredis';
import { InfrastructureFault, isRedisAway, StartupError } from './errors.ts';

/** Accepts `redis://`, `rediss://` and `unix:///path/to.sock`. */
function targetOf(url: string): string {
  if (url.startsWith('unix://')) return new URL(url).pathname;
  if (/^rediss?:\/\//.test(url)) return url;
  throw new StartupError('REDIS_URL must begin with redis://, rediss:// or unix://.');
}

const retryStrategy = (attempt: number) => Math.min(100 * 2 ** Math.min(attempt, 5), 2_000);

/**
 * For commands whose caller waits: while Redis is away they fail instead of queueing up, so that HTTP answers 503
 * and a stage gives its job back.
 *
 * A Redis that is gone is noticed at once, one that is there and silent (frozen, cut off) after `patienceMs`. Then
 * the connection is given up, and until a new one answers every command fails at once: so waiting happens once, not
 * once a request, and no heap of commands is carried out much later, when nobody waits for them any more. Those few
 * that were sent before may be: a command that timed out may still happen.
 *
 * @param patienceMs how long a reply may take.
 */
export function connectRedis(url: string, patienceMs = 5_000): Redis {
  const redis = new Redis(targetOf(url), {
    retryStrategy,
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
    commandTimeout: patienceMs,
    socketTimeout: patienceMs,
    connectTimeout: 5_000,
    lazyConnect: false,
  });
  // Without a listener a lost connection would end the process; readiness tells of it (service.ts).
  redis.on('error', () => {});
  return redis;
}

/** For BullMQ workers and subscribers, which must outlive an absence of Redis and go on. */
export function connectRedisForWorker(url: string): Redis {
  const redis = new Redis(targetOf(url), { retryStrategy, maxRetriesPerRequest: null });
  redis.on('error', () => {});
  return redis;
}

/** Runs a Redis operation; a lost connection becomes an {@link InfrastructureFault}. */
export async function withRedis<T>(operation: () => Promise<T>): Promise<T> {
  try {
    return await operation();
  } catch (error) {
    if (isRedisAway(error)) throw new InfrastructureFault('redis', 'Redis cannot be reached', error);
    throw error;
  }
}

/**
 * The readiness check of a connection: writes a key, since a Redis that refuses writes (full, a read-only
 * replica) is not ready; and, once, that this Redis is one that the service can rely on.
 *
 * The check throws {@link StartupError} on a cluster (every key is laid out for one, nobody has proven it yet)
 * and on a Redis that evicts keys.
 */
export function redisCheck(redis: Redis): () => Promise<void> {
  let fit = false;
  return async () => {
    await redis.set(`as:probe:${process.pid}`, '1', 'EX', 10);
    if (fit) return;
    const info = await redis.info();
    if (/^cluster_enabled:1/m.test(info)) {
      throw new StartupError(
        'This Redis runs in cluster mode, which AcousticSense does not support yet: use a single Redis or Sentinel.',
      );
    }
    const policy = /^maxmemory_policy:(\S+)/m.exec(info)?.[1];
    if (!/^maxmemory:0\s*$/m.test(info) && policy !== 'noeviction') {
      throw new StartupError(
        `This Redis evicts keys (maxmemory-policy ${policy}), which would lose jobs: set it to noeviction.`,
      );
    }
    fit = true;
  };
}
