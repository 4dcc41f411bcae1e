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

/**
 * Hash ref -> `<cursor> <queue id>` of the messages on it in the last hand-over, and before them of the one that the first
 * of these waits for; until the last of all is over. So a hand-over that is repeated, because it was noted here and then
 * broken off, gives each message the same one to wait for.
 */
const keyOf = (tenant: string, endpointId: string) => `as:{${tenant}}:endpoint:${endpointId}:refs`;

/** Hash queue id -> queue id of the message that waits for it. */
const heldKeyOf = (tenant: string, endpointId: string) => `as:{${tenant}}:endpoint:${endpointId}:held`;

const releaseScript = `
local places = redis.call('HGET', KEYS[1], ARGV[1])
if not places then return 0 end
local isLast = places == ARGV[2] or string.sub(places, -#ARGV[2] - 1) == ' ' .. ARGV[2]
return isLast and redis.call('HDEL', KEYS[1], ARGV[1]) or 0`;

const nextScript = `
local next = redis.call('HGET', KEYS[1], ARGV[1])
if next then redis.call('HDEL', KEYS[1], ARGV[1]) end
return next`;

interface Place {
  readonly cursor: string;
  /** Of the message in its queue. */
  readonly id: string;
}

const textOf = ({ cursor, id }: Place) => `${cursor} ${id}`;

function parsePlaces(text: string): Place[] {
  return [...text.matchAll(/(\S+) (\S+)/g)].map(([, cursor, id]) => ({ cursor: cursor!, id: id! }));
}

/** Of a hand-over whose first message on the ref is at `cursor`: what was noted is added to, if it is of the same one. */
function placesFor(cursor: string, noted: readonly Place[]): Place[] {
  const last = noted.at(-1);
  return last !== undefined && compareCursors(last.cursor, cursor) < 0 ? [last] : [...noted];
}

export function createOrder(redis: Redis): Order {
  return {
    async chain({ tenant, id: endpointId }, messages) {
      const refs = [...new Set(messages.flatMap(({ message }) => message.ref ?? []))];
      if (refs.length === 0) return [...messages];
      const key = keyOf(tenant, endpointId);
      const stored = await withRedis(() => redis.hmget(key, ...refs));
      const before = new Map(refs.map((ref, at) => [ref, parsePlaces(stored[at] ?? '')]));
      const now = new Map<string, Place[]>();
      const fresh = new Set<string>();
      const chained = messages.map((queued) => {
        const { id, message } = queued;
        const { ref, cursor } = message;
        if (ref === undefined) return queued;
        const places = now.get(ref) ?? placesFor(cursor, before.get(ref)!);
        now.set(ref, places);
        // What is told once more, out of its time, is not waited for.
        const last = places.at(-1);
        if (last === undefined || compareCursors(last.cursor, cursor) < 0) {
          places.push({ cursor, id });
          fresh.add(ref);
        }
        const after = places.findLast((place) => compareCursors(place.cursor, cursor) < 0)?.id;
        return after === undefined ? queued : { ...queued, message: { ...message, after } };
      });
      const changed = [...fresh].flatMap((ref) => [ref, now.get(ref)!.map(textOf).join(' ')]);
      if (changed.length > 0) await withRedis(() => redis.hset(key, ...changed));
      return chained;
    },

    async release(message, id) {
      const { tenant, endpointId, ref } = message;
      if (ref === undefined) return;
      await withRedis(() =>
        redis.eval(releaseScript, 1, keyOf(tenant, endpointId), ref, textOf({ cursor: message.cursor, id })),
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
