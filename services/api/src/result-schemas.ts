/** The contract of results of batches: what is asked in a query, and what is answered. */
import { partRowSchema } from '@acousticsense/shared/batch';
import { verdicts } from '@acousticsense/shared/house-genres';
import { jobRecordSchema } from '@acousticsense/shared/job';
import { jobStates } from '@acousticsense/shared/pipeline';
import { z } from 'zod';
import { flag, jobSchema, number, refSchema } from './schemas.ts';

const choice = <const T extends readonly string[]>(values: T) =>
  z
    .string()
    .transform((text) => text.split(',').map((value) => value.trim()))
    .pipe(z.array(z.enum(values, `must be some of ${values.join(', ')}, separated by commas`)));

export const viewSchema = z.strictObject({
  topK: number(z.number().int().min(1).max(1_000))
    .optional()
    .describe("how many genres to list; the batch's own when absent"),
  threshold: number(z.number().min(0).max(1))
    .optional()
    .describe("below it an answer is `uncertain`, and so its verdict; the batch's own when absent"),
});
export type View = z.infer<typeof viewSchema>;

const rowNumber = number(z.number().int().min(0)).optional();
export const resultsQuerySchema = viewSchema.extend({
  state: choice(partRowSchema.shape.state.options)
    .optional()
    .describe('only rows that ended so: completed, failed, cancelled, with commas between'),
  verdict: choice(verdicts)
    .optional()
    .describe(`only rows of these verdicts: ${verdicts.join(', ')}, with commas between`),
  from: rowNumber.describe('only from this row on; rows are counted from 0'),
  to: rowNumber.describe('only the rows before this one'),
});
export type ResultsQuery = z.infer<typeof resultsQuerySchema>;

export const csvQuerySchema = resultsQuerySchema.extend({
  bom: flag
    .transform((text) => text === 'true')
    .describe('begin with a byte-order mark, by which Excel knows UTF-8'),
});

export const refQuerySchema = viewSchema.extend({
  ref: refSchema.describe("the caller's own name for the track"),
});

const batchId = z.string().regex(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, 'must be the id of a batch');
export const diffQuerySchema = z.strictObject({
  with: batchId.describe('the batch to compare with, as a rule the earlier one'),
  threshold: viewSchema.shape.threshold.describe("for both; each batch's own when absent"),
  summary: flag.transform((text) => text === 'true').describe('figures instead of rows'),
});

export const auditQuerySchema = z.strictObject({
  threshold: viewSchema.shape.threshold,
  limit: number(z.number().int().min(1).max(100_000))
    .default(1_000)
    .describe('how many disagreements, the most confident ones first'),
});
export const auditCsvQuerySchema = auditQuerySchema.extend({ bom: csvQuerySchema.shape.bom });

const probability = z.number().min(0).max(1);
const answer = jobSchema.shape.result.unwrap().partial();

export const resultRowSchema = answer.extend({
  row: z.int().describe('within the batch, from 0'),
  line: z.int().describe('of the manifest, from 1'),
  ref: z.string().optional(),
  audio: z.string().describe('as in the manifest: s3://BUCKET/KEY, a URL, or upload:ID'),
  state: z.enum(['waiting', ...jobStates]).describe('`waiting`: not a job yet'),
  revision: z.int().optional().describe('of several results under one ref the highest is the latest'),
  jobId: z.uuid(),
  finishedAt: z.iso.datetime().optional(),
  windows: answer.shape.windows.describe('of a long recording they are at `links.timeline`'),
  house: z
    .array(z.strictObject({ genre: z.string(), probability }))
    .optional()
    .describe('of a mapped batch: the likeliest house genres, `topK` of them; docs/house-genres.md'),
  declaredGenre: z.array(z.string()).optional(),
  predicted: z.string().optional().describe('the likeliest house genre; without a mapping, label'),
  predictedProbability: probability.optional(),
  verdict: z.enum(verdicts).optional(),
  disagreement: probability.optional().describe('of the verdict `disagree`: how confident'),
  input: jobSchema.shape.input,
  warnings: jobSchema.shape.warnings,
  error: jobSchema.shape.error,
  reused: z.boolean().optional().describe('taken over from an earlier result on the same audio'),
  model: jobSchema.shape.model,
  timings: jobRecordSchema.shape.timings.describe('milliseconds'),
  links: z.strictObject({
    self: z.string(),
    timeline: z.string().optional(),
    explanation: z.string().optional(),
    vectors: z.string().optional(),
  }),
});
export type ResultRow = z.infer<typeof resultRowSchema>;

