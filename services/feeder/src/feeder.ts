/**
 * The feeder: keeps the queues at a few times what the workers hold, and no fuller. A million rows wait in storage, not
 * in Redis; so a release that comes later overtakes them, and so does another tenant.
 *
 * Turns go to tenants by weight (`turns.ts`), among those whose rows go through the same workers. Within a tenant
 * releases go before backfills, and batches of one class in turn. One process feeds at a time, by a lease; a second one
 * would do the same work again, harmlessly: every step is decided in Redis.
 */

import { type BatchRecord, isEnded } from '@acousticsense/shared/batch';
import { type BatchRecords, rowJobId } from '@acousticsense/shared/batch-records';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { jobData } from '@acousticsense/shared/events';
import {
  anyOpenState,
  type CommitResult,
  type JobRecords,
  type NewJobRecord,
  refOf,
} from '@acousticsense/shared/job-records';
import { rowIndex } from '@acousticsense/shared/manifest';
import { isFinished, queueName, type StageName, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues } from '@acousticsense/shared/queues';
import { knownModel, type ModelDescription } from '@acousticsense/shared/serving';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import { createErrands } from './errands.ts';
import { createFeed, type Feed, type FeedDeps } from './feeds.ts';
import type { Parts } from './parts.ts';
import { createRates } from './rates.ts';
import { measureRoom, type Pool, type Room, readPools } from './rooms.ts';
import { createTurns, type Turns } from './turns.ts';

export interface FeederDeps extends FeedDeps {
  readonly redis: Redis;
  readonly records: JobRecords;
  readonly batches: BatchRecords;
  readonly queues: Queues;
  readonly parts: Parts;
  readonly receive: (batch: BatchRecord, signal: AbortSignal) => Promise<void>;
  readonly weightOf: (tenant: string) => Promise<number>;
  readonly log: Logger;
  /** Rows in a queue, as a multiple of what its workers hold at a time. */
  readonly factor: number;
  /** Events of a tenant in Redis; with more of them nothing of its batches is fed. */
  readonly eventsWaitingMost: number;
}

/** Rows that a tenant of weight 1 hands over in a turn: while there is little room, others wait for as many. */
const quantum = 8;
/** Handed over at a time, and to one model in a round: between rounds there is a look at what has changed. */
const groupRows = 200;
const roundRows = 1_000;
/** How often the tenants that have batches are looked at, at most; and everybody, for who is new. */
const lookMs = 250;
const everybodyMs = 1_000;
/** Looking takes up no more than this share of the time, however many batches there are. */
const lookShare = 0.1;
const idleMs = 50;
/** Prepared ahead of their turn, for each batch and in all (each takes some kilobytes of memory). */
const aheadRows = 1_000;
const aheadInAll = 50_000;
const leastAhead = 100;
/** A batch whose manifest stopped coming: its caller has gone. */
const abandonedMs = 3_600_000;
/** Jobs of a cancelled batch that are ended at a time. */
const cancelledAtOnce = 100;

export type Feeder = ReturnType<typeof createFeeder>;

export interface WaitingRows {
  readonly decodeQueue: string;
  readonly inferenceQueue: string;
  readonly rows: number;
}

