/** Messages that are not tried any more: written where they outlive the queue, to be read and sent again. */
import type { EventType } from '@acousticsense/shared/events';
import { deadLetterKey } from '@acousticsense/shared/object-keys';
import type { Storage } from '@acousticsense/shared/storage';
import type { Attempt, QueuedMessage } from './messages.ts';

/** `gone`: the endpoint answered 410; `exhausted`: every attempt failed. */
export type DeathReason = 'gone' | 'exhausted';

export interface DeadLetter {
  readonly eventId: string;
  readonly cursor: string;
  readonly type: EventType;
  readonly url: string;
  readonly body: string;
  readonly attempts: readonly Attempt[];
  /** epoch milliseconds */
  readonly deadAt: number;
  readonly reason: DeathReason;
}

export interface DeadLetters {
  bury(message: QueuedMessage, attempts: readonly Attempt[], reason: DeathReason, now: number): Promise<void>;
  /** It is on its way again. @param day of its death, as its key has it. */
  exhume(tenant: string, endpointId: string, day: string, eventId: string): Promise<void>;
}

export function createDeadLetters(storage: Pick<Storage, 'put' | 'delete'>): DeadLetters {
  return {
    async bury({ tenant, endpointId, eventId, cursor, type, url, body }, attempts, reason, now) {
      const letter: DeadLetter = { eventId, cursor, type, url, body, attempts, deadAt: now, reason };
      const key = deadLetterKey(tenant, endpointId, new Date(now), eventId);
      await storage.put(key, Buffer.from(JSON.stringify(letter)));
    },
    exhume: (tenant, endpointId, day, eventId) =>
      storage.delete(deadLetterKey(tenant, endpointId, new Date(day), eventId)),
  };
}
