/** The pull feed on the whole product: what ends is told with a link that opens without a key, and only that. */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { createUrlSigner } from '../packages/shared/src/signed-url.ts';
import { eventPageSchema, type FedPage } from '../services/api/src/event-feed.ts';
import { jobSchema } from '../services/api/src/schemas.ts';
import { sine, wav } from './audio.ts';
import { formOf, type Problem, request } from './client.ts';
import { type System, startSystem } from './system.ts';

const operatorKey = 'the-operators-own-key';
const secretsKey = Buffer.alloc(32, 'links').toString('base64');
const song = wav([sine({ seconds: 2, hz: 440, sampleRate: 8_000 })], { sampleRate: 8_000 });

describe('the pull feed', () => {
  let system: System;
  before(async () => {
    system = await startSystem({ env: { API_KEY: operatorKey, SECRETS_KEY: secretsKey } });
  });
  after(() => system?.stop());

  const headers = { authorization: `Bearer ${operatorKey}` };
  const send = (audio: Uint8Array) =>
    request(`${system.url}/v1/jobs`, {
      method: 'POST',
      headers,
      body: formOf(audio, { fields: { ref: 'track-1' } }),
    });
  async function next(cursor: string): Promise<FedPage> {
    const at = `${system.url}/v1/events?wait=30&after=${cursor}`;
    const { status, body } = await request<unknown>(at, { headers });
    assert.equal(status, 200, JSON.stringify(body));
    return eventPageSchema.parse(body);
  }

  test('a job that ends is told to who waits, and its result is opened without a key', async () => {
    const { body: job } = await send(song);
    const page = await next('0-0');
    assert.deepEqual(
      page.events.map(({ type, data }) => [type, 'jobId' in data && data.jobId]),
      [['job.completed', job.id]],
    );
    const { resultUrl } = page.events[0]!.data;
    assert.ok(resultUrl.startsWith(`${system.url}/v1/jobs/${job.id}?`), resultUrl);
    const opened = await request(resultUrl);
    assert.equal(opened.status, 200);
    assert.equal(jobSchema.parse(opened.body).state, 'completed');
    assert.equal((await fetch(resultUrl, { method: 'HEAD' })).status, 200);

    for (const [url, method] of [
      [resultUrl, 'DELETE'],
      [resultUrl.replace('?', '/vectors?'), 'GET'],
      [`${resultUrl}&topK=3`, 'GET'],
      [resultUrl.replace('tenant=default', 'tenant=other'), 'GET'],
      [resultUrl.split('?')[0]!, 'GET'],
    ] as const) {
      const refused = await request<Problem>(url, { method });
      assert.deepEqual([refused.status, refused.body.code], [401, 'unauthorized'], `${method} ${url}`);
    }
    const failed = await send(new TextEncoder().encode('no audio at all'));
    const after = await next(page.next);
    assert.deepEqual(
      after.events.map(({ type, data }) => [type, 'jobId' in data && data.jobId]),
      [['job.failed', failed.body.id]],
    );
    assert.equal((await request(after.events[0]!.data.resultUrl)).status, 200);
  });

  test('routes that take few parameters take a signed link as if it were not signed', async () => {
    const signer = createUrlSigner(secretsKey);
    const batch = '/v1/batches/01990000-0000-7000-8000-000000000000';
    for (const at of [
      batch,
      `${batch}/rows/3`,
      `${batch}/results.jsonl?from=0&to=10`,
      `${batch}/results.jsonl`,
    ]) {
      const link = signer.sign('default', at, Date.now() + 60_000);
      const { status, body } = await request<Problem>(system.url + link);
      assert.deepEqual([status, body.code], [404, 'batch_not_found'], at);
    }
  });
});
