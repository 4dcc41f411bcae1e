import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { JobRecord, Outcome } from '@acousticsense/shared/job';
import type { ModelDescription } from '@acousticsense/shared/serving';
import { acceptedJob } from '../../../test/job.ts';
import { presentJob } from './presentation.ts';
import { jobSchema } from './schemas.ts';

const model: ModelDescription = {
  digest: 'd'.repeat(64),
  name: 'm',
  version: '1',
  licence: '',
  provenance: '',
  labels: ['Blues', 'Jazz', 'Rock'],
  profileHash: 'p',
  windowSeconds: 10,
  stepSeconds: 5,
  windows: 'middle',
  threshold: 0.5,
  outlierThreshold: 4,
  calibrated: true,
  reliability: [
    { from: 0, to: 0.5, clips: 200, right: 61 },
    { from: 0.5, to: 0.8, clips: 300, right: 200 },
    { from: 0.8, to: 0.9, clips: 9, right: 9 },
    { from: 0.9, to: 1, clips: 40, right: 39 },
  ],
  embeds: false,
  explains: false,
  accuracy: 'none',
};

const sure = [0.1, 0.7, 0.2];
const unsure = [0.3, 0.4, 0.3];

function completed(
  outcome: Pick<Outcome, 'probabilities' | 'windows'> & Partial<Outcome>,
  more: Partial<JobRecord> = {},
): JobRecord {
  const windows = outcome.windows!.map((probabilities, index) => ({
    start: index * 5,
    end: index * 5 + 10,
    validFrames: 128,
    dbAt0: -80,
    dbAt255: 0,
    peakDbfs: -3,
    silent: probabilities === null,
  }));
  const input = {
    container: 'wav',
    codec: 'pcm_s16le',
    sampleRate: 22_050,
    channels: 1,
    duration: 30,
    analysedStart: 0,
    analysedEnd: 30,
    bandwidth: 11_025,
  };
  return {
    ...acceptedJob({ tenant: 'acme' }),
    state: 'completed',
    version: 5,
    updatedAt: Date.now(),
    decoded: { contentId: 'c', tensorKey: 't', windows, input, warnings: [] },
    outcome: { provider: 'cpu', ...outcome },
    ...more,
  };
}

function resultOf(record: JobRecord, described: ModelDescription | undefined = model) {
  const job = jobSchema.parse(presentJob(record, described));
  assert.ok(job.result);
  return job.result;
}

const oneWindow = (probabilities: number[] | null, outlier?: number) =>
  completed({
    probabilities,
    windows: [probabilities],
    ...(outlier === undefined ? {} : { outliers: [outlier] }),
  });

