/** Puts the logs away: what is old leaves Redis for object storage, what is past its retention goes. */
import type { DeliveryLog, EventLog } from '@acousticsense/shared/event-log';
import { eventsChannel } from '@acousticsense/shared/events';
import type { KeptLease } from '@acousticsense/shared/lease';
import { deadLetterPrefix } from '@acousticsense/shared/object-keys';
import { pause } from '@acousticsense/shared/pause';
import type { Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';

export interface KeeperDeps {
  /** A connection that subscribes. */
  readonly subscriber: Redis;
  readonly events: EventLog;
  readonly deliveries: DeliveryLog;
  readonly storage: Pick<Storage, 'list' | 'delete'>;
  readonly tenants: () => Promise<string[]>;
  readonly lease: KeptLease;
  readonly log: Logger;
  readonly signal: AbortSignal;
  readonly retentionMs: number;
  /** Events of a tenant that stay in Redis on purpose. */
  readonly kept: number;
}

export interface Keeper {
  unarchived(): Promise<number>;
  readonly ended: Promise<void>;
}

/** Of tenants that were heard of; all are looked at now and then. */
const archiveMs = 2_000;
const everybodyMs = 60_000;
const sweepMs = 3_600_000;
const firstSweepMs = 5 * 60_000;

export function createKeeper(deps: KeeperDeps): Keeper {
  const { events, deliveries, storage, tenants, lease, log, signal, retentionMs, kept } = deps;
  let heard = new Set<string>();
  deps.subscriber.on('message', (channel: string, tenant: string) => {
    if (channel === eventsChannel) heard.add(tenant);
  });

  async function run(): Promise<void> {
    let everybodyAt = 0;
    let sweepAt = performance.now() + firstSweepMs;
    while (!signal.aborted) {
      if (lease.isHeld()) {
        const now = performance.now();
        try {
          const some = heard;
          heard = new Set();
          const all = now >= everybodyAt;
          for (const tenant of all ? await tenants() : some) await archive(tenant);
          if (all) everybodyAt = now + everybodyMs;
          if (now >= sweepAt) {
            sweepAt = now + sweepMs;
            for (const tenant of await tenants()) await sweep(tenant, Date.now());
          }
        } catch (error) {
          log.warn({ err: error }, 'events could not be put away; trying again');
        }
      }
      await pause(archiveMs, signal);
    }
  }

  /** One whose segments cannot be written keeps the others waiting for nothing. */
  async function archive(tenant: string): Promise<void> {
    for (const some of [events, deliveries]) {
      await some.archive(tenant).catch((error) => {
        heard.add(tenant);
        log.warn({ err: error, tenant }, 'a log could not be put away; trying again');
      });
    }
  }

  async function sweep(tenant: string, now: number): Promise<void> {
    const before = new Date(now - retentionMs);
    await events.sweep(tenant, before);
    await deliveries.sweep(tenant, before);
    const day = before.toISOString().slice(0, 10);
    for await (const { key } of storage.list(deadLetterPrefix(tenant))) {
      if ((key.split('/')[3] ?? day) < day) await storage.delete(key);
    }
  }

  return {
    async unarchived() {
      const lengths = await Promise.all((await tenants()).map((tenant) => events.length(tenant)));
      return lengths.reduce((sum, length) => sum + Math.max(0, length - kept), 0);
    },
    ended: run(),
  };
}
