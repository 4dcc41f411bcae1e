import assert from 'node:assert/strict';
import { randomBytes, randomUUIDv7 } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type TestContext, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { createBatchRecords, rowJobId } from '@acousticsense/shared/batch-records';
import { createEndpoints, endpointDefinitionSchema } from '@acousticsense/shared/endpoints';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import type { JobRecord } from '@acousticsense/shared/job';
import { createJobRecords } from '@acousticsense/shared/job-records';
import {
  audioKey,
  explanationKey,
  spectrogramKey,
  uploadKey,
  vectorsKey,
} from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedis } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import { createTenants } from '@acousticsense/shared/tenants';
import { writeUpload } from '@acousticsense/shared/uploads';
import { pino } from 'pino';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { createCallbacks } from './callbacks.ts';
import { createChanges } from './changes.ts';
import { createJobs, type JobsDeps } from './jobs.ts';
import { createLimits } from './limits.ts';
import { createUploadedRefs } from './uploaded-refs.ts';
import { createUploads } from './uploads.ts';

const digest = 'd'.repeat(64);
/** As releases wrote it that knew neither default windows nor explanations. */
const oldDescription = {
  digest,
  name: 'm',
  version: '1',
  licence: '',
  provenance: '',
  labels: ['rock'],
  profileHash: 'p',
  windowSeconds: 30,
  stepSeconds: 30,
  threshold: 0.5,
  calibrated: false,
  accuracy: { split: 's', clips: 1, top1: 1, top3: 1, meanRecall: 1 },
};

/** Jobs behind an HTTP server that only accepts, with a model that is served by announcement only. */
async function acceptJobs(
  t: TestContext,
  server: TestRedis,
  description: object,
  replace: (parts: Pick<JobsDeps, 'records' | 'queues'>) => Partial<JobsDeps> = () => ({}),
) {
  const redis = connectRedis(server.url);
  await once(redis, 'ready');
  const subscriber = connectRedis(server.url);
  const directory = await mkdtemp(path.join(tmpdir(), 'as-jobs-'));
  await redis.set(`as:model:${digest}`, JSON.stringify(description));
  for (const kind of ['decoder', 'inference']) {
    const worker = { kind, queue: kind, workerId: kind, since: 1, modelDigest: digest, profileHash: 'p' };
    await redis.hset('as:workers', kind, JSON.stringify({ ...worker, seen: Date.now() }));
  }
  const retention = { resultSeconds: 60 };
  const records = createJobRecords(redis, retention);
  const queues = createQueues(redis);
  const storage = openStorage(pathToFileURL(directory).href);
  const log = pino({ level: 'silent' });
  const uploads = createUploads({
    ...{ redis, storage, log, maxUploadBytes: 1_000, charge: async () => {} },
    ...{ uploadExpiryMs: 60_000, audioRetentionMs: 60_000, uploadUrlMs: 60_000 },
  });
  const uploadedRefs = createUploadedRefs({
    ...{ redis, batches: createBatchRecords(redis, retention), retention },
  });
  const endpoints = createEndpoints({ redis, secrets: createSecrets(randomBytes(32).toString('base64')) });
  const jobs = createJobs({
    redis,
    storage,
    records,
    queues,
    changes: createChanges(subscriber, records),
    log,
    uploads,
    uploadedRefs,
    callbackFor: createCallbacks(endpoints),
    limits: createLimits({
      ...{ redis, records, tenants: createTenants(redis), maxOpenJobs: 10, eventsWaitingMost: 1_000 },
      ...{ requestsPerMinute: 0, rowsPerDay: 0, bytesPerDay: 0 },
    }),
    maxUploadBytes: 1_000,
    ...replace({ records, queues }),
  });
  let last: JobRecord | Error | undefined;
  const http = createServer(async (request, response) => {
    last = await jobs.accept(request, 'acme', 'file').catch((error) => error);
    response.end();
  });
  http.listen(0, '127.0.0.1');
  await once(http, 'listening');
  t.after(async () => {
    http.close();
    await queues.close();
    redis.disconnect();
    subscriber.disconnect();
    await rm(directory, { recursive: true });
  });
  /** Sends three bytes that nobody will decode. */
  async function send(fields: Record<string, string> = {}): Promise<JobRecord> {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    form.append('file', new Blob(['abc']), 'a.mp3');
    await fetch(`http://127.0.0.1:${(http.address() as AddressInfo).port}`, { method: 'POST', body: form });
    if (last instanceof Error) throw last;
    return last!;
  }
  /** The same for an upload that is there already. */
  async function sendJson(
    body: unknown,
    contentType = 'application/json; charset=utf-8',
  ): Promise<JobRecord> {
    await fetch(`http://127.0.0.1:${(http.address() as AddressInfo).port}`, {
      method: 'POST',
      headers: { 'content-type': contentType },
      body: typeof body === 'string' ? body : JSON.stringify(body),
    });
    if (last instanceof Error) throw last;
    return last!;
  }
  const stored = async () => (await Array.fromAsync(storage.list('jobs/'))).map(({ key }) => key);
  return { jobs, records, uploadedRefs, endpoints, storage, send, sendJson, stored };
}

