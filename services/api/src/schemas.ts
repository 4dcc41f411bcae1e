/** The API's contract: these schemas validate, and /openapi.json is generated from them. */
import { batchClasses, batchStates, notifications } from '@acousticsense/shared/batch';
import { problemCodes } from '@acousticsense/shared/errors';
import { mappingSchema } from '@acousticsense/shared/house-genres';
import {
  inputFactsSchema,
  timingsSchema,
  warningSchema,
  windowChoiceSchema,
} from '@acousticsense/shared/job';
import { badRowSchema } from '@acousticsense/shared/manifest';
import { jobStates } from '@acousticsense/shared/pipeline';
import { modelDescriptionSchema } from '@acousticsense/shared/serving';
import { z } from 'zod';

/** Of text, as forms and queries have it. */
export const number = (schema: z.ZodNumber) =>
  z
    .string()
    .trim()
    .regex(/^-?\d+(\.\d+)?$/, 'must be a number')
    .transform(Number)
    .pipe(schema);

export const mappingNameSchema = z
  .string()
  .regex(/^[a-z0-9][a-z0-9._-]{0,62}$/, 'must be a name of a-z, 0-9, . _ -');

export const flag = z.enum(['true', 'false'], 'must be true or false').default('false');

/** What is to be done with audio. It arrives as text. */
const analysisOptionsSchema = z.strictObject({
  topK: number(z.number().int().min(1).max(1_000)).default(5).describe('how many genres to list'),
  threshold: number(z.number().min(0).max(1))
    .optional()
    .describe("below it the answer is `uncertain`; the model's own when absent"),
  windows: z
    .string()
    .trim()
    .transform((text) => (/^\d+$/.test(text) ? Number(text) : text))
    .pipe(windowChoiceSchema)
    .optional()
    .describe(
      "`middle`: one window; `all`: every step; a number: that many, evenly spaced; the model's own when absent",
    ),
  start: number(z.number().min(0).max(1e6)).default(0).describe('seconds from which to analyse'),
  duration: number(z.number().positive().max(1e6))
    .optional()
    .describe('seconds to analyse; to the end when absent'),
  explain: flag
    .transform((text) => text === 'true')
    .describe('keep what the model looked at, for `links.explanation`; not every model can'),
  vectors: flag
    .transform((text) => text === 'true')
    .describe('keep the logits and the embedding, for `links.vectors`'),
});

/** As the `ref` of a manifest's row. */
export const refSchema = z
  .string()
  .min(1)
  .max(256)
  .regex(/^\P{Cc}*$/u, 'must hold no line break or other control character');

const callbackUrlSchema = z
  .string()
  .min(1)
  .max(2_000)
  .describe('where to tell of it, beside the endpoints: under one of them that is enabled');

/** Form fields beside the file. */
export const jobOptionsSchema = analysisOptionsSchema.extend({
  ref: refSchema
    .optional()
    .describe("the caller's own name for the track: /v1/results?ref= finds its latest result"),
  callbackUrl: callbackUrlSchema.optional(),
});

const optional = <T extends z.ZodType>(schema: T) => schema.optional();

/** Of a batch: in the query beside a manifest, or in the JSON beside `prefix` or `rerunOf`. */
export const batchOptionsSchema = analysisOptionsSchema.extend({
  name: z.string().trim().min(1).max(200).optional().describe("the caller's own name for the batch"),
  class: z
    .enum(batchClasses)
    .default('backfill')
    .describe('`release` goes before `backfill` of the same tenant; both after uploads'),
  topK: optional(analysisOptionsSchema.shape.topK.unwrap()),
  start: optional(analysisOptionsSchema.shape.start.unwrap()),
  force: flag.transform((text) => text === 'true').describe('work out every row, known answers or not'),
  model: z
    .string()
    .regex(/^[0-9a-f]{16,64}$/, 'must be the digest of a model, or its first 16 digits or more')
    .optional()
    .describe('digest of the model; the one that is served to everybody when absent'),
  mapping: mappingNameSchema.optional().describe('name of a house mapping, see /v1/mappings'),
  notify: z
    .enum(notifications)
    .optional()
    .describe(
      'what is told of it: nothing, the batch as a whole, or each row too; `batch` when absent, `none` for a repetition without a callback',
    ),
  callbackUrl: callbackUrlSchema.optional(),
});

export const batchListQuerySchema = z.strictObject({
  limit: number(z.number().int().min(1).max(100)).default(20),
  before: z.iso.datetime().optional().describe('only batches that were made before'),
});

