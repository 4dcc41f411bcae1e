import assert from 'node:assert/strict';
import { type ChildProcess, fork } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import type { JobRecord } from '@acousticsense/shared/job';
import { anyOpenState, createJobRecords, type JobRecords, refOf } from '@acousticsense/shared/job-records';
import { audioKey, jobPrefix } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { isFinished, type JobState } from '@acousticsense/shared/pipeline';
import { createQueues, type Queues } from '@acousticsense/shared/queues';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { liveWorkers } from '@acousticsense/shared/serving';
import type { Storage } from '@acousticsense/shared/storage';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { startWeb, type Web } from './testing/web.ts';

const sound = randomBytes(200_000);
const sha256 = createHash('sha256').update(sound).digest('hex');

describe('the fetch service as a process', () => {
  let server: TestRedis;
  let directory: string;
  let storageUrl: string;
  let storage: Storage;
  let redis: ReturnType<typeof connectRedisForWorker>;
  let records: JobRecords;
  let queues: Queues;
  let web: Web;
  let service: ChildProcess | undefined;
  let answer: (request: IncomingMessage, response: ServerResponse) => unknown;

  before(async () => {
    server = await startRedis();
    directory = await mkdtemp(path.join(tmpdir(), 'as-fetch-'));
    storageUrl = pathToFileURL(directory).href;
    storage = openStorage(storageUrl);
    redis = connectRedisForWorker(server.url);
    records = createJobRecords(redis, { resultSeconds: 3_600 });
    queues = createQueues(redis);
    web = await startWeb((request, response) => answer(request, response));
  });
  afterEach(async () => {
    await stop();
    web.requests.length = 0;
  });
  after(async () => {
    await web.close();
    await queues.close();
    redis.disconnect();
    await server[Symbol.asyncDispose]();
    await rm(directory, { recursive: true, force: true });
  });

  /** @returns the port of its health, once it is ready. */
  function start(env: Record<string, string> = {}): Promise<number> {
    service = fork(path.join(import.meta.dirname, 'main.ts'), [], {
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: [],
      env: { PATH: process.env['PATH'], REDIS_URL: server.url, STORAGE_URL: storageUrl, ...env },
    });
    const child = service;
    return new Promise((resolve, reject) => {
      let port = 0;
      child.on('message', (message: { type: string; port?: number; message?: string }) => {
        if (message.type === 'listening') port = message.port!;
        if (message.type === 'ready') resolve(port);
        if (message.type === 'failed') reject(new Error(message.message));
      });
      child.on('exit', (code) => reject(new Error(`the service exited with ${code}`)));
    });
  }
  async function stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (!service || service.exitCode !== null || service.signalCode !== null) return;
    const exited = once(service, 'exit');
    service.kill(signal);
    await exited;
  }
  const openWeb = () => ({ EGRESS_ALLOW: `127.0.0.1:${web.port}` });

  async function submit(url = `${web.origin}/song.mp3`): Promise<JobRecord> {
    const job = acceptedJob({ tenant: 'acme', audio: { url, filename: 'song.mp3' } });
    await records.create(job);
    await queues.add('fetch', job as JobRecord);
    // Already 'fetching' where the service was quicker than this line.
    return await recordOf(job);
  }
  const recordOf = async (job: { id: string }) => (await records.get('acme', job.id))!;

  async function reaches(job: JobRecord, state: JobState): Promise<JobRecord> {
    for (let n = 0; n < 600; n += 1) {
      const record = await recordOf(job);
      if (record.state === state) return record;
      if (isFinished(record.state)) assert.fail(`${record.state}: ${JSON.stringify(record.error)}`);
      await sleep(25);
    }
    return assert.fail(`never ${state}`);
  }
  async function objectsOf(job: JobRecord): Promise<string[]> {
    const found: string[] = [];
    for await (const { key } of storage.list(jobPrefix(job))) found.push(key);
    return found;
  }

  test('a URL becomes a stored object and a job for the decoder', async () => {
    answer = (_, response) => response.end(sound);
    const port = await start(openWeb());
    const job = await reaches(await submit(), 'queued');
    assert.ok('key' in job.audio);
    const { key, etag } = job.audio;
    assert.deepEqual(job.audio, { key, size: sound.length, sha256, etag, filename: 'song.mp3' });
    assert.equal(key, audioKey(job));
    assert.equal((await storage.stat(key))?.etag, etag);
    assert.ok((await storage.read(key)).equals(sound));
    assert.ok(job.timings?.fetch !== undefined && job.timings.fetchWait !== undefined);
    while ((await queues.state('fetch', job)) !== 'completed') await sleep(10);
    assert.equal(await queues.state('decode', job), 'waiting');

    const metrics = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
    assert.match(metrics, /acousticsense_stage_jobs_total\{stage="fetch",outcome="done".*\} 1/);
    assert.match(metrics, /acousticsense_fetched_bytes_total\{.*\} 200000/);
    assert.equal((await fetch(`http://127.0.0.1:${port}/readyz`)).status, 200);
    const [worker] = await liveWorkers(redis);
    assert.deepEqual([worker?.kind, worker?.queue], ['fetch', 'fetch']);
    await stop();
    assert.deepEqual(await liveWorkers(redis), []);
  });

  test('what can never be read fails at once, with its code; without EGRESS_ALLOW nothing inside is read', async () => {
    answer = (_, response) => response.writeHead(404).end();
    await start(openWeb());
    const missing = await reaches(await submit(), 'failed');
    assert.equal(missing.error?.code, 'url_not_found');
    assert.equal(web.requests.length, 1);
    assert.deepEqual(await objectsOf(missing), []);
    const metadata = await reaches(await submit('https://169.254.169.254/latest/meta-data/'), 'failed');
    assert.equal(metadata.error?.code, 'url_not_allowed');
    await stop();
    await start();
    const inside = await reaches(await submit(), 'failed');
    assert.equal(inside.error?.code, 'url_not_allowed');
    assert.equal(web.requests.length, 1);
  });

  test('a server that is busy is asked again later', async () => {
    answer = (_, response) => {
      if (web.requests.length === 1) response.writeHead(503).end();
      else response.end(sound);
    };
    await start(openWeb());
    const job = await reaches(await submit(), 'queued');
    assert.equal(web.requests.length, 2);
    assert.equal(job.fetchStarts, 2);
  });

  test('a service that is killed in mid-download leaves the job to the next, which ends it once', async () => {
    const begun = Promise.withResolvers<void>();
    answer = (_, response) => {
      if (web.requests.length > 1) response.end(sound);
      else
        response
          .writeHead(200, { 'content-length': sound.length })
          .write(sound.subarray(0, 1_000), () => begun.resolve());
    };
    await start(openWeb());
    const job = await submit();
    await begun.promise;
    await stop('SIGKILL');
    assert.deepEqual(await objectsOf(job), []);
    await start(openWeb());
    const ended = await reaches(job, 'queued');
    assert.ok('key' in ended.audio && ended.audio.sha256 === sha256);
    assert.deepEqual(await objectsOf(job), [audioKey(job)]);
  });

  test('a service that is stopped in mid-download gives the job back without spending an attempt', async () => {
    const begun = Promise.withResolvers<void>();
    answer = (_, response) => {
      if (web.requests.length > 1) response.end(sound);
      else response.write('.', () => begun.resolve());
    };
    await start({ ...openWeb(), DRAIN_SECONDS: '0.2' });
    const job = await submit();
    await begun.promise;
    await stop();
    assert.equal((await recordOf(job)).fetchStarts, 0);
    await start(openWeb());
    await reaches(job, 'queued');
  });

  test('a job that is cancelled in mid-download leaves nothing, and its connection is closed', async () => {
    const begun = Promise.withResolvers<void>();
    const closed = Promise.withResolvers<void>();
    answer = (_, response) => {
      response.on('close', closed.resolve);
      response.write(sound, () => begun.resolve());
    };
    await start(openWeb());
    const job = await submit();
    await begun.promise;
    await records.commit(refOf(job), { from: anyOpenState, to: 'cancelled' });
    await closed.promise;
    while ((await queues.state('fetch', job)) !== 'completed') await sleep(10);
    assert.equal((await recordOf(job)).state, 'cancelled');
    assert.equal(await queues.state('decode', job), 'gone');
    assert.deepEqual(await objectsOf(job), []);
  });

  test('an EGRESS_ALLOW that is not understood ends it with one sentence', async () => {
    await assert.rejects(start({ EGRESS_ALLOW: 'http://minio:9000' }), /EGRESS_ALLOW.*http:\/\/minio:9000/);
  });
});
