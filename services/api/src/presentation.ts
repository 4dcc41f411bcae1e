/** From a job record to what callers see; `topK` and `threshold` are applied here and nowhere else. */
import { outlierOf, reasonToDoubt } from '@acousticsense/shared/doubt';
import { topGenres } from '@acousticsense/shared/events';
import type { JobRecord, Timeline } from '@acousticsense/shared/job';
import type { ModelDescription } from '@acousticsense/shared/serving';
import { extras, isAskedFor } from './extras.ts';
import type { JobResource } from './schemas.ts';

type Result = NonNullable<JobResource['result']>;

/**
 * @param model to which the job is pinned; without it a result has no labels.
 * @param timeline of a recording of many windows: {@link hasTimeline}.
 */
export function presentJob(
  record: JobRecord,
  model: ModelDescription | undefined,
  timeline?: Timeline,
): JobResource {
  const self = `/v1/jobs/${record.id}`;
  const result = presentResult(record, model, timeline);
  const asked = extras.filter((extra) => isAskedFor(record, extra));
  return {
    id: record.id,
    state: record.state,
    version: record.version,
    createdAt: new Date(record.createdAt).toISOString(),
    updatedAt: new Date(record.updatedAt).toISOString(),
    filename: record.audio.filename,
    ...(record.ref === undefined ? {} : { ref: record.ref }),
    ...(record.revision === undefined ? {} : { revision: record.revision }),
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
    links: {
      self,
      events: `${self}/events`,
      spectrogram: `${self}/spectrogram.png`,
      ...Object.fromEntries(asked.map((extra) => [extra, `${self}/${extra}`])),
    },
  };
}

/** The windows of the result lie in an object of their own (`timelineKey`). */
export function hasTimeline({ state, outcome }: Pick<JobRecord, 'state' | 'outcome'>): boolean {
  return state === 'completed' && outcome !== undefined && outcome.windows === undefined;
}

/** What a result is made from; a stored row of a batch has it as a record has. */
export type Answered = Pick<JobRecord, 'state' | 'decoded' | 'outcome' | 'presentation'>;

export function presentResult(
  record: Answered,
  model: ModelDescription | undefined,
  timeline?: Timeline,
): Result | undefined {
  const { outcome, decoded, presentation } = record;
  if (record.state !== 'completed' || outcome === undefined || decoded === undefined) return undefined;
  const spans = timeline?.windows ?? decoded.windows ?? [];
  const perWindow = timeline?.probabilities ?? outcome.windows ?? [];
  const outliers = timeline?.outliers ?? outcome.outliers;
  const { topK, threshold } = presentation;
  const labels = model?.labels ?? [];
  const limits = { threshold, outlierThreshold: model?.outlierThreshold };
  const ranked = outcome.probabilities ? topGenres(outcome.probabilities, labels, labels.length) : [];
  const [first, second] = ranked;
  const uncertainBecause = reasonToDoubt(outcome.probabilities, outlierOf(outcome), limits);
  const reliability =
    uncertainBecause === 'not_music' ? undefined : reliabilityOf(perWindow, model?.reliability);
  return {
    top: ranked.slice(0, topK),
    probabilities: Object.fromEntries(
      labels.map((label, index) => [label, outcome.probabilities?.[index] ?? 0]),
    ),
    uncertain: uncertainBecause !== undefined,
    ...(uncertainBecause ? { uncertainBecause } : {}),
    lead: round(first ? first.confidence - (second?.confidence ?? 0) : 0),
    threshold,
    ...(reliability ? { reliability } : {}),
    windows: spans.map(({ start, end, silent }, index) => {
      const probabilities = perWindow[index] ?? null;
      return {
        start,
        end,
        silent,
        uncertain: reasonToDoubt(probabilities, outliers?.[index] ?? undefined, limits) !== undefined,
        top: probabilities ? topGenres(probabilities, labels, Math.min(topK, 3)) : [],
      };
    }),
    provider: outcome.provider,
  };
}

/** A bin of fewer says nothing. */
const leastClips = 10;

/**
 * The bin of test songs that an answer falls into. The test was of one window a song, so it speaks only for answers
 * that were read from one.
 */
function reliabilityOf(
  windows: readonly (readonly number[] | null)[],
  bins: ModelDescription['reliability'] = [],
): Result['reliability'] {
  const [only, ...others] = windows.filter((window) => window !== null);
  if (only === undefined || others.length > 0) return undefined;
  // Of the window, not of the track: where windows vote, one vote is always all of them.
  const confidence = Math.max(...only);
  // The last bin holds its upper edge too: nothing is above certainty.
  const bin = bins.find(({ from, to }) => confidence >= from && (confidence < to || to >= 1));
  if (bin === undefined || bin.clips < leastClips) return undefined;
  const { right, clips, from, to } = bin;
  return { right, clips, from, to, percent: Math.round((100 * right) / clips) };
}

const round = (value: number) => Math.round(value * 1e6) / 1e6;
