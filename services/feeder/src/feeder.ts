/**
 * The feeder: keeps the queues at a few times what the workers hold, and no fuller. A million rows wait in storage, not
 * in Redis; so a release that comes later overtakes them, and so does another tenant.
 *
 * Turns go to tenants by deficit round-robin (Shreedhar and Varghese 1995): a tenant of weight 2 hands over twice the
 * rows of one of weight 1 while both have some. Within a tenant releases go before backfills, and batches of one
 * class in turn. One process feeds at a time, by a lease; a second one would do the same work again, harmlessly.
 */
import { type BatchRecord, isEnded } from '@acousticsense/shared/batch';
import { type BatchRecords, rowJobId } from '@acousticsense/shared/batch-records';
import {
  anyOpenState,
  type JobRecords,
  type NewJobRecord,
  refOf,
  rowIndex,
} from '@acousticsense/shared/job-records';
import { isFinished, type JobClass, type StageName, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues, Route } from '@acousticsense/shared/queues';
import { liveWorkers } from '@acousticsense/shared/serving';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import { createFeed, type Feed, type FeedDeps } from './feeds.ts';
import { createRates } from './rates.ts';

export interface FeederDeps extends FeedDeps {
  readonly redis: Redis;
  readonly records: JobRecords;
  readonly batches: BatchRecords;
  readonly queues: Queues;
  readonly parts: FeedDeps['parts'] & {
    close(tenant: string, batchId: string, chunk: number): Promise<void>;
    save(tenant: string, batchId: string): Promise<void>;
  };
  readonly receive: (batch: BatchRecord, signal: AbortSignal) => Promise<void>;
  readonly weightOf: (tenant: string) => Promise<number>;
  readonly log: Logger;
  /** Rows in the queues, as a multiple of what workers hold at a time. */
  readonly factor: number;
}

/** Rows that a tenant of weight 1 hands over in a turn. */
const quantum = 32;
/** Below this the queues would run dry between two looks, however few the workers. */
const leastQueued = 32;
/** How often batches and workers are read again. */
const lookMs = 250;
const idleMs = 50;
/** A batch whose manifest stopped coming: its caller has gone. */
const abandonedMs = 3_600_000;

interface Room {
  /** Of all rows. */
  total: number;
  /** As if only releases waited: they overtake what waits. */
  release: number;
}

export type Feeder = ReturnType<typeof createFeeder>;

