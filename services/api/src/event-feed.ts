/**
 * The pull feed: a tenant's events page by page, over the whole retention, for receivers that were away or cannot be
 * reached. Whoever has read all may wait for more: one Redis subscriber for the whole process wakes all who do.
 *
 * What is published is only a hint to look again. So nothing is lost when a hint is: everybody looks again when the
 * subscriber's connection comes or goes, and at the end of the wait.
 */
import { isCursor } from '@acousticsense/shared/archived-log';
import type { EventLog } from '@acousticsense/shared/event-log';
import {
  type EventType,
  eventSchema,
  eventsChannel,
  eventTypes,
  type LoggedEvent,
} from '@acousticsense/shared/events';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { beginning, pageOf } from './log-pages.ts';
import { number } from './schemas.ts';

const cursor = z.string().refine(isCursor, 'must be the `next` or a `cursor` of an answer');

export const feedQuerySchema = z.strictObject({
  after: cursor
    .optional()
    .describe('`next` of the page before, or the `cursor` of an event; absent: from the oldest'),
  limit: number(z.number().int().min(1).max(1_000)).default(100),
  types: z
    .string()
    .transform((text) => text.split(','))
    .pipe(z.array(z.enum(eventTypes, `must be among ${eventTypes.join(', ')}, separated by commas`)))
    .optional()
    .describe('only these, separated by commas'),
  wait: number(z.number().int().min(0).max(30))
    .default(0)
    .describe('seconds to wait for an event where there is none yet'),
});
type FeedQuery = z.infer<typeof feedQuerySchema>;

const place = {
  id: z.string().describe('the same however often it is told: `webhook-id`'),
  cursor: z.string().describe('in order'),
};
const [first, ...others] = eventSchema.options;
const fedEventSchema = z.discriminatedUnion('type', [
  first.extend(place),
  ...others.map((option) => option.extend(place)),
]);
export const eventPageSchema = z.strictObject({
  events: z.array(fedEventSchema),
  next: z.string().describe('`after` of the next page; moves on over events that were not asked for'),
  more: z.boolean().describe('whether there is more already'),
});
export type FedPage = z.infer<typeof eventPageSchema>;

export interface EventFeed {
  /**
   * The next events of these types; waits for one where there is none.
   * @param signal ends the waiting, with what there is.
   * @throws {ProblemError} cursor_expired
   */
  next(
    tenant: string,
    query: FeedQuery,
    signal: AbortSignal,
  ): Promise<{ events: LoggedEvent[]; next: string; more: boolean }>;
  /** Everybody who waits is answered at once, and nobody waits any more. */
  close(): void;
}

export function createEventFeed({
  subscriber,
  log,
}: {
  readonly subscriber: Redis;
  readonly log: EventLog;
}): EventFeed {
  const waiters = new Map<string, Set<() => void>>();
  const closing = new AbortController();

  subscriber.on('message', (channel, tenant) => {
    if (channel === eventsChannel) for (const wake of waiters.get(tenant) ?? []) wake();
  });
  const wakeAll = () => {
    for (const set of waiters.values()) for (const wake of set) wake();
  };
  subscriber.on('ready', wakeAll);
  subscriber.on('close', wakeAll);
  void subscriber.subscribe(eventsChannel).catch(() => {});

  async function look(tenant: string, after: string | undefined, { limit, types }: FeedQuery) {
    const wanted = types && new Set<EventType>(types);
    const { found, ...place } = await pageOf<Omit<LoggedEvent, 'cursor'>>(
      {
        async read(from, most) {
          const { events, ...about } = await log.read(tenant, from, most);
          return { entries: events, ...about };
        },
        oldest: () => log.oldest(tenant),
      },
      { after, limit },
      'Events',
      wanted && (({ event }) => wanted.has(event.type)),
    );
    return { events: found, ...place };
  }

  return {
    async next(tenant, query, signal) {
      const over = AbortSignal.any([signal, closing.signal, AbortSignal.timeout(query.wait * 1_000)]);
      let wake = () => {};
      const woken = () => wake();
      // Before the first look, so that no event falls between the two.
      const set = waiters.get(tenant) ?? new Set();
      waiters.set(tenant, set.add(woken));
      over.addEventListener('abort', woken, { once: true });
      try {
        for (let { after } = query; ; ) {
          const last = over.aborted;
          const hinted = new Promise<void>((resolve) => {
            wake = resolve;
          });
          const page = await look(tenant, after, query);
          const done = page.events.length > 0 || page.more || last || query.wait === 0;
          if (done) return { ...page, next: page.next ?? beginning };
          after = page.next;
          // A last look follows: the hint may have been lost.
          if (!over.aborted) await hinted;
          if (signal.aborted) return { events: [], next: after ?? beginning, more: false };
        }
      } finally {
        over.removeEventListener('abort', woken);
        set.delete(woken);
        if (set.size === 0) waiters.delete(tenant);
      }
    },
    close: () => closing.abort(),
  };
}
