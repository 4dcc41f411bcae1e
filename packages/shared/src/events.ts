/**
 * What callers are told: the events of webhooks and of the pull feed, each of one fixed shape. Every field is always
 * there (null where it says nothing), and no event grows with the audio, the batch or the number of labels.
 *
 * An event is born in the atomic step that makes it true (`commit.lua`, `batch.lua`), complete but for `resultUrl`, which
 * is signed when the event is told. Its id is worked out from what happened, so that a step that is repeated after a
 * crash tells the same event, not another one.
 */
import { z } from 'zod';
import { batchClasses } from './batch.ts';
import { outlierOf, reasonToDoubt } from './doubt.ts';
import { type Callback, type JobRecord, warningSchema } from './job.ts';
import { rowIndex } from './manifest.ts';
import type { ModelDescription } from './serving.ts';

/** In the order in which they are documented. */
export const eventTypes = [
  'job.completed',
  'job.failed',
  'job.cancelled',
  'results.part',
  'batch.progress',
  'batch.completed',
  'batch.failed',
  'batch.cancelled',
  'endpoint.disabled',
] as const;
export type EventType = (typeof eventTypes)[number];

/** An event stays under 20 kB, whatever `topK` its job asked for. */
const genresTold = 10;

const count = z.int().min(0);
const model = z.strictObject({
  name: z.string(),
  version: z.string(),
  digest: z.string().describe('of the model'),
  profile: z.string().describe('digest of the preprocessing profile'),
});
const resultUrl = z.string().describe('opens without an API key for 14 days from when it was told');
const timestamp = z.iso.datetime().describe('when it happened, not when it was sent');

export const jobDataSchema = z.strictObject({
  jobId: z.uuid(),
  batchId: z.uuid().nullable().describe('null for a job of its own'),
  row: count.nullable().describe('within the batch, from 0'),
  ref: z.string().nullable().describe("the caller's own name for the track"),
  revision: z
    .int()
    .nullable()
    .describe('of several results under one ref the highest is the latest; null without a ref'),
  state: z.enum(['completed', 'failed', 'cancelled']),
  genres: z
    .array(z.strictObject({ label: z.string(), confidence: z.number().min(0).max(1) }))
    .max(genresTold)
    .describe(
      'best first; as many as the job asked for, ten at most; empty without an answer, and for silence',
    ),
  uncertain: z.boolean().nullable().describe("at the job's own threshold; null without an answer"),
  uncertainBecause: z.string().nullable(),
  warnings: z.array(warningSchema.pick({ code: true, message: true })),
  error: z
    .strictObject({ code: z.string(), message: z.string(), retryable: z.boolean() })
    .nullable()
    .describe('of job.failed'),
  model,
  resultUrl,
});
export type JobData = z.infer<typeof jobDataSchema>;

const countsSchema = z.strictObject({
  rows: count,
  bad: count.describe('rows of the manifest that could not be used'),
  completed: count,
  failed: count,
  cancelled: count,
  reused: count.describe('of the completed: answers that were known'),
});

const batchBase = {
  batchId: z.uuid(),
  name: z.string().nullable().describe("the caller's own name for the batch"),
  class: z.enum(batchClasses),
  revision: z.int().describe('of its results; raised by every retry of failed rows'),
  counts: countsSchema,
  model,
  resultUrl,
};
const partDataSchema = z.strictObject({
  ...batchBase,
  part: z.strictObject({
    number: count,
    from: count.describe('first row'),
    to: count.describe('the row after the last one'),
    completed: count,
    failed: count,
    cancelled: count,
  }),
});
const batchDataSchema = z.strictObject({
  ...batchBase,
  error: z.strictObject({ code: z.string(), message: z.string() }).nullable().describe('of batch.failed'),
});

export const disabledReasons = ['gone', 'failing'] as const;
const disabledDataSchema = z.strictObject({
  endpointId: z.string(),
  url: z.string(),
  reason: z
    .enum(disabledReasons)
    .describe(
      '`gone`: it answered 410; `failing`: for all the time that an event is tried, none was delivered',
    ),
  failingSince: z.iso.datetime().nullable(),
  resultUrl: z.string().describe('of the endpoint; needs an API key'),
});

export const eventSchema = z.discriminatedUnion('type', [
  z.strictObject({ type: z.literal('job.completed'), timestamp, data: jobDataSchema }),
  z.strictObject({ type: z.literal('job.failed'), timestamp, data: jobDataSchema }),
  z.strictObject({ type: z.literal('job.cancelled'), timestamp, data: jobDataSchema }),
  z.strictObject({ type: z.literal('results.part'), timestamp, data: partDataSchema }),
  z.strictObject({ type: z.literal('batch.progress'), timestamp, data: batchDataSchema }),
  z.strictObject({ type: z.literal('batch.completed'), timestamp, data: batchDataSchema }),
  z.strictObject({ type: z.literal('batch.failed'), timestamp, data: batchDataSchema }),
  z.strictObject({ type: z.literal('batch.cancelled'), timestamp, data: batchDataSchema }),
  z.strictObject({ type: z.literal('endpoint.disabled'), timestamp, data: disabledDataSchema }),
]);
/** Sent to a new endpoint alone: it proves itself by saying the challenge back. In no log, and nobody subscribes to it. */
export const verificationEventSchema = z.strictObject({
  type: z.literal('endpoint.verification'),
  timestamp,
  data: z.strictObject({
    endpointId: z.string(),
    challenge: z.string().describe('to be the whole answer, as text or as JSON {"challenge": "..."}'),
  }),
});
export type VerificationEvent = z.infer<typeof verificationEventSchema>;

