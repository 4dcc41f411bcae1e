/**
 * Tenants on the whole product: keys made by the operator's command, nothing of one seen by another, limits, the
 * same request twice, and a Redis that is gone or silent.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdir } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { sine, wav } from './audio.ts';
import {
  type Answer,
  formOf,
  isFinished,
  type Job,
  type Problem,
  request,
  serverSentEvents,
} from './client.ts';
import { type System, startSystem } from './system.ts';

const cli = path.resolve(import.meta.dirname, '../packages/cli/src/main.ts');
const operatorKey = 'the-operators-own-key';
const tone = (seconds: number, hz = 440) =>
  wav([sine({ seconds, hz, sampleRate: 8_000 })], { sampleRate: 8_000 });
const song = tone(2);

async function acousticsense(system: System, ...args: string[]): Promise<string> {
  const child = spawn(process.execPath, [cli, ...args], {
    env: { ...process.env, REDIS_URL: system.redis.url },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const [output, notes, [code]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, 'close'),
  ]);
  assert.equal(code, 0, notes);
  return output.trim();
}

type Redis = ReturnType<typeof connectRedisForWorker>;
type Body = Job & Problem;
/** The API as a tenant's program calls it. */
function callerOf(system: System, key: string) {
  const call = (at: string, init: RequestInit = {}): Promise<Answer<Body>> =>
    request<Body>(system.url + at, {
      ...init,
      headers: { authorization: `Bearer ${key}`, ...(init.headers as Record<string, string>) },
    });
  const send = (
    audio: Uint8Array = song,
    { idempotencyKey, ...options }: Parameters<typeof formOf>[1] & { idempotencyKey?: string } = {},
  ) =>
    call('/v1/jobs', {
      method: 'POST',
      body: formOf(audio, options),
      headers: idempotencyKey === undefined ? {} : { 'idempotency-key': idempotencyKey },
    });
  return { key, call, send };
}

