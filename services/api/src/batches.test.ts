/** What is told of a batch, and where: on real Redis and storage, with a model that is served by announcement only. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { createBatchRecords } from '@acousticsense/shared/batch-records';
import { createEndpoints, endpointDefinitionSchema } from '@acousticsense/shared/endpoints';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedis } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import { createSources } from '@acousticsense/shared/sources';
import { createTenants } from '@acousticsense/shared/tenants';
import express from 'express';
import { pino } from 'pino';
import { startRedis } from '../../../test/redis.ts';
import { answerProblem } from './app.ts';
import { createBatchRoutes } from './batch-routes.ts';
import { createBatches } from './batches.ts';
import { createCallbacks } from './callbacks.ts';
import { createChanges } from './changes.ts';
import { createIdempotency } from './idempotency.ts';
import { createJobs } from './jobs.ts';
import { createLimits } from './limits.ts';
import { createMappings } from './mappings.ts';
import { batchSchema } from './schemas.ts';
import { createStoredBatches } from './stored-batches.ts';
import { createUploadedRefs } from './uploaded-refs.ts';
import { createUploads } from './uploads.ts';

const server = await startRedis();
const redis = connectRedis(server.url);
await once(redis, 'ready');
const subscriber = connectRedis(server.url);
const directory = await mkdtemp(path.join(tmpdir(), 'as-batches-'));
const storage = openStorage(pathToFileURL(directory).href);
const log = pino({ level: 'silent' });
const modelDigest = 'd'.repeat(64);
await redis.set(
  `as:model:${modelDigest}`,
  JSON.stringify({
    ...{ digest: modelDigest, name: 'm', version: '1', licence: '', provenance: '', labels: ['rock'] },
    ...{ profileHash: 'p', windowSeconds: 30, stepSeconds: 30, threshold: 0.5, calibrated: false },
    accuracy: { split: 's', clips: 1, top1: 1, top3: 1, meanRecall: 1 },
  }),
);
for (const kind of ['decoder', 'inference']) {
  const worker = { kind, queue: kind, workerId: kind, since: 1, modelDigest, profileHash: 'p' };
  await redis.hset('as:workers', kind, JSON.stringify({ ...worker, seen: Date.now() }));
}

const retention = { resultSeconds: 60 };
const records = createJobRecords(redis, retention);
const batchRecords = createBatchRecords(redis, retention);
const queues = createQueues(redis);
const secrets = createSecrets(randomBytes(32).toString('base64'));
const endpoints = createEndpoints({ redis, secrets });
const callbackFor = createCallbacks(endpoints);
const limits = createLimits({
  ...{ redis, records, tenants: createTenants(redis), maxOpenJobs: 10, eventsWaitingMost: 1_000 },
  ...{ requestsPerMinute: 0, rowsPerDay: 50, bytesPerDay: 0 },
});
const jobs = createJobs({
  ...{ redis, storage, records, queues, log, limits, callbackFor, maxUploadBytes: 1_000 },
  changes: createChanges(subscriber, records),
  uploads: createUploads({
    ...{ redis, storage, log, maxUploadBytes: 1_000, charge: async () => {} },
    ...{ uploadExpiryMs: 60_000, audioRetentionMs: 60_000, uploadUrlMs: 60_000 },
  }),
  uploadedRefs: createUploadedRefs({ redis, batches: batchRecords, retention }),
});
const mappings = createMappings(storage);
const batches = createBatches({
  ...{ storage, batches: batchRecords, jobs, limits, callbackFor, mappings, log },
  stored: createStoredBatches({ batches: batchRecords, storage }),
  sources: createSources({ redis, secrets, storageUrl: 'file:///objects' }),
  index: { writeTombstone: async () => {} },
  ...{ maxRows: 10, maxActive: 100 },
});
const app = express();
app.set('query parser', 'simple');
const closing = new AbortController().signal;
const idempotency = createIdempotency(redis, log);
app.use(
  createBatchRoutes({ batches, mappings, jobs, idempotency, storage, tenantOf: () => 'acme', closing, log }),
);
app.use(answerProblem({ log }));
const http = createServer(app).listen(0, '127.0.0.1');
await once(http, 'listening');
after(async () => {
  http.closeAllConnections();
  http.close();
  await queues.close();
  redis.disconnect();
  subscriber.disconnect();
  storage.close();
  await server[Symbol.asyncDispose]();
  await rm(directory, { recursive: true, force: true });
});

const receiver = 'https://receiver.example.com/hooks';
const { endpoint } = await endpoints.create('acme', endpointDefinitionSchema.parse({ url: receiver }));
await endpoints.verified('acme', endpoint.id, { at: 1, ok: true, url: receiver });
const stored = async ({ id }: { id: string }) => {
  const { notify, callback } = (await batchRecords.get({ tenant: 'acme', id }))!;
  return { notify, callback };
};

async function send(query: Record<string, string>, body: object | string) {
  const url = `http://127.0.0.1:${(http.address() as AddressInfo).port}/v1/batches`;
  const answer = await fetch(`${url}?${new URLSearchParams(query)}`, {
    method: 'POST',
    headers: {
      'content-type': typeof body === 'string' ? 'application/x-ndjson' : 'application/json',
    },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
  return { status: answer.status, body: (await answer.json()) as { [name: string]: string } };
}
async function accepted(query: Record<string, string>, body: object | string = manifest) {
  const answer = await send(query, body);
  assert.equal(answer.status, 202, JSON.stringify(answer.body));
  return batchSchema.parse(answer.body);
}
const manifest = '{"audio":"https://music.example.com/1.mp3"}\n';

test('of a batch the whole is told unless something else is asked for, and the batch shows what', async () => {
  const plain = await accepted({});
  assert.equal(plain.notify, 'batch');
  assert.deepEqual(await stored(plain), { notify: 'batch', callback: undefined });
  for (const notify of ['none', 'batch', 'rows'] as const) {
    const batch = await accepted({ notify });
    assert.equal(batch.notify, notify);
    assert.equal((await stored(batch)).notify, notify);
  }
});

test('a repetition is silent, unless it is asked to tell or has a callback', async () => {
  const { id: rerunOf } = await accepted({ notify: 'rows', callbackUrl: receiver });
  assert.deepEqual(await stored(await accepted({}, { rerunOf })), { notify: 'none', callback: undefined });
  assert.equal((await accepted({}, { rerunOf, notify: 'rows' })).notify, 'rows');
  const callbackUrl = `${receiver}/repeated`;
  assert.deepEqual(await stored(await accepted({}, { rerunOf, callbackUrl })), {
    notify: 'batch',
    callback: { endpointId: endpoint.id, url: callbackUrl },
  });
  assert.equal((await accepted({}, { rerunOf, callbackUrl, notify: 'none' })).notify, 'none');
});

test('a batch has its own callback under an enabled endpoint, and is not made with any other', async () => {
  const batch = await accepted({ callbackUrl: `${receiver}/catalogue?x=1` });
  assert.deepEqual((await stored(batch)).callback, {
    endpointId: endpoint.id,
    url: `${receiver}/catalogue?x=1`,
  });
  const before = await batchRecords.active('acme');
  for (const callbackUrl of [
    'https://elsewhere.example.com/',
    'https://user:pass@receiver.example.com/hooks',
    'ftp://receiver.example.com/hooks',
    `${receiver}#a`,
    `${receiver}/../admin`,
  ]) {
    for (const [query, body] of [
      [{ callbackUrl }, manifest],
      [{}, { rerunOf: batch.id, callbackUrl }],
    ] as const) {
      const answer = await send(query, body);
      assert.deepEqual(
        [answer.status, answer.body['code'], answer.body['field']],
        [400, 'callback_not_allowed', 'callbackUrl'],
        callbackUrl,
      );
    }
  }
  assert.deepEqual(await batchRecords.active('acme'), before);
  // Were they charged, fifty rows a day would be used up by now.
  for (let n = 0; n < 50; n += 1) {
    const refused = await send({}, { rerunOf: batch.id, callbackUrl: 'https://elsewhere.example.com/' });
    assert.equal(refused.status, 400);
  }
  await accepted({}, { rerunOf: batch.id });
  const answer = await send({ notify: 'everything' }, manifest);
  assert.deepEqual([answer.status, answer.body['field']], [400, 'notify']);
});
