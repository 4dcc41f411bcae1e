/** Endpoints of webhooks as callers see them. */
import { isCursor } from '@acousticsense/shared/archived-log';
import {
  attemptOutcomes,
  type Endpoint,
  endpointDisabledReasons,
  endpointStatuses,
  type TestOutcome,
} from '@acousticsense/shared/endpoints';
import { eventTypes } from '@acousticsense/shared/events';
import { z } from 'zod';
import { number } from './schemas.ts';

const count = z.int().min(0);
const time = z.iso.datetime();

export const endpointResourceSchema = z.strictObject({
  id: z.string(),
  url: z.string(),
  types: z.array(z.enum(eventTypes)).describe('empty: all but batch.progress'),
  description: z.string().optional(),
  maxInFlight: z.int(),
  maxPerSecond: z.int(),
  status: z
    .enum(endpointStatuses)
    .describe('only an enabled one is told of events; events wait for one that is disabled'),
  disabledReason: z
    .enum(endpointDisabledReasons)
    .optional()
    .describe(
      '`gone`: it answered 410; `failing`: nothing could be delivered for days; `operator`: on request',
    ),
  failingSince: time.optional().describe('the first failure since the last success'),
  lastSuccessAt: time.optional(),
  verification: z
    .strictObject({ at: time, ok: z.boolean(), status: z.int().optional(), problem: z.string().optional() })
    .optional()
    .describe('how the last challenge of ownership went'),
  secrets: z
    .array(z.strictObject({ createdAt: time, until: time.optional() }))
    .describe('that sign now, the newest first; the secrets themselves are never shown again'),
  replays: z.array(
    z.strictObject({
      id: z.string(),
      after: z.string().describe('cursor: where it stands'),
      until: z.string(),
      types: z.array(z.enum(eventTypes)).optional(),
    }),
  ),
  createdAt: time,
  updatedAt: time,
});
export type EndpointResource = z.infer<typeof endpointResourceSchema>;

export const newEndpointSchema = endpointResourceSchema.extend({
  secret: z.string().describe('to verify signatures with; shown this once'),
});
export const endpointListSchema = z.strictObject({ endpoints: z.array(endpointResourceSchema) });

const outcome = {
  at: time,
  outcome: z.enum(attemptOutcomes),
  status: z.int().optional().describe('of the answer; absent when there was none'),
  ms: z.number().describe('how long it took'),
  problem: z.string().optional().describe('stable code of what went wrong'),
  excerpt: z.string().optional().describe('the first 256 bytes of the answer'),
};

const attemptResourceSchema = z.strictObject({
  ...outcome,
  eventId: z.string(),
  type: z.string(),
  attempt: z.int().describe('from 1'),
});

export const endpointDetailSchema = endpointResourceSchema.extend({
  backlog: z
    .strictObject({ waiting: count, delayed: count, active: count })
    .describe('messages that are queued: to be sent, to be sent again later, being sent'),
  attempts: z.array(attemptResourceSchema).describe('the last 10, newest first'),
});

export const secretSchema = newEndpointSchema.pick({ secret: true });

export const orderSchema = z.strictObject({ orderId: z.string() });
export const testSchema = z.discriminatedUnion('state', [
  z.strictObject({ orderId: z.string(), state: z.literal('waiting') }),
  z.strictObject({ orderId: z.string(), state: z.literal('done'), ...outcome }),
]);

export const resendRequestSchema = z.strictObject({ eventId: z.string().min(1).max(200) });

const cursor = z.string().refine(isCursor, 'must be the `cursor` of an event');
/** A range of the log: by cursors or by times. */
export const replayRequestSchema = z
  .strictObject({
    after: cursor.optional().describe('from the event behind this one'),
    from: time.optional().describe('instead: from what happened at that time'),
    until: cursor.optional().describe('to this one; to the newest when absent'),
    to: time.optional().describe('instead: to what happened before that time'),
    types: z.array(z.enum(eventTypes)).min(1).optional().describe('those of the endpoint when absent'),
  })
  .refine(({ after, from }) => (after === undefined) !== (from === undefined), {
    path: ['after'],
    message: 'say from where: either "after" or "from"',
  })
  .refine(({ until, to }) => until === undefined || to === undefined, {
    path: ['until'],
    message: 'say up to where: either "until" or "to"',
  });
