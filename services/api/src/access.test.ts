import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectRedis } from '@acousticsense/shared/redis';
import { createUrlSigner } from '@acousticsense/shared/signed-url';
import { createTenants } from '@acousticsense/shared/tenants';
import express from 'express';
import { pino } from 'pino';
import { startRedis } from '../../../test/redis.ts';
import { guardAccess, tenantOf } from './access.ts';
import { answerProblem } from './app.ts';

const operatorKey = 'the-operators-own-key';
const service = { log: pino({ level: 'silent' }) };
const signer = createUrlSigner(randomBytes(32).toString('base64'));

/** A guarded service that answers with whom it takes the caller for. */
async function openService(t: TestContext, apiKey?: string) {
  const server = await startRedis({ appendOnly: true, args: ['--appendfsync', 'always'] });
  const redis = connectRedis(server.url, 500);
  await once(redis, 'ready');
  const tenants = createTenants(redis);
  const app = express();
  app.set('query parser', 'simple');
  app.use(guardAccess({ host: '127.0.0.1', allowedHosts: [], apiKey }, tenants, signer));
  app.get(['/healthz', '/readyz'], (_request, response) => void response.send('ok'));
  app.use(
    (request, response) =>
      void response.json({ tenant: tenantOf(response), url: request.url, query: request.query }),
  );
  app.use(answerProblem(service));
  const http = createServer(app);
  http.listen(0, '127.0.0.1');
  await once(http, 'listening');
  t.after(async () => {
    http.closeAllConnections();
    http.close();
    redis.disconnect();
    await server[Symbol.asyncDispose]();
  });
  const base = `http://127.0.0.1:${(http.address() as AddressInfo).port}`;
  async function call(headers: Record<string, string> = {}, at = '/v1/model', method = 'GET') {
    const response = await fetch(base + at, { method, headers, redirect: 'manual' });
    const text = await response.text();
    const body = (
      /json/.test(response.headers.get('content-type') ?? '') && text !== '' ? JSON.parse(text) : {}
    ) as {
      tenant?: string;
      url?: string;
      query?: Record<string, string>;
      code?: string;
      detail?: string;
    };
    return { status: response.status, ...body, headers: response.headers };
  }
  return { server, tenants, call };
}

/** The three ways to send a key. */
const ways = (key: string): Record<string, string>[] => [
  { authorization: `Bearer ${key}` },
  { 'x-api-key': key },
  { cookie: `other=1; acousticsense_key=${key}` },
];

for (const apiKey of [undefined, operatorKey]) {
  const where = apiKey === undefined ? 'without an API_KEY' : 'with an API_KEY';

  test(`${where}: a tenant's key is that tenant's, however it is sent`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key } = await tenants.createKey('acme', '');
    await tenants.createKey('umbrella', '');
    for (const headers of ways(key)) {
      assert.equal((await call(headers)).tenant, 'acme');
      assert.equal((await call({ ...headers, 'x-tenant': 'acme' })).tenant, 'acme');
      for (const other of ['umbrella', 'default', 'nobody', '']) {
        const refused = await call({ ...headers, 'x-tenant': other });
        assert.deepEqual([refused.status, refused.code], [404, 'tenant_not_found'], other);
      }
    }
  });

  test(`${where}: a key that was never made, or is revoked, is refused and never taken for none`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key, id } = await tenants.createKey('acme', '');
    assert.equal((await call(ways(key)[0])).status, 200);
    await tenants.revokeKey(id);
    for (const dead of [key, 'as_wrong', 'anything-else', `${operatorKey}x`]) {
      for (const headers of ways(dead)) {
        for (const at of ['/v1/jobs', '/v1/model', '/metrics', '/']) {
          if (at === '/' && headers['cookie']) continue;
          const refused = await call(headers, at);
          assert.deepEqual([refused.status, refused.code], [401, 'unauthorized'], `${dead} at ${at}`);
        }
        assert.equal((await call(headers, '/v1/jobs', 'POST')).status, 401);
        assert.equal((await call({ ...headers, 'x-tenant': 'acme' })).status, 401);
      }
    }
    assert.equal((await call({}, `/?key=${key}`)).status, 401);
  });

  test(`${where}: opening the page with a tenant's key sets the cookie that speaks for it`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key } = await tenants.createKey('acme', '');
    const opened = await call({}, `/?key=${key}`);
    assert.deepEqual([opened.status, opened.headers.get('location')], [303, '/']);
    const cookie = opened.headers.get('set-cookie')!;
    assert.match(cookie, /HttpOnly.*SameSite=Strict/);
    assert.equal((await call({ cookie: cookie.split(';')[0]! }, '/')).tenant, 'acme');
  });

  test(`${where}: what tells of all tenants is the operator's alone`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key } = await tenants.createKey('acme', '');
    const refused = await call({ 'x-api-key': key }, '/metrics');
    assert.deepEqual([refused.status, refused.code], [404, 'not_found']);
    assert.equal((await call(apiKey ? { 'x-api-key': apiKey } : {}, '/metrics')).status, 200);
  });

  test(`${where}: the operator speaks for the default tenant, and for any that exists`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    await tenants.createKey('acme', '');
    for (const headers of apiKey ? ways(apiKey) : [{}]) {
      assert.equal((await call(headers)).tenant, 'default');
      assert.equal((await call({ ...headers, 'x-tenant': 'acme' })).tenant, 'acme');
      for (const nobody of ['nobody', 'acme/weight', 'ACME', '../acme']) {
        const refused = await call({ ...headers, 'x-tenant': nobody });
        assert.deepEqual([refused.status, refused.code], [404, 'tenant_not_found'], nobody);
      }
    }
  });
}