describe('two tenants', () => {
  let system: System;
  let acme: ReturnType<typeof callerOf>;
  let umbrella: ReturnType<typeof callerOf>;
  before(async () => {
    system = await startSystem({ env: { API_KEY: operatorKey } });
    acme = callerOf(system, await acousticsense(system, 'keys', 'create', 'acme'));
    umbrella = callerOf(system, await acousticsense(system, 'keys', 'create', 'umbrella'));
  });
  after(() => system?.stop());

  const isNothing = ({ status, body }: Answer<Body>, what: string) =>
    assert.deepEqual([status, body.code], [404, 'job_not_found'], what);

  test('see nothing of each other: not a job, its events, pictures or numbers, finished or not', async () => {
    const sent = await acme.send(song, { fields: { vectors: 'true' } });
    assert.equal(sent.status, 202);
    const { self, events, spectrogram, vectors } = sent.body.links;
    for await (const { data } of serverSentEvents(system.url + events, {
      headers: { 'x-api-key': acme.key },
    }))
      if (isFinished(data as Job)) assert.equal((data as Job).state, 'completed');
    for (const at of [self, events, spectrogram, vectors!, `${self}/explanation`])
      isNothing(await umbrella.call(at), at);
    isNothing(await umbrella.call(self, { method: 'DELETE' }), 'DELETE');
    isNothing(await callerOf(system, operatorKey).call(self), 'the default tenant');

    for (const at of [self, vectors!]) assert.equal((await acme.call(at)).status, 200, at);
    const picture = await fetch(system.url + spectrogram, { headers: { 'x-api-key': acme.key } });
    assert.equal(picture.headers.get('content-type'), 'image/png');
    await picture.arrayBuffer();
  });

  test('cannot cancel for each other, nor be told of it', async () => {
    process.kill(system.pid('decoder'), 'SIGSTOP');
    try {
      const { self } = (await acme.send()).body.links;
      isNothing(await umbrella.call(self, { method: 'DELETE' }), 'DELETE');
      assert.equal((await acme.call(self)).body.state, 'queued');
      assert.equal((await acme.call(self, { method: 'DELETE' })).body.state, 'cancelled');
    } finally {
      process.kill(system.pid('decoder'), 'SIGCONT');
    }
  });

  test('do not share what was decoded of the same song', async () => {
    const tensorsOf = async (tenant: string) =>
      (await readdir(path.join(system.directory, 'objects/tensors', tenant), { recursive: true })).filter(
        (name) => name.endsWith('.npy'),
      ).length;
    const predict = async (caller: typeof acme) => {
      const answer = await caller.call('/api/predict/', {
        method: 'POST',
        body: formOf(tone(3), { field: 'data' }),
      });
      assert.equal(answer.status, 200, JSON.stringify(answer.body));
    };
    const before = await tensorsOf('acme');
    await predict(acme);
    await predict(umbrella);
    assert.equal(await tensorsOf('acme'), before + 1);
    assert.equal(await tensorsOf('umbrella'), 1);
  });

  test('are served by the operator by name', async () => {
    const operator = callerOf(system, operatorKey);
    const { self } = (await acme.send()).body.links;
    assert.equal((await operator.call(self, { headers: { 'x-tenant': 'acme' } })).status, 200);
    isNothing(await operator.call(self, { headers: { 'x-tenant': 'umbrella' } }), 'X-Tenant: umbrella');
    const nobody = await operator.call(self, { headers: { 'x-tenant': 'nobody' } });
    assert.deepEqual([nobody.status, nobody.body.code], [404, 'tenant_not_found']);
  });

  test('lose a key within 5 seconds of its end, while another key of theirs goes on', async () => {
    const second = callerOf(
      system,
      await acousticsense(system, 'keys', 'create', 'acme', '--name', 'second'),
    );
    assert.equal((await second.call('/v1/model')).status, 200);
    const keys = JSON.parse(await acousticsense(system, 'keys', 'list', '--json')) as Record<
      string,
      string
    >[];
    await acousticsense(system, 'keys', 'revoke', keys.find(({ name }) => name === 'second')!['id']!);
    const from = performance.now();
    while ((await second.call('/v1/model')).status === 200) {
      assert.ok(performance.now() - from < 5_000);
      await sleep(100);
    }
    assert.equal((await second.send()).status, 401);
    assert.equal((await acme.call('/v1/model')).status, 200);
  });
});

/** Workers that are announced and take nothing: jobs stay where they are. */
async function announceWorkers(redis: Redis): Promise<void> {
  const digest = 'd'.repeat(64);
  const accuracy = { split: 's', clips: 1, top1: 1, top3: 1, meanRecall: 1 };
  const windows = { windowSeconds: 30, stepSeconds: 30, threshold: 0.5 };
  const model = {
    digest,
    name: 'm',
    version: '1',
    licence: '',
    provenance: '',
    labels: ['rock'],
    profileHash: 'p',
  };
  await redis.set(
    `as:model:${digest}`,
    JSON.stringify({ ...model, ...windows, calibrated: false, accuracy }),
  );
  for (const kind of ['decoder', 'inference']) {
    const worker = { kind, queue: kind, workerId: kind, since: 1, modelDigest: digest, profileHash: 'p' };
    await redis.hset('as:workers', kind, JSON.stringify({ ...worker, seen: Date.now() + 3_600_000 }));
  }
}

