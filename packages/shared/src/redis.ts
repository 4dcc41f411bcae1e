/** Connections to Redis: where it is, how each kind behaves while it is away, and what is said of it then. */
import { Redis, type RedisOptions } from 'ioredis';
import { InfrastructureFault, isRedisAway, StartupError } from './errors.ts';

const forms =
  'redis://[[user]:password@]host:port, rediss://..., unix:///path or redis+sentinel://[[user]:password@]host:port,host:port/NAME';

type Options = Omit<RedisOptions, 'replyMapping'>;

/**
 * Opens a connection to where the URL leads; the one place that reads it.
 *
 * `redis+sentinel://` (`rediss+sentinel://` with TLS, to the Sentinels as well) names the Sentinels, 26379 where no
 * port is given, and what they call the primary. User and password are Redis's own, those of the Sentinels stand in
 * `?sentinelUsername=` and `?sentinelPassword=`; `?db=` chooses the database. The Sentinels are asked anew for every
 * connection, so after a fail-over all lead to the new primary.
 *
 * @throws {StartupError} in words that hold no part of the URL, which may have a password in it.
 */
function open(url: string, behaviour: Options): Redis {
  const sentinel = /^(rediss?)\+sentinel:\/\/(.*)$/.exec(url);
  let redis: Redis;
  if (sentinel)
    redis = new Redis({ ...sentinelOptions(sentinel[1] === 'rediss', sentinel[2]!), ...behaviour });
  else if (url.startsWith('unix://')) redis = new Redis(new URL(url).pathname, behaviour);
  else if (/^rediss?:\/\//.test(url) && URL.canParse(url)) redis = new Redis(url, behaviour);
  else throw new StartupError(`REDIS_URL must be ${forms}.`);
  // Without a listener a lost connection would end the process; readiness tells of it (service.ts).
  redis.on('error', () => {});
  return redis;
}

function sentinelOptions(tls: boolean, rest: string): Options {
  const [, username = '', password = '', hosts = '', name = '', query] =
    /^(?:([^:@/]*):([^@/]*)@)?([^@/?]+)\/([^/?]+)(?:\?(.*))?$/.exec(rest) ?? [];
  const sentinels = hosts.split(',').map((address) => {
    const [, host, port = '26379'] = /^(\[[^\]]+\]|[^:]+)(?::(\d+))?$/.exec(address) ?? [];
    if (host === undefined) throw new StartupError(`REDIS_URL must be ${forms}.`);
    return { host: host.replace(/^\[|\]$/g, ''), port: Number(port) };
  });
  const asked = new URLSearchParams(query);
  const db = Number(asked.get('db') ?? 0);
  if (!Number.isInteger(db) || db < 0)
    throw new StartupError('REDIS_URL: db must be a whole number from 0 on.');
  const credentials = {
    username: decoded(username),
    password: decoded(password),
    sentinelUsername: asked.get('sentinelUsername'),
    sentinelPassword: asked.get('sentinelPassword'),
  };
  return {
    sentinels,
    name: decoded(name),
    db,
    ...Object.fromEntries(Object.entries(credentials).filter(([, value]) => value)),
    ...(tls ? { tls: {}, sentinelTLS: {}, enableTLSForSentinelMode: true } : {}),
    sentinelCommandTimeout: 2_000,
    sentinelRetryStrategy: retryStrategy,
    // A primary that became a replica under an open connection: the Sentinels know who it is now.
    reconnectOnError: (error) => error.message.startsWith('READONLY'),
  };
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    throw new StartupError('REDIS_URL: a % in a user, password or name must be written %25.');
  }
}

/** The URL as it may be shown: no user, no password, no options. */
export function withoutCredentials(url: string): string {
  return url.replace(/\/\/.*@/s, '//').replace(/\?.*$/s, '');
}

const silenceMs = 30_000;

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
  return open(url, {
    retryStrategy,
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
    commandTimeout: patienceMs,
    socketTimeout: patienceMs,
    connectTimeout: 5_000,
  });
}

