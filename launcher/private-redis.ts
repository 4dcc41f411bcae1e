/**
 * The Redis that a bare machine gets: private to one data directory, on a Unix socket only, with an append-only
 * file, never evicting.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault, StartupError } from '@acousticsense/shared/errors';
import { connectRedis, redisCheck, withoutCredentials } from '@acousticsense/shared/redis';

/** `sun_path` holds 108 bytes with its end (unix(7)). */
const longestSocketPath = 107;

export interface RedisSocket {
  readonly path: string;
  readonly url: string;
  remove(): void;
}

/** In the data directory when its path fits a socket address and a URL as it is, else in a private directory of its own. */
export function placeSocket(dataDir: string): RedisSocket {
  const preferred = path.join(dataDir, 'redis', 'redis.sock');
  const fits = Buffer.byteLength(preferred) <= longestSocketPath && /^[\w./-]+$/.test(preferred);
  const directory = fits ? undefined : mkdtempSync(path.join(tmpdir(), 'acousticsense-'));
  const socket = directory === undefined ? preferred : path.join(directory, 'redis.sock');
  return {
    path: socket,
    url: `unix://${socket}`,
    remove() {
      rmSync(directory ?? socket, { recursive: true, force: true });
    },
  };
}

export function redisCommand(dataDir: string, socket: RedisSocket): [string, ...string[]] {
  const options = {
    port: '0',
    unixsocket: socket.path,
    unixsocketperm: '700',
    dir: path.join(dataDir, 'redis'),
    appendonly: 'yes',
    appendfsync: 'everysec',
    save: '',
    'maxmemory-policy': 'noeviction',
    daemonize: 'no',
    // An append-only file cut by a power loss is loaded up to the cut.
    'aof-load-truncated': 'yes',
  };
  return ['redis-server', ...Object.entries(options).flatMap(([name, value]) => [`--${name}`, value])];
}

/**
 * Resolves when Redis answers, has loaded its data and is one that this version can use.
 * @throws {StartupError} when it stays away for `patienceMs` or is not usable.
 */
export async function waitForRedis(url: string, patienceMs: number): Promise<void> {
  const redis = connectRedis(url);
  const check = redisCheck(redis);
  try {
    for (const deadline = Date.now() + patienceMs; ; await sleep(50)) {
      try {
        return await check();
      } catch (error) {
        if (!(error instanceof InfrastructureFault)) throw error;
        if (Date.now() < deadline) continue;
        const away = /^Redis cannot be reached \((.*)\)\.$/.exec(error.message)?.[1];
        if (away === undefined) throw new StartupError(error.message);
        throw new StartupError(
          `Redis cannot be reached at ${withoutCredentials(url)} (${away}): start it, or leave REDIS_URL empty and a private one is started for you.`,
        );
      }
    }
  } finally {
    redis.disconnect();
  }
}
