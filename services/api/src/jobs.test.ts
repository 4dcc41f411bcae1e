import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedis } from '@acousticsense/shared/redis';
import { pino } from 'pino';
import { startRedis } from '../../../test/redis.ts';
import { createChanges } from './changes.ts';
import { createJobs } from './jobs.ts';

test('a job whose record is committed is accepted, even if Redis is lost before it is queued', async (t) => {
  await using server = await startRedis();
  const redis = connectRedis(server.url);
  await once(redis, 'ready');
  const subscriber = connectRedis(server.url);
  const directory = await mkdtemp(path.join(tmpdir(), 'as-jobs-'));
  const digest = 'd'.repeat(64);
  const description = {
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
  await redis.set(`as:model:${digest}`, JSON.stringify(description));
  for (const kind of ['decoder', 'inference']) {
    const worker = { kind, queue: kind, workerId: kind, since: 1, modelDigest: digest, profileHash: 'p' };
    await redis.hset('as:workers', kind, JSON.stringify({ ...worker, seen: Date.now() }));
  }
  const records = createJobRecords(redis, { resultSeconds: 60, events: 10 });
  const queues = createQueues(redis);
  const jobs = createJobs({
    redis,
    storage: openStorage(pathToFileURL(directory).href),
    records,
    queues: {
      ...queues,
      async add() {
        await server.stop('SIGKILL');
        throw new Error('Connection is closed.');
      },
    },
    changes: createChanges(subscriber, records),
    log: pino({ level: 'silent' }),
    maxUploadBytes: 1_000,
    maxOpenJobs: 10,
  });
  const http = createServer(async (request, response) => {
    const told = await jobs
      .accept(request, 'acme', 'file')
      .then((record) => jobs.present(record))
      .then(({ state }) => state, String);
    response.end(told);
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
  const form = new FormData();
  form.append('file', new Blob(['abc']), 'a.mp3');
  const answer = await fetch(`http://127.0.0.1:${(http.address() as AddressInfo).port}`, {
    method: 'POST',
    body: form,
  });
  assert.equal(await answer.text(), 'queued');
});