const count = z.int().min(0);
const batchProblem = z.object({ code: z.string(), message: z.string() });
export const batchSchema = z.strictObject({
  id: z.uuid(),
  name: z.string().optional(),
  state: z.enum(batchStates),
  class: z.enum(batchClasses),
  notify: z.enum(notifications).describe('what webhooks and the pull feed tell of it'),
  createdAt: z.iso.datetime(),
  updatedAt: z.iso.datetime(),
  endedAt: z.iso.datetime().optional(),
  origin: z.discriminatedUnion('kind', [
    z.strictObject({ kind: z.literal('manifest') }),
    z.strictObject({ kind: z.literal('prefix'), prefix: z.string() }),
    z.strictObject({ kind: z.literal('rerun'), of: z.uuid() }),
  ]),
  model: z.strictObject({ name: z.string(), version: z.string(), digest: z.string(), profile: z.string() }),
  complete: z.boolean().describe('all of its rows are known; a prefix may still be walked'),
  revision: z.int().describe('of its results; raised when what failed is tried again'),
  counts: z.strictObject({
    rows: count.describe('good rows: waiting + running + completed + failed + cancelled'),
    bad: count.describe('rows of the manifest that could not be used'),
    waiting: count,
    running: count,
    completed: count,
    failed: count,
    cancelled: count,
    reused: count.describe('of the completed: answers that were known already'),
  }),
  verdicts: z
    .strictObject({
      agree: count,
      disagree: count,
      uncertain: count,
      undeclared: count,
      unknown_genre: count,
    })
    .describe('declared against predicted, of the rows whose results are written (a thousand at a time)'),
  rowsPerSecond: z.number().optional(),
  estimatedEnd: z.iso.datetime().optional(),
  error: batchProblem.optional(),
  firstErrors: z.strictObject({
    bad: z.array(badRowSchema).describe('all of them: `links.badRows`'),
    failed: z.array(z.object({ row: z.int(), error: batchProblem })),
  }),
  notes: z
    .array(z.object({ line: z.int(), field: z.string(), message: z.string() }))
    .optional()
    .describe('fields that were left aside; told once, with the answer to the manifest'),
  links: z.strictObject({
    self: z.string(),
    events: z.string(),
    results: z.string(),
    csv: z.string(),
    badRows: z.string(),
    audit: z.string(),
  }),
});
export type BatchResource = z.infer<typeof batchSchema>;
export const batchListSchema = z.strictObject({ batches: z.array(batchSchema) });

export const namedMappingSchema = mappingSchema.extend({ name: z.string() });
export const mappingListSchema = z.strictObject({ mappings: z.array(z.string()) });

/** A job of an upload that is there already; the options as in a form, in JSON's own types. */
export const jobRequestSchema = z.strictObject({
  upload: z.uuid().describe('the id of a finished upload'),
  filename: z.string().max(1_000).optional().describe("for display; the upload's own when absent"),
  topK: z.int().min(1).max(1_000).default(5),
  threshold: z.number().min(0).max(1).optional(),
  windows: windowChoiceSchema.optional(),
  start: z.number().min(0).max(1e6).default(0),
  duration: z.number().positive().max(1e6).optional(),
  explain: z.boolean().default(false),
  vectors: z.boolean().default(false),
  ref: refSchema.optional().describe("the caller's own name for the track"),
  callbackUrl: callbackUrlSchema.optional(),
});

const guess = z.strictObject({ label: z.string(), confidence: z.number().min(0).max(1) });

export const jobSchema = z.strictObject({
  id: z.uuid(),
  state: z.enum(jobStates),
  version: z.int().describe('raised at every change; the id of server-sent events'),
  createdAt: z.iso.datetime(),
  updatedAt: z.iso.datetime(),
  filename: z.string(),
  ref: z.string().optional().describe("the caller's own name for the track"),
  revision: z.int().optional().describe('of several results under one ref the highest is the latest'),
  model: z.strictObject({ name: z.string(), version: z.string(), digest: z.string(), profile: z.string() }),
  result: z
    .strictObject({
      top: z.array(guess).describe('the likeliest genres, best first; empty when all is silent'),
      probabilities: z.record(z.string(), z.number()).describe('every genre'),
      uncertain: z.boolean().describe('do not take the best genre for an answer'),
      uncertainBecause: z
        .enum(['silent', 'not_music', 'confidence'])
        .optional()
        .describe(
          'all is silent; unlike the music the model was trained on; the best confidence lies under the threshold',
        ),
      lead: z.number().describe('difference between the first and the second'),
      threshold: z.number(),
      reliability: z
        .strictObject({
          right: z.int(),
          clips: z.int(),
          from: z.number(),
          to: z.number(),
          percent: z.int().describe('right of 100'),
        })
        .optional()
        .describe(
          'of the test songs whose best confidence lay in [from, to), as here, how many were right; only for an answer read from one window of what may be music, by a calibrated model tested on enough songs',
        ),
      windows: z.array(
        z.strictObject({
          start: z.number(),
          end: z.number(),
          silent: z.boolean(),
          uncertain: z.boolean().describe('as for the whole'),
          top: z.array(guess),
        }),
      ),
      provider: z.string().describe('the execution provider that really ran'),
    })
    .optional(),
  input: inputFactsSchema.optional(),
  warnings: z.array(warningSchema),
  timings: timingsSchema.optional().describe('milliseconds'),
  error: z
    .strictObject({ code: z.enum(problemCodes), message: z.string(), retryable: z.boolean() })
    .optional(),
  links: z.strictObject({
    self: z.string(),
    events: z.string(),
    spectrogram: z.string(),
    explanation: z.string().optional().describe('when `explain` was asked for'),
    vectors: z.string().optional().describe('when `vectors` was asked for'),
  }),
});
export type JobResource = z.infer<typeof jobSchema>;

