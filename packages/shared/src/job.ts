/** What a job record holds: the one shape that all services agree on. */
import { z } from 'zod';
import { problemCodes } from './errors.ts';
import { batchRowSchema, jobClasses, jobStates } from './pipeline.ts';
import { windowInfoSchema } from './tensor.ts';

/** `middle`: one window; `all`: every step; a number: that many, evenly spaced. */
export const windowChoiceSchema = z.union([z.enum(['middle', 'all']), z.int().min(1).max(64)]);
export type WindowChoice = z.infer<typeof windowChoiceSchema>;

export const selectionSchema = z.strictObject({
  windows: windowChoiceSchema,
  start: z.number().min(0).describe('seconds'),
  duration: z.number().positive().optional().describe('seconds; to the end when absent'),
});
export type Selection = z.infer<typeof selectionSchema>;

const warningCodes = ['too_short', 'silent', 'clipped', 'low_passed', 'partly_corrupt', 'sanitised'] as const;
export const warningSchema = z.strictObject({
  code: z.enum(warningCodes),
  message: z.string().describe('one sentence: what was detected, and what to do'),
  value: z.number().optional().describe('the measured quantity behind it'),
});
export type Warning = z.infer<typeof warningSchema>;

export const inputFactsSchema = z.strictObject({
  container: z.string(),
  codec: z.string(),
  sampleRate: z.int().describe('Hz, as stored'),
  channels: z.int(),
  duration: z.number().describe('seconds of audio in the file, as far as it could be told'),
  bitRate: z.number().optional().describe('bits per second'),
  analysedStart: z.number().describe('seconds'),
  analysedEnd: z.number().describe('seconds'),
  bandwidth: z.number().describe('Hz under which the sound lies'),
});
export type InputFacts = z.infer<typeof inputFactsSchema>;

/** A result in Redis stays under 4 kB: the windows of a longer recording lie in an object. */
export const inlineWindows = 3;

/** What the decoder hands on, committed with the state `decoded`. */
export const decodedSchema = z.strictObject({
  contentId: z.string().describe('SHA-256 of the audio'),
  tensorKey: z.string().describe('without ending'),
  windows: z
    .array(windowInfoSchema)
    .min(1)
    .optional()
    .describe(`at most ${inlineWindows}: of more, only the sidecar beside the tensor tells`),
  input: inputFactsSchema,
  warnings: z.array(warningSchema),
});
export type Decoded = z.infer<typeof decodedSchema>;

/** The JSON beside a tensor: with it the step is known to be complete and need not be repeated. */
export const sidecarSchema = z.strictObject({
  v: z.literal(1),
  frontEnd: z.string().describe('front-end version that wrote the tensor'),
  profileHash: z.string(),
  windows: z.array(windowInfoSchema).min(1),
  input: inputFactsSchema,
  warnings: decodedSchema.shape.warnings,
});
export type Sidecar = z.infer<typeof sidecarSchema>;

/** What the inference service found, committed with the state `completed`. */
export const outcomeSchema = z.strictObject({
  probabilities: z
    .array(z.number())
    .nullable()
    .describe('aggregate over the windows that are not silent, in label order; null when all are silent'),
  windows: z
    .array(z.array(z.number()).nullable())
    .optional()
    .describe('per window, in label order; null when silent; of many windows, the timeline object tells'),
  outlier: z.number().optional().describe('mean over the windows that are not silent'),
  outliers: z
    .array(z.number().nullable())
    .optional()
    .describe('per window, how little it is like the music that the model was trained on; null when silent'),
  provider: z.string().describe('the execution provider that really ran'),
});
export type Outcome = z.infer<typeof outcomeSchema>;

/** Of a recording of many windows: an object in storage, written before the record says `completed`. */
export const timelineSchema = z.strictObject({
  v: z.literal(1),
  windows: z.array(windowInfoSchema),
  probabilities: z.array(z.array(z.number()).nullable()).describe('as `windows` of an outcome'),
  outliers: z.array(z.number().nullable()).optional(),
});
export type Timeline = z.infer<typeof timelineSchema>;

const span = { start: z.number().describe('seconds'), end: z.number() };

/** What the model looked at: an object in storage, written when the job asks for it. */
export const explanationSchema = z.strictObject({
  v: z.literal(1),
  windows: z.array(
    z.strictObject({
      ...span,
      attention: z
        .array(z.array(z.number()))
        .describe(
          '[rows][columns] over the window: share of the attention on each patch, row 0 lowest in pitch',
        ),
    }),
  ),
});
export type Explanation = z.infer<typeof explanationSchema>;

