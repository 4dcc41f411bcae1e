/**
 * Which models and profiles are served now: workers announce it in Redis every few seconds, the API reads it
 * and refuses a job that nobody would take.
 */
import { hostname } from 'node:os';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { accuracySchema, type Bundle, reliabilitySchema, windowSeconds } from './bundle.ts';
import { windowChoiceSchema } from './job.ts';
import { queueName, type StageName } from './pipeline.ts';
import { withRedis } from './redis.ts';
import type { Service } from './service.ts';

/**
 * What a model says of itself to everybody: enough to read a stored result long after its worker is gone. Not
 * strict: during a roll-out an older process reads the description of a newer one.
 */
export const modelDescriptionSchema = z.object({
  digest: z.string(),
  name: z.string(),
  version: z.string(),
  licence: z.string(),
  provenance: z.string(),
  labels: z.array(z.string()),
  taxonomy: z.record(z.string(), z.array(z.string())).optional(),
  missing: z.array(z.object({ label: z.string(), reason: z.string() })).optional(),
  profileHash: z.string(),
  windowSeconds: z.number(),
  stepSeconds: z.number(),
  // Defaults here and below: descriptions of models outlive the release that wrote them.
  windows: windowChoiceSchema.default('middle').describe('analysed when the caller does not say'),
  threshold: z.number(),
  outlierThreshold: z.number().optional(),
  calibrated: z.boolean(),
  reliability: reliabilitySchema.optional().describe('absent while the model is not calibrated'),
  embeds: z.boolean().default(false).describe('the model gives an embedding'),
  explains: z.boolean().default(false).describe('the model can show what it attended to'),
  accuracy: z.union([z.literal('none'), accuracySchema]),
});
export type ModelDescription = z.infer<typeof modelDescriptionSchema>;

export function describeModel({ manifest, digest, profileHash }: Bundle): ModelDescription {
  const { name, version, licence, provenance, labels, threshold, calibration, accuracy, profile } = manifest;
  const { taxonomy, missing, outlierThreshold, windows, graph } = manifest;
  return {
    digest,
    name,
    version,
    licence,
    provenance,
    labels,
    ...(taxonomy ? { taxonomy } : {}),
    ...(missing ? { missing } : {}),
    profileHash,
    windows,
    ...(outlierThreshold === undefined ? {} : { outlierThreshold }),
    ...(calibration === 'none' ? {} : { reliability: calibration.reliability }),
    embeds: graph.outputs.embedding !== undefined,
    explains: graph.explain !== undefined,
    windowSeconds: windowSeconds(profile),
    stepSeconds: (profile.stepFrames * profile.hopLength) / profile.sampleRate,
    threshold,
    calibrated: calibration !== 'none',
    accuracy,
  };
}

/** The stage that each kind of worker runs. */
export const stageOfWorker = {
  fetch: 'fetch',
  decoder: 'decode',
  inference: 'inference',
} as const satisfies Record<string, StageName>;
type WorkerKind = keyof typeof stageOfWorker;

export interface Announcement {
  readonly kind: WorkerKind;
  /** The queue that this worker reads. */
  readonly queue: string;
  readonly workerId: string;
  /** When this worker began to serve (epoch ms): among several models, the newest roll-out is the default. */
  readonly since: number;
  /** Empty, as the profile is, for a worker that serves every model. */
  readonly modelDigest: string;
  readonly profileHash: string;
  /** Queue jobs that this worker holds at a time: how much the feeder may put before it. */
  readonly concurrency: number;
  /** A model on trial: jobs are pinned to it only when they name it. */
  readonly candidate?: boolean;
  /** Inference only: the execution provider that really runs. */
  readonly provider?: string;
}

export interface WorkerFacts {
  readonly kind: WorkerKind;
  readonly concurrency: number;
  readonly candidate?: boolean;
}

const workersKey = 'as:workers';
const modelKey = (digest: string) => `as:model:${digest}`;
const beatMs = 3_000;
const retryMs = 250;
const goneAfterMs = 12_000;

/**
 * Announces a worker until the service closes. While it is not ready or Redis is away it tries again soon, so that
 * a worker that has just become ready is known at once.
 *
 * @param bundle undefined for a worker that serves every model.
 * @param ready what is told of it beyond its route; undefined while it is not ready: then it is not announced, and
 *   the API refuses what nobody would take.
 */
export function announceWorker(
  service: Service,
  redis: Redis,
  bundle: Bundle | undefined,
  { kind, concurrency, candidate = false }: WorkerFacts,
  ready: () => { provider?: string } | undefined,
): void {
  const description = bundle && describeModel(bundle);
  const route = { profileHash: bundle?.profileHash ?? '', modelDigest: bundle?.digest ?? '' };
  const queue = queueName(stageOfWorker[kind], route);
  const workerId = `${hostname()}-${process.pid}`;
  const field = `${queue}/${workerId}`;
  const since = Date.now();
  let told = false;
  let stopped = false;
  let timer: NodeJS.Timeout | undefined;

  const tell = async () => {
    const more = ready();
    if (more === undefined) return false;
    const announcement: Announcement = {
      kind,
      queue,
      workerId,
      since,
      concurrency,
      ...(candidate ? { candidate } : {}),
      ...route,
      ...more,
    };
    if (description) await redis.set(modelKey(description.digest), JSON.stringify(description));
    await redis.hset(workersKey, field, JSON.stringify({ ...announcement, seen: await timeOf(redis) }));
    told = true;
    return true;
  };
  const beat = async () => {
    const done = await tell().catch(() => false);
    if (stopped) return;
    const again = () => {
      beating = beat();
    };
    timer = setTimeout(again, done ? beatMs : retryMs);
  };
  let beating = beat();

  service.onClose('announcement', async () => {
    stopped = true;
    clearTimeout(timer);
    await beating;
    if (told) await redis.hdel(workersKey, field).catch(() => {});
  });
}

/** Epoch milliseconds by the one clock that all who announce and all who ask share: their own may differ, or jump. */
async function timeOf(redis: Redis): Promise<number> {
  const [seconds, microseconds] = (await redis.time()).map(Number) as [number, number];
  return seconds * 1_000 + Math.floor(microseconds / 1_000);
}

/** Every worker that was heard of within the last seconds; forgets those silent for an hour. */
export async function liveWorkers(redis: Redis): Promise<Announcement[]> {
  const [all, now] = await withRedis(() => Promise.all([redis.hgetall(workersKey), timeOf(redis)]));
  const live: Announcement[] = [];
  for (const [field, json] of Object.entries(all)) {
    const { seen, ...announcement } = JSON.parse(json) as Announcement & { seen: number };
    if (now - seen < goneAfterMs) live.push(announcement);
    else if (now - seen > 3_600_000) await redis.hdel(workersKey, field);
  }
  return live;
}

/** A model that was ever announced, served now or not. */
export async function knownModel(redis: Redis, digest: string): Promise<ModelDescription | undefined> {
  const json = await withRedis(() => redis.get(modelKey(digest)));
  return json === null ? undefined : modelDescriptionSchema.parse(JSON.parse(json));
}
