/** What a batch holds, and what of its rows lies in storage: the shapes that the API and the feeder agree on. */
import { z } from 'zod';
import { verdicts } from './house-genres.ts';
import { callbackSchema, jobRecordSchema, selectionSchema } from './job.ts';
import { badRowSchema, manifestRowSchema } from './manifest.ts';

/**
 * `receiving`: its manifest comes in. `cancelling`: what runs is being stopped. `failed`: the prefix that it was to
 * walk could not be read to the end; the rows that were found have run.
 */
export const batchStates = [
  'receiving',
  'running',
  'paused',
  'cancelling',
  'completed',
  'cancelled',
  'failed',
] as const;
export type BatchState = (typeof batchStates)[number];

export const isEnded = (state: BatchState) => ['completed', 'cancelled', 'failed'].includes(state);

export const batchClasses = ['release', 'backfill'] as const;

export const originSchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('manifest') }),
  z.strictObject({ kind: z.literal('prefix'), bucket: z.string(), prefix: z.string() }),
  z.strictObject({ kind: z.literal('rerun'), of: z.uuid() }),
]);
export type BatchOrigin = z.infer<typeof originSchema>;

const count = z.int().min(0).default(0);

/** What is told of a batch: nothing, the batch as a whole, or each of its rows too. */
export const notifications = ['none', 'batch', 'rows'] as const;

/** Not strict: during a roll-out an older process reads the batches of a newer one. */
export const batchRecordSchema = z.object({
  id: z.uuid(),
  tenant: z.string(),
  name: z.string().optional(),
  state: z.enum(batchStates),
  createdAt: z.int().describe('epoch milliseconds'),
  updatedAt: z.int(),
  endedAt: z.int().optional(),
  origin: originSchema,
  class: z.enum(batchClasses),
  modelDigest: z.string(),
  modelName: z.string(),
  modelVersion: z.string(),
  profileHash: z.string(),
  selection: selectionSchema,
  presentation: jobRecordSchema.shape.presentation,
  extras: jobRecordSchema.shape.extras,
  traceparent: z.string(),
  /** Of a run that is repeated by a model of the same profile: what was decoded for that one is used again. */
  tensorsOf: z.uuid().optional(),
  /** A house mapping lies beside the manifest. */
  mapped: z.boolean().default(false),
  /** Known answers are not taken over. */
  force: z.boolean().default(false),
  notify: z.enum(notifications).default('batch'),
  callback: callbackSchema.optional(),
  /** Of all its results; raised by every retry. */
  revision: z.int(),
  /** How often its failed rows were tried again. */
  round: z.int().default(0),
  sealed: z.boolean().default(false),
  error: z.object({ code: z.string(), message: z.string() }).optional(),
  /** The first rows of the manifest that could not be used, and the first that failed. */
  firstBad: z.array(badRowSchema).default([]),
  faults: z
    .array(z.object({ row: z.int(), error: z.object({ code: z.string(), message: z.string() }) }))
    .default([]),
  /** Of a walked prefix: the last key that lies in a chunk. */
  walked: z.string().optional(),
  /** Rows that ended per second, lately; measured by the feeder. */
  rate: z.number().optional(),

  chunks: count.describe('of the manifest so far'),
  opened: count,
  closed: count,
  openChunks: z.array(z.int()).default([]).describe('their numbers, ascending'),
  retryNext: z.int().optional().describe('of a retry: the next chunk to look through'),
  rows: count.describe('good rows: all of them end once'),
  bad: count.describe('rows of the manifest that could not be used'),
  waiting: count,
  open: count,
  completed: count,
  failed: count,
  cancelled: count,
  reused: count.describe('of the completed: answers that were known'),
  uncertain: count,
  agree: count,
  disagree: count,
  undeclared: count,
  unknown_genre: count,
});
export type BatchRecord = z.infer<typeof batchRecordSchema>;

/** How a row ended, with all that a result is presented from: one line of a part. */
export const partRowSchema = manifestRowSchema.extend({
  row: z.int().describe('within the batch, from 0'),
  jobId: z.uuid(),
  state: z.enum(['completed', 'failed', 'cancelled']),
  revision: z.int(),
  finishedAt: z.int().describe('epoch milliseconds'),
  generation: z.int(),
  decoded: jobRecordSchema.shape.decoded,
  outcome: jobRecordSchema.shape.outcome,
  error: jobRecordSchema.shape.error,
  reused: z.boolean().optional(),
  timings: jobRecordSchema.shape.timings,
  predicted: z.string().optional().describe('the likeliest house genre'),
  confidence: z.number().optional(),
  uncertain: z.boolean().optional().describe("at the batch's own threshold"),
  disagreement: z.number().optional().describe('of the verdict `disagree`: how confident, 0 to 1'),
  verdict: z.enum(verdicts).optional(),
});
export type PartRow = z.infer<typeof partRowSchema>;

export function encodePart(rows: readonly PartRow[]): Buffer {
  return Buffer.from(rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
}

/** Rows of a part that was written whole, so they are not validated one by one: a million of them are read. */
export function decodePart(bytes: Buffer): PartRow[] {
  const lines = bytes.toString('utf8').split('\n');
  lines.pop();
  return lines.map((line) => JSON.parse(line) as PartRow);
}