export const replayIdSchema = z.strictObject({ id: z.string() });

const day = z.iso.date('must be a day, YYYY-MM-DD');
export const deadLettersQuerySchema = z.strictObject({
  day: day.optional().describe('on which they were given up (UTC); every day when absent'),
  limit: number(z.number().int().min(1).max(500)).default(50),
});
/** As the webhook service writes it; not strict, since it may write more. */
export const storedLetterSchema = z.object({
  eventId: z.string(),
  cursor: z.string(),
  type: z.string(),
  url: z.string(),
  body: z.string(),
  attempts: z.array(
    z.object({
      at: z.int(),
      attempt: z.int(),
      outcome: z.enum(attemptOutcomes),
      status: z.int().optional(),
      ms: z.number(),
      problem: z.string().optional(),
      excerpt: z.string().optional(),
    }),
  ),
  deadAt: z.int(),
  reason: z.string(),
});
const deadLetterSchema = storedLetterSchema.strict().extend({
  attempts: z.array(attemptResourceSchema.omit({ eventId: true, type: true })),
  deadAt: time,
  reason: z.string().describe('`exhausted`: every attempt failed; `gone`: the endpoint answered 410'),
});
export const deadLetterListSchema = z.strictObject({
  deadLetters: z.array(deadLetterSchema).describe('the newest day first'),
  more: z.boolean(),
});

export const deadLettersResendSchema = z
  .strictObject({
    eventId: z.string().min(1).max(200).optional(),
    day: day.optional(),
    all: z.literal(true).optional(),
  })
  .refine(({ eventId, day, all }) => [eventId, day, all].filter((one) => one !== undefined).length === 1, {
    path: ['eventId'],
    message: 'say which: "eventId", "day", or "all": true',
  });
export const resentSchema = z.strictObject({
  resent: count.describe('that wait to be sent now'),
  more: z.boolean().describe('10,000 wait at most: ask again once these are gone'),
});

const iso = (ms: number) => new Date(ms).toISOString();

/** @param now epoch milliseconds: secrets that have ended are left out. */
export function presentEndpoint(endpoint: Endpoint, now: number): EndpointResource {
  const { id, url, types, description, maxInFlight, maxPerSecond, status, disabledReason } = endpoint;
  const { failingSince, lastSuccessAt, verification } = endpoint;
  return {
    ...{ id, url, types: [...types] },
    ...(description === undefined ? {} : { description }),
    ...{ maxInFlight, maxPerSecond, status },
    ...(disabledReason === undefined ? {} : { disabledReason }),
    ...(failingSince === undefined ? {} : { failingSince: iso(failingSince) }),
    ...(lastSuccessAt === undefined ? {} : { lastSuccessAt: iso(lastSuccessAt) }),
    ...(verification === undefined ? {} : { verification: { ...verification, at: iso(verification.at) } }),
    secrets: endpoint.secrets
      .filter(({ until }) => until === undefined || until > now)
      .map(({ createdAt, until }) => ({
        createdAt: iso(createdAt),
        ...(until === undefined ? {} : { until: iso(until) }),
      })),
    replays: endpoint.replays.map(({ id, after, until, types }) => ({
      ...{ id, after, until },
      ...(types === undefined ? {} : { types }),
    })),
    createdAt: iso(endpoint.createdAt),
    updatedAt: iso(endpoint.updatedAt),
  };
}

/** An attempt, a test: whatever has an outcome at a time. */
export const presentOutcome = <T extends TestOutcome>(of: T) => ({ ...of, at: iso(of.at) });

export function presentLetter(letter: z.infer<typeof storedLetterSchema>): z.infer<typeof deadLetterSchema> {
  return { ...letter, attempts: letter.attempts.map(presentOutcome), deadAt: iso(letter.deadAt) };
}
