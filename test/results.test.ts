/** Results of batches through the whole product: real audio, real model, real processes. */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import {
  auditSchema,
  diffSummarySchema,
  latestResultSchema,
  type ResultRow,
  resultRowSchema,
  rowTimelineSchema,
} from '../services/api/src/result-schemas.ts';
import type { BatchResource } from '../services/api/src/schemas.ts';
import { sine, wav } from './audio.ts';
import { finished, type Problem, request, upload } from './client.ts';
import { type System, startSystem } from './system.ts';

const tone = (seconds: number, hz: number) =>
  wav([sine({ seconds, hz, sampleRate: 8_000 })], { sampleRate: 8_000 });

describe('results of a batch', () => {
  let system: System;
  let batch: BatchResource;
  before(async () => {
    system = await startSystem();
    const rows = [
      { ref: 'short', audio: await tus(tone(3, 300)), declaredGenre: ['Classical', 'Polka'] },
      { ref: 'long', audio: await tus(tone(150, 500)), windows: 'all' },
      { ref: 'text', audio: await tus(Buffer.from('this is no audio, only text')) },
      { audio: await tus(tone(2, 700)), declaredGenre: ['Polka'] },
    ];
    batch = await send(rows.map((row) => JSON.stringify(row)).join('\n'), '?vectors=true&topK=2&name=first');
  });
  after(() => system?.stop());

  async function tus(bytes: Uint8Array): Promise<string> {
    const response = await fetch(`${system.url}/v1/uploads/tus`, {
      method: 'POST',
      headers: {
        'tus-resumable': '1.0.0',
        'upload-length': String(bytes.length),
        'content-type': 'application/offset+octet-stream',
      },
      body: bytes as BodyInit,
    });
    assert.equal(response.status, 201);
    return `upload:${response.headers.get('location')!.split('/').at(-1)}`;
  }

  async function send(body: string, query = '', type = 'application/x-ndjson'): Promise<BatchResource> {
    const headers = { 'content-type': type };
    const accepted = await request<BatchResource>(`${system.url}/v1/batches${query}`, {
      method: 'POST',
      headers,
      body,
    });
    assert.equal(accepted.status, 202, JSON.stringify(accepted.body));
    for (const until = Date.now() + 120_000; Date.now() < until; await sleep(100)) {
      const now = await get<BatchResource>(accepted.body.links.self);
      if (now.state === 'completed') return now;
    }
    throw new Error('the batch did not end');
  }

  async function get<T>(at: string): Promise<T> {
    const { status, body } = await request<T>(system.url + at);
    assert.equal(status, 200, `${at}: ${JSON.stringify(body)}`);
    return body;
  }

  async function rowsOf({ links }: BatchResource): Promise<ResultRow[]> {
    const text = await (await fetch(system.url + links.results)).text();
    return text
      .trim()
      .split('\n')
      .map((line) => resultRowSchema.parse(JSON.parse(line)));
  }

  test('say of every row what was heard, or why nothing was', async () => {
    const [short, long, text, nameless] = await rowsOf(batch);
    assert.deepEqual(
      [short, long, text, nameless].map((row) => [row?.ref, row?.state, row?.error?.code]),
      [
        ['short', 'completed', undefined],
        ['long', 'completed', undefined],
        ['text', 'failed', 'not_audio'],
        [undefined, 'completed', undefined],
      ],
    );
    assert.match(short!.audio, /^upload:[0-9a-f-]{36}$/);
    assert.deepEqual([short!.top!.length, short!.input!.sampleRate, short!.provider], [2, 8_000, 'cpu']);
    assert.equal(nameless!.verdict, 'unknown_genre');
    assert.equal(long!.windows, undefined);
    const { windows } = rowTimelineSchema.parse(await get(long!.links.timeline!));
    assert.ok(windows.length > 4 && windows.every(({ end }) => end <= 150.5), JSON.stringify(windows));
    const vectors = await get<{ windows: unknown[] }>(long!.links.vectors!);
    assert.equal(vectors.windows.length, windows.length);
    const csv = await (await fetch(system.url + batch.links.csv)).text();
    assert.equal(csv.split('\r\n').length, 6);
    const audit = auditSchema.parse(await get(batch.links.audit));
    assert.deepEqual([audit.rows, audit.unanswered, audit.verdicts.unknown_genre], [4, 1, 1]);
  });

  test('are compared with those of a repetition, which has the later answer of every ref', async () => {
    const again = await send(JSON.stringify({ rerunOf: batch.id }), '', 'application/json');
    const summary = diffSummarySchema.parse(
      await get(`/v1/batches/${again.id}/diff?with=${batch.id}&summary=true`),
    );
    assert.deepEqual(
      [summary.alignedBy, summary.compared, summary.changed, summary.meanConfidenceDifference],
      ['row', 4, 0, 0],
    );
    const { batch: of, revision } = latestResultSchema.parse(await get('/v1/results?ref=short'));
    assert.deepEqual([of?.id, of?.name], [again.id, 'first']);
    assert.ok(revision! > batch.revision);
    const job = await upload(system.url, tone(2, 900), { fields: { ref: 'short' } });
    assert.equal(job.ref, 'short');
    await finished(system.url, job.id);
    const latest = latestResultSchema.parse(await get('/v1/results?ref=short'));
    assert.deepEqual([latest.jobId, latest.revision], [job.id, job.revision]);
    await fetch(`${system.url}/v1/jobs/${job.id}`, { method: 'DELETE' });
    assert.equal(latestResultSchema.parse(await get('/v1/results?ref=short')).batch?.id, again.id);
    await fetch(`${system.url}/v1/batches/${again.id}`, { method: 'DELETE' });
    assert.equal(latestResultSchema.parse(await get('/v1/results?ref=short')).batch?.id, batch.id);
  });

  test('outlive Redis, and their end is remembered', async () => {
    const before = await rowsOf(batch);
    const redis = connectRedisForWorker(system.redis.url);
    try {
      await redis.del(`as:{default}:batch:${batch.id}`);
    } finally {
      redis.disconnect();
    }
    assert.deepEqual(await rowsOf(batch), before);
    assert.equal(latestResultSchema.parse(await get('/v1/results?ref=long')).batch?.id, batch.id);
    const from = Date.now();
    assert.equal((await fetch(system.url + batch.links.self, { method: 'DELETE' })).status, 204);
    for (const at of [batch.links.results, '/v1/results?ref=long']) {
      const { status, body } = await request<Problem & { deletedAt: string }>(system.url + at);
      assert.deepEqual([status, /_gone$/.test(body.code)], [410, true], body.detail);
      assert.ok(Date.parse(body.deletedAt) >= from, body.deletedAt);
    }
    assert.equal(
      (await request<Problem>(`${system.url}/v1/results?ref=never`)).body.code,
      'result_not_found',
    );
  });
});