export const latestResultSchema = resultRowSchema.partial({ row: true, line: true, audio: true }).extend({
  batch: z.strictObject({ id: z.uuid(), name: z.string().optional() }).optional(),
  filename: z.string().optional().describe('of an upload'),
});
export type LatestResult = z.infer<typeof latestResultSchema>;

export const rowTimelineSchema = z.strictObject({
  row: z.int(),
  windows: jobSchema.shape.result.unwrap().shape.windows,
});

const run = z.strictObject({
  id: z.uuid(),
  name: z.string().optional(),
  model: jobSchema.shape.model,
  threshold: z.number(),
});

const side = z.strictObject({
  row: z.int(),
  state: partRowSchema.shape.state,
  label: z.string().nullable().describe('the likeliest; null when there is none: silent, or no answer'),
  confidence: z.number().nullable(),
  uncertain: z.boolean(),
  house: z.string().optional().describe('the likeliest house genre, when both batches are mapped'),
  error: z.string().optional().describe('its code'),
});

export const diffRowSchema = z.strictObject({
  ref: z.string().optional(),
  audio: z.string(),
  changed: z.array(z.enum(['state', 'label', 'house'])).min(1),
  from: side.describe('in the batch that `with` names'),
  to: side.describe('in the batch of the address'),
});
export type DiffRow = z.infer<typeof diffRowSchema>;

const count = z.int().min(0);
const change = z.strictObject({ from: z.string().nullable(), to: z.string().nullable(), rows: count });
export const diffSummarySchema = z.strictObject({
  from: run,
  to: run,
  alignedBy: z.enum(['row', 'ref']),
  compared: count.describe('rows that have ended in both'),
  same: count,
  changed: count.describe('state, label or house genre differ'),
  changes: z.strictObject({ state: count, label: count, house: count }),
  onlyInFrom: count.describe('rows that have ended in one only; rows without a ref, where refs align'),
  onlyInTo: count,
  uncertainInEither: count,
  meanConfidenceDifference: z
    .number()
    .nullable()
    .describe('of the best label, absolute, over the rows that have an answer in both; null when none has'),
  labels: z.array(change).describe('how many rows went from which label to which, most rows first'),
  houses: z.array(change).optional().describe('of house genres, when both are mapped'),
  otherChanges: count.describe('rows of further pairs: the first 10,000 are told apart'),
});
export type DiffSummary = z.infer<typeof diffSummarySchema>;

const tally = z.strictObject({
  agree: count,
  disagree: count,
  uncertain: count,
  undeclared: count,
  unknown_genre: count,
});
export const auditSchema = z.strictObject({
  batch: run.extend({ mapped: z.boolean() }),
  rows: count.describe('that have ended'),
  unanswered: count.describe('of these, failed or cancelled'),
  verdicts: tally,
  byDeclared: z
    .array(tally.omit({ undeclared: true }).extend({ genre: z.string(), rows: count }))
    .describe('by declared genre, as it is spelt; a row that declares several counts for each'),
  otherDeclared: count.describe('further spellings of rows: the first 10,000 are told apart'),
  disagreements: z.array(
    z.strictObject({
      row: z.int(),
      line: z.int(),
      ref: z.string().optional(),
      audio: z.string(),
      declaredGenre: z.array(z.string()),
      predicted: z.string(),
      predictedProbability: probability,
      disagreement: probability.describe('how confident'),
      label: z.string(),
      confidence: probability.describe('of the label'),
    }),
  ),
});
export type Audit = z.infer<typeof auditSchema>;
