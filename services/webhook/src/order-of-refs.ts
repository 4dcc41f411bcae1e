/**
 * Events of one ref reach an endpoint in the order in which they happened: a later one waits until the earlier has been
 * delivered or given up. So a receiver that is told of revision 8 has been told of revision 7 before, or never will be.
 * Between different refs there is no order, and nobody waits.
 */
import { compareCursors } from '@acousticsense/shared/archived-log';
import type { Endpoint } from '@acousticsense/shared/endpoints';
import { withRedis } from '@acousticsense/shared/redis';
import type { Redis } from 'ioredis';
import type { QueuedMessage } from './messages.ts';

interface Queued {
  readonly id: string;
  readonly message: QueuedMessage;
}

export interface Order {
  /** Says of each message which one it has to wait for. */
  chain(endpoint: Pick<Endpoint, 'tenant' | 'id'>, messages: readonly Queued[]): Promise<Queued[]>;
  /** A message is over: nothing waits for it from now on. */
  release(message: QueuedMessage, id: string): Promise<void>;
  /** A message waits for the one before it, and is to be woken. */
  hold(message: QueuedMessage, id: string): Promise<void>;
  /** It waits no longer. */
  goOn(message: QueuedMessage): Promise<void>;
  /** @returns the queue id of the message that waits for this one; only once. */
  next(message: QueuedMessage, id: string): Promise<string | undefined>;
  /** Of an endpoint that is no more. */
  forget(tenant: string, endpointId: string): Promise<void>;
}

/** Hash ref -> `<cursor> <queue id>` of the last message on it that is not over. */
const keyOf = (tenant: string, endpointId: string) => `as:{${tenant}}:endpoint:${endpointId}:refs`;

/** Hash queue id -> queue id of the message that waits for it. */
const heldKeyOf = (tenant: string, endpointId: string) => `as:{${tenant}}:endpoint:${endpointId}:held`;

const releaseScript = `
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return redis.call('HDEL', KEYS[1], ARGV[1]) end
return 0`;

const nextScript = `
local next = redis.call('HGET', KEYS[1], ARGV[1])
if next then redis.call('HDEL', KEYS[1], ARGV[1]) end
return next`;

export function createOrder(redis: Redis): Order {
  const placeOf = ({ id, message }: Queued) => `${message.cursor} ${id}`;
  return {
    async chain({ tenant, id }, messages) {
      const refs = [...new Set(messages.flatMap(({ message }) => message.ref ?? []))];
      if (refs.length === 0) return [...messages];
      const key = keyOf(tenant, id);
      const before = await withRedis(() => redis.hmget(key, ...refs));
      const last = new Map(refs.flatMap((ref, at) => (before[at] ? [[ref, before[at]] as const] : [])));
      const fresh = new Set<string>();
      const chained = messages.map((queued) => {
        const { message } = queued;
        if (message.ref === undefined) return queued;
        const [cursor, after] = last.get(message.ref)?.split(' ') ?? [];
        // A hand-over that is repeated finds its own messages, and those behind them: to wait for these would be for
        // ever. What is told once more, out of its time, waits for nothing and nothing for it.
        if (cursor !== undefined && compareCursors(cursor, message.cursor) >= 0) return queued;
        last.set(message.ref, placeOf(queued));
        fresh.add(message.ref);
        return after === undefined ? queued : { ...queued, message: { ...message, after } };
      });
      const changed = [...fresh].flatMap((ref) => [ref, last.get(ref)!]);
      if (changed.length > 0) await withRedis(() => redis.hset(key, ...changed));
      return chained;
    },

    async release(message, id) {
      const { tenant, endpointId, ref } = message;
      if (ref === undefined) return;
      await withRedis(() =>
        redis.eval(releaseScript, 1, keyOf(tenant, endpointId), ref, placeOf({ id, message })),
      );
    },

    async hold({ tenant, endpointId, after }, id) {
      await withRedis(() => redis.hset(heldKeyOf(tenant, endpointId), after!, id));
    },

    async goOn({ tenant, endpointId, after }) {
      if (after !== undefined) await withRedis(() => redis.hdel(heldKeyOf(tenant, endpointId), after));
    },

    async next({ tenant, endpointId, ref }, id) {
      if (ref === undefined) return undefined;
      const found = await withRedis(() => redis.eval(nextScript, 1, heldKeyOf(tenant, endpointId), id));
      return (found as string | null) ?? undefined;
    },

    async forget(tenant, endpointId) {
      await withRedis(() => redis.del(keyOf(tenant, endpointId), heldKeyOf(tenant, endpointId)));
    },
  };
}
