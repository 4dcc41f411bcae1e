import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, beforeEach, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { createEventLog } from '@acousticsense/shared/event-log';
import {
  type EventType,
  eventSchema,
  type JobData,
  jobData,
  type StoredEvent,
} from '@acousticsense/shared/events';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedis, connectRedisForWorker } from '@acousticsense/shared/redis';
import { createUrlSigner } from '@acousticsense/shared/signed-url';
import { createTelling } from '@acousticsense/shared/told-event';
import express from 'express';
import { pino } from 'pino';
import { startRedis } from '../../../test/redis.ts';
import { answerProblem } from './app.ts';
import { createEventFeed, eventPageSchema } from './event-feed.ts';
import { createEventRoutes } from './event-routes.ts';

const server = await startRedis({ appendOnly: true });
const redis = connectRedis(server.url, 500);
await once(redis, 'ready');
const subscriber = connectRedisForWorker(server.url);
const directory = await mkdtemp(path.join(tmpdir(), 'as-feed-'));
const storage = openStorage(pathToFileURL(directory).href);
const log = createEventLog({ redis, storage, kept: 0, segmentEvents: 10, segmentAgeMs: 0 });
const signer = createUrlSigner(randomBytes(32).toString('base64'));

interface Answer {
  status: number;
  // biome-ignore lint/suspicious/noExplicitAny: the answers' shapes are what is tested
  body: any;
}

/** The header `x-tenant` says who calls. */
async function serve(by = signer) {
  const feed = createEventFeed({ subscriber, log });
  const tell = createTelling({ signer: by, publicUrl: () => 'https://music.example.com' });
  const app = express();
  app.set('query parser', 'simple');
  app.use(
    createEventRoutes({
      ...{ feed, tell },
      tenantOf: (response) => String(response.req.headers['x-tenant'] ?? 'acme'),
    }),
  );
  app.use(answerProblem({ log: pino({ level: 'silent' }) }));
  const http = createServer(app).listen(0, '127.0.0.1');
  await once(http, 'listening');
  const url = `http://127.0.0.1:${(http.address() as AddressInfo).port}/v1/events`;
  return {
    feed,
    url,
    async call(query = '', { tenant = 'acme', method = 'GET', signal = AbortSignal.timeout(20_000) } = {}) {
      const answer = await fetch(url + query, { method, signal, headers: { 'x-tenant': tenant } });
      const text = await answer.text();
      return { status: answer.status, body: text === '' ? undefined : JSON.parse(text) } as Answer;
    },
    async [Symbol.asyncDispose]() {
      feed.close();
      http.closeAllConnections();
      http.close();
    },
  };
}

const api = await serve();
after(async () => {
  await api[Symbol.asyncDispose]();
  redis.disconnect();
  subscriber.disconnect();
  storage.close();
  await server[Symbol.asyncDispose]();
  await rm(directory, { recursive: true, force: true });
});
let tenant = '';
beforeEach(() => {
  tenant = `acme-${randomUUID().slice(0, 8)}`;
});

const timestamp = '2026-11-22T10:00:00.000Z';
const states = {
  'job.completed': 'completed',
  'job.failed': 'failed',
  'job.cancelled': 'cancelled',
} as const;
function eventOf(n: number, type: keyof typeof states = 'job.cancelled'): StoredEvent {
  const data = jobData(
    {
      id: `0199aaaa-0000-7000-8000-${String(n).padStart(12, '0')}`,
      presentation: { topK: 5, threshold: 0.5 },
      ...{ ref: `track-${n}`, revision: n },
      ...{ modelName: 'm', modelVersion: '1', modelDigest: 'd', profileHash: 'p' },
    },
    states[type],
  );
  return { type, timestamp, data };
}
const add = (n: number, type?: keyof typeof states) =>
  log.append(tenant, { id: `evt_${n}`, event: eventOf(n, type) });
const call = (query = '', more: { method?: string; signal?: AbortSignal } = {}) =>
  api.call(query, { tenant, ...more });