export const modelSchema = modelDescriptionSchema.extend({
  provider: z.string(),
  retention: z.strictObject({ audioHours: z.number(), resultDays: z.number() }),
  limits: z.strictObject({ maxBytes: z.number(), maxDurationSeconds: z.number() }),
});
export type ModelResource = z.infer<typeof modelSchema>;

/** Begins an upload by signed URLs. */
export const uploadRequestSchema = z.strictObject({
  size: z.int().min(1).describe('bytes'),
  filename: z.string().max(1_000).optional().describe('for display'),
  parts: z
    .int()
    .min(1)
    .max(10_000)
    .optional()
    .describe('how many to cut it into, of at least 5 MiB each; of 16 MiB when absent'),
});

export const uploadPartSchema = z.strictObject({
  number: z.int().min(1),
  size: z.int().describe('bytes that the PUT must carry: its Content-Length is signed'),
  url: z.string().describe('where to PUT them; ask again for those that have expired'),
  etag: z.string().optional().describe('of what has come under this number; absent when nothing has'),
});
export type UploadPart = z.infer<typeof uploadPartSchema>;

const statedPartSchema = z.strictObject({
  number: z.int().min(1).max(10_000),
  etag: z.string().min(1).max(200).describe('from the answer to its PUT'),
});
export type StatedPart = z.infer<typeof statedPartSchema>;
export const uploadCompletionSchema = z.strictObject({ parts: z.array(statedPartSchema).min(1).max(10_000) });

export const uploadSchema = z.strictObject({
  id: z.uuid(),
  state: z.enum(['open', 'finished']),
  by: z.enum(['tus', 'presigned']),
  size: z.int().describe('bytes, as announced'),
  received: z.int().optional().describe('bytes that have come; known of uploads by tus'),
  filename: z.string(),
  createdAt: z.iso.datetime(),
  expiresAt: z.iso.datetime().describe('an unfinished one is then deleted, and so is a finished one later'),
  completedAt: z.iso.datetime().optional(),
  etag: z.string().optional().describe('of the finished object: a job reads this content or fails'),
  sha256: z.string().optional(),
  parts: z.array(uploadPartSchema).optional().describe('the first 100'),
  links: z.strictObject({
    self: z.string(),
    tus: z.string().optional(),
    parts: z.string().optional(),
    next: z.string().optional().describe('further parts'),
    complete: z.string().optional(),
  }),
});
export type UploadResource = z.infer<typeof uploadSchema>;

export const uploadPartsSchema = z.strictObject({
  parts: z.array(uploadPartSchema).describe('100 at most'),
  links: z.strictObject({ next: z.string().optional() }),
});
export const uploadPartsQuerySchema = z.strictObject({
  after: number(z.number().int().min(0).max(10_000))
    .default(0)
    .describe('the last number of the page before'),
});

/** The seed application's answer, exactly. */
export const predictionSchema = z.strictObject({
  prediction: z.array(guess),
  mel_spectrogram_url: z.string(),
});
export type Prediction = z.infer<typeof predictionSchema>;

export const problemSchema = z.looseObject({
  type: z.string(),
  title: z.string(),
  status: z.int(),
  detail: z.string().describe('one sentence: what was wrong, and what to do'),
  code: z.enum(problemCodes).describe('stable'),
  retryable: z.boolean(),
  field: z.string().optional(),
  deletedAt: z.iso.datetime().optional().describe('of what is gone'),
});

export const spectrogramQuerySchema = z.strictObject({
  scale: number(z.number().int().min(1).max(8)).default(1).describe('224 times this is the side in pixels'),
});
