/** When an answer should not be taken for one: one rule for a window, a track, a job and a row of a batch. */
import type { Outcome } from './job.ts';

export type Doubt = 'silent' | 'not_music' | 'confidence';

/**
 * Why a window, or a track, should not be taken for its likeliest genre. What is unlike all music that the model
 * knows says so first: its confidence is that of an answer to a question that does not arise.
 *
 * @param probabilities null when all is silent.
 * @param outlier undefined for a model that gives none.
 */
export function reasonToDoubt(
  probabilities: readonly number[] | null,
  outlier: number | undefined,
  limits: { threshold: number; outlierThreshold: number | undefined },
): Doubt | undefined {
  if (probabilities === null) return 'silent';
  if (outlier !== undefined && limits.outlierThreshold !== undefined && outlier > limits.outlierThreshold)
    return 'not_music';
  return Math.max(...probabilities) < limits.threshold ? 'confidence' : undefined;
}

/** Of the whole: the mean over the windows that were heard. */
export function outlierOf({ outlier, outliers }: Outcome): number | undefined {
  return outlier ?? meanOf(outliers);
}

/** Over the windows that were heard. */
export function meanOf(scores: readonly (number | null)[] | undefined): number | undefined {
  const heard = (scores ?? []).filter((score) => score !== null);
  return heard.length === 0 ? undefined : heard.reduce((a, b) => a + b) / heard.length;
}
