/** From a job record to what callers see; `topK` and `threshold` are applied here and nowhere else. */
import type { JobRecord } from '@acousticsense/shared/job';
import type { JobResource } from './schemas.ts';

export interface Guess {
  label: string;
  confidence: number;
}

/** The `topK` likeliest labels, best first; ties keep label order. */
export function topGenres(
  probabilities: readonly number[],
  labels: readonly string[],
  topK: number,
): Guess[] {
  return labels
    .map((label, index) => ({ label, confidence: probabilities[index] ?? 0 }))
    .sort((a, b) => b.confidence - a.confidence)
    .slice(0, topK);
}

/** @param labels of the model to which the job is pinned, in output order. */
export function presentJob(record: JobRecord, labels: readonly string[]): JobResource {
  const self = `/v1/jobs/${record.id}`;
  const result = presentResult(record, labels);
  return {
    id: record.id,
    state: record.state,
    version: record.version,
    createdAt: new Date(record.createdAt).toISOString(),
    updatedAt: new Date(record.updatedAt).toISOString(),
    filename: record.audio.filename,
    model: {
      name: record.modelName,
      version: record.modelVersion,
      digest: record.modelDigest,
      profile: record.profileHash,
    },
    ...(result ? { result } : {}),
    ...(record.decoded ? { input: record.decoded.input } : {}),
    warnings: record.decoded?.warnings ?? [],
    ...(record.timings ? { timings: record.timings } : {}),
    ...(record.error ? { error: record.error } : {}),
    links: { self, events: `${self}/events`, spectrogram: `${self}/spectrogram.png` },
  };
}

function presentResult(record: JobRecord, labels: readonly string[]): JobResource['result'] {
  const { outcome, decoded, presentation } = record;
  if (record.state !== 'completed' || outcome === undefined || decoded === undefined) return undefined;
  const { topK, threshold } = presentation;
  const ranked = outcome.probabilities ? topGenres(outcome.probabilities, labels, labels.length) : [];
  const [first, second] = ranked;
  return {
    top: ranked.slice(0, topK),
    probabilities: Object.fromEntries(
      labels.map((label, index) => [label, outcome.probabilities?.[index] ?? 0]),
    ),
    uncertain: first === undefined || first.confidence < threshold,
    lead: round(first ? first.confidence - (second?.confidence ?? 0) : 0),
    threshold,
    windows: decoded.windows.map(({ start, end, silent }, index) => {
      const probabilities = outcome.windows[index];
      return {
        start,
        end,
        silent,
        top: probabilities ? topGenres(probabilities, labels, Math.min(topK, 3)) : [],
      };
    }),
    provider: outcome.provider,
  };
}

const round = (value: number) => Math.round(value * 1e6) / 1e6;