describe('an answer is uncertain', () => {
  test('not when its confidence reaches the threshold and it is like music', () => {
    for (const record of [oneWindow(sure), oneWindow(sure, 4), oneWindow([0.5, 0.5, 0], 0)]) {
      const result = resultOf(record);
      assert.equal(result.uncertain, false);
      assert.ok(!('uncertainBecause' in result));
      assert.equal(result.windows[0]!.uncertain, false);
    }
  });

  test('because of its confidence, when that lies under the threshold of the job', () => {
    const result = resultOf(oneWindow(unsure, 1));
    assert.deepEqual([result.uncertain, result.uncertainBecause], [true, 'confidence']);
    assert.equal(result.windows[0]!.uncertain, true);
    const lax = { ...oneWindow(unsure, 1), presentation: { topK: 5, threshold: 0.3 } };
    assert.equal(resultOf(lax).uncertain, false);
  });

  test('because it is not music, however confident it is or is not', () => {
    for (const probabilities of [[0, 1, 0], unsure]) {
      const result = resultOf(oneWindow(probabilities, 4.1));
      assert.deepEqual([result.uncertain, result.uncertainBecause], [true, 'not_music']);
      assert.equal(result.windows[0]!.uncertain, true);
      assert.equal(result.top[0]!.label, 'Jazz', 'the genres are told all the same');
    }
  });

  test('because it is silent, when no window was heard', () => {
    const record = completed({ probabilities: null, windows: [null, null], outliers: [null, null] });
    const result = resultOf(record);
    assert.deepEqual([result.uncertain, result.uncertainBecause], [true, 'silent']);
    assert.deepEqual(result.top, []);
    assert.deepEqual(
      result.windows.map(({ uncertain }) => uncertain),
      [true, true],
    );
  });

  test('by the mean outlier score of the windows that were heard, and each window by its own', () => {
    const windows = [sure, null, sure, unsure];
    const result = resultOf(completed({ probabilities: sure, windows, outliers: [5, null, 2, 2] }));
    assert.equal(result.uncertain, false, 'a mean of 3; with the silent one as 0 it would be less still');
    assert.deepEqual(
      result.windows.map(({ uncertain }) => uncertain),
      [true, true, false, true],
    );
    const over = completed({ probabilities: sure, windows, outliers: [9, null, 2, 2] });
    assert.equal(resultOf(over).uncertainBecause, 'not_music', 'a mean of 4.33, of four it would be 3.25');
  });

  test('by its confidence alone, when the model has no outlier score', () => {
    const { outlierThreshold: _, ...without } = model;
    assert.equal(resultOf(oneWindow(sure, 100), without).uncertain, false);
    assert.equal(resultOf(oneWindow(sure), model).uncertain, false);
  });

  test('by its own numbers, even if the model is no longer known', () => {
    const result = resultOf(oneWindow(sure), { ...model, labels: [] });
    assert.equal(result.uncertain, false);
    assert.equal(presentJob(oneWindow(unsure), undefined).result?.uncertainBecause, 'confidence');
  });
});

describe('how often the model was right at this confidence', () => {
  test('is told from the bin that holds the best confidence, as songs of 100', () => {
    assert.deepEqual(resultOf(oneWindow(sure)).reliability, {
      right: 200,
      clips: 300,
      from: 0.5,
      to: 0.8,
      percent: 67,
    });
    assert.equal(resultOf(oneWindow(unsure)).reliability?.percent, 31, 'an unsure answer too');
  });

  test('counts a lower edge to its bin, and certainty to the last', () => {
    assert.equal(resultOf(oneWindow([0.5, 0.5, 0])).reliability?.from, 0.5);
    assert.equal(resultOf(oneWindow([0.9, 0.1, 0])).reliability?.from, 0.9);
    assert.equal(resultOf(oneWindow([1, 0, 0])).reliability?.from, 0.9);
  });

  test('is not told from fewer than ten songs', () => {
    assert.equal(resultOf(oneWindow([0.1, 0.8, 0.1])).reliability, undefined);
  });

  test('is not told of a mean over windows: the test was of one window a song', () => {
    assert.equal(resultOf(completed({ probabilities: sure, windows: [sure, sure] })).reliability, undefined);
    const oneHeard = completed({ probabilities: sure, windows: [null, sure, null] });
    assert.equal(resultOf(oneHeard).reliability?.percent, 67);
  });

  test('is of the window, where a vote makes the confidence of the track', () => {
    const voted = completed({ probabilities: [0, 1, 0], windows: [sure] });
    assert.equal(resultOf(voted).reliability?.percent, 67);
  });

  test('is not told by a model that is not calibrated, nor of what is not music or silent', () => {
    const { reliability: _, ...uncalibrated } = model;
    assert.equal(resultOf(oneWindow(sure), { ...uncalibrated, calibrated: false }).reliability, undefined);
    assert.equal(resultOf(oneWindow(sure, 5)).reliability, undefined);
    assert.equal(resultOf(oneWindow(null)).reliability, undefined);
  });
});

test('links lead to explanation and vectors only where they were asked for', () => {
  const links = (extras?: JobRecord['extras']) => {
    const record = { ...oneWindow(sure), ...(extras ? { extras } : {}) };
    return Object.keys(jobSchema.parse(presentJob(record, model)).links);
  };
  assert.deepEqual(links(), ['self', 'events', 'spectrogram']);
  assert.deepEqual(links({ explain: false, vectors: true }), ['self', 'events', 'spectrogram', 'vectors']);
  assert.deepEqual(links({ explain: true, vectors: false }), [
    'self',
    'events',
    'spectrogram',
    'explanation',
  ]);
});
