/**
 * How good answers are: pure functions from judged answers to figures. Shares lie between 0 and 1; what has
 * nothing to be measured on is `null`. The same definitions as in training/metrics.py.
 */

/** One labelled file with the model's answer. */
export interface Judged {
  /** Index of the true label. */
  readonly truth: number;
  /** In label order. */
  readonly probabilities: readonly number[];
}

/** A best answer, reduced to what calibration needs. */
export interface Confident {
  readonly confidence: number;
  readonly right: boolean;
}

export interface Accuracy {
  clips: number;
  top1: number;
  top3: number;
  /** Mean over the labels present of the share of their files that were answered rightly. */
  meanRecall: number;
}

export interface LabelRecall {
  label: string;
  clips: number;
  right: number;
  recall: number;
  /** 95 % confidence interval (Wilson). */
  low: number;
  high: number;
}

export interface Confusion {
  truth: string;
  answer: string;
  clips: number;
  /** Of the files of the true label. */
  share: number;
}

export interface Bin {
  /** Confidences in [from, to); 1 is in the last one. */
  from: number;
  to: number;
  clips: number;
  right: number;
  /** Mean of the confidences in it; null when empty. */
  meanConfidence: number | null;
}

export interface Coverage {
  threshold: number;
  clips: number;
  /** Share of the files whose best confidence reaches the threshold. */
  coverage: number;
  /** Share of those that are right; null when there are none. */
  precision: number | null;
}

/** Label indices, the likeliest first; equal ones keep label order. */
function ranked(probabilities: readonly number[]): number[] {
  return probabilities
    .map((_, index) => index)
    .sort((a, b) => probabilities[b]! - probabilities[a]! || a - b);
}

export function best({ truth, probabilities }: Judged): Confident {
  const first = ranked(probabilities)[0]!;
  return { confidence: probabilities[first]!, right: first === truth };
}

/** @param judged at least one. */
export function accuracy(judged: readonly Judged[]): Accuracy {
  const ranks = judged.map(({ truth, probabilities }) => ranked(probabilities).indexOf(truth));
  const share = (k: number) => ranks.filter((rank) => rank < k).length / ranks.length;
  const recalls = [...new Set(judged.map(({ truth }) => truth))].map((label) => {
    const own = ranks.filter((_, index) => judged[index]!.truth === label);
    return own.filter((rank) => rank === 0).length / own.length;
  });
  return {
    clips: judged.length,
    top1: share(1),
    top3: share(3),
    meanRecall: recalls.reduce((a, b) => a + b, 0) / recalls.length,
  };
}

/** The labels that occur, in label order. */
export function recallByLabel(judged: readonly Judged[], labels: readonly string[]): LabelRecall[] {
  return labels.flatMap((label, index) => {
    const own = judged.filter(({ truth }) => truth === index);
    if (own.length === 0) return [];
    const right = own.filter((one) => best(one).right).length;
    return [{ label, clips: own.length, right, recall: right / own.length, ...wilson(right, own.length) }];
  });
}

/**
 * 95 % confidence interval of a share. Wilson 1927: unlike the textbook's, it stays within 0..1 and holds for
 * few cases. https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
 *
 * @param of at least 1.
 */
export function wilson(right: number, of: number): { low: number; high: number } {
  const z = 1.959964;
  const share = right / of;
  const centre = (share + z ** 2 / (2 * of)) / (1 + z ** 2 / of);
  const half = (z / (1 + z ** 2 / of)) * Math.sqrt((share * (1 - share)) / of + z ** 2 / (4 * of ** 2));
  return { low: Math.max(0, centre - half), high: Math.min(1, centre + half) };
}

/** Counts [true label][answered label]. */
export function confusionMatrix(judged: readonly Judged[], labels: readonly string[]): number[][] {
  const matrix = labels.map(() => labels.map(() => 0));
  for (const { truth, probabilities } of judged) matrix[truth]![ranked(probabilities)[0]!]! += 1;
  return matrix;
}

/** The commonest wrong answers; among equally common ones those that hit the larger share of a label. */
export function commonestConfusions(
  matrix: readonly (readonly number[])[],
  labels: readonly string[],
  most = 10,
): Confusion[] {
  return matrix
    .flatMap((row, truth) => {
      const all = row.reduce((a, b) => a + b, 0);
      return row.map((clips, answer) => ({
        truth: labels[truth]!,
        answer: truth === answer ? '' : labels[answer]!,
        clips,
        share: all === 0 ? 0 : clips / all,
      }));
    })
    .filter(({ answer, clips }) => answer !== '' && clips > 0)
    .sort((a, b) => b.clips - a.clips || b.share - a.share)
    .slice(0, most);
}

/** @param count equal-width bins over 0..1. */
export function reliability(answers: readonly Confident[], count: number): Bin[] {
  return Array.from({ length: count }, (_, index) => {
    const members = answers.filter(
      ({ confidence }) => Math.min(Math.floor(confidence * count), count - 1) === index,
    );
    return {
      from: index / count,
      to: (index + 1) / count,
      clips: members.length,
      right: members.filter(({ right }) => right).length,
      meanConfidence: members.length === 0 ? null : meanOf(members.map(({ confidence }) => confidence)),
    };
  });
}

/**
 * Expected calibration error: how far the confidence of the best answer lies from the share that is right, bins
 * weighted by their files. Naeini et al. 2015; Guo et al. 2017, https://arxiv.org/abs/1706.04599
 */
export function calibrationError(answers: readonly Confident[], bins = 15): number {
  return reliability(answers, bins).reduce(
    (sum, { clips, right, meanConfidence }) =>
      sum +
      (meanConfidence === null ? 0 : (clips / answers.length) * Math.abs(right / clips - meanConfidence)),
    0,
  );
}

export function coverageAt(answers: readonly Confident[], threshold: number): Coverage {
  const above = answers.filter(({ confidence }) => confidence >= threshold);
  return {
    threshold,
    clips: above.length,
    coverage: above.length / answers.length,
    precision: above.length === 0 ? null : above.filter(({ right }) => right).length / above.length,
  };
}

/** The least multiple of 0.05 from 0.1 on above which at least two answers in three are right; else 0.9. */
export function pickThreshold(answers: readonly Confident[]): number {
  for (let step = 2; step <= 18; step += 1) {
    const threshold = step / 20;
    const { precision } = coverageAt(answers, threshold);
    if (precision !== null && precision >= 2 / 3) return threshold;
  }
  return 0.9;
}

function meanOf(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