export function createFeeder(deps: FeederDeps) {
  const { redis, records, batches, queues, parts, log, signal } = deps;
  const feeds = new Map<string, Feed>();
  const receiving = new Map<string, Promise<void>>();
  const deficits = new Map<string, number>();
  const closing = new Map<string, Promise<void>>();
  const rates = createRates(batches);
  let tenants: string[] = [];
  let lookedAt = 0;
  let capacities = new Map<string, { route: Route; slots: number }>();
  /** Whose turn is first: goes round. */
  let first = 0;

  /** @returns whether there was anything to do: the next round may come at once. */
  async function round(): Promise<boolean> {
    if (Date.now() - lookedAt >= lookMs) await look();
    const closed = await closeEnded();
    const fed = await feed();
    return closed || fed > 0;
  }

  async function look(): Promise<void> {
    lookedAt = Date.now();
    tenants = await records.tenants();
    capacities = await readCapacities();
    const active = new Set<string>();
    for (const tenant of tenants) {
      for (const id of await batches.active(tenant)) {
        const batch = await batches.get({ tenant, id });
        if (batch === undefined || isEnded(batch.state)) continue;
        active.add(id);
        await attend(batch);
      }
      for (const id of await batches.unsaved(tenant)) await parts.save(tenant, id);
    }
    for (const id of feeds.keys()) if (!active.has(id)) feeds.delete(id);
    await rates.measure([...feeds.values()].map(({ batch }) => batch));
  }

  async function attend(batch: BatchRecord): Promise<void> {
    if (batch.state === 'cancelling') return cancelOpen(batch);
    if (batch.state === 'receiving') {
      if (Date.now() - batch.updatedAt > abandonedMs) await batches.cancel(batch);
      return;
    }
    if (!batch.sealed && batch.origin.kind !== 'manifest') receive(batch);
    const feed = feeds.get(batch.id);
    if (feed) feed.update(batch);
    else {
      const fresh = createFeed(batch, deps);
      feeds.set(batch.id, fresh);
      fresh.update(batch);
    }
  }

  function receive(batch: BatchRecord): void {
    if (receiving.has(batch.id)) return;
    const work = deps
      .receive(batch, signal)
      .catch(async (error) => {
        if (signal.aborted) return;
        log.warn({ err: error, batchId: batch.id }, 'the manifest could not be read on; trying again');
        await new Promise((resolve) => setTimeout(resolve, 1_000));
      })
      .finally(() => receiving.delete(batch.id));
    receiving.set(batch.id, work);
  }

  /** Stops what a cancelled batch still has: rows that were never fed, and jobs. */
  async function cancelOpen(batch: BatchRecord): Promise<void> {
    const { tenant, id } = batch;
    feeds.delete(id);
    for (const chunk of await batches.openChunks(batch)) {
      await batches.cancelRows(batch, { chunk });
      const states = (await batches.rowStates(batch, chunk)) ?? '';
      const rows = [...states].flatMap((state, row) => (state === 'o' ? [row] : []));
      const jobIds = rows.map((row) => rowJobId(id, rowIndex({ chunk, row })));
      for (const record of await records.getMany(tenant, jobIds)) {
        if (record === undefined || isFinished(record.state)) continue;
        const events = [{ type: 'job.cancelled' as const }];
        const { outcome } = await records.commit(refOf(record), {
          from: anyOpenState,
          to: 'cancelled',
          events,
        });
        const stage = stageOf(record.state);
        if (outcome === 'committed' && stage) await queues.withdraw(stage, record).catch(() => {});
      }
    }
  }

  /** What decoders and inference services hold at a time, by the route of their jobs. */
  async function readCapacities() {
    const workers = await liveWorkers(redis);
    const found = new Map<string, { route: Route; slots: number }>();
    for (const { kind, profileHash, modelDigest, concurrency } of workers) {
      if (kind !== 'inference') continue;
      const route = { profileHash, modelDigest };
      const decoders = workers.filter(
        (other) => other.kind === 'decoder' && other.profileHash === profileHash,
      );
      const known = found.get(modelDigest);
      const slots = known ? known.slots : decoders.reduce((sum, other) => sum + (other.concurrency ?? 1), 0);
      found.set(modelDigest, { route, slots: slots + (concurrency ?? 1) });
    }
    return found;
  }

  async function closeEnded(): Promise<boolean> {
    for (const tenant of tenants) {
      for (const { id, chunk } of await batches.endedChunks(tenant)) {
        const key = `${id}/${chunk}`;
        if (closing.has(key) || closing.size >= 4) continue;
        const work = parts
          .close(tenant, id, chunk)
          .catch((error) =>
            log.warn({ err: error, batchId: id, chunk }, 'a part could not be written; trying again'),
          )
          .finally(() => closing.delete(key));
        closing.set(key, work);
      }
    }
    return false;
  }

  async function feed(): Promise<number> {
    const rooms = new Map<string, Room>();
    for (const { batch, ready } of feeds.values()) {
      if (ready > 0 && !rooms.has(batch.modelDigest)) rooms.set(batch.modelDigest, await roomOf(batch));
    }
    let fed = 0;
    for (;;) {
      const waiting = tenants.filter((tenant) => waitingOf(tenant, rooms).length > 0);
      if (waiting.length === 0) return fed;
      const taken: NewJobRecord[] = [];
      for (let turn = 0; turn < waiting.length; turn += 1) {
        const tenant = waiting[(turn + first) % waiting.length]!;
        // A tenant that had nothing keeps no credit: it would flood the queues when it comes back.
        const credit = (deficits.get(tenant) ?? 0) + quantum * (await deps.weightOf(tenant));
        const rows = takeTurn(tenant, credit, rooms);
        deficits.set(tenant, waitingOf(tenant, rooms).length > 0 ? credit - rows.length : 0);
        taken.push(...rows);
      }
      first += 1;
      if (taken.length === 0) return fed;
      await handOver(taken);
      fed += taken.length;
    }
  }

  /** Batches of a tenant that have rows ready and room for them, in the order of their turns. */
  function waitingOf(tenant: string, rooms: Map<string, Room>): Feed[] {
    const own = [...feeds.values()].filter(
      ({ batch, ready }) => batch.tenant === tenant && ready > 0 && roomFor(batch, rooms) > 0,
    );
    return own.sort((a, b) => rankOf(a.batch) - rankOf(b.batch));
  }

  function takeTurn(tenant: string, credit: number, rooms: Map<string, Room>): NewJobRecord[] {
    const taken: NewJobRecord[] = [];
    for (const feed of waitingOf(tenant, rooms)) {
      const room = roomFor(feed.batch, rooms);
      const rows = feed.take(Math.min(room, Math.floor(credit) - taken.length));
      const queued = rows.filter(({ state }) => stageOf(state ?? 'queued') !== undefined).length;
      const left = rooms.get(feed.batch.modelDigest)!;
      left.total -= queued;
      if (feed.batch.class === 'release') left.release -= queued;
      // Behind the others of its class next time.
      if (rows.length > 0) {
        feeds.delete(feed.batch.id);
        feeds.set(feed.batch.id, feed);
      }
      taken.push(...rows);
      if (taken.length >= Math.floor(credit)) break;
    }
    return taken;
  }

  const rankOf = ({ class: of }: BatchRecord) => (of === 'release' ? 0 : 1);

  function roomFor(batch: BatchRecord, rooms: Map<string, Room>): number {
    const room = rooms.get(batch.modelDigest);
    return room === undefined ? 0 : batch.class === 'release' ? room.release : room.total;
  }

  async function roomOf(batch: BatchRecord): Promise<Room> {
    const capacity = capacities.get(batch.modelDigest);
    if (capacity === undefined) return { total: 0, release: 0 };
    const depths = await Promise.all(
      (['fetch', 'decode', 'inference'] as const).map((stage: StageName) =>
        queues.depth(stage, capacity.route),
      ),
    );
    const sum = (...classes: (JobClass | 'active')[]) =>
      depths.reduce((all, depth) => all + classes.reduce((some, name) => some + depth[name], 0), 0);
    const wanted = Math.max(leastQueued, Math.ceil(deps.factor * capacity.slots));
    return {
      total: wanted - sum('active', 'interactive', 'release', 'backfill'),
      // What is active already cannot be overtaken, and is not waited for by what overtakes.
      release: wanted - sum('interactive', 'release'),
    };
  }

  /** Record first, queue second: a row that is lost between the two is found by the reconciler. */
  async function handOver(rows: readonly NewJobRecord[]): Promise<void> {
    const results = await Promise.all(rows.map((row) => records.create(row)));
    const groups = new Map<string, { stage: StageName; jobs: NewJobRecord[] }>();
    rows.forEach((row, at) => {
      const { outcome, state } = results[at]!;
      if (outcome === 'refused') feeds.get(row.batch!.id)?.giveBack(row);
      const stage = outcome === 'committed' && state !== 'none' ? stageOf(state) : undefined;
      if (stage === undefined) return;
      const key = `${stage}/${row.profileHash}/${row.modelDigest}`;
      const group = groups.get(key) ?? { stage, jobs: [] };
      group.jobs.push(row);
      groups.set(key, group);
    });
    await Promise.all([...groups.values()].map(({ stage, jobs }) => queues.addMany(stage, jobs)));
  }

  return {
    round,
    idleMs,
    /** Waits for what is under way. */
    async settle() {
      await Promise.allSettled([...closing.values(), ...receiving.values()]);
    },
    /** Another process has fed meanwhile: what was known of the batches is not what is. */
    forget() {
      feeds.clear();
      lookedAt = 0;
    },
  };
}
