/** An example of every event, for the OpenAPI document and for tests of receivers: what a test message is made of. */
import type { Event, EventType } from './events.ts';

const model = {
  name: 'acousticsense-default',
  version: '0.1.0',
  digest: '3f9a1c5be0d24786af0412c7d9e85b6313f9a1c5be0d24786af0412c7d9e85b6',
  profile: '1c5be0d24786af04',
};
const batchId = '019abf2c-7d10-7c41-9f32-6b1f0f8a2e55';
const batch = {
  batchId,
  name: 'Catalogue of November',
  class: 'backfill' as const,
  revision: 12,
  counts: { rows: 250_000, bad: 3, completed: 249_871, failed: 129, cancelled: 0, reused: 18_204 },
  model,
};
const signed = 'tenant=acme&expires=1796256000&signature=Zm9yIHNob3cgb25seQ';
const base = 'https://acousticsense.example';
const job = {
  jobId: '019abf2d-11a3-7b02-8e4d-5a7c90b1d3f6',
  batchId: null,
  row: null,
  ref: 'DE-A12-26-00042',
  revision: 7,
  genres: [],
  uncertain: null,
  uncertainBecause: null,
  warnings: [],
  error: null,
  model,
  resultUrl: `${base}/v1/jobs/019abf2d-11a3-7b02-8e4d-5a7c90b1d3f6?${signed}`,
};
const results = `${base}/v1/batches/${batchId}/results.jsonl`;

export const eventExamples: { readonly [T in EventType]: Extract<Event, { type: T }> } = {
  'job.completed': {
    type: 'job.completed',
    timestamp: '2026-11-24T16:40:05.123Z',
    data: {
      ...job,
      state: 'completed',
      genres: [
        { label: 'jazz', confidence: 0.8123 },
        { label: 'blues', confidence: 0.0971 },
        { label: 'classical', confidence: 0.0412 },
      ],
      uncertain: false,
      warnings: [
        { code: 'low_passed', message: 'The sound ends at 11 kHz: send a better copy if there is one.' },
      ],
    },
  },
  'job.failed': {
    type: 'job.failed',
    timestamp: '2026-11-24T16:40:06.481Z',
    data: {
      ...job,
      state: 'failed',
      error: { code: 'not_audio', message: 'The file is not audio that can be read.', retryable: false },
    },
  },
  'job.cancelled': {
    type: 'job.cancelled',
    timestamp: '2026-11-24T16:40:07.002Z',
    data: { ...job, state: 'cancelled' },
  },
  'results.part': {
    type: 'results.part',
    timestamp: '2026-11-24T16:52:31.770Z',
    data: {
      ...batch,
      counts: { ...batch.counts, completed: 4_991, failed: 9, reused: 311 },
      part: { number: 4, from: 4_000, to: 5_000, completed: 998, failed: 2, cancelled: 0 },
      resultUrl: `${results}?from=4000&to=5000&${signed}`,
    },
  },
  'batch.progress': {
    type: 'batch.progress',
    timestamp: '2026-11-24T16:53:00.000Z',
    data: {
      ...batch,
      counts: { ...batch.counts, completed: 5_102, failed: 10, reused: 320 },
      error: null,
      resultUrl: `${base}/v1/batches/${batchId}?${signed}`,
    },
  },
  'batch.completed': {
    type: 'batch.completed',
    timestamp: '2026-11-25T03:11:42.318Z',
    data: { ...batch, error: null, resultUrl: `${results}?${signed}` },
  },
  'batch.failed': {
    type: 'batch.failed',
    timestamp: '2026-11-25T03:11:42.318Z',
    data: {
      ...batch,
      error: { code: 'source_forbidden', message: 'The bucket refused to be listed.' },
      resultUrl: `${results}?${signed}`,
    },
  },
  'batch.cancelled': {
    type: 'batch.cancelled',
    timestamp: '2026-11-24T17:05:10.950Z',
    data: {
      ...batch,
      counts: { ...batch.counts, completed: 9_120, failed: 21, cancelled: 240_859, reused: 502 },
      error: null,
      resultUrl: `${results}?${signed}`,
    },
  },
  'endpoint.disabled': {
    type: 'endpoint.disabled',
    timestamp: '2026-11-27T20:15:40.077Z',
    data: {
      endpointId: 'ep_4nT0cQx9ZbL2mYw7RkVdHs',
      url: 'https://receiver.example/hooks',
      reason: 'failing',
      failingSince: '2026-11-24T16:40:05.123Z',
      resultUrl: `${base}/v1/webhooks/endpoints/ep_4nT0cQx9ZbL2mYw7RkVdHs`,
    },
  },
};
