/**
 * Temperature scaling: the one number by which logits are divided so that confidences are as large as the share of
 * right answers. It changes no ranking within a window. Guo et al. 2017, https://arxiv.org/abs/1706.04599
 */
import { createHash } from 'node:crypto';
import { best, type Confident, calibrationError, type Judged } from './metrics.ts';

export type Aggregation = 'mean' | 'vote';

/** A labelled file with the logits of its windows; at least one window. */
export interface Clip {
  readonly name: string;
  readonly truth: number;
  readonly logits: readonly (readonly number[])[];
}

export interface Fit {
  readonly temperature: number;
  /** Expected calibration error with temperature 1, and with the one fitted; see `crossValidated`. */
  readonly eceBefore: number;
  readonly ece: number;
}

const foldCount = 5;
/** Bounds of ln(temperature): from 0.05 to 20. */
const bounds = [-3, 3] as const;

function softmax(logits: readonly number[], temperature: number): number[] {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp((logit - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** What the inference service answers for the file: the mean of its windows' probabilities, or their votes. */
export function answerOf({ logits, truth }: Clip, temperature: number, aggregation: Aggregation): Judged {
  const windows = logits.map((window) => softmax(window, temperature));
  return { truth, probabilities: meanRow(aggregation === 'mean' ? windows : windows.map(winnerTakesAll)) };
}

/**
 * What the temperature acts on. Of `mean` it is the file's answer; votes know no temperature, so there it is each
 * window's.
 */
export function calibrated(
  clips: readonly Clip[],
  temperature: number,
  aggregation: Aggregation,
): Confident[] {
  if (aggregation === 'mean') return clips.map((clip) => best(answerOf(clip, temperature, 'mean')));
  return clips.flatMap(({ truth, logits }) =>
    logits.map((window) => best({ truth, probabilities: softmax(window, temperature) })),
  );
}

/** Mean negative log-likelihood of the true label, over files (`mean`) or over windows (`vote`). */
export function negativeLogLikelihood(
  clips: readonly Clip[],
  temperature: number,
  aggregation: Aggregation,
): number {
  const likelihoods = clips.flatMap(({ truth, logits }) => {
    const windows = logits.map((window) => softmax(window, temperature)[truth]!);
    return aggregation === 'vote' ? windows : [windows.reduce((a, b) => a + b, 0) / windows.length];
  });
  return likelihoods.reduce((sum, p) => sum - Math.log(p + 1e-12), 0) / likelihoods.length;
}

/**
 * The temperature of least negative log-likelihood, by golden section on its logarithm within 0.05..20. A coarse
 * look comes first: with several windows averaged the function may have more than one valley.
 */
export function fitTemperature(clips: readonly Clip[], aggregation: Aggregation): number {
  const loss = (log: number) => negativeLogLikelihood(clips, Math.exp(log), aggregation);
  const step = 0.25;
  const grid = Array.from(
    { length: (bounds[1] - bounds[0]) / step + 1 },
    (_, index) => bounds[0] + index * step,
  );
  const losses = grid.map(loss);
  const lowest = grid[losses.indexOf(Math.min(...losses))]!;
  let [low, high] = [Math.max(bounds[0], lowest - step), Math.min(bounds[1], lowest + step)];
  const ratio = (Math.sqrt(5) - 1) / 2;
  while (high - low > 1e-5) {
    const [left, right] = [high - ratio * (high - low), low + ratio * (high - low)];
    if (loss(left) <= loss(right)) high = right;
    else low = left;
  }
  return Math.exp((low + high) / 2);
}

/**
 * The temperature fitted on all clips, and what it does to clips it was not fitted on: each fifth of them is
 * answered with the temperature of the other four fifths, and the errors are those of all fifths together.
 */
export function crossValidated(clips: readonly Clip[], aggregation: Aggregation): Fit {
  const fold = foldsOf(clips);
  const unseen = Array.from({ length: foldCount }, (_, held) => {
    const temperature = fitTemperature(
      clips.filter((_, index) => fold[index] !== held),
      aggregation,
    );
    return calibrated(
      clips.filter((_, index) => fold[index] === held),
      temperature,
      aggregation,
    );
  }).flat();
  return {
    temperature: fitTemperature(clips, aggregation),
    eceBefore: calibrationError(calibrated(clips, 1, aggregation)),
    ece: calibrationError(unseen),
  };
}

/** Every label dealt out over the folds in turn, in an order that depends on the names alone. */
function foldsOf(clips: readonly Clip[]): number[] {
  const digests = clips.map(({ name }) => createHash('sha256').update(name).digest('hex'));
  const order = clips
    .map((_, index) => index)
    .sort((a, b) => clips[a]!.truth - clips[b]!.truth || (digests[a]! < digests[b]! ? -1 : 1));
  const folds: number[] = [];
  for (const [place, index] of order.entries()) folds[index] = place % foldCount;
  return folds;
}

function winnerTakesAll(probabilities: number[]): number[] {
  const winner = probabilities.indexOf(Math.max(...probabilities));
  return probabilities.map((_, label) => (label === winner ? 1 : 0));
}

function meanRow(rows: number[][]): number[] {
  return rows[0]!.map((_, column) => rows.reduce((sum, row) => sum + row[column]!, 0) / rows.length);
}
