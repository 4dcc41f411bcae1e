/** Real HTTP, real Redis, a server that speaks S3's protocol on loopback, which EGRESS_ALLOW opens. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, beforeEach, test } from 'node:test';
import { createEgressGuard } from '@acousticsense/egress/guard';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import { createSourceReader } from '@acousticsense/shared/source-reader';
import { createSources } from '@acousticsense/shared/sources';
import express from 'express';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { startRedis } from '../../../test/redis.ts';
import { startS3, testCredentials } from '../../../test/s3.ts';
import { answerProblem } from './app.ts';
import { createSourceRoutes, registeredSourceSchema, sourceListSchema } from './source-routes.ts';

const redisServer = await startRedis();
const redis = connectRedisForWorker(redisServer.url);
const s3 = await startS3();
const guard = createEgressGuard({ allow: '127.0.0.0/8' });
beforeEach(() => redis.flushall());

/** The header `x-tenant` says who calls. */
async function serve(secretsKey: string | undefined): Promise<AsyncDisposable & { url: string }> {
  const secrets = createSecrets(secretsKey);
  const app = express();
  app.set('query parser', 'simple');
  app.use(
    createSourceRoutes({
      sources: createSources({ redis, secrets, storageUrl: `s3://own?endpoint=${s3.endpoint}` }),
      reader: createSourceReader({
        guard,
        secrets,
        registry: new Registry(),
        limits: { backoffMs: 1, tries: 2 },
      }),
      tenantOf: (response) => String(response.req.headers['x-tenant'] ?? 'acme'),
    }),
  );
  app.use(answerProblem({ log: pino({ level: 'silent' }) }));
  const server = createServer(app).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1/sources`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      server.close();
    },
  };
}

const api = await serve(randomBytes(32).toString('base64'));
after(async () => {
  await api[Symbol.asyncDispose]();
  await guard.close();
  await s3[Symbol.asyncDispose]();
  redis.disconnect();
  await redisServer[Symbol.asyncDispose]();
});

interface Answer {
  status: number;
  // biome-ignore lint/suspicious/noExplicitAny: the answers' shapes are what is tested
  body: any;
  text: string;
}

async function call(method: string, at = '', body?: unknown, { url = api.url, tenant = 'acme' } = {}) {
  const answer = await fetch(url + at, {
    method,
    headers: {
      'x-tenant': tenant,
      ...(body === undefined ? {} : { 'content-type': 'application/json' }),
    },
    ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
  const text = await answer.text();
  return { status: answer.status, text, body: text === '' ? undefined : JSON.parse(text) } as Answer;
}

const bucket = { bucket: 'music', endpoint: s3.endpoint, credentials: testCredentials };
const refused = ({ status, body }: Answer) => [status, body.code, body.field];

test('a source is registered after it was listed, and is told again without its secret', async () => {
  await fetch(`${s3.endpoint}/music/albums/1.mp3`, { method: 'PUT', body: 'x' });
  const secret = { accessKeyId: 'S3RVER', secretAccessKey: 'never-shown-again' };
  const made = await call('PUT', '/catalogue', { ...bucket, prefix: 'albums/', credentials: secret });
  assert.equal(made.status, 201, made.text);
  const parsed = registeredSourceSchema.parse(made.body);
  assert.deepEqual(parsed.verification, { firstKey: 'albums/1.mp3' });
  const again = await call('PUT', '/catalogue', { ...bucket, prefix: 'none/' });
  assert.deepEqual([again.status, again.body.verification.firstKey], [200, null]);
  const read = await call('GET', '/catalogue');
  const list = await call('GET');
  assert.deepEqual(sourceListSchema.parse(list.body).sources, [read.body]);
  assert.equal(read.body.prefix, 'none/');
  for (const { text } of [made, again, read, list]) assert.ok(!text.includes('never-shown-again'));
});

test('a source of another tenant is not seen, not removed and not replaced', async () => {
  await call('PUT', '/catalogue', bucket);
  const evil = { tenant: 'evil' };
  assert.deepEqual((await call('GET', '', undefined, evil)).body.sources, []);
  assert.equal((await call('GET', '/catalogue', undefined, evil)).status, 404);
  assert.equal((await call('DELETE', '/catalogue', undefined, evil)).status, 404);
  assert.equal((await call('PUT', '/catalogue', { ...bucket, prefix: 'x/' }, evil)).status, 201);
  assert.equal((await call('GET', '/catalogue')).body.prefix, '');
});

test('a removed source is gone', async () => {
  await call('PUT', '/catalogue', bucket);
  assert.equal((await call('DELETE', '/catalogue')).status, 204);
  assert.deepEqual(refused(await call('DELETE', '/catalogue')), [404, 'not_found', undefined]);
  assert.deepEqual((await call('GET')).body.sources, []);
});

test('what the source said is told, and nothing is registered, unless nobody asked it', async () => {
  const cases: [definition: object, status: number, code: string, words: RegExp][] = [
    [
      { credentials: { accessKeyId: 'AKIAX', secretAccessKey: 'x' } },
      422,
      'source_forbidden',
      /InvalidAccessKeyId/,
    ],
    [{ bucket: 'nowhere' }, 422, 'source_not_found', /no bucket nowhere/],
    [{ endpoint: 'http://127.0.0.1:9' }, 502, 'source_unavailable', /ECONNREFUSED/],
    [{ endpoint: 'https://169.254.169.254' }, 403, 'source_not_allowed', /does not connect/],
    [{ endpoint: 'http://10.1.2.3:9000' }, 403, 'source_not_allowed', /does not connect/],
  ];
  for (const [definition, status, code, words] of cases) {
    const answer = await call('PUT', '/x', { ...bucket, ...definition });
    assert.deepEqual([answer.status, answer.body.code], [status, code], answer.text);
    assert.match(answer.body.detail, words);
    assert.match(answer.body.detail, /verify=false/);
    assert.equal((await call('GET', '/x')).status, 404);
  }
  const unasked = await call('PUT', '/x?verify=false', { ...bucket, endpoint: 'http://127.0.0.1:9' });
  assert.deepEqual([unasked.status, unasked.body.verification], [201, undefined]);
});

test("the service's own bucket is refused, asked or not", async () => {
  for (const query of ['', '?verify=false']) {
    const answer = await call('PUT', `/own${query}`, { ...bucket, bucket: 'own' });
    assert.deepEqual(refused(answer), [403, 'source_not_allowed', 'bucket']);
  }
  assert.deepEqual((await call('GET')).body.sources, []);
});

test('requests that are none are refused by name of the field, without repeating a secret', async () => {
  const cases: [at: string, body: unknown, expected: unknown[]][] = [
    ['/UPPER', bucket, [400, 'bad_option', 'name']],
    ['/x?verify=maybe', bucket, [400, 'bad_option', 'verify']],
    ['/x', { ...bucket, bucket: 'a/b' }, [400, 'bad_option', 'bucket']],
    ['/x', { ...bucket, endpoint: 'http://h/own' }, [400, 'bad_option', 'endpoint']],
    [
      '/x',
      { ...bucket, credentials: { accessKeyId: 1, secretAccessKey: 'hush' } },
      [400, 'bad_option', 'credentials'],
    ],
    ['/x', { ...bucket, acl: 'public' }, [400, 'bad_option', 'acl']],
    ['/x', '{"bucket": "hush', [400, 'bad_request', undefined]],
    ['/x', { ...bucket, prefix: 'p'.repeat(100_000) }, [400, 'bad_request', undefined]],
  ];
  for (const [at, body, expected] of cases) {
    const answer = await call('PUT', at, body);
    assert.deepEqual(refused(answer), expected, answer.text);
    assert.ok(!answer.text.includes('hush'));
  }
  const form = await fetch(`${api.url}/x`, { method: 'PUT', body: new URLSearchParams({ bucket: 'music' }) });
  assert.equal(form.status, 415);
});

test('without SECRETS_KEY credentials are refused with the reason, and a public bucket is taken', async () => {
  await using keyless = await serve(undefined);
  const answer = await call('PUT', '/x', bucket, { url: keyless.url });
  assert.deepEqual(refused(answer), [501, 'secrets_not_kept', undefined]);
  assert.match(answer.body.detail, /SECRETS_KEY/);
  const open = await call('PUT', '/x', { ...bucket, credentials: undefined }, { url: keyless.url });
  assert.deepEqual([open.status, open.body.access], [201, 'anonymous']);
});

test('methods that are not served are told which are', async () => {
  const answer = await fetch(`${api.url}/x`, { method: 'POST' });
  assert.deepEqual([answer.status, answer.headers.get('allow')], [405, 'GET, HEAD, PUT, DELETE']);
});