/**
 * For BullMQ workers and subscribers, which must outlive an absence of Redis and go on.
 *
 * A machine that is cut off closes no connection. A reply that does not come in `silenceMs` and, where nothing is
 * asked (a subscriber waits for what others say), unanswered keep-alives tell of it. BullMQ's blocking reads end
 * after 10 seconds at most.
 */
export function connectRedisForWorker(url: string): Redis {
  return open(url, {
    retryStrategy,
    maxRetriesPerRequest: null,
    connectTimeout: 5_000,
    socketTimeout: silenceMs,
    keepAlive: 10_000,
  });
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
 * replica) is not ready; and, once a connection (a fail-over leads to another), that this Redis is one that the
 * service can rely on.
 *
 * The check throws {@link StartupError} on a cluster (every key is laid out for one, nobody has proven it yet)
 * and on a Redis that evicts keys; {@link InfrastructureFault} with what is wrong and what to do while it is away.
 */
export function redisCheck(redis: Redis): () => Promise<void> {
  let fit = false;
  let trouble: Error | undefined;
  redis.on('error', (error: Error) => {
    // Each Sentinel's own words came before it.
    if (!error.message.startsWith('All sentinels are unreachable')) trouble = error;
  });
  redis.on('sentinelError', (error: Error) => {
    trouble = error;
  });
  redis.on('ready', () => {
    trouble = undefined;
    fit = false;
  });
  return async () => {
    try {
      if (!fit) checkFit(await redis.info());
      fit = true;
      await redis.set(`as:probe:${process.pid}`, '1', 'EX', 10);
    } catch (error) {
      if (error instanceof StartupError) throw error;
      // Without a connection a command only says that there is none; why, the connection itself was told.
      const cause = redis.status === 'ready' ? error : (trouble ?? error);
      throw new InfrastructureFault('redis', complaint(cause), error);
    }
  };
}

function checkFit(info: string): void {
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
}

/** The first words of Redis's errors, and what they mean to who runs it. */
const complaints: readonly (readonly [RegExp, string])[] = [
  [
    /^NOAUTH/,
    'Redis asks for a password and REDIS_URL gives none: put it there (redis://:PASSWORD@host:port).',
  ],
  [
    /^WRONGPASS|invalid (username-)?password/i,
    'Redis refuses the user or the password in REDIS_URL: put them right.',
  ],
  [
    /NOPERM/,
    'The Redis user in REDIS_URL may not do what is needed: give it all commands, keys and channels.',
  ],
  [/^OOM/, 'Redis is full (maxmemory): give it more memory. It takes nothing until then.'],
  [/^MISCONF/, 'Redis cannot write to its own disk and takes no writes (MISCONF): see to that disk.'],
  [
    /^READONLY/,
    'This Redis is a replica, which takes no writes: name its primary in REDIS_URL, or its Sentinels (redis+sentinel://).',
  ],
  [
    /^NOREPLICAS/,
    'Redis has fewer replicas than min-replicas-to-write and takes no writes: see to its replicas.',
  ],
  [/^LOADING/, 'Redis is loading its data.'],
];

function complaint(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  const known = complaints.find(([pattern]) => pattern.test(message))?.[1];
  if (known) return known;
  if (/sentinel/i.test(message)) {
    const reason = / because (.*)$/.exec(message)?.[1];
    if (/NOAUTH|WRONGPASS/.test(reason ?? ''))
      return 'The Sentinels want another password: give theirs in REDIS_URL (?sentinelPassword=).';
    return reason === undefined
      ? 'No Sentinel that REDIS_URL names knows a primary by the name in it: put the name right (the last part of its path).'
      : `No Sentinel that REDIS_URL names can be asked for the primary (${reason}).`;
  }
  if (message.startsWith("Stream isn't writeable")) return 'Redis cannot be reached (no answer yet).';
  return `Redis cannot be reached (${message}).`;
}
