/**
 * From the tenants' logs into the queues of their endpoints. Each endpoint has a cursor into the log and a bounded
 * number of messages outstanding: what is behind that waits in the log, where it costs no Redis. So an endpoint may be
 * dead under a million events, and no other waits for it.
 *
 * One process does it at a time (the lease). The order is: add the messages, then move the cursor. Who repeats a step
 * after a crash, or beside another that was held up, adds messages that are there already.
 */

import { compareCursors } from '@acousticsense/shared/archived-log';
import { type Endpoint, type Endpoints, subscribes } from '@acousticsense/shared/endpoints';
import type { EventLog } from '@acousticsense/shared/event-log';
import { eventsChannel, type LoggedEvent } from '@acousticsense/shared/events';
import type { KeptLease } from '@acousticsense/shared/lease';
import { pause } from '@acousticsense/shared/pause';
import type { Tell } from '@acousticsense/shared/told-event';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { Clock } from './clock.ts';
import type { DeadLetters } from './dead-letters.ts';
import { type MessageQueues, messageId, type QueuedMessage } from './messages.ts';
import type { Order } from './order-of-refs.ts';

export interface DispatcherDeps {
  /** A connection of its own: it subscribes. */
  readonly subscriber: Redis;
  readonly endpoints: Endpoints;
  readonly events: EventLog;
  readonly queues: MessageQueues;
  readonly order: Order;
  readonly deadLetters: Pick<DeadLetters, 'exhume'>;
  readonly tell: Tell;
  readonly lease: KeptLease;
  readonly clock: Clock;
  readonly log: Logger;
  readonly signal: AbortSignal;
  /** Messages outstanding of one endpoint. */
  readonly backlog: number;
}

export interface Dispatcher {
  /** Seconds since the oldest event that an enabled endpoint's queue has not got; 0 when none waits. */
  lagSeconds(): number;
  /** Settles once the signal is aborted and what is under way is done. */
  readonly ended: Promise<void>;
}

/** All endpoints are looked at so often even when nothing is heard: what is published may be lost. */
const lookMs = 1_000;
/** Handed over at a time, and looked through for them: of a busy log an endpoint may want few. */
const handedEvents = 100;
const pageEvents = 500;
/**
 * An endpoint that takes messages has room for so many times as many that wait to be tried again: what it refuses for
 * ever must not keep it from what it takes.
 */
const roomOfAlive = 5;
const aliveMs = 600_000;
/** Between looks at the queue of an endpoint whose messages do not move. */
const fullMs = 250;
const faultMs = 2_000;