test('a job whose record is committed is accepted, even if Redis is lost before it is queued', async (t) => {
  await using server = await startRedis();
  const { jobs, send } = await acceptJobs(t, server, oldDescription, ({ queues }) => ({
    queues: {
      ...queues,
      async add() {
        await server.stop('SIGKILL');
        throw new Error('Connection is closed.');
      },
    },
  }));
  assert.equal((await jobs.present(await send())).state, 'queued');
});

test('whoever sends it does not wait for a queue that cannot be reached', async (t) => {
  await using server = await startRedis();
  const { send } = await acceptJobs(t, server, oldDescription, ({ records }) => ({
    records: {
      ...records,
      async create(record) {
        const created = await records.create(record);
        await server.stop('SIGKILL');
        return created;
      },
    },
  }));
  const from = performance.now();
  assert.equal((await send()).state, 'queued');
  assert.ok(performance.now() - from < 2_000);
});

test('a job that may have been made though Redis did not say so keeps its audio', async (t) => {
  await using server = await startRedis();
  const { send, stored, records } = await acceptJobs(t, server, oldDescription, ({ records }) => ({
    records: {
      ...records,
      async create(record) {
        await records.create(record);
        throw new InfrastructureFault('redis', 'Command timed out');
      },
    },
  }));
  await assert.rejects(send(), InfrastructureFault);
  const [id] = await records.openSince('acme', Date.now() + 1, 10);
  assert.deepEqual(await stored(), [audioKey({ tenant: 'acme', id: id! })]);
});

test("a job that names no windows takes the model's own", async (t) => {
  await using server = await startRedis();
  const { send } = await acceptJobs(t, server, { ...oldDescription, windows: 3 });
  assert.equal((await send()).selection.windows, 3);
  assert.equal((await send({ windows: 'middle' })).selection.windows, 'middle');
});

test('a model that cannot explain refuses just that, and nothing is left behind', async (t) => {
  await using server = await startRedis();
  const { send, stored, records } = await acceptJobs(t, server, oldDescription);
  for (const fields of [{ explain: 'true' }, { explain: 'true', vectors: 'true' }] as const) {
    await assert.rejects(send(fields), (error) => {
      assert.ok(error instanceof ProblemError);
      assert.deepEqual([error.code, error.details.field], ['model_cannot_explain', 'explain']);
      return true;
    });
  }
  assert.deepEqual(await stored(), []);
  const { id, extras } = await send({ explain: 'false', vectors: 'true' });
  assert.deepEqual(extras, { explain: false, vectors: true });
  assert.deepEqual((await records.get('acme', id))?.extras, extras);
  assert.equal((await send({ explain: 'false', vectors: 'false' })).extras, undefined);
});

test('a model that can explain is asked to', async (t) => {
  await using server = await startRedis();
  const { send } = await acceptJobs(t, server, { ...oldDescription, explains: true });
  assert.deepEqual((await send({ explain: 'true' })).extras, { explain: true, vectors: false });
});

test('a job under a ref takes a revision and is found by the ref; one without takes none', async (t) => {
  await using server = await startRedis();
  const { records, uploadedRefs, send } = await acceptJobs(t, server, oldDescription);
  const first = await send({ ref: 'ISRC-1' });
  const second = await send({ ref: 'ISRC-1' });
  const none = await send();
  const stored = await Promise.all([first, second, none].map(({ id }) => records.get('acme', id)));
  assert.deepEqual(
    stored.map((record) => [record?.ref, record?.revision]),
    [
      ['ISRC-1', 1],
      ['ISRC-1', 2],
      [undefined, undefined],
    ],
  );
  assert.deepEqual(await uploadedRefs.jobsOf('acme', 'ISRC-1'), [second.id, first.id]);
  assert.deepEqual(await uploadedRefs.jobsOf('other', 'ISRC-1'), []);
  for (let n = 0; n < 4; n += 1) await send({ ref: 'ISRC-1' });
  assert.equal((await uploadedRefs.jobsOf('acme', 'ISRC-1')).length, 4, 'the newest alone are kept');
  for (const ref of ['x'.repeat(257), 'a\nb'])
    await assert.rejects(send({ ref }), (error) => (error as ProblemError).details.field === 'ref');
});