/** The model's own numbers: an object in storage, written when the job asks for it. */
export const vectorsSchema = z.strictObject({
  v: z.literal(1),
  labels: z.array(z.string()),
  embedding: z
    .array(z.number())
    .optional()
    .describe(
      "the style anchor: mean of the windows' embeddings, unit length; absent when the model has none",
    ),
  windows: z.array(
    z.strictObject({
      ...span,
      logits: z.array(z.number()).nullable().describe('in label order; null when the window is silent'),
      embedding: z.array(z.number()).nullable().optional().describe('unit length'),
    }),
  ),
});
export type Vectors = z.infer<typeof vectorsSchema>;

const milliseconds = z.number().min(0);
export const timingsSchema = z.strictObject({
  upload: milliseconds.optional(),
  fetchWait: milliseconds.optional().describe('from acceptance to the fetch service'),
  fetch: milliseconds.optional().describe('audio from its URL to storage'),
  decodeWait: milliseconds.optional().describe('from acceptance to the decoder'),
  decodeFetch: milliseconds.optional().describe('audio from storage to scratch'),
  decode: milliseconds.optional().describe('ffmpeg, front end and tensor'),
  inferenceWait: milliseconds.optional().describe('from decoded to the inference service'),
  batchWait: milliseconds.optional().describe('in the batcher'),
  inference: milliseconds.optional().describe('the batch that held the last window'),
});

/** An object of a registered source bucket, read in place. */
export const sourceObjectSchema = z.strictObject({
  bucket: z.string(),
  key: z.string(),
  etag: z.string().optional().describe('every read is conditional on it'),
  versionId: z.string().optional(),
  size: z.int().optional(),
});
export type SourceObject = z.infer<typeof sourceObjectSchema>;

const filename = z.string().describe('what the caller called it, for display only');
export const audioSchema = z.union([
  z.strictObject({
    key: z.string().describe("in the service's own object storage"),
    size: z.int(),
    sha256: z.string().optional().describe('the decoder works it out when absent'),
    etag: z.string().optional().describe('every read is conditional on it'),
    filename,
  }),
  z.strictObject({ source: sourceObjectSchema, filename }),
  z.strictObject({ url: z.string(), filename }).describe('until the fetch service has stored it'),
]);
export type Audio = z.infer<typeof audioSchema>;
export type StoredAudio = Extract<Audio, { key: string }>;

/** Where a caller wants to hear of one job or batch, beside what endpoints subscribe to: under one of the endpoints. */
export const callbackSchema = z.strictObject({ endpointId: z.string(), url: z.string() });
export type Callback = z.infer<typeof callbackSchema>;

/** Not strict: during a roll-out an older process reads the records of a newer one, without what it does not know. */
export const jobRecordSchema = z.object({
  id: z.uuid(),
  tenant: z.string(),
  state: z.enum(jobStates),
  generation: z.int().min(1),
  version: z.int().min(1).describe('raised by every commit'),
  createdAt: z.int().describe('epoch milliseconds'),
  updatedAt: z.int(),
  traceparent: z.string(),
  modelDigest: z.string(),
  modelName: z.string(),
  modelVersion: z.string(),
  profileHash: z.string(),
  audio: audioSchema,
  /** Absent: interactive. */
  class: z.enum(jobClasses).optional(),
  /** The caller's own name for the track; of several results under one name the highest revision is the latest. */
  ref: z.string().optional(),
  revision: z.int().optional(),
  batch: batchRowSchema.optional(),
  /** The answer of an earlier job on the same audio, taken over without work. */
  reused: z.boolean().optional(),
  selection: selectionSchema,
  /** Applied when a result is read: they change no stored number. */
  presentation: z.strictObject({ topK: z.int(), threshold: z.number() }),
  /** Of a row: the batch's. */
  callback: callbackSchema.optional(),
  /** What the inference stage writes into storage beside the result. */
  extras: z.strictObject({ explain: z.boolean(), vectors: z.boolean() }).optional(),
  decoded: decodedSchema.optional(),
  outcome: outcomeSchema.optional(),
  error: z
    .strictObject({ code: z.enum(problemCodes), message: z.string(), retryable: z.boolean() })
    .optional(),
  timings: timingsSchema.optional(),
  /** How often each stage has begun: a job that keeps killing its worker is found by it. */
  fetchStarts: z.int().optional(),
  decodeStarts: z.int().optional(),
  inferenceStarts: z.int().optional(),
  /** How often the model's process died on this job alone. */
  crashes: z.int().optional(),
  /** How often the job went back to decode because its tensor was gone. */
  redecodes: z.int().optional(),
});
export type JobRecord = z.infer<typeof jobRecordSchema>;
