/**
 * The model bundle: a directory with `model.json` and the files it names.
 *
 * Labels, thresholds and preprocessing are data of the bundle, never code: the decoder takes its whole front
 * end from `profile`, the inference service its inputs, outputs and labels from `graph` and `labels`.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { StartupError } from './errors.ts';
import { windowChoiceSchema } from './job.ts';

/**
 * Everything that decides which numbers the decoder writes into a tensor. Two profiles with the same hash
 * give the same tensor for the same audio.
 */
export const profileSchema = z.strictObject({
  sampleRate: z.int().min(8_000).max(48_000).describe('Hz after resampling'),
  channels: z.enum(['mean']).describe('how channels become one'),
  resampler: z.enum(['soxr', 'swr']),
  window: z.enum(['hann']).describe('periodic Hann'),
  fftSize: z.int().min(256).max(8192),
  hopLength: z.int().min(1).describe('samples between frames'),
  centered: z.boolean().describe('true: frame k is centred on sample k*hop; false: it begins there'),
  padMode: z.enum(['none', 'zero']),
  power: z.union([z.literal(1), z.literal(2)]).describe('1: magnitude, 2: power'),
  melScale: z.enum(['slaney', 'htk']),
  melNorm: z.enum(['slaney', 'none']),
  melBands: z.int().min(16).max(512),
  minHz: z.number().min(0),
  maxHz: z.number().positive(),
  reference: z.enum(['max']).describe('what 0 dB is'),
  scope: z.enum(['window', 'track']).describe('where the reference is taken from'),
  floorDb: z.number().negative().describe('decibels under the reference where the range ends'),
  stretch: z
    .enum(['none', 'window'])
    .describe("none: 0 is the floor, 255 the reference; window: the window's own least and greatest cell"),
  quantisation: z
    .enum(['linear-uint8', 'matplotlib-uint8'])
    .describe(
      'linear: rounded to nearest of 255 steps; matplotlib: floor of 256 equal steps, the top one closed',
    ),
  windowFrames: z.int().min(8).max(4096),
  stepFrames: z.int().min(1).max(4096),
  placement: z
    .enum(['anchored', 'centred'])
    .describe('of `all` windows: the last one ends with the audio, or as many as fit, both ends cut alike'),
  shortInput: z.enum(['loop']).describe('audio shorter than a window is repeated in the mel domain'),
});
export type Profile = z.infer<typeof profileSchema>;

const sha256Hex = z.string().regex(/^[0-9a-f]{64}$/);
const tensorShape = z.array(z.union([z.literal('batch'), z.int().positive()]));
const outputSchema = z.strictObject({ name: z.string(), shape: tensorShape });

export const accuracySchema = z.looseObject({
  split: z.string(),
  clips: z.int(),
  top1: z.number(),
  top3: z.number(),
  meanRecall: z.number(),
});

/** Of the answers whose confidence lay in [from, to): how many there were, how many of them were right. */
export const reliabilitySchema = z.array(
  z.strictObject({ from: z.number(), to: z.number(), clips: z.int(), right: z.int() }),
);

const calibrationSchema = z.strictObject({
  method: z.literal('temperature'),
  temperature: z.number().positive(),
  data: z.string().describe('what it was fitted on'),
  clips: z.int(),
  eceBefore: z.number().describe('expected calibration error, 15 equal-width bins'),
  ece: z.number(),
  reliability: reliabilitySchema.describe('of one window a clip, after calibration'),
});

export const manifestSchema = z.strictObject({
  format: z.literal(1),
  name: z.string().regex(/^[a-z0-9][a-z0-9._-]{0,63}$/),
  version: z.string().min(1).max(40),
  licence: z.string(),
  provenance: z.string(),
  labels: z
    .array(z.string().min(1))
    .min(2)
    .refine((all) => new Set(all).size === all.length, 'labels repeat'),
  taxonomy: z.record(z.string(), z.array(z.string())).optional().describe('families, each with its labels'),
  missing: z
    .array(z.strictObject({ label: z.string(), reason: z.string() }))
    .optional()
    .describe('genres that a user may look for in vain, and why'),
  profile: profileSchema,
  graph: z.strictObject({
    file: z.string(),
    input: z.strictObject({ name: z.string(), shape: tensorShape, type: z.literal('uint8') }),
    outputs: z.strictObject({
      logits: outputSchema,
      embedding: outputSchema.optional().describe('[batch, size], unit length'),
      outlier: outputSchema
        .optional()
        .describe('[batch]: the higher, the less like the music it was trained on'),
    }),
    explain: z
      .strictObject({ file: z.string(), output: outputSchema })
      .optional()
      .describe('the same weights and input; attention rolled out to [batch, rows, columns], row 0 lowest'),
    precision: z.enum(['fp32', 'fp16', 'int8']),
    imageSize: z.int(),
    colour: z.string(),
    resize: z.string(),
    mean: z.array(z.number()),
    std: z.array(z.number()),
  }),
  windows: windowChoiceSchema.describe('analysed when the caller does not say'),
  aggregation: z.enum(['mean', 'vote']),
  calibration: z.union([z.literal('none'), calibrationSchema]),
  threshold: z.number().min(0).max(1).describe('below this confidence an answer is `uncertain`'),
  outlierThreshold: z.number().optional().describe('above this outlier score too'),
  accuracy: z.union([z.literal('none'), accuracySchema]),
  selfTest: z.strictObject({ input: z.string(), output: z.string(), tolerance: z.number().positive() }),
  files: z.record(z.string(), sha256Hex),
});
export type Manifest = z.infer<typeof manifestSchema>;