/** As it is told. */
export type Event = z.infer<typeof eventSchema>;

/** As it is stored: `resultUrl` is added when it is told ({@link resultPath}). */
export type StoredEvent = {
  readonly [T in EventType]: {
    readonly type: T;
    readonly timestamp: string;
    readonly data: Omit<Extract<Event, { type: T }>['data'], 'resultUrl'>;
  };
}[EventType];

/** An event in the log, between the step that made it and those who are told. */
export interface LoggedEvent {
  /** The stream id `<ms>-<seq>`: events of a tenant in order. */
  readonly cursor: string;
  /** `webhook-id`: the same however often it is told. */
  readonly id: string;
  readonly event: StoredEvent;
  readonly callback?: Callback;
}

/** Channel on which a tenant's name is published after each of its events: a hint, never a source of truth. */
export const eventsChannel = 'as:events';

/** `webhook-id` of how a job ended. Neither dots (they part what is signed) nor colons (BullMQ's ids hold none). */
export function jobEventId(
  job: { readonly jobId: string; readonly generation: number },
  type: EventType,
): string {
  return `evt_${job.jobId}_${job.generation}_${type.split('.')[1]}`;
}

type Ended = Pick<
  JobRecord,
  | 'id'
  | 'batch'
  | 'ref'
  | 'revision'
  | 'presentation'
  | 'modelName'
  | 'modelVersion'
  | 'modelDigest'
  | 'profileHash'
> &
  Partial<Pick<JobRecord, 'decoded' | 'outcome' | 'error'>>;

/**
 * What is told of a job that ends.
 * @param record as it is after the step.
 * @param description of its model: needed of a completed job only.
 */
export function jobData(
  record: Ended,
  state: JobData['state'],
  description?: Pick<ModelDescription, 'labels' | 'outlierThreshold'>,
): Omit<JobData, 'resultUrl'> {
  const { batch, outcome, presentation, error } = record;
  const answered = state === 'completed' && outcome !== undefined;
  const limits = { threshold: presentation.threshold, outlierThreshold: description?.outlierThreshold };
  const doubt = answered ? reasonToDoubt(outcome.probabilities, outlierOf(outcome), limits) : undefined;
  return {
    jobId: record.id,
    batchId: batch?.id ?? null,
    row: batch ? rowIndex(batch) : null,
    ref: record.ref ?? null,
    revision: record.ref === undefined ? null : (record.revision ?? null),
    state,
    genres:
      answered && outcome.probabilities
        ? topGenres(outcome.probabilities, description?.labels ?? [], Math.min(presentation.topK, genresTold))
        : [],
    uncertain: answered ? doubt !== undefined : null,
    uncertainBecause: doubt ?? null,
    warnings: (record.decoded?.warnings ?? []).map(({ code, message }) => ({ code, message })),
    error: state === 'failed' && error ? error : null,
    model: {
      name: record.modelName,
      version: record.modelVersion,
      digest: record.modelDigest,
      profile: record.profileHash,
    },
  };
}

/** The `topK` likeliest labels, best first; ties keep label order. */
export function topGenres(
  probabilities: readonly number[],
  labels: readonly string[],
  topK: number,
): { label: string; confidence: number }[] {
  return labels
    .map((label, index) => ({ label, confidence: probabilities[index] ?? 0 }))
    .sort((a, b) => b.confidence - a.confidence)
    .slice(0, topK);
}

/** The path under which the result of an event is read; `endpoint.disabled` has that of the endpoint. */
export function resultPath(event: StoredEvent): string {
  switch (event.type) {
    case 'job.completed':
    case 'job.failed':
    case 'job.cancelled': {
      const { jobId, batchId, row } = event.data;
      return batchId === null ? `/v1/jobs/${jobId}` : `/v1/batches/${batchId}/rows/${row}`;
    }
    case 'results.part':
      return `/v1/batches/${event.data.batchId}/results.jsonl?from=${event.data.part.from}&to=${event.data.part.to}`;
    case 'batch.progress':
      return `/v1/batches/${event.data.batchId}`;
    case 'endpoint.disabled':
      return `/v1/webhooks/endpoints/${event.data.endpointId}`;
    default:
      return `/v1/batches/${event.data.batchId}/results.jsonl`;
  }
}
