/**
 * The queues of the endpoints, from the side that sends: one BullMQ worker for each enabled endpoint. What an attempt
 * brought decides what follows:
 *
 *   delivered   the message is over
 *   failed      it waits, longer each time; the last attempt makes it a dead letter. When nothing at all was delivered
 *               while all attempts of one message failed, the endpoint is disabled
 *   gone (410)  a dead letter, and the endpoint is disabled
 *   Redis or storage away, this process killed   the attempt does not count: it is made again, under the same id
 */
import { type Endpoint, type Endpoints, endpointQueueName, isUnder } from '@acousticsense/shared/endpoints';
import { InfrastructureFault, isRedisAway } from '@acousticsense/shared/errors';
import type { DeliveryLog } from '@acousticsense/shared/event-log';
import { pause } from '@acousticsense/shared/pause';
import { queuePrefix } from '@acousticsense/shared/queues';
import { heedErrors } from '@acousticsense/shared/worker-errors';
import { DelayedError, type Job, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { Clock } from './clock.ts';
import type { DeadLetters, DeathReason } from './dead-letters.ts';
import { type Deliver, receiptOf } from './deliver.ts';
import { allEndpoints } from './dispatcher.ts';
import {
  type Attempt,
  backoffBy,
  holdMs,
  type MessageQueues,
  maxAttempts,
  parseMessage,
  type QueuedMessage,
  TryLater,
} from './messages.ts';
import type { Metrics } from './metrics.ts';
import type { Order } from './order-of-refs.ts';

export interface DeliveriesDeps {
  /** A further connection, for a worker's blocking reads. */
  readonly connect: () => Redis;
  readonly endpoints: Endpoints;
  readonly queues: MessageQueues;
  readonly order: Order;
  readonly receipts: Pick<DeliveryLog, 'append'>;
  readonly deadLetters: Pick<DeadLetters, 'bury'>;
  readonly deliver: Deliver;
  readonly clock: Clock;
  readonly metrics: Metrics;
  readonly log: Logger;
  /** Aborted when running attempts are to be given back. */
  readonly closing: AbortSignal;
}

export interface Deliveries {
  /** Endpoints by status, as this process saw them last. */
  statuses(): Readonly<Record<Endpoint['status'], number>>;
  close(): Promise<void>;
}

const lookMs = 1_000;
const lockMs = 10_000;
/** A rotated secret signs within this time. */
const believedMs = 1_000;
const disabledMs = 60_000;
const faultMs = 1_000;

interface Running {
  readonly tenant: string;
  readonly worker: Worker<QueuedMessage>;
  readonly connection: Redis;
  readonly maxInFlight: number;
  readonly maxPerSecond: number;
}

export function createDeliveries(deps: DeliveriesDeps): Deliveries {
  const { endpoints, queues, order, receipts, deadLetters, deliver, clock, metrics, log, closing } = deps;
  const running = new Map<string, Running>();
  let statuses = { unverified: 0, enabled: 0, disabled: 0 };
  const stop = new AbortController();
  const secretsOf = remember((tenant, id) => endpoints.signingSecrets(tenant, id, clock.now()));
  const endpointOf = remember((tenant, id) => endpoints.get(tenant, id));

  async function look(): Promise<void> {
    const all = await allEndpoints(endpoints);
    statuses = { unverified: 0, enabled: 0, disabled: 0 };
    for (const { status } of all) statuses[status] += 1;
    const wanted = new Map(all.filter(({ status }) => status === 'enabled').map((one) => [one.id, one]));
    await Promise.all(
      [...running].map(async ([id, { tenant, maxInFlight, maxPerSecond }]) => {
        const endpoint = wanted.get(id);
        const same = endpoint?.maxInFlight === maxInFlight && endpoint.maxPerSecond === maxPerSecond;
        if (!same) await end(id);
        if (all.some((one) => one.id === id)) return;
        await queues.forget(id);
        await order.forget(tenant, id);
      }),
    );
    for (const endpoint of wanted.values()) {
      if (stop.signal.aborted) return;
      if (!running.has(endpoint.id)) await begin(endpoint);
    }
  }

  async function begin({ tenant, id, maxInFlight, maxPerSecond }: Endpoint): Promise<void> {
    await queues.of(id).setGlobalConcurrency(maxInFlight);
    const connection = deps.connect();
    const name = endpointQueueName(id);
    const worker = new Worker<QueuedMessage>(name, process, {
      connection,
      prefix: queuePrefix(name),
      concurrency: maxInFlight,
      limiter: { max: maxPerSecond, duration: 1_000 },
      lockDuration: lockMs,
      stalledInterval: lockMs / 2,
      // A message is bounded by its attempts, not by how often this process is killed.
      maxStalledCount: 1_000_000,
      skipVersionCheck: true,
      settings: { backoffStrategy: backoffBy(clock) },
      autorun: false,
    });
    heedErrors(worker, log.child({ endpointId: id }));
    worker.on('completed', (job) => void wakeNext(job));
    worker.on('failed', (job) => {
      if (job?.finishedOn !== undefined) void wakeNext(job);
    });
    void worker.run().catch((error) => log.error({ err: error, endpointId: id }, 'queue worker ended'));
    running.set(id, { tenant, worker, connection, maxInFlight, maxPerSecond });
  }

  /** What it is at runs to its end. */
  async function end(id: string): Promise<void> {
    const found = running.get(id);
    if (found === undefined) return;
    running.delete(id);
    await found.worker.close();
    found.connection.disconnect();
  }

  async function process(job: Job<QueuedMessage>, token: string | undefined): Promise<void> {
    const message = parseMessage(job.data);
    if (message === undefined) {
      log.error({ queue: job.queueName, id: job.id }, 'a message that is not understood is left out');
      return;
    }
    try {
      await attempt(job, message, token);
    } catch (error) {
      if (error instanceof DelayedError) throw error;
      const away = error instanceof InfrastructureFault || isRedisAway(error) || closing.aborted;
      if (!away) {
        if (error instanceof TryLater) throw error;
        const last = job.attemptsMade + 1 >= maxAttempts;
        log.error(
          { err: error, endpointId: message.endpointId, last },
          'an attempt failed by a fault of ours',
        );
        if (!last) throw error;
        return bury(job, message, message.attempts, 'exhausted');
      }
      // Not the receiver's doing: the attempt does not count. Should this fail too, the lock runs out.
      await giveBack(job, token, faultMs);
    }
  }

  async function attempt(job: Job<QueuedMessage>, message: QueuedMessage, token?: string): Promise<void> {
    const { tenant, endpointId } = message;
    const endpoint = await endpointOf(tenant, endpointId);
    if (endpoint === undefined) return;
    if (endpoint.status !== 'enabled') await giveBack(job, token, disabledMs);
    const { after } = message;
    if (after !== undefined && !(await queues.isOver(endpointId, after)))
      return hold(job, message, after, token);
    await order.goOn(message);
    const secrets = await secretsOf(tenant, endpointId);
    const { eventId: id, body } = message;
    // It may have moved since: what was meant for it goes where it is now.
    const url = isUnder(endpoint, message.url) ? message.url : endpoint.url;
    const at = clock.now();
    const outcome = await deliver({ id, url, body }, secrets, closing);
    const made = { ...receiptOf(outcome, at), attempt: job.attemptsMade + 1 };
    const about = { eventId: id, type: message.type };
    metrics.attempts.inc({ outcome: made.outcome, problem: made.problem ?? 'none' });
    await Promise.all([
      receipts.append(tenant, { ...made, ...about, endpointId }),
      endpoints.recordAttempt(tenant, endpointId, { ...made, ...about }),
    ]);
    if (outcome.kind === 'delivered') {
      await endpoints.succeeded(tenant, endpointId, clock.now());
      metrics.seconds.observe(Math.max(0, clock.now() - Number(message.cursor.split('-')[0])) / 1_000);
      return order.release(message, job.id!);
    }
    const attempts = [...message.attempts, made].slice(-maxAttempts);
    if (outcome.kind === 'gone') {
      if (await endpoints.disable(tenant, endpointId, 'gone', endpoint.url))
        log.info({ tenant, endpointId }, 'endpoint answered 410: disabled');
      return bury(job, message, attempts, 'gone');
    }
    await endpoints.failed(tenant, endpointId, clock.now());
    if (made.attempt < maxAttempts) {
      await job.updateData({ ...message, attempts });
      throw new TryLater(outcome.problem, outcome.retryAfterMs);
    }
    await bury(job, message, attempts, 'exhausted');
    const { failingSince, lastSuccessAt = 0 } = (await endpoints.get(tenant, endpointId)) ?? {};
    if (failingSince !== undefined && lastSuccessAt < attempts[0]!.at) {
      if (await endpoints.disable(tenant, endpointId, 'failing', endpoint.url))
        log.info(
          { tenant, endpointId, failingSince },
          'endpoint fails for as long as a message is tried: disabled',
        );
    }
  }

  async function bury(
    job: Job<QueuedMessage>,
    message: QueuedMessage,
    attempts: readonly Attempt[],
    reason: DeathReason,
  ): Promise<void> {
    await deadLetters.bury(message, attempts, reason, clock.now());
    metrics.deadLetters.inc({ reason });
    await order.release(message, job.id!);
  }

  /** Until the one before it is over. */
  async function hold(job: Job<QueuedMessage>, message: QueuedMessage, after: string, token?: string) {
    const waitedMs = clock.realMs(clock.now() - message.handedOverAt);
    await order.hold(message, job.id!);
    await job.moveToDelayed(Date.now() + holdMs(waitedMs), token);
    // That one may have ended before it could know who waits for it.
    if (await queues.isOver(message.endpointId, after).catch(() => false)) await wake(message, job.id!);
    throw new DelayedError();
  }

  async function wakeNext(job: Job<QueuedMessage>): Promise<void> {
    const message = parseMessage(job.data);
    const next = message && (await order.next(message, job.id!).catch(() => undefined));
    if (next !== undefined) await wake(message!, next);
  }

  const wake = ({ endpointId }: QueuedMessage, id: string) => queues.wake(endpointId, id).catch(() => {});

  async function run(): Promise<void> {
    while (!stop.signal.aborted) {
      await look().catch((error) => log.warn({ err: error }, 'endpoints could not be read'));
      await pause(lookMs, stop.signal);
    }
  }
  const ended = run();

  return {
    statuses: () => statuses,
    async close() {
      stop.abort();
      await ended;
      await Promise.all([...running.keys()].map(end));
    },
  };
}

/** Spends no attempt. */
async function giveBack(job: Job, token: string | undefined, ms: number): Promise<never> {
  await job.moveToDelayed(Date.now() + Math.max(1, Math.round(ms)), token);
  throw new DelayedError();
}

/** Believes what was read for a second. */
function remember<T>(read: (tenant: string, id: string) => Promise<T>) {
  const known = new Map<string, { at: number; value: Promise<T> }>();
  return (tenant: string, id: string): Promise<T> => {
    const key = `${tenant}/${id}`;
    const entry = known.get(key);
    if (entry && performance.now() - entry.at < believedMs) return entry.value;
    if (known.size > 10_000) known.clear();
    const value = read(tenant, id);
    known.set(key, { at: performance.now(), value });
    value.catch(() => known.delete(key));
    return value;
  };
}
