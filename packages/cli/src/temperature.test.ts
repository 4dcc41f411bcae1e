import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  answerOf,
  type Clip,
  calibrated,
  crossValidated,
  fitTemperature,
  negativeLogLikelihood,
} from './temperature.ts';

/** Numbers between 0 and 1 that are the same every time. */
function randomness(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Clips of two labels whose true odds are exp(margin): logits are that margin, `sharper` times too large. */
function clipsWith(sharper: number, count = 4_000): Clip[] {
  const random = randomness(7);
  return Array.from({ length: count }, (_, index) => {
    const margin = (random() - 0.5) * 6;
    const truth = random() < 1 / (1 + Math.exp(-margin)) ? 0 : 1;
    return { name: `clip-${index}`, truth, logits: [[sharper * margin, 0]] };
  });
}

test('a model that is three times too sure gets the temperature 3, and one that is right gets 1', () => {
  const sure = fitTemperature(clipsWith(3), 'mean');
  assert.ok(Math.abs(sure - 3) < 0.25, String(sure));
  const right = fitTemperature(clipsWith(1), 'mean');
  assert.ok(Math.abs(right - 1) < 0.1, String(right));
});

test('the fitted temperature is a minimum of the likelihood', () => {
  const clips = clipsWith(2, 300);
  const temperature = fitTemperature(clips, 'mean');
  const at = negativeLogLikelihood(clips, temperature, 'mean');
  for (const other of [temperature * 1.02, temperature / 1.02])
    assert.ok(at < negativeLogLikelihood(clips, other, 'mean'));
});

test('three answers in four right, always by the same margin: the temperature in closed form', () => {
  // Confidence must become 3/4: sigmoid(4 / T) = 3/4, so T = 4 / ln 3.
  const clips = Array.from({ length: 100 }, (_, index) => ({
    name: String(index),
    truth: index % 4 === 0 ? 1 : 0,
    logits: [[4, 0]],
  }));
  assert.ok(Math.abs(fitTemperature(clips, 'mean') - 4 / Math.log(3)) < 1e-3);
});

test('the error after calibration is measured on clips that were held out', () => {
  const { eceBefore, ece } = crossValidated(clipsWith(3), 'mean');
  assert.ok(eceBefore > 0.08, String(eceBefore));
  assert.ok(ece < 0.03, String(ece));
  // Five clips, each right for another reason: what fits four says nothing of the fifth.
  const clips = [0, 1, 0, 1, 0].map((truth, index) => ({
    name: String(index),
    truth,
    logits: [[index - 2, 0]],
  }));
  const unseen = crossValidated(clips, 'mean');
  assert.notEqual(unseen.ece, 0);
});

test('of votes the windows are calibrated, and the share of votes stays as it is', () => {
  const clip = {
    name: 'a',
    truth: 1,
    logits: [
      [2, 0],
      [0, 1],
      [0, 3],
      [0, 1],
    ],
  };
  assert.deepEqual(answerOf(clip, 1, 'vote').probabilities, [0.25, 0.75]);
  assert.deepEqual(answerOf(clip, 5, 'vote').probabilities, [0.25, 0.75]);
  assert.equal(calibrated([clip], 1, 'vote').length, 4);
  assert.equal(calibrated([clip], 1, 'mean').length, 1);
  assert.notDeepEqual(calibrated([clip], 1, 'vote'), calibrated([clip], 5, 'vote'));
});

test('logits far apart give probabilities, not NaN', () => {
  const { probabilities } = answerOf({ name: 'a', truth: 0, logits: [[1e4, -1e4]] }, 0.05, 'mean');
  assert.deepEqual(probabilities, [1, 0]);
  assert.ok(
    Number.isFinite(negativeLogLikelihood([{ name: 'a', truth: 1, logits: [[1e4, -1e4]] }], 1, 'mean')),
  );
});