export function createDispatcher(deps: DispatcherDeps): Dispatcher {
  const { endpoints, events, queues, order, deadLetters, tell, lease, clock, log, signal } = deps;
  /** Endpoints that are being attended to, and what was heard of their tenants meanwhile. */
  const attended = new Map<string, { again: boolean; done: Promise<void> }>();
  const lags = new Map<string, number>();
  let heard = new Set<string>();
  let wake = Promise.withResolvers<void>();

  deps.subscriber.on('message', (_channel, tenant: string) => {
    heard.add(tenant);
    wake.resolve();
  });
  void deps.subscriber.subscribe(eventsChannel).catch(() => {});

  async function run(): Promise<void> {
    let lookAt = 0;
    let known: Endpoint[] = [];
    while (!signal.aborted) {
      if (!lease.isHeld()) {
        lags.clear();
        await pause(lookMs / 4, signal);
        continue;
      }
      const told = heard;
      heard = new Set();
      wake = Promise.withResolvers<void>();
      try {
        const all = performance.now() >= lookAt;
        if (all) {
          known = await allEndpoints(endpoints);
          lookAt = performance.now() + lookMs;
          for (const id of lags.keys()) if (!known.some((one) => one.id === id)) lags.delete(id);
        }
        for (const endpoint of known) if (all || told.has(endpoint.tenant)) attend(endpoint);
      } catch (error) {
        log.warn({ err: error }, 'endpoints could not be read');
        await pause(faultMs, signal);
      }
      if (heard.size === 0)
        await Promise.race([wake.promise, pause(Math.max(1, lookAt - performance.now()), signal)]);
    }
    await Promise.all([...attended.values()].map(({ done }) => done));
  }

  /** One at a time for each endpoint, all endpoints beside one another. */
  function attend({ tenant, id }: Endpoint): void {
    const running = attended.get(id);
    if (running) {
      running.again = true;
      return;
    }
    const state = { again: false, done: Promise.resolve() };
    attended.set(id, state);
    state.done = (async () => {
      try {
        do {
          state.again = false;
          while (lease.isHeld() && !signal.aborted && (await step(tenant, id)) === 'more');
        } while (state.again && lease.isHeld() && !signal.aborted);
      } catch (error) {
        if (!signal.aborted)
          log.warn({ err: error, tenant, endpointId: id }, 'events could not be handed over');
        await pause(faultMs, signal);
      } finally {
        attended.delete(id);
      }
    })();
  }

  /** @returns whether there is more to hand over. */
  async function step(tenant: string, id: string): Promise<'more' | 'idle'> {
    const endpoint = await endpoints.get(tenant, id);
    if (endpoint?.status === 'disabled') await tellDisabled(endpoint);
    if (endpoint?.status !== 'enabled') {
      lags.delete(id);
      return 'idle';
    }
    const isAlive = clock.now() - (endpoint.lastSuccessAt ?? 0) < aliveMs;
    const most = deps.backlog * (isAlive ? roomOfAlive : 1);
    const room = Math.min(handedEvents, most - (await queues.outstanding(id)));
    if (room <= 0) {
      await noteLag(endpoint);
      await pause(fullMs, signal);
      return 'more';
    }
    const again = (await resend(endpoint, room)) || (await replay(endpoint, room));
    const page = await events.read(tenant, endpoint.cursor, pageEvents, signal);
    if (page.expired)
      log.warn(
        { tenant, endpointId: id, cursor: endpoint.cursor },
        'events passed their retention before they were told',
      );
    const wanted = page.events.filter((logged) => wants(endpoint, logged));
    const chosen = wanted.slice(0, room);
    await handOver(endpoint, chosen);
    const isAll = chosen.length === wanted.length;
    const cursor = isAll ? page.cursor : chosen.at(-1)!.cursor;
    if (cursor !== undefined && cursor !== endpoint.cursor) await endpoints.setCursor(tenant, id, cursor);
    const more = page.more || !isAll;
    const next = isAll ? page.events.at(-1) : wanted[room];
    lags.set(id, more && next ? msOf(next.cursor) : 0);
    return again || more ? 'more' : 'idle';
  }

  async function noteLag({ tenant, id, cursor }: Endpoint): Promise<void> {
    const [next] = (await events.read(tenant, cursor, 1, signal)).events;
    lags.set(id, next ? msOf(next.cursor) : 0);
  }

  async function handOver(endpoint: Endpoint, chosen: readonly LoggedEvent[], again?: string): Promise<void> {
    if (chosen.length === 0) return;
    const { tenant, id: endpointId } = endpoint;
    const messages = await Promise.all(
      chosen.map(async (logged) => {
        const { cursor, event, callback } = logged;
        const ref = 'ref' in event.data ? (event.data.ref ?? undefined) : undefined;
        const message: QueuedMessage = {
          v: 1,
          tenant,
          endpointId,
          eventId: logged.id,
          type: event.type,
          cursor,
          url: callback?.endpointId === endpointId ? callback.url : endpoint.url,
          body: JSON.stringify(await tell(tenant, logged, clock.now())),
          ...(ref === undefined ? {} : { ref }),
          handedOverAt: clock.now(),
          attempts: [],
        };
        return { id: messageId(logged.id, endpointId, again), message };
      }),
    );
    const chained = await order.chain(endpoint, messages);
    const held = chained.filter(({ message }) => message.after !== undefined);
    await Promise.all(held.map(({ id, message }) => order.hold(message, id)));
    await queues.add(endpointId, chained);
    // What it waits for may have ended before it was there to be woken.
    const late = held.map(async ({ id, message }) => {
      if (!(await queues.isOver(endpointId, message.after!))) return;
      await order.goOn(message);
      await queues.wake(endpointId, id);
    });
    await Promise.all(late);
    // Removed meanwhile, and its queue with it: nobody would empty the one that was made here.
    if ((await endpoints.get(tenant, endpointId)) !== undefined) return;
    await queues.forget(endpointId);
    await order.forget(tenant, endpointId);
  }

  /** Events that were asked for once more, one by one. @returns whether there were any. */
  async function resend(endpoint: Endpoint, room: number): Promise<boolean> {
    const { tenant, id } = endpoint;
    const wanted = await endpoints.resends(tenant, id, room);
    for (const one of wanted) {
      const { cursor, eventId, url = endpoint.url, day } = one;
      const page = await events.read(tenant, justBefore(cursor), 1, signal);
      const logged = page.events.find((found) => found.id === eventId);
      const callback = { endpointId: id, url };
      if (logged) await handOver(endpoint, [{ ...logged, callback }], `again${Date.now()}`);
      else log.warn({ tenant, endpointId: id, eventId }, 'an event to be sent again is no longer stored');
      if (logged && day !== undefined) await deadLetters.exhume(tenant, id, day, eventId);
      await endpoints.dropResends(tenant, id, [one]);
    }
    return wanted.length > 0;
  }

  /** The next page of a range that was asked for once more. @returns whether there was one. */
  async function replay(endpoint: Endpoint, room: number): Promise<boolean> {
    const [first] = endpoint.replays;
    if (first === undefined) return false;
    const { tenant, id } = endpoint;
    const page = await events.read(tenant, first.after, room, signal);
    const inside = page.events.filter(({ cursor }) => compareCursors(cursor, first.until) <= 0);
    const chosen = inside.filter(
      (logged) =>
        wants(endpoint, logged) && (!first.types?.length || first.types.includes(logged.event.type)),
    );
    await handOver(endpoint, chosen, first.id);
    const isOver = inside.length < page.events.length || !page.more;
    await endpoints.setReplay(tenant, id, first.id, isOver ? undefined : page.cursor);
    return true;
  }

  /** Repeated until it is noted as told: the event's id is the same. */
  async function tellDisabled(endpoint: Endpoint): Promise<void> {
    const { tenant, id, url, disabledReason, disabledUntold: disabledAt, failingSince } = endpoint;
    if (disabledAt === undefined || disabledReason === undefined || disabledReason === 'operator') return;
    await events.append(tenant, {
      id: `evt_${id}_disabled_${disabledAt}`,
      event: {
        type: 'endpoint.disabled',
        timestamp: new Date(disabledAt).toISOString(),
        data: {
          endpointId: id,
          url,
          reason: disabledReason,
          failingSince: failingSince === undefined ? null : new Date(failingSince).toISOString(),
        },
      },
    });
    await endpoints.toldDisabled(tenant, id, disabledAt);
  }

  return {
    lagSeconds() {
      const waiting = [...lags.values()].filter((since) => since > 0);
      return waiting.length === 0 ? 0 : Math.max(0, (Date.now() - Math.min(...waiting)) / 1_000);
    },
    ended: run(),
  };
}

export async function allEndpoints(endpoints: Pick<Endpoints, 'tenants' | 'list'>): Promise<Endpoint[]> {
  const tenants = await endpoints.tenants();
  return (await Promise.all(tenants.map((tenant) => endpoints.list(tenant)))).flat();
}

function wants(endpoint: Endpoint, { event, callback }: LoggedEvent): boolean {
  return callback?.endpointId === endpoint.id || subscribes(endpoint, event.type);
}

const partsOf = (cursor: string): [ms: number, seq: bigint] => {
  const [ms = '0', seq = '0'] = cursor.split('-');
  return [Number(ms), BigInt(seq)];
};
const msOf = (cursor: string): number => partsOf(cursor)[0];
const lastSequence = '18446744073709551615';
/** The cursor behind which the entry of this one comes first. */
function justBefore(cursor: string): string {
  const [ms, seq] = partsOf(cursor);
  return seq > 0n ? `${ms}-${seq - 1n}` : `${ms - 1}-${lastSequence}`;
}
