/** From logits of windows to the probabilities of a track. */
import type { Manifest } from '@acousticsense/shared/bundle';
import type { Outcome } from '@acousticsense/shared/job';

type Calibration = 'none' | Pick<Exclude<Manifest['calibration'], 'none'>, 'temperature'>;

/**
 * Calibrated probabilities of one window: softmax(logits / temperature), with the maximum subtracted first so
 * that no exponential overflows. Temperature scaling: Guo et al. 2017, https://arxiv.org/abs/1706.04599
 *
 * @throws {RangeError} on a logit that is not finite: no probability follows from it.
 */
export function calibratedSoftmax(logits: Float32Array, calibration: Calibration): number[] {
  if (!logits.every(Number.isFinite))
    throw new RangeError('the model gave a logit that is not a finite number');
  const temperature = calibration === 'none' ? 1 : calibration.temperature;
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/**
 * @param logits per window [labels]; `null` for a silent one, which has no genre and stays out of the aggregate.
 * @returns per-window and track probabilities in label order, rounded to 6 decimals (a record holds thousands of
 *   them). `mean` averages the windows' probabilities, `vote` counts the windows in which a label comes first.
 */
export function aggregate(
  logits: readonly (Float32Array | null)[],
  { calibration, aggregation }: Pick<Manifest, 'aggregation'> & { readonly calibration: Calibration },
): Pick<Outcome, 'probabilities'> & { windows: (number[] | null)[] } {
  const windows = logits.map((window) => window && calibratedSoftmax(window, calibration));
  const heard = windows.filter((window) => window !== null);
  const ballots = aggregation === 'mean' ? heard : heard.map(winnerTakesAll);
  return {
    probabilities: ballots.length === 0 ? null : mean(ballots).map(round),
    windows: windows.map((window) => window?.map(round) ?? null),
  };
}

function winnerTakesAll(probabilities: number[]): number[] {
  const winner = probabilities.indexOf(Math.max(...probabilities));
  return probabilities.map((_, label) => (label === winner ? 1 : 0));
}

function mean(rows: number[][]): number[] {
  return rows[0]!.map((_, column) => rows.reduce((sum, row) => sum + row[column]!, 0) / rows.length);
}

const round = (probability: number) => Math.round(probability * 1e6) / 1e6;
