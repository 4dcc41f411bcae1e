/** Under which address callers reach the API: only the API knows, and others tell it on. */
import type { Redis } from 'ioredis';
import { InfrastructureFault } from './errors.ts';
import { withRedis } from './redis.ts';

const key = 'as:public-url';
const believedMs = 5_000;
/** A Redis that was emptied hears it again. */
const repeatMs = 30_000;

/**
 * Announces it now, at every connection to Redis and from time to time; a Redis that is away hears it later.
 * @returns ends it.
 */
export function announcePublicUrl(redis: Redis, url: string): () => void {
  const announce = () => void redis.set(key, url).catch(() => {});
  const timer = setInterval(announce, repeatMs);
  timer.unref();
  redis.on('ready', announce);
  if (redis.status === 'ready') announce();
  return () => {
    clearInterval(timer);
    redis.off('ready', announce);
  };
}

/**
 * Reads what the API announced, without a slash at its end, and believes it for 5 s.
 * The function throws {@link InfrastructureFault}: Redis is away, or no API has ever announced itself.
 */
export function readPublicUrl(redis: Redis): () => Promise<string> {
  let known: { at: number; url: string } | undefined;
  return async () => {
    if (known && performance.now() - known.at < believedMs) return known.url;
    const url = await withRedis(() => redis.get(key));
    if (url === null)
      throw new InfrastructureFault('api', 'No API has announced its address (PUBLIC_URL) yet');
    known = { at: performance.now(), url };
    return url;
  };
}