test('of two keys the one in the header counts, not the cookie that a browser adds', async (t) => {
  const { tenants, call } = await openService(t, operatorKey);
  const [acme, umbrella] = [await tenants.createKey('acme', ''), await tenants.createKey('umbrella', '')];
  const cookie = `acousticsense_key=${umbrella.key}`;
  assert.equal((await call({ cookie, authorization: `Bearer ${acme.key}` })).tenant, 'acme');
  assert.equal((await call({ cookie, authorization: 'Bearer wrong' })).status, 401);
});

test('a dead cookie is dropped: where no key is asked for the page opens again without it', async (t) => {
  const open = await openService(t);
  const cookie = 'acousticsense_key=of-another-service';
  const page = await open.call({ cookie }, '/');
  assert.deepEqual([page.status, page.headers.get('location')], [303, '/']);
  const request = await open.call({ cookie }, '/v1/jobs', 'POST');
  assert.equal(request.status, 401, 'a page that is open does not change its tenant unnoticed');
  const keyed = await openService(t, operatorKey);
  const refused = await keyed.call({ cookie }, '/');
  assert.equal(refused.status, 401);
  for (const { headers } of [page, request, refused])
    assert.match(headers.get('set-cookie')!, /^acousticsense_key=;.*Expires=Thu, 01 Jan 1970/);
});

test('a key dies within 5 seconds of being revoked elsewhere', async (t) => {
  const { server, tenants, call } = await openService(t, operatorKey);
  const { key, id } = await tenants.createKey('acme', '');
  assert.equal((await call({ 'x-api-key': key })).status, 200);
  const other = connectRedis(server.url);
  await once(other, 'ready');
  await createTenants(other).revokeKey(id);
  other.disconnect();
  const from = performance.now();
  while ((await call({ 'x-api-key': key })).status === 200) {
    assert.ok(performance.now() - from < 5_000);
    await sleep(50);
  }
  assert.equal((await call({ 'x-api-key': key })).status, 401);
});

test('while Redis is away a tenant hears 503 and not 401; health and the operator need no Redis', async (t) => {
  const { server, tenants, call } = await openService(t, operatorKey);
  const { key } = await tenants.createKey('acme', '');
  await server.stop('SIGKILL');
  const away = await call({ 'x-api-key': key });
  assert.deepEqual([away.status, away.code], [503, 'unavailable']);
  assert.ok(away.headers.get('retry-after'));
  assert.equal((await call({}, '/healthz')).status, 200);
  assert.equal((await call({ 'x-api-key': operatorKey })).tenant, 'default');
  await server.start();
  for (const from = performance.now(); (await call({ 'x-api-key': key })).tenant !== 'acme'; await sleep(50))
    assert.ok(performance.now() - from < 5_000);
});

const path = '/v1/batches/x/results.jsonl?from=0&to=1000';
const later = () => Date.now() + 60_000;

for (const apiKey of [undefined, operatorKey]) {
  const where = apiKey === undefined ? 'without an API_KEY' : 'with an API_KEY';

  test(`${where}: a signed link needs no key, and routes do not see its signature`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key } = await tenants.createKey('umbrella', '');
    const link = signer.sign('acme', path, later());
    for (const headers of [{}, ...ways(key), ...ways('wrong'), { 'x-tenant': 'acme' }]) {
      const answer = await call(headers, link);
      assert.deepEqual(
        [answer.status, answer.tenant, answer.url, answer.query],
        [200, 'acme', path, { from: '0', to: '1000' }],
      );
    }
    assert.equal((await call({}, link, 'HEAD')).status, 200);
    const bare = await call({}, signer.sign('acme', '/v1/jobs/x', later()));
    assert.deepEqual([bare.tenant, bare.url, bare.query], ['acme', '/v1/jobs/x', {}]);
  });

  test(`${where}: a link that was changed or has expired is refused, whatever else is sent`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    const { key } = await tenants.createKey('acme', '');
    const link = signer.sign('acme', path, later());
    const cases: [link: string, method: string, words: RegExp][] = [
      [signer.sign('acme', path, Date.now() - 1_000), 'GET', /expired at 20/],
      [link.replace('to=1000', 'to=9999'), 'GET', /changed/],
      [link.replace('results.jsonl', 'bad-rows.jsonl'), 'GET', /changed/],
      [link.replace('tenant=acme', 'tenant=default'), 'GET', /changed/],
      [`${link}&x=1`, 'GET', /changed/],
      [link, 'POST', /changed/],
      [link, 'DELETE', /changed/],
      [createUrlSigner(randomBytes(32).toString('base64')).sign('acme', path, later()), 'GET', /changed/],
      ['/v1/jobs/x?signature=', 'GET', /changed/],
      ['/metrics?signature=x', 'GET', /changed/],
      ['/?signature=x', 'GET', /changed/],
    ];
    for (const [at, method, words] of cases) {
      for (const headers of [{}, ...ways(key), ...(apiKey ? ways(apiKey) : [])]) {
        const refused = await call(headers, at, method);
        assert.deepEqual([refused.status, refused.code], [401, 'unauthorized'], `${method} ${at}`);
        assert.match(refused.detail!, words);
      }
    }
  });

  test(`${where}: a link speaks for no other tenant, and opens nothing of the operator's`, async (t) => {
    const { tenants, call } = await openService(t, apiKey);
    await tenants.createKey('umbrella', '');
    const link = signer.sign('default', path, later());
    for (const other of ['umbrella', 'acme', 'nobody', '']) {
      const refused = await call({ 'x-tenant': other }, link);
      assert.deepEqual([refused.status, refused.code], [404, 'tenant_not_found'], other);
    }
    const metrics = await call({}, signer.sign('default', '/metrics', later()));
    assert.deepEqual([metrics.status, metrics.code], [404, 'not_found']);
  });
}