export interface Bundle {
  readonly directory: string;
  readonly manifest: Manifest;
  /** SHA-256 of model.json, which itself holds the SHA-256 of every other file: names the whole bundle. */
  readonly digest: string;
  readonly profileHash: string;
}

/** First 16 hex digits of the SHA-256 of the profile's canonical JSON (keys sorted). */
export function hashProfile(profile: Profile): string {
  const canonical = JSON.stringify(profile, Object.keys(profile).sort());
  return createHash('sha256').update(canonical).digest('hex').slice(0, 16);
}

/** Window length in seconds of audio. */
export function windowSeconds(profile: Profile): number {
  return (profile.windowFrames * profile.hopLength) / profile.sampleRate;
}

/**
 * Reads and checks a bundle from a local directory (a path or a `file:` URL).
 *
 * @param verifyFiles hash every named file (the inference service does; the decoder needs only the profile).
 * @throws {StartupError} one sentence that names what is missing or does not match.
 */
export async function loadBundle(location: string, { verifyFiles = true } = {}): Promise<Bundle> {
  // No part of the URL is repeated: it may hold credentials.
  if (/^[a-z][a-z0-9+.-]+:\/\//i.test(location) && !location.startsWith('file:'))
    throw new StartupError(
      `MODEL_URL is a ${location.split(':', 1)[0]}: URL: services take a bundle from a directory, to which it is brought before they start (docs/deployment-kubernetes.md, Models).`,
    );
  const directory = location.startsWith('file:') ? fileURLToPath(location) : path.resolve(location);
  const manifestPath = path.join(directory, 'model.json');
  let text: Buffer;
  try {
    text = await readFile(manifestPath);
  } catch (cause) {
    throw new StartupError(
      `No model bundle at ${directory}: ${manifestPath} cannot be read. Set MODEL_URL to a bundle's directory.`,
      {
        cause,
      },
    );
  }
  const manifest = parseManifest(text.toString('utf8'), manifestPath);
  checkShapes(manifest, manifestPath);
  const { graph, selfTest } = manifest;
  const named = [graph.file, selfTest.input, selfTest.output, ...(graph.explain ? [graph.explain.file] : [])];
  for (const file of named) {
    if (!(file in manifest.files))
      throw new StartupError(`${manifestPath}: "files" has no SHA-256 for ${file}.`);
  }
  if (verifyFiles) {
    for (const [file, expected] of Object.entries(manifest.files))
      await verifyFile(directory, file, expected);
  }
  return {
    directory,
    manifest,
    digest: createHash('sha256').update(text).digest('hex'),
    profileHash: hashProfile(manifest.profile),
  };
}

function parseManifest(text: string, manifestPath: string): Manifest {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new StartupError(`${manifestPath} is not JSON.`, { cause });
  }
  const parsed = manifestSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  throw new StartupError(`${manifestPath}: ${issue.path.join('.') || 'the manifest'}: ${issue.message}.`);
}

function checkShapes(manifest: Manifest, manifestPath: string): void {
  const { graph, labels, profile, taxonomy = {}, outlierThreshold } = manifest;
  const { embedding, outlier } = graph.outputs;
  if ((outlier === undefined) !== (outlierThreshold === undefined))
    throw new StartupError(`${manifestPath}: an outlier output needs outlierThreshold, and the reverse.`);
  checkRank('outputs.embedding', embedding?.shape, 2, manifestPath);
  checkRank('outputs.outlier', outlier?.shape, 1, manifestPath);
  checkRank('explain.output', graph.explain?.output.shape, 3, manifestPath);
  const { windowFrames, melBands, stepFrames, maxHz, sampleRate } = profile;
  const expectedInput = JSON.stringify(['batch', melBands, windowFrames]);
  if (JSON.stringify(graph.input.shape) !== expectedInput) {
    throw new StartupError(
      `${manifestPath}: graph.input.shape is ${JSON.stringify(graph.input.shape)}, the profile makes ${expectedInput}.`,
    );
  }
  if (graph.outputs.logits.shape.at(-1) !== labels.length) {
    throw new StartupError(
      `${manifestPath}: ${labels.length} labels for logits of shape ${JSON.stringify(graph.outputs.logits.shape)}.`,
    );
  }
  const stranger = Object.values(taxonomy)
    .flat()
    .find((label) => !labels.includes(label));
  if (stranger !== undefined)
    throw new StartupError(`${manifestPath}: taxonomy names ${stranger}, which is no label.`);
  if (stepFrames > windowFrames)
    throw new StartupError(`${manifestPath}: stepFrames is larger than windowFrames.`);
  if (maxHz > sampleRate / 2)
    throw new StartupError(`${manifestPath}: maxHz lies above half the sample rate.`);
}

function checkRank(name: string, shape: unknown[] | undefined, rank: number, manifestPath: string): void {
  if (shape === undefined || (shape.length === rank && shape[0] === 'batch')) return;
  throw new StartupError(
    `${manifestPath}: graph.${name} has shape ${JSON.stringify(shape)}: it must be ${rank} sides, the first "batch".`,
  );
}

async function verifyFile(directory: string, file: string, expected: string): Promise<void> {
  const full = path.join(directory, file);
  if (path.relative(directory, full).startsWith('..')) {
    throw new StartupError(`The bundle names ${file}, which lies outside its directory.`);
  }
  const hash = createHash('sha256');
  try {
    await pipeline(createReadStream(full), hash);
  } catch (cause) {
    throw new StartupError(`The model bundle's file ${full} cannot be read.`, { cause });
  }
  const actual = hash.digest('hex');
  if (actual !== expected) {
    throw new StartupError(
      `The model bundle's file ${full} has SHA-256 ${actual}, model.json says ${expected}: it is damaged or was changed.`,
    );
  }
}