const refs = ({ body }: Answer) => body.events.map(({ data }: { data: JobData }) => data.ref);
const upTo = (count: number, from = 0) => Array.from({ length: count }, (_, n) => `track-${from + n}`);
/** Until the request has come to wait. */
const waiting = () => sleep(150);

test('events are read page by page in order, of storage and Redis alike, each with a link that opens', async () => {
  for (let n = 0; n < 20; n += 1) await add(n);
  await log.archive(tenant);
  for (let n = 20; n < 25; n += 1) await add(n);
  const seen: string[] = [];
  let query = '?limit=7';
  for (const more of [true, true, true, false]) {
    const answer = await call(query);
    assert.equal(answer.status, 200, JSON.stringify(answer.body));
    const page = eventPageSchema.parse(answer.body);
    assert.equal(page.more, more);
    assert.equal(page.next, page.events.at(-1)!.cursor);
    for (const { id, cursor: _, ...event } of page.events) {
      const { data } = eventSchema.parse(event) as { data: JobData };
      assert.equal(id, `evt_${data.revision}`);
      const { origin, pathname, search } = new URL(data.resultUrl);
      assert.equal(origin, 'https://music.example.com');
      assert.equal(pathname, `/v1/jobs/${data.jobId}`);
      const in13Days = Date.now() + 13 * 86_400_000;
      assert.equal(signer.verify('GET', pathname + search, in13Days), tenant);
      assert.throws(() => signer.verify('GET', pathname + search, in13Days + 2 * 86_400_000));
    }
    seen.push(...refs(answer));
    query = `?limit=7&after=${page.next}`;
  }
  assert.deepEqual(seen, upTo(25));
  const end = await call(query);
  assert.deepEqual([end.body.events, end.body.more, `?limit=7&after=${end.body.next}`], [[], false, query]);
});

test('an empty feed has a place from which one goes on', async () => {
  const empty = await call();
  assert.deepEqual(empty.body, { events: [], next: '0-0', more: false });
  await add(1);
  assert.deepEqual(refs(await call(`?after=${empty.body.next}`)), ['track-1']);
});

test('of some types only these are told, and `next` moves on over the others', async () => {
  const types = ['job.completed', 'job.failed', 'job.cancelled'] as const;
  let last = '';
  for (let n = 0; n < 30; n += 1) last = await add(n, types[n % 3]);
  const page = await call('?types=job.completed,job.cancelled&limit=5');
  assert.deepEqual(refs(page), ['track-0', 'track-2', 'track-3', 'track-5', 'track-6']);
  assert.equal(page.body.more, true);
  const none = await call('?types=batch.failed' satisfies `?types=${EventType}`);
  assert.deepEqual([none.body.events, none.body.next, none.body.more], [[], last, false]);
  const rest = await call(`?types=job.failed&after=${page.body.next}`);
  assert.deepEqual([refs(rest)[0], refs(rest).length], ['track-7', 8]);
});

test('who waits is answered as soon as something happens, to this tenant and of these types', async () => {
  const answers = [call('?wait=20'), call('?wait=20&types=job.failed'), call('?after=0-0&wait=20')];
  const other = new AbortController();
  const elsewhere = api.call('?wait=20', { tenant: `${tenant}-2`, signal: other.signal });
  await waiting();
  const from = performance.now();
  await add(1);
  assert.deepEqual(refs(await answers[0]!), ['track-1']);
  assert.deepEqual(refs(await answers[2]!), ['track-1']);
  await add(2, 'job.failed');
  assert.deepEqual(refs(await answers[1]!), ['track-2']);
  assert.ok(performance.now() - from < 10_000);
  const isStillWaiting = await Promise.race([elsewhere.then(() => false), sleep(50).then(() => true)]);
  assert.ok(isStillWaiting);
  other.abort();
  await assert.rejects(elsewhere, { name: 'AbortError' });
});

