/**
 * Which models and profiles are served now: workers announce it in Redis every few seconds, the API reads it
 * and refuses a job that nobody would take.
 */
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { type Bundle, windowSeconds } from './bundle.ts';
import { withRedis } from './redis.ts';

/** What a model says of itself to everybody: enough to read a stored result long after its worker is gone. */
export const modelDescriptionSchema = z.strictObject({
  digest: z.string(),
  name: z.string(),
  version: z.string(),
  licence: z.string(),
  provenance: z.string(),
  labels: z.array(z.string()),
  profileHash: z.string(),
  windowSeconds: z.number(),
  stepSeconds: z.number(),
  threshold: z.number(),
  calibrated: z.boolean(),
  accuracy: z.looseObject({
    split: z.string(),
    clips: z.int(),
    top1: z.number(),
    top3: z.number(),
    meanRecall: z.number(),
  }),
});
export type ModelDescription = z.infer<typeof modelDescriptionSchema>;

export function describeModel({ manifest, digest, profileHash }: Bundle): ModelDescription {
  const { name, version, licence, provenance, labels, threshold, calibration, accuracy, profile } = manifest;
  return {
    digest,
    name,
    version,
    licence,
    provenance,
    labels,
    profileHash,
    windowSeconds: windowSeconds(profile),
    stepSeconds: (profile.stepFrames * profile.hopLength) / profile.sampleRate,
    threshold,
    calibrated: calibration !== 'none',
    accuracy,
  };
}

export interface Announcement {
  readonly kind: 'decoder' | 'inference';
  /** The queue that this worker reads. */
  readonly queue: string;
  readonly workerId: string;
  /** When this worker began to serve (epoch ms): among several models, the newest roll-out is the default. */
  readonly since: number;
  readonly modelDigest: string;
  readonly profileHash: string;
  /** Inference only: the execution provider that really runs. */
  readonly provider?: string;
}

const workersKey = 'as:workers';
const modelKey = (digest: string) => `as:model:${digest}`;
const beatMs = 3_000;
const goneAfterMs = 12_000;

/**
 * Announces until closed. Failures to reach Redis are passed over: the next beat tells again, and readiness
 * has its own check.
 */
export function announce(
  redis: Redis,
  description: ModelDescription,
  announcement: () => Announcement | undefined,
): { stop(): Promise<void> } {
  let last: Announcement | undefined;
  const beat = async () => {
    last = announcement();
    if (last === undefined) return;
    const field = `${last.queue}/${last.workerId}`;
    await redis.set(modelKey(description.digest), JSON.stringify(description));
    await redis.hset(workersKey, field, JSON.stringify({ ...last, seen: Date.now() }));
  };
  const timer = setInterval(() => void beat().catch(() => {}), beatMs);
  void beat().catch(() => {});
  return {
    async stop() {
      clearInterval(timer);
      if (last) await redis.hdel(workersKey, `${last.queue}/${last.workerId}`).catch(() => {});
    },
  };
}

/** Every worker that was heard of within the last seconds; forgets those silent for an hour. */
export async function liveWorkers(redis: Redis): Promise<Announcement[]> {
  const all = await withRedis(() => redis.hgetall(workersKey));
  const now = Date.now();
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
