/**
 * The pipeline on one page: which stages there are, what each queue job carries, how often it is tried and
 * how long it may take. Start reading here, then `services/api/src/jobs.ts`, `services/decoder/src/stage.ts`
 * and `services/inference/src/stage.ts`.
 *
 *   api    --[decode-<profile>]--> decoder --[inference-<model>]--> inference --> the job record
 *   feeder --[fetch]--> fetch --^      (the rows of a batch, a few at a time; only https:// rows are fetched)
 *
 * A queue job carries references only: the job record is the authority, the queue is transport. In every
 * stage the order is: write objects, commit the record, add the next stage's queue job, return. So whatever
 * dies, BullMQ's redelivery repeats the rest, and a stage that finds its step committed only repeats the add.
 */
import { z } from 'zod';

/** Version of the payloads; a reader accepts this one and the one before, which knew no batches. */
export const payloadVersion = 2;

/** Which row of which batch a job is: every commit of it moves the batch's counters too. */
export const batchRowSchema = z.strictObject({
  id: z.uuid(),
  chunk: z.int().min(0),
  row: z.int().min(0).describe('within the chunk'),
});
export type BatchRow = z.infer<typeof batchRowSchema>;

export const tenantNameSchema = z
  .string()
  .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'takes up to 63 small letters, digits and hyphens');

const stagePayload = z.strictObject({
  v: z.union([z.literal(payloadVersion), z.literal(payloadVersion - 1)]),
  tenant: tenantNameSchema,
  jobId: z.uuid(),
  generation: z.int().min(1),
  traceparent: z.string().regex(/^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$/),
  batch: batchRowSchema.optional(),
});
export type StagePayload = z.infer<typeof stagePayload>;

export const stages = {
  /** A URL -> audio object. Queue `fetch`; one for all models. */
  fetch: {
    payload: stagePayload,
    begins: { from: ['pending', 'fetching'], to: 'fetching' },
    attempts: 5,
    backoff: { type: 'exponential', delay: 2_000, jitter: 0.5 },
  },
  /** Audio object -> log-mel tensor. Queue `decode-<profile hash>`. */
  decode: {
    payload: stagePayload,
    begins: { from: ['queued', 'decoding'], to: 'decoding' },
    attempts: 3,
    backoff: { type: 'exponential', delay: 500, jitter: 0.5 },
  },
  /** Tensor -> probabilities. Queue `inference-<first 16 digits of the bundle's digest>`. */
  inference: {
    payload: stagePayload,
    begins: { from: ['decoded', 'classifying'], to: 'classifying' },
    attempts: 3,
    backoff: { type: 'exponential', delay: 500, jitter: 0.5 },
  },
} as const;
export type StageName = keyof typeof stages;

/**
 * Forward order of the states of a job. `failed` and `cancelled` can follow any of the unfinished ones, and
 * nothing follows a finished one except under a raised generation.
 */
export const jobStates = [
  'pending',
  'fetching',
  'queued',
  'decoding',
  'decoded',
  'classifying',
  'completed',
  'failed',
  'cancelled',
] as const;
export type JobState = (typeof jobStates)[number];
const finishedStates = ['completed', 'failed', 'cancelled'] as const satisfies JobState[];
export const openStates = [
  'pending',
  'fetching',
  'queued',
  'decoding',
  'decoded',
  'classifying',
] as const satisfies JobState[];

export function isFinished(state: JobState): boolean {
  return (finishedStates as readonly JobState[]).includes(state);
}

/** The stage whose queue job must exist while a record is in this state; none for a finished one. */
export function stageOf(state: JobState): StageName | undefined {
  if (state === 'pending' || state === 'fetching') return 'fetch';
  if (state === 'queued' || state === 'decoding') return 'decode';
  if (state === 'decoded' || state === 'classifying') return 'inference';
  return undefined;
}

export function queueName(stage: StageName, job: { profileHash: string; modelDigest: string }): string {
  if (stage === 'fetch') return 'fetch';
  return stage === 'decode' ? `decode-${job.profileHash}` : `inference-${job.modelDigest.slice(0, 16)}`;
}

/** Who waits: somebody at a screen, a release that comes out, a catalogue that is gone through. */
export const jobClasses = ['interactive', 'release', 'backfill'] as const;
export type JobClass = (typeof jobClasses)[number];

/** BullMQ's order within a queue: what has no priority goes first, then the smaller number. */
export const queuePriority: Readonly<Record<JobClass, number>> = { interactive: 0, release: 1, backfill: 2 };

/** Deterministic, so that a repeated add is one job. BullMQ's ids hold no ':' and are no plain integers. */
export function queueJobId({ jobId, generation }: Pick<StagePayload, 'jobId' | 'generation'>): string {
  return `${jobId}.${generation}`;
}