test('a job is told of under an enabled endpoint of its tenant; anything else is refused in a sentence', async (t) => {
  await using server = await startRedis();
  const { endpoints, records, send, stored } = await acceptJobs(t, server, oldDescription);
  const register = async (tenant: string, url: string, isVerified = true) => {
    const { endpoint } = await endpoints.create(tenant, endpointDefinitionSchema.parse({ url }));
    if (isVerified) await endpoints.verified(tenant, endpoint.id, { at: 1, ok: true, url });
    return endpoint.id;
  };
  const id = await register('acme', 'https://receiver.example.com/hooks');
  const closer = await register('acme', 'https://receiver.example.com/hooks/songs');
  const disabled = await register('acme', 'https://off.example.com/');
  await endpoints.disable('acme', disabled, 'operator');
  await register('acme', 'https://new.example.com/', false);
  await register('other', 'https://other.example.com/');

  const job = await send({ callbackUrl: 'https://Receiver.example.com:443/hooks/a?song=1' });
  const callback = { endpointId: id, url: 'https://receiver.example.com/hooks/a?song=1' };
  assert.deepEqual((await records.get('acme', job.id))?.callback, callback);
  const other = await send({ callbackUrl: 'https://receiver.example.com/hooks/songs/1' });
  assert.equal((await records.get('acme', other.id))?.callback?.endpointId, closer);
  assert.equal((await send()).callback, undefined);

  const before = await stored();
  for (const [callbackUrl, words] of [
    ['hooks', /is no URL/],
    ['ftp://receiver.example.com/hooks', /must begin with https/],
    ['javascript:alert(1)', /must begin with https/],
    ['http://receiver.example.com/hooks', /under none of your endpoints/],
    ['https://receiver.example.com:8443/hooks', /under none of your endpoints/],
    ['https://receiver.example.com/hooksandmore', /under none of your endpoints/],
    ['https://receiver.example.com/hooks/../admin', /under none of your endpoints/],
    ['https://receiver.example.com.evil.example/hooks', /under none of your endpoints/],
    ['https://other.example.com/', /under none of your endpoints/],
    ['https://user:pass@receiver.example.com/hooks', /no user and no password/],
    ['https://@receiver.example.com/hooks', /no user and no password/],
    ['https://receiver.example.com/hooks#a', /no fragment/],
    ['https://new.example.com/a', /not verified yet/],
    ['https://off.example.com/a', /is disabled/],
  ] as const) {
    await assert.rejects(send({ callbackUrl }), (error) => {
      assert.ok(error instanceof ProblemError);
      assert.deepEqual([error.code, error.details.field], ['callback_not_allowed', 'callbackUrl']);
      assert.match(error.message, words, callbackUrl);
      return true;
    });
  }
  assert.deepEqual(await stored(), before, 'the audio of what is refused does not stay');
});

test('deleting a finished job deletes all that was stored beside its result', async (t) => {
  await using server = await startRedis();
  const { jobs, records, storage, send, stored } = await acceptJobs(t, server, oldDescription);
  const { id, generation } = await send({ vectors: 'true' });
  const other = await send();
  for (const keyOf of [spectrogramKey, explanationKey, vectorsKey])
    await storage.put(keyOf({ tenant: 'acme', id }), Buffer.from('{}'));
  await records.commit({ tenant: 'acme', jobId: id, generation }, { from: ['queued'], to: 'failed' });
  assert.equal((await stored()).length, 5);
  assert.equal(await jobs.cancelOrDelete('acme', id), undefined);
  assert.deepEqual(await stored(), [audioKey({ tenant: 'acme', id: other.id })]);
});