export function createFeeder(deps: FeederDeps) {
  const { redis, records, batches, queues, parts, log, signal } = deps;
  /** In the order of their turns. */
  const feeds = new Map<string, Feed>();
  /** By model digest. */
  const turns = new Map<string, Turns>();
  const weights = new Map<string, number>();
  /** Whose events nobody puts away. */
  let held = new Set<string>();
  /** Descriptions that were read, by digest: a model never changes. */
  const models = new Map<string, ModelDescription>();
  const rates = createRates(batches);
  const errands = {
    receive: createErrands('manifest', 64, log, signal),
    cancel: createErrands('cancel', 4, log, signal),
    close: createErrands('part', 4, log, signal),
    save: createErrands('batch', 4, log, signal),
  };
  let pools = new Map<string, Pool>();
  let everybody: string[] = [];
  let busy = new Set<string>();
  let lookAt = 0;
  let everybodyAt = 0;

  /** @returns whether there was anything to hand over: the next round may come at once. */
  async function round(): Promise<boolean> {
    if (performance.now() >= lookAt) await look();
    return feed();
  }

  async function look(): Promise<void> {
    const from = performance.now();
    if (from >= everybodyAt) {
      everybody = await records.tenants();
      everybodyAt = from + everybodyMs;
      busy = new Set(everybody);
    }
    pools = await readPools(redis);
    const tenants = [...busy];
    const pending = await batches.pending(tenants);
    busy = new Set(
      tenants.filter((_, at) => Object.values(pending[at]!).some((errands) => errands.length > 0)),
    );
    await Promise.all([...busy].map(async (tenant) => weights.set(tenant, await deps.weightOf(tenant))));
    held = await heldBack();

    const refs = pending.flatMap(({ active }, at) => active.map((id) => ({ tenant: tenants[at]!, id })));
    const found = await Promise.all(refs.map(read));
    const active = found.filter((batch) => batch !== undefined && !isEnded(batch.state)) as BatchRecord[];
    const known = new Set(active.map(({ id }) => id));
    for (const id of feeds.keys()) if (!known.has(id)) feeds.delete(id);
    for (const batch of active) await attend(batch, active.length);

    for (const [at, { chunks, unsaved }] of pending.entries()) {
      const tenant = tenants[at]!;
      for (const { id, chunk } of chunks)
        errands.close.run(`${id}/${chunk}`, () => parts.close(tenant, id, chunk));
      for (const id of unsaved) errands.save.run(id, () => parts.save(tenant, id));
    }
    await rates.measure([...feeds.values()].map(({ batch }) => batch));
    const took = performance.now() - from;
    lookAt = performance.now() + Math.max(lookMs, took / lookShare);
  }

  async function heldBack(): Promise<Set<string>> {
    const counts = await Promise.all(
      [...busy].map(async (tenant) => [tenant, await records.countEvents(tenant)] as const),
    );
    const full = counts.filter(([, events]) => events > deps.eventsWaitingMost).map(([tenant]) => tenant);
    for (const tenant of full) {
      if (!held.has(tenant))
        log.error({ tenant }, 'not fed: its events are not put away, does the webhook service run?');
    }
    return new Set(full);
  }

  /** One that cannot be read (of another version, damaged) keeps the others waiting for nothing. */
  async function read(ref: { tenant: string; id: string }): Promise<BatchRecord | undefined> {
    return batches.get(ref).catch((error) => {
      if (error instanceof InfrastructureFault) throw error;
      log.error({ err: error, batchId: ref.id }, 'batch cannot be read');
      return undefined;
    });
  }

  async function attend(batch: BatchRecord, active: number): Promise<void> {
    const { id, state } = batch;
    if (state === 'cancelling' || state === 'receiving') feeds.delete(id);
    if (state === 'cancelling') return errands.cancel.run(id, () => cancelOpen(batch));
    if (state === 'receiving') {
      if (Date.now() - batch.updatedAt > abandonedMs) await batches.cancel(batch);
      return;
    }
    if (!batch.sealed && batch.origin.kind !== 'manifest')
      errands.receive.run(id, () => deps.receive(batch, signal));
    const feed = feeds.get(id) ?? createFeed(batch, deps);
    feeds.set(id, feed);
    feed.update(batch, Math.min(aheadRows, Math.max(leastAhead, Math.floor(aheadInAll / active))));
  }

  /** Stops what a cancelled batch still has: rows that were never fed, and jobs. */
  async function cancelOpen(batch: BatchRecord): Promise<void> {
    for (const chunk of await batches.openChunks(batch)) {
      await batches.cancelRows(batch, { chunk });
      const states = (await batches.rowStates(batch, chunk)) ?? '';
      const jobIds = [...states].flatMap((state, row) =>
        state === 'o' ? [rowJobId(batch.id, rowIndex({ chunk, row }))] : [],
      );
      for (let at = 0; at < jobIds.length && !signal.aborted; at += cancelledAtOnce) {
        const jobs = await records.getMany(batch.tenant, jobIds.slice(at, at + cancelledAtOnce));
        await Promise.all(jobs.map((job) => job && !isFinished(job.state) && cancel(job)));
      }
    }
  }

  async function cancel(job: NewJobRecord & { state: Exclude<NewJobRecord['state'], undefined> }) {
    const event = { type: 'job.cancelled', data: jobData(job, 'cancelled') } as const;
    const step = { from: anyOpenState, to: 'cancelled', events: [event] } as const;
    const { outcome } = await records.commit(refOf(job), step);
    const stage = stageOf(job.state);
    // One that stays in a queue is dropped by the worker that takes it.
    if (outcome === 'committed' && stage) await queues.withdraw(stage, job).catch(() => {});
  }

  async function feed(): Promise<boolean> {
    let busy = false;
    for (const [model, waiting] of waitingByModel()) {
      const room = await measureRoom(queues, pools.get(model), deps.factor);
      const whose = turns.get(model) ?? createTurns(quantum, (tenant) => weights.get(tenant) ?? 1);
      turns.set(model, whose);
      for (let fed = 0; fed < roundRows; ) {
        const taken = takeGroup(waiting, whose, room);
        if (taken.length === 0) break;
        fed += taken.length;
        busy = true;
        await handOver(taken);
      }
    }
    return busy;
  }

  /** Feeds that have rows ready, by model and tenant, in the order in which a tenant's go. */
  function waitingByModel(): Map<string, Map<string, Feed[]>> {
    const models = new Map<string, Map<string, Feed[]>>();
    const ranked = [...feeds.values()].sort((a, b) => rankOf(a) - rankOf(b));
    for (const feed of ranked) {
      if (feed.next === undefined || held.has(feed.batch.tenant)) continue;
      const { modelDigest, tenant } = feed.batch;
      const tenants = models.get(modelDigest) ?? new Map<string, Feed[]>();
      models.set(modelDigest, tenants.set(tenant, [...(tenants.get(tenant) ?? []), feed]));
    }
    for (const model of turns.keys()) if (!models.has(model)) turns.delete(model);
    return models;
  }

  const rankOf = ({ batch }: Feed) => (batch.class === 'release' ? 0 : 1);

  function takeGroup(waiting: Map<string, Feed[]>, whose: Turns, room: Room): NewJobRecord[] {
    const taken: NewJobRecord[] = [];
    const mayGo = ({ next }: Feed) => next !== undefined && room.takes(next);
    while (taken.length < groupRows) {
      const names = [...waiting].filter(([, own]) => own.some(({ next }) => next !== undefined));
      const canTake = (tenant: string) => waiting.get(tenant)!.some(mayGo);
      const turn = whose.next(new Set(names.map(([tenant]) => tenant)), canTake);
      if (turn === undefined) break;
      const feed = waiting.get(turn.name)!.find(mayGo)!;
      const rows = feed.take(Math.min(turn.most, groupRows - taken.length), (row) => {
        const letIn = room.takes(row);
        if (letIn) room.fill(row);
        return letIn;
      });
      whose.took(turn.name, rows.length);
      taken.push(...rows);
      comesLast(feed, waiting.get(turn.name)!);
    }
    return taken;
  }

  /** Behind the others of its class next time. */
  function comesLast(feed: Feed, own: Feed[]): void {
    own.splice(own.indexOf(feed), 1);
    const behind = own.findLastIndex((other) => rankOf(other) <= rankOf(feed));
    own.splice(behind + 1, 0, feed);
    if (feeds.delete(feed.batch.id)) feeds.set(feed.batch.id, feed);
  }

  /**
   * Record first, queue second. What fails on the way comes again: a record that is there and was not begun is only
   * added to its queue once more. What a killed process leaves between the two is found by the reconciler.
   *
   * @throws when something was away.
   */
  async function handOver(rows: readonly NewJobRecord[]): Promise<void> {
    const descriptions = await describe(rows);
    const created = await Promise.allSettled(
      rows.map((row) => records.create(row, descriptions.get(row.modelDigest))),
    );
    const failed = new Set<NewJobRecord>();
    const faults: unknown[] = [];
    const groups = new Map<string, { stage: StageName; jobs: NewJobRecord[] }>();
    rows.forEach((row, at) => {
      const result = created[at]!;
      if (result.status === 'rejected') {
        failed.add(row);
        faults.push(result.reason);
        return;
      }
      if (result.value.outcome === 'refused') feeds.get(row.batch!.id)?.reset();
      const stage = stageToBegin(result.value);
      if (stage === undefined) return;
      const key = `${stage}/${row.profileHash}/${row.modelDigest}`;
      const group = groups.get(key) ?? { stage, jobs: [] };
      group.jobs.push(row);
      groups.set(key, group);
    });
    for (const { stage, jobs } of groups.values()) {
      await queues.addMany(stage, jobs).catch((error) => {
        faults.push(error);
        for (const job of jobs) failed.add(job);
      });
    }
    if (faults.length === 0) return;
    for (const feed of feeds.values()) {
      const own = rows.filter((row) => failed.has(row) && row.batch!.id === feed.batch.id);
      if (own.length > 0) feed.giveBack(own);
    }
    throw faults[0];
  }

  /** The models of rows whose answers were known: what is told of them is told in labels. */
  async function describe(rows: readonly NewJobRecord[]): Promise<Map<string, ModelDescription>> {
    const completed = rows.filter(({ state }) => state === 'completed');
    for (const digest of new Set(completed.map(({ modelDigest }) => modelDigest))) {
      const known = models.get(digest) ?? (await knownModel(redis, digest));
      if (known) models.set(digest, known);
    }
    return models;
  }

  return {
    round,
    idleMs,
    /** Waits for what is under way. */
    async settle() {
      await Promise.all(Object.values(errands).map((some) => some.settle()));
    },
    /** Rows that wait for room in the queues, by the queues that they will go through. */
    waitingRows(): WaitingRows[] {
      const sums = new Map<string, WaitingRows>();
      for (const { batch } of feeds.values()) {
        if (batch.state !== 'running') continue;
        const decodeQueue = queueName('decode', batch);
        const inferenceQueue = queueName('inference', batch);
        const rows = (sums.get(inferenceQueue)?.rows ?? 0) + batch.waiting;
        sums.set(inferenceQueue, { decodeQueue, inferenceQueue, rows });
      }
      return [...sums.values()];
    },

    /** Another process has fed meanwhile: what was known of the batches is not what is. */
    forget() {
      feeds.clear();
      turns.clear();
      lookAt = 0;
      everybodyAt = 0;
    },
  };
}

/** Where a record that was not begun is to be added. */
function stageToBegin({ outcome, state, version }: CommitResult): StageName | undefined {
  const isNew = outcome === 'committed' || (outcome === 'already' && version === 1);
  return isNew && state !== 'none' ? stageOf(state) : undefined;
}