test('waiting ends in vain after its time, and finds what no hint told of', async () => {
  const from = performance.now();
  const answer = await call('?wait=1');
  assert.deepEqual(answer.body.events, []);
  assert.ok(performance.now() - from >= 990);
  const unheard = call('?wait=1');
  await waiting();
  await redis.xadd(`as:{${tenant}}:events`, '*', 'id', 'evt_1', 'event', JSON.stringify(eventOf(1)));
  assert.deepEqual(refs(await unheard), ['track-1']);
});

test('when the service closes, whoever waits is answered at once', async () => {
  await using closing = await serve();
  const answer = closing.call('?wait=30', { tenant });
  await waiting();
  closing.feed.close();
  assert.deepEqual((await answer).body, { events: [], next: '0-0', more: false });
  assert.equal((await closing.call('?wait=30', { tenant })).status, 200, 'and nobody waits any more');
});

test('a cursor behind which events were deleted is 410 and names the oldest that is left', async () => {
  const long = Date.now() - 40 * 86_400_000;
  for (const n of [0, 1, 2])
    await redis.xadd(
      `as:{${tenant}}:events`,
      `${long + n}-0`,
      ...['id', `evt_${n}`, 'event', JSON.stringify(eventOf(n))],
    );
  const oldest = await add(3);
  await log.archive(tenant);
  await log.sweep(tenant, new Date(Date.now() - 30 * 86_400_000));
  for (const cursor of ['0-0', `${long}-0`, `${long + 1}-5`]) {
    const { status, body } = await call(`?after=${cursor}`);
    assert.deepEqual([status, body.code, body.field], [410, 'cursor_expired', 'after']);
    assert.ok(body.detail.includes(oldest), body.detail);
  }
  assert.deepEqual(refs(await call(`?after=${long + 2}-0`)), ['track-3']);
  assert.deepEqual(refs(await call()), ['track-3']);
});

test('requests that are none are refused by name of the field', async () => {
  for (const [query, field] of [
    ['?after=x', 'after'],
    ['?after=', 'after'],
    ['?after=1-', 'after'],
    ['?after=-1-1', 'after'],
    ['?after=9999999999999999-0', 'after'],
    ['?limit=0', 'limit'],
    ['?limit=1001', 'limit'],
    ['?limit=1.5', 'limit'],
    ['?limit=', 'limit'],
    ['?wait=31', 'wait'],
    ['?wait=-1', 'wait'],
    ['?wait=soon', 'wait'],
    ['?types=', 'types'],
    ['?types=job.begun', 'types'],
    ['?types=job.failed,', 'types'],
    ['?before=1-1', 'before'],
  ] as const) {
    const { status, body } = await call(query);
    assert.deepEqual([status, body.code, body.field], [400, 'bad_option', field], query);
  }
  const posted = await fetch(api.url, { method: 'POST' });
  assert.deepEqual([posted.status, posted.headers.get('allow')], [405, 'GET, HEAD']);
});

test('HEAD is answered, and does not wait', async () => {
  const from = performance.now();
  assert.equal((await call('?wait=30', { method: 'HEAD' })).status, 200);
  assert.ok(performance.now() - from < 10_000);
});

test('without SECRETS_KEY nothing can be told, with the reason', async () => {
  await using keyless = await serve(createUrlSigner(undefined));
  await add(1);
  const { status, body } = await keyless.call('', { tenant });
  assert.deepEqual([status, body.code], [501, 'secrets_not_kept']);
});

test('while Redis is away the answer is 503, also for who waits; afterwards it goes on', async () => {
  await add(1);
  const { body } = await call();
  const waiter = call(`?after=${body.next}&wait=30`);
  await waiting();
  await server.stop('SIGKILL');
  const from = performance.now();
  assert.deepEqual([(await waiter).status, (await call()).status], [503, 503]);
  assert.ok(performance.now() - from < 5_000);
  await server.start();
  while ((await call()).status !== 200) await sleep(20);
  while (subscriber.status !== 'ready') await sleep(20);
  const again = call(`?after=${body.next}&wait=20`);
  await waiting();
  await add(2);
  assert.deepEqual(refs(await again), ['track-2']);
});