describe('an API', () => {
  let system: System;
  let redis: Redis;
  let tenants = 0;
  before(async () => {
    system = await startSystem({
      env: { API_KEY: operatorKey },
      without: ['decoder', 'inference', 'fetch', 'feeder', 'webhook'],
    });
    redis = connectRedisForWorker(system.redis.url);
    await announceWorkers(redis);
  });
  after(async () => {
    redis?.disconnect();
    await system?.stop();
  });

  /** A tenant of the test's own, with these settings. */
  async function newTenant(...settings: string[]) {
    tenants += 1;
    const name = `tenant-${tenants}`;
    if (settings.length > 0) await acousticsense(system, 'tenants', 'set', name, ...settings);
    const caller = callerOf(system, await acousticsense(system, 'keys', 'create', name));
    const open = () => redis.zcard(`as:{${name}}:open`);
    const audio = async () =>
      (await readdir(path.join(system.directory, 'objects'), { recursive: true })).filter((file) =>
        new RegExp(`/${name}/[^/]+/audio$`).test(file),
      ).length;
    return { name, ...caller, open, audio };
  }

  function assertRefused(
    { status, body, headers }: Answer<Body>,
    code: string,
    retryAfter: [from: number, to: number],
    expected = 429,
  ) {
    assert.deepEqual([status, body.code], [expected, code], JSON.stringify(body));
    assert.match(headers.get('content-type') ?? '', /^application\/problem\+json/);
    const seconds = Number(headers.get('retry-after'));
    assert.ok(seconds >= retryAfter[0] && seconds <= retryAfter[1], `Retry-After: ${seconds}`);
    assert.equal(body.retryable, true);
  }

  describe('with limits', () => {
    test('refuses requests beyond the minute, whatever they are, and of this tenant only', async () => {
      const tenant = await newTenant('--requests-per-minute', '3');
      const other = await newTenant();
      assert.equal((await tenant.call('/v1/model')).status, 200);
      assert.equal((await tenant.call('/v1/jobs/x')).status, 404);
      assert.equal((await tenant.send()).status, 202);
      assertRefused(await tenant.send(), 'rate_limited', [50, 60]);
      assertRefused(await tenant.call('/V1/model'), 'rate_limited', [50, 60]);
      assert.equal((await other.call('/v1/model')).status, 200);
      assert.equal(await tenant.audio(), 1);
      assert.equal((await tenant.call('/openapi.json')).status, 200, 'the page and its files are free');
    });

    test("refuses songs beyond the day's, and leaves nothing of them", async () => {
      const tenant = await newTenant('--rows-per-day', '2');
      for (let n = 0; n < 2; n += 1) assert.equal((await tenant.send()).status, 202);
      assertRefused(await tenant.send(), 'quota_exceeded', [86_000, 86_400]);
      const predict = { method: 'POST', body: formOf(song, { field: 'data' }) };
      assertRefused(await tenant.call('/api/predict/', predict), 'quota_exceeded', [86_000, 86_400]);
      assert.deepEqual([await tenant.open(), await tenant.audio()], [2, 2]);
    });

    test('charges no song that it did not accept', async () => {
      const tenant = await newTenant('--rows-per-day', '1');
      assert.equal((await tenant.send(song, { fields: { topK: 'many' } })).status, 400);
      assert.equal((await tenant.send(new Uint8Array())).status, 422);
      assert.equal((await tenant.send()).status, 202);
    });

    test("refuses bytes beyond the day's: before they are sent, where their length is told", async () => {
      const tenant = await newTenant('--bytes-per-day', String(song.length + 470_000));
      assert.equal((await tenant.send()).status, 202);
      assertRefused(await tenant.send(tone(30)), 'quota_exceeded', [86_000, 86_400]);
      const early = await sendSlowly(tenant.key, { 'content-length': '600000' }, 1_000).response;
      assert.equal(early.status, 429, 'refused after a thousand of its bytes');
      const untold = sendSlowly(tenant.key, { 'transfer-encoding': 'chunked' }, 480_000);
      untold.end();
      assert.equal((await untold.response).status, 429);
      assert.deepEqual([await tenant.open(), await tenant.audio()], [1, 1]);
    });

    test('refuses a song that is larger than the quota, without a time to come again', async () => {
      const tenant = await newTenant('--bytes-per-day', '10000');
      const { status, body, headers } = await tenant.send();
      assert.deepEqual([status, body.code, headers.get('retry-after')], [429, 'quota_exceeded', null]);
    });

    test('refuses jobs beyond those that may be open, until one has ended', async () => {
      const tenant = await newTenant('--open-jobs', '2');
      const { self } = (await tenant.send()).body.links;
      assert.equal((await tenant.send()).status, 202);
      assertRefused(await tenant.send(), 'too_busy', [1, 60]);
      assert.equal((await tenant.call(self, { method: 'DELETE' })).status, 200);
      assert.equal((await tenant.send()).status, 202);
    });
  });

  /** A multipart upload whose first bytes are on their way, and which ends when it is told to. */
  function sendSlowly(key: string, headers: Record<string, string>, bytes = 50_000) {
    const sending = httpRequest(`${system.url}/v1/jobs`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${key}`,
        'content-type': 'multipart/form-data; boundary=b',
        ...headers,
      },
    });
    const response = new Promise<{ status: number; body: Body }>((resolve, reject) => {
      sending.on('error', reject);
      sending.on('response', async (incoming) => {
        const body = await text(incoming);
        resolve({ status: incoming.statusCode!, body: JSON.parse(body) as Body });
      });
    });
    response.catch(() => {});
    sending.write('--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n');
    sending.write(Buffer.alloc(bytes, 1));
    return {
      response,
      end: () => void sending.end('\r\n--b--\r\n'),
      cut: () => void sending.destroy(),
    };
  }

  async function until(what: () => Promise<boolean>, withinMs = 5_000): Promise<void> {
    for (const from = performance.now(); !(await what()); await sleep(20))
      assert.ok(performance.now() - from < withinMs, `not within ${withinMs} ms`);
  }

  describe('that is sent the same song twice', () => {
    test('answers as before and makes, stores and charges nothing, even at the limit', async () => {
      const tenant = await newTenant('--rows-per-day', '1', '--open-jobs', '1');
      const first = await tenant.send(song, { idempotencyKey: 'k1', fields: { topK: '3', windows: 'all' } });
      assert.equal(first.status, 202);
      assert.equal(first.headers.get('idempotent-replayed'), null);
      for (let n = 0; n < 3; n += 1) {
        const again = await tenant.send(song, {
          idempotencyKey: 'k1',
          fields: { windows: 'all', topK: '3' },
        });
        assert.deepEqual([again.status, again.body], [202, first.body]);
        assert.equal(again.headers.get('location'), first.headers.get('location'));
        assert.equal(again.headers.get('idempotent-replayed'), 'true');
      }
      assert.deepEqual([await tenant.open(), await tenant.audio()], [1, 1]);
      assertRefused(await tenant.send(song, { idempotencyKey: 'k2' }), 'too_busy', [1, 60]);
    });

    test('refuses another song or other options under the same key', async () => {
      const tenant = await newTenant();
      assert.equal((await tenant.send(song, { idempotencyKey: 'k1' })).status, 202);
      for (const [audio, fields] of [
        [tone(2, 441), {}],
        [song, { topK: '4' }],
      ] as const) {
        const { status, body } = await tenant.send(audio, { idempotencyKey: 'k1', fields });
        assert.deepEqual([status, body.code], [422, 'idempotency_key_reused']);
      }
      assert.deepEqual([await tenant.open(), await tenant.audio()], [1, 1]);
      const other = await newTenant();
      assert.equal(
        (await other.send(tone(2, 441), { idempotencyKey: 'k1' })).status,
        202,
        'of another tenant',
      );
    });

    test('carries out one of many at once', async () => {
      const tenant = await newTenant();
      const answers = await Promise.all(
        Array.from({ length: 12 }, () => tenant.send(song, { idempotencyKey: 'k1' })),
      );
      assert.deepEqual([await tenant.open(), await tenant.audio()], [1, 1]);
      const accepted = answers.filter(({ status }) => status === 202);
      assert.equal(new Set(accepted.map(({ body }) => body.id)).size, 1);
      assert.equal(accepted.filter(({ headers }) => !headers.has('idempotent-replayed')).length, 1);
      for (const answer of answers.filter(({ status }) => status !== 202))
        assertRefused(answer, 'idempotency_in_flight', [1, 10], 409);
    });

    test('tells that the first is under way, and frees the key soon after kill -9', async () => {
      const tenant = await newTenant();
      const cut = sendSlowly(tenant.key, { 'idempotency-key': 'k1' });
      await until(async () => (await redis.keys(`as:{${tenant.name}}:idempotency:*:lease`)).length === 1);
      assertRefused(await tenant.send(song, { idempotencyKey: 'k1' }), 'idempotency_in_flight', [1, 10], 409);
      await system.kill('api');
      await assert.rejects(cut.response);
      await system.start('api');
      await until(async () => {
        const { status } = await tenant.send(song, { idempotencyKey: 'k1' });
        // 503: it has only just come up.
        assert.ok([409, 202, 503].includes(status), String(status));
        return status === 202;
      }, 15_000);
      assert.equal(await tenant.open(), 1);
    });

    test('frees the key at once when the first is cut off or refused', async () => {
      const tenant = await newTenant();
      const cut = sendSlowly(tenant.key, { 'idempotency-key': 'k1' });
      await until(async () => (await redis.keys(`as:{${tenant.name}}:idempotency:*:lease`)).length === 1);
      const refused = await tenant.send(song, { idempotencyKey: 'k2', fields: { topK: 'many' } });
      assert.equal(refused.status, 400);
      assert.equal((await tenant.send(song, { idempotencyKey: 'k2' })).status, 202);
      cut.cut();
      await until(async () => (await tenant.send(song, { idempotencyKey: 'k1' })).status === 202, 1_500);
    });
  });

  describe('whose Redis is away', () => {
    const id = '0198c0de-0000-7000-8000-000000000000';
    const requests: [method: string, at: string, more?: () => RequestInit][] = [
      ['GET', '/v1/model'],
      ['GET', `/v1/jobs/${id}`],
      ['GET', `/v1/jobs/${id}/events`],
      ['GET', `/v1/jobs/${id}/spectrogram.png`],
      ['GET', `/v1/jobs/${id}/vectors`],
      ['DELETE', `/v1/jobs/${id}`],
      ['POST', '/v1/jobs', () => ({ body: formOf(song) })],
      ['POST', '/api/predict/', () => ({ body: formOf(song, { field: 'data' }) })],
      ['GET', '/v1/sources'],
      ['GET', '/v1/batches'],
      ['GET', `/v1/batches/${id}`],
      ['GET', `/v1/batches/${id}/events`],
      ['GET', `/v1/batches/${id}/results.jsonl`],
      ['POST', `/v1/batches/${id}/cancel`],
      [
        'POST',
        '/v1/batches',
        () => ({
          body: '{"ref":"a","audio":"s3://bucket/a.mp3"}\n',
          headers: { 'content-type': 'application/x-ndjson', 'idempotency-key': 'frozen-batch' },
        }),
      ],
      ['POST', '/v1/uploads/tus', () => ({ headers: { 'tus-resumable': '1.0.0', 'upload-length': '10' } })],
    ];
    let tenant: Awaited<ReturnType<typeof newTenant>>;
    let limited: Awaited<ReturnType<typeof newTenant>>;
    before(async () => {
      tenant = await newTenant();
      limited = await newTenant('--requests-per-minute', '1000');
    });
    const works = async (key = tenant.key) =>
      (
        await callerOf(system, key)
          .call('/v1/model')
          .catch(() => undefined)
      )?.status === 200;

    /** @returns how long the answer took, in milliseconds. */
    async function assertTold([method, at, more]: (typeof requests)[number], key: string): Promise<number> {
      const from = performance.now();
      const { headers, ...init } = more?.() ?? {};
      const answer = await fetch(system.url + at, {
        ...init,
        method,
        headers: { authorization: `Bearer ${key}`, ...(headers as Record<string, string>) },
      });
      const body = await answer.text();
      const ms = performance.now() - from;
      assert.equal(answer.status, 503, `${method} ${at}: ${body}`);
      // tus has errors of its own form.
      if (at !== '/v1/uploads/tus') {
        assert.equal((JSON.parse(body) as Problem).code, 'unavailable');
        assert.match(answer.headers.get('retry-after') ?? '', /^[1-5]$/);
      }
      assert.ok(ms < 1_000, `${method} ${at} answered after ${Math.round(ms)} ms`);
      return ms;
    }

    test('answers 503 within a second when it is frozen, whichever request finds out', async (t) => {
      let slowest = 0;
      const asked = [
        // What is known of this tenant is believed for a moment: it is the handler that finds out,
        ...requests.map((one) => [tenant.key, one] as const),
        // and here the counting of its requests.
        [limited.key, requests[0]!] as const,
      ];
      for (const [key, one] of asked) {
        await until(async () => (await works()) && (await works(key)), 10_000);
        process.kill(system.redis.pid, 'SIGSTOP');
        try {
          slowest = Math.max(slowest, await assertTold(one, key));
          const again = await assertTold(one, key);
          assert.ok(again < 300, `known by now, and yet ${Math.round(again)} ms`);
        } finally {
          process.kill(system.redis.pid, 'SIGCONT');
        }
      }
      await until(works, 10_000);
      t.diagnostic(`the slowest answer took ${Math.round(slowest)} ms`);
    });

    test('answers 503 within a second of the end of an upload during which it froze', async () => {
      const sending = sendSlowly(tenant.key, { 'transfer-encoding': 'chunked', 'idempotency-key': 'frozen' });
      await until(async () => (await redis.keys(`as:{${tenant.name}}:idempotency:*:lease`)).length === 1);
      process.kill(system.redis.pid, 'SIGSTOP');
      try {
        const from = performance.now();
        sending.end();
        const { status, body } = await sending.response;
        assert.deepEqual([status, body.code], [503, 'unavailable']);
        assert.ok(performance.now() - from < 2_000, `${performance.now() - from} ms`);
      } finally {
        process.kill(system.redis.pid, 'SIGCONT');
      }
      await until(works, 10_000);
    });

    test('says at /readyz which part it is, and at /healthz that it lives', async () => {
      process.kill(system.redis.pid, 'SIGSTOP');
      try {
        const from = performance.now();
        const { status, body } = await request<{ reasons: object }>(`${system.url}/readyz`);
        assert.equal(status, 503);
        assert.ok('redis' in body.reasons);
        assert.ok(performance.now() - from < 2_100);
        assert.equal((await fetch(`${system.url}/healthz`)).status, 200);
      } finally {
        process.kill(system.redis.pid, 'SIGCONT');
      }
      await until(works, 10_000);
    });

    test('answers 503 at once when it is dead, and goes on when it is back', async (t) => {
      await system.redis.stop('SIGKILL');
      let slowest = 0;
      for (const key of [tenant.key, operatorKey])
        for (const one of requests) slowest = Math.max(slowest, await assertTold(one, key));
      await system.redis.start();
      await until(works, 10_000);
      assert.equal((await tenant.send()).status, 202);
      t.diagnostic(`the slowest answer took ${Math.round(slowest)} ms`);
    });

    test('makes no job of a song that it could not promise, once Redis is back', async () => {
      const own = await newTenant();
      assert.equal((await own.send()).status, 202);
      process.kill(system.redis.pid, 'SIGSTOP');
      try {
        for (let n = 0; n < 5; n += 1) assert.equal((await own.send()).status, 503);
      } finally {
        process.kill(system.redis.pid, 'SIGCONT');
      }
      await until(works, 10_000);
      assert.equal(await own.open(), 1);
    });
  });
});
