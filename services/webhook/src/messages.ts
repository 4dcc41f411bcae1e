/**
 * A message is one event on its way to one endpoint. Each endpoint has a BullMQ queue of its own, so that one that is
 * slow or dead keeps nobody else waiting, and so that its limits hold over all processes together.
 */
import { endpointQueueName, attemptSchema as recordedSchema } from '@acousticsense/shared/endpoints';
import { eventTypes } from '@acousticsense/shared/events';
import { queuePrefix } from '@acousticsense/shared/queues';
import { withRedis } from '@acousticsense/shared/redis';
import { type JobsOptions, Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import type { Clock } from './clock.ts';

/** As it is on record, without the event that the message is of. */
const attemptSchema = recordedSchema.omit({ eventId: true, type: true });
export type Attempt = z.infer<typeof attemptSchema>;

/** Not strict: during a roll-out an older process reads the messages of a newer one. */
const messageSchema = z.object({
  v: z.literal(1),
  tenant: z.string(),
  endpointId: z.string(),
  /** `webhook-id` */
  eventId: z.string(),
  type: z.enum(eventTypes),
  cursor: z.string(),
  url: z.string(),
  /** Worked out once: every attempt signs and sends the same bytes. */
  body: z.string(),
  ref: z.string().optional(),
  /** Queue id of an earlier message on the same ref, which is to be over first. */
  after: z.string().optional(),
  handedOverAt: z.number().describe('by the clock'),
  /** That failed so far. */
  attempts: z.array(attemptSchema).default([]),
});
export type QueuedMessage = z.infer<typeof messageSchema>;

/**
 * Waits before the second to the tenth attempt, as Standard Webhooks recommends them: 75 hours and a half in all.
 * https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
 */
const second = 1_000;
const minute = 60 * second;
const hour = 60 * minute;
const waits = [
  5 * second,
  5 * minute,
  30 * minute,
  2 * hour,
  5 * hour,
  10 * hour,
  14 * hour,
  20 * hour,
  24 * hour,
];
export const maxAttempts = waits.length + 1;
/** A tenth more or less: receivers that come back are not met by all at once. */
const jitter = 0.1;

/**
 * Milliseconds of the clock before the next attempt.
 * @param failed how many have failed, from 1.
 * @param retryAfterMs for how long the receiver asked to be left alone.
 */
export function waitAfter(failed: number, retryAfterMs = 0, random = Math.random()): number {
  const wait = waits[Math.min(failed, waits.length) - 1]!;
  return Math.max(wait * (1 - jitter + 2 * jitter * random), retryAfterMs);
}

/** An attempt that failed and is not the last: BullMQ waits as long as this says. */
export class TryLater extends Error {
  override readonly name = 'TryLater';
  readonly retryAfterMs: number | undefined;
  constructor(problem: string, retryAfterMs: number | undefined) {
    super(problem);
    this.retryAfterMs = retryAfterMs;
  }
}

/** For BullMQ's worker: real milliseconds before the next attempt. */
export const backoffBy =
  (clock: Clock) =>
  (attemptsMade: number, _type?: string, error?: Error): number =>
    clock.realMs(waitAfter(attemptsMade, error instanceof TryLater ? error.retryAfterMs : undefined));

/** `again` tells apart what is told once more on request from what is on its way anyway. */
export function messageId(eventId: string, endpointId: string, again?: string): string {
  return `${eventId}.${endpointId}${again === undefined ? '' : `.${again}`}`;
}

const options: JobsOptions = {
  attempts: maxAttempts,
  backoff: { type: 'custom' },
  // A hand-over that is repeated after a crash finds those that were delivered meanwhile: more than one page of them.
  removeOnComplete: { count: 250 },
  removeOnFail: { count: 250 },
};

/**
 * A message that waits for another is woken when that is over. Should this be missed (a process killed in between), it
 * looks itself after this time: rarely, since each look is one of the messages that its endpoint takes in a second.
 */
const holdLeastMs = 60_000;
const holdMostMs = 15 * 60_000;
export const holdMs = (waitedMs: number): number => Math.min(holdMostMs, Math.max(holdLeastMs, waitedMs / 4));

export interface MessageQueues {
  of(endpointId: string): Queue<QueuedMessage>;
  /** Adds messages in their order, held where they wait for another; one that is there already is left as it is. */
  add(endpointId: string, messages: readonly { id: string; message: QueuedMessage }[]): Promise<void>;
  /** Whether nobody tries it any more. */
  isOver(endpointId: string, id: string): Promise<boolean>;
  /** One that was held goes on at once; one that is not waiting is left as it is. */
  wake(endpointId: string, id: string): Promise<void>;
  /** Under way, waiting, or waiting to be tried again. */
  outstanding(endpointId: string): Promise<number>;
  /** Of an endpoint that is no more, after its worker has ended: a worker makes some keys anew. */
  forget(endpointId: string): Promise<void>;
  close(): Promise<void>;
}

export function createMessageQueues(connection: Redis): MessageQueues {
  const open = new Map<string, Queue<QueuedMessage>>();
  function of(endpointId: string): Queue<QueuedMessage> {
    const name = endpointQueueName(endpointId);
    let queue = open.get(name);
    if (queue === undefined) {
      queue = new Queue<QueuedMessage>(name, {
        connection,
        prefix: queuePrefix(name),
        skipVersionCheck: true,
      });
      queue.on('error', () => {});
      open.set(name, queue);
    }
    return queue;
  }
  return {
    of,
    async add(endpointId, messages) {
      const jobs = messages.map(({ id, message }) => ({
        name: 'message' as never,
        data: message as never,
        opts: { ...options, jobId: id, ...(message.after === undefined ? {} : { delay: holdMs(0) }) },
      }));
      await withRedis(() => of(endpointId).addBulk(jobs));
    },
    async isOver(endpointId, id) {
      const state = await withRedis(() => of(endpointId).getJobState(id));
      return state === 'completed' || state === 'failed' || state === 'unknown';
    },
    async wake(endpointId, id) {
      const held = await withRedis(() => of(endpointId).getJob(id));
      // Redis away is as good as not waiting: it looks itself later.
      await held?.promote().catch(() => {});
    },
    outstanding: (endpointId) =>
      withRedis(() => of(endpointId).getJobCountByTypes('waiting', 'active', 'delayed', 'prioritized')),
    async forget(endpointId) {
      const queue = of(endpointId);
      await withRedis(() => queue.obliterate({ force: true }));
      open.delete(queue.name);
      await queue.close();
    },
    async close() {
      await Promise.allSettled([...open.values()].map((queue) => queue.close()));
    },
  };
}

/** @returns undefined for what is no message. */
export function parseMessage(data: unknown): QueuedMessage | undefined {
  return messageSchema.safeParse(data).data;
}
