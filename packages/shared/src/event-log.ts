/** The logs of a tenant that callers can read back: what happened, and how it was delivered. */
import { z } from 'zod';
import {
  type ArchivedLog,
  type ArchiveOptions,
  createArchivedLog,
  type EntryFormat,
} from './archived-log.ts';
import { eventsChannel, eventTypes, type LoggedEvent, type StoredEvent } from './events.ts';
import type { Callback } from './job.ts';
import { timeOf } from './object-keys.ts';

type EventEntry = Omit<LoggedEvent, 'cursor'>;

export interface EventPage {
  readonly events: LoggedEvent[];
  /** From here the next page is read; undefined: there never was an event. */
  readonly cursor: string | undefined;
  /** Whether there was more at that moment. */
  readonly more: boolean;
  /** Whether events behind `after` were deleted since: this page begins with the oldest that is left. */
  readonly expired: boolean;
}

export interface EventLog extends Omit<ArchivedLog<EventEntry>, 'page' | 'search' | 'append'> {
  /** For events that are not born in `commit.lua` or `batch.lua`. @returns the cursor. */
  append(
    tenant: string,
    entry: { readonly id: string; readonly event: StoredEvent; readonly callback?: Callback },
  ): Promise<string>;
  /**
   * In order: as many as `limit`, fewer at the end, and where what follows cannot be read at present.
   * @param after exclusive; undefined: from the oldest.
   * @throws {InfrastructureFault} Redis or storage is away, or a segment is damaged.
   */
  read(tenant: string, after: string | undefined, limit: number, signal?: AbortSignal): Promise<EventPage>;
  /** By its `webhook-id`; reads all since its job or batch was made, if need be. */
  find(tenant: string, eventId: string, signal?: AbortSignal): Promise<LoggedEvent | undefined>;
}

const knownTypes: ReadonlySet<string> = new Set(eventTypes);

const eventFormat: EntryFormat<EventEntry> = {
  name: 'events',
  channel: eventsChannel,
  toFields: ({ id, event, callback }) => [
    ...['id', id, 'event', JSON.stringify(event)],
    ...(callback ? ['callback', JSON.stringify(callback)] : []),
  ],
  fromFields(fields) {
    const [id, event, callback] = ['id', 'event', 'callback'].map((name) => fields.get(name));
    if (!id || !event) return undefined;
    try {
      const parsed = JSON.parse(event) as StoredEvent;
      if (!knownTypes.has(parsed.type) || typeof parsed.data !== 'object') return undefined;
      return { id, event: parsed, ...(callback ? { callback: JSON.parse(callback) as Callback } : {}) };
    } catch {
      return undefined;
    }
  },
};

/** What clocks of two machines may differ by. */
const skewMs = 3_600_000;

export function createEventLog(options: ArchiveOptions): EventLog {
  const { page, search, append, ...rest } = createArchivedLog(eventFormat, options);
  return {
    ...rest,
    append,
    async read(tenant, after, limit, signal) {
      const { entries, ...about } = await page(tenant, after, limit, signal);
      return { events: entries, ...about };
    },
    async find(tenant, eventId, signal) {
      // The id of the job or batch in it is a UUIDv7: nothing was told of it before it was made.
      const uuid = /[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/.exec(eventId)?.[0];
      const after = uuid && `${Math.max(0, timeOf(uuid).getTime() - skewMs)}-0`;
      return search(tenant, after, ({ id }) => id === eventId, signal);
    },
  };
}

/** One attempt to deliver an event, as it is kept. */
export const deliverySchema = z.object({
  at: z.number().describe('epoch ms at which it began'),
  eventId: z.string(),
  endpointId: z.string(),
  type: z.enum(eventTypes),
  attempt: z.int().min(1),
  outcome: z.enum(['delivered', 'failed', 'gone']),
  status: z.int().optional().describe('of the answer, if there was one'),
  ms: z.number().min(0),
  problem: z.string().optional().describe('stable short code of why it failed'),
  excerpt: z.string().optional().describe('how the answer begins'),
});
export type Delivery = z.infer<typeof deliverySchema>;

const deliveryFormat: EntryFormat<Delivery> = {
  name: 'deliveries',
  toFields: (delivery) => ['attempt', JSON.stringify(delivery)],
  fromFields(fields) {
    try {
      return deliverySchema.safeParse(JSON.parse(fields.get('attempt') ?? '')).data;
    } catch {
      return undefined;
    }
  },
};

/** Attempts of all endpoints of a tenant in the order in which they ended. */
export type DeliveryLog = ArchivedLog<Delivery>;

export function createDeliveryLog(options: ArchiveOptions): DeliveryLog {
  return createArchivedLog(deliveryFormat, options);
}
