import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  accuracy,
  best,
  calibrationError,
  commonestConfusions,
  confusionMatrix,
  coverageAt,
  type Judged,
  pickThreshold,
  recallByLabel,
  reliability,
  wilson,
} from './metrics.ts';

const labels = ['Blues', 'Jazz', 'Metal', 'Rock'];
/** Right, right, second, third, last: by label 0, 0, 1, 1, 3. */
const judged: Judged[] = [
  { truth: 0, probabilities: [0.7, 0.1, 0.1, 0.1] },
  { truth: 0, probabilities: [0.4, 0.3, 0.2, 0.1] },
  { truth: 1, probabilities: [0.5, 0.4, 0.1, 0] },
  { truth: 1, probabilities: [0.1, 0.2, 0.4, 0.3] },
  { truth: 3, probabilities: [0.4, 0.3, 0.2, 0.1] },
];
const near = (actual: number, expected: number, within = 1e-9) =>
  assert.ok(Math.abs(actual - expected) <= within, `${actual} instead of ${expected}`);

test('top-1, top-3 and the mean of the recalls of the labels that occur', () => {
  const { clips, top1, top3, meanRecall } = accuracy(judged);
  assert.equal(clips, 5);
  near(top1, 2 / 5);
  near(top3, 4 / 5);
  // Blues 2/2, Jazz 0/2, Rock 0/1; Metal does not occur.
  near(meanRecall, 1 / 3);
});

test('equally likely labels rank in label order', () => {
  assert.deepEqual(best({ truth: 1, probabilities: [0.5, 0.5] }), { confidence: 0.5, right: false });
  assert.deepEqual(best({ truth: 0, probabilities: [0.5, 0.5] }), { confidence: 0.5, right: true });
});

test('recall by label leaves out labels without files', () => {
  const rows = recallByLabel(judged, labels);
  assert.deepEqual(
    rows.map(({ label, clips, right }) => [label, clips, right]),
    [
      ['Blues', 2, 2],
      ['Jazz', 2, 0],
      ['Rock', 1, 0],
    ],
  );
});

test("Wilson's interval, as in the textbook's tables", () => {
  // 8 of 10: 0.4902 to 0.9433; 0 of 10: 0 to 0.2775 (Agresti and Coull 1998 give the formula).
  const eight = wilson(8, 10);
  near(eight.low, 0.4902, 1e-4);
  near(eight.high, 0.9433, 1e-4);
  const none = wilson(0, 10);
  assert.equal(none.low, 0);
  near(none.high, 0.2775, 1e-4);
  near(wilson(10, 10).high, 1);
});

test('confusions are counted from the true label to the answer, the commonest first', () => {
  const matrix = confusionMatrix(judged, labels);
  assert.deepEqual(matrix, [
    [2, 0, 0, 0],
    [1, 0, 1, 0],
    [0, 0, 0, 0],
    [1, 0, 0, 0],
  ]);
  assert.deepEqual(commonestConfusions(matrix, labels, 2), [
    { truth: 'Rock', answer: 'Blues', clips: 1, share: 1 },
    { truth: 'Jazz', answer: 'Blues', clips: 1, share: 0.5 },
  ]);
});

test('calibration error: bins weighted by their answers, each by the distance of its mean confidence', () => {
  const answers = [
    { confidence: 0.9, right: true },
    { confidence: 0.94, right: false },
    { confidence: 0.5, right: true },
    { confidence: 1, right: true },
  ];
  // Ten bins. [0.9, 1]: 3 answers, mean 0.94667, 2/3 right; [0.5, 0.6): 1 answer, 0.5, all right.
  near(calibrationError(answers, 10), (3 / 4) * Math.abs(2 / 3 - 2.84 / 3) + (1 / 4) * 0.5);
  const bins = reliability(answers, 10);
  assert.deepEqual(
    bins.filter(({ clips }) => clips > 0).map(({ from, clips, right }) => [from, clips, right]),
    [
      [0.5, 1, 1],
      [0.9, 3, 2],
    ],
  );
  assert.equal(bins[0]!.meanConfidence, null);
});

test('a model that is right as often as it says has no calibration error', () => {
  const answers = Array.from({ length: 10 }, (_, index) => ({ confidence: 0.7, right: index < 7 }));
  near(calibrationError(answers), 0);
});

test('coverage and precision at a threshold, the threshold itself included', () => {
  const answers = [
    { confidence: 0.3, right: false },
    { confidence: 0.5, right: true },
    { confidence: 0.8, right: false },
  ];
  assert.deepEqual(coverageAt(answers, 0.5), { threshold: 0.5, clips: 2, coverage: 2 / 3, precision: 1 / 2 });
  assert.deepEqual(coverageAt(answers, 0.9), { threshold: 0.9, clips: 0, coverage: 0, precision: null });
});

test('the threshold is the least step at or above which two answers in three are right', () => {
  const answers = [
    { confidence: 0.3, right: false },
    { confidence: 0.42, right: false },
    { confidence: 0.45, right: false },
    { confidence: 0.6, right: true },
    { confidence: 0.7, right: true },
  ];
  // From 0.43 to 0.45 on: 2 of 3 are right.
  assert.equal(pickThreshold(answers), 0.45);
  assert.equal(pickThreshold([{ confidence: 0.99, right: false }]), 0.9);
});
