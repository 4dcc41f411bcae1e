import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { test } from 'node:test';
import { eventSchema, jobData, type StoredEvent } from './events.ts';
import { createUrlSigner } from './signed-url.ts';
import { createTelling, resultUrlMs } from './told-event.ts';

const signer = createUrlSigner(randomBytes(32).toString('base64'));
const tell = createTelling({ signer, publicUrl: () => 'https://music.example.com/as' });
const timestamp = '2026-11-22T10:00:00.000Z';
const now = Date.parse(timestamp);

test('a told event is one of the published shapes, and its resultUrl is signed for the tenant', async () => {
  const id = randomUUID();
  const data = jobData(
    {
      id,
      presentation: { topK: 5, threshold: 0.5 },
      ...{ modelName: 'm', modelVersion: '1', modelDigest: 'd', profileHash: 'p' },
    },
    'cancelled',
  );
  const event: StoredEvent = { type: 'job.cancelled', timestamp, data };
  const told = eventSchema.parse(await tell('acme', { event }, now));
  const { origin, pathname, search } = new URL(told.data.resultUrl);
  assert.equal(`${origin}${pathname}`, `https://music.example.com/as/v1/jobs/${id}`);
  const path = `/v1/jobs/${id}${search}`;
  assert.equal(signer.verify('GET', path, now + resultUrlMs - 1_000), 'acme');
  assert.throws(() => signer.verify('GET', path, now + resultUrlMs), /expired/);
  const { resultUrl: _, ...rest } = told.data;
  assert.deepEqual(rest, data);
});

test('the address of a disabled endpoint is told without a signature', async () => {
  const event: StoredEvent = {
    type: 'endpoint.disabled',
    timestamp,
    data: { endpointId: 'ep_1', url: 'https://x.example.com/', reason: 'gone', failingSince: null },
  };
  const told = eventSchema.parse(await tell('acme', { event }, now));
  assert.equal(told.data.resultUrl, 'https://music.example.com/as/v1/webhooks/endpoints/ep_1');
});