test('the result of a row of a batch is not deleted alone: its chunk is written from it', async (t) => {
  await using server = await startRedis();
  const { jobs, records, send } = await acceptJobs(t, server, oldDescription);
  const { modelDigest, modelName, modelVersion, profileHash, ...job } = await send();
  const redis = connectRedis(server.url);
  t.after(() => redis.disconnect());
  await once(redis, 'ready');
  const batches = createBatchRecords(redis, { resultSeconds: 60 });
  const id = randomUUIDv7();
  const of = { modelDigest, modelName, modelVersion, profileHash };
  await batches.create({
    ...{ ...of, id, tenant: 'acme', name: undefined, state: 'running', origin: { kind: 'manifest' } },
    ...{ class: 'backfill', selection: job.selection, presentation: job.presentation, extras: undefined },
    ...{ traceparent: job.traceparent, tensorsOf: undefined, mapped: false, force: false, revision: 1 },
  });
  await batches.append({ tenant: 'acme', id }, { chunk: 0, rows: 1, bad: 0, last: true });
  await batches.open({ tenant: 'acme', id }, { chunk: 0 });
  const jobId = rowJobId(id, 0);
  await records.create({ ...job, ...of, id: jobId, batch: { id, chunk: 0, row: 0 }, state: 'completed' });
  await assert.rejects(
    jobs.cancelOrDelete('acme', jobId),
    (error) => error instanceof ProblemError && error.code === 'batch_state',
  );
  assert.equal((await records.get('acme', jobId))?.state, 'completed');
});

test('a job of a finished upload reads it where it lies, and deleting the job leaves it there', async (t) => {
  await using server = await startRedis();
  const { jobs, records, storage, sendJson, stored } = await acceptJobs(t, server, oldDescription);
  const id = randomUUIDv7();
  const etag = await storage.put(uploadKey('acme', id), Buffer.from('abc'));
  const open = { v: 1, by: 'presigned', size: 3, filename: 'a.mp3', createdAt: Date.now() } as const;
  const expiresAt = Date.now() + 60_000;
  await writeUpload(storage, 'acme', id, { ...open, state: 'open', expiresAt });
  await assert.rejects(sendJson({ upload: id }), { code: 'upload_unfinished' });
  await writeUpload(storage, 'acme', id, {
    ...{ ...open, state: 'finished', expiresAt, etag, completedAt: Date.now() },
  });

  const job = await sendJson({ upload: id, topK: 3, windows: 'all', start: 1.5, vectors: true });
  assert.deepEqual(job.audio, { key: uploadKey('acme', id), size: 3, etag, filename: 'a.mp3' });
  assert.deepEqual(job.selection, { windows: 'all', start: 1.5 });
  assert.deepEqual(job.extras, { explain: false, vectors: true });
  assert.deepEqual((await records.get('acme', job.id))?.audio, job.audio);
  assert.deepEqual(await stored(), []);
  assert.equal((await sendJson({ upload: id, filename: 'x/b.mp3' })).audio.filename, 'b.mp3');

  await jobs.cancelOrDelete('acme', job.id);
  await jobs.cancelOrDelete('acme', job.id);
  assert.equal((await storage.stat(uploadKey('acme', id)))?.etag, etag);
});

test('a job of an upload that cannot be had is refused with the reason', async (t) => {
  await using server = await startRedis();
  const { storage, sendJson } = await acceptJobs(t, server, oldDescription);
  const foreign = randomUUIDv7();
  await storage.put(uploadKey('other', foreign), Buffer.from('abc'));
  await writeUpload(storage, 'other', foreign, {
    ...{ v: 1, by: 'tus', state: 'finished', size: 3, filename: 'a', etag: 'e' },
    ...{ createdAt: Date.now(), completedAt: Date.now(), expiresAt: Date.now() + 60_000 },
  });
  for (const [body, code, field] of [
    [{ upload: randomUUIDv7() }, 'upload_not_found', 'upload'],
    [{ upload: foreign }, 'upload_not_found', 'upload'],
    [{ upload: '../x' }, 'bad_option', 'upload'],
    [{}, 'bad_option', 'upload'],
    [{ upload: foreign, topK: '3' }, 'bad_option', 'topK'],
    [{ upload: foreign, file: 'x' }, 'bad_option', 'file'],
    ['{', 'bad_request', undefined],
    [' '.repeat(70_000), 'bad_request', undefined],
  ] as const)
    await assert.rejects(sendJson(body), (error) => {
      assert.ok(error instanceof ProblemError);
      assert.deepEqual([error.code, error.details.field], [code, field]);
      return true;
    });
  await assert.rejects(sendJson('{}', 'text/plain'), { code: 'wrong_content_type' });
});
