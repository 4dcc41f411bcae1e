/** Real HTTP, Redis, queues and storage; what the webhook service would do is done by the store's own functions. */
import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, beforeEach, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { createEgressGuard } from '@acousticsense/egress/guard';
import { createEndpointQueues } from '@acousticsense/shared/endpoint-queues';
import { createEndpoints, endpointQueueName } from '@acousticsense/shared/endpoints';
import { createEventLog } from '@acousticsense/shared/event-log';
import type { StoredEvent } from '@acousticsense/shared/events';
import { deadLetterKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { queuePrefix } from '@acousticsense/shared/queues';
import { connectRedis } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import { createOrders, type WebhookOrder, type WebhookOrders } from '@acousticsense/shared/webhook-orders';
import express from 'express';
import { pino } from 'pino';
import { startRedis } from '../../../test/redis.ts';
import { answerProblem } from './app.ts';
import { createWebhookRoutes } from './webhook-routes.ts';
import {
  deadLetterListSchema,
  endpointDetailSchema,
  endpointListSchema,
  endpointResourceSchema,
  newEndpointSchema,
  resentSchema,
  testSchema,
} from './webhook-schemas.ts';

const server = await startRedis();
const redis = connectRedis(server.url);
await once(redis, 'ready');
const directory = await mkdtemp(path.join(tmpdir(), 'as-webhooks-'));
const storage = openStorage(pathToFileURL(directory).href);
const guard = createEgressGuard({ allow: '127.0.0.1:8099' });
const log = pino({ level: 'silent' });
const eventLog = createEventLog({ redis, storage, log });
const queue = createOrders(redis);
const orders: Pick<WebhookOrders, 'add'> = {
  async add({ kind, tenant, endpointId }) {
    const orderId = await queue.add({ kind, tenant, endpointId });
    ordered.push({ kind, endpointId, orderId });
    return orderId;
  },
};
const endpoints = createEndpoints({ redis, secrets: createSecrets(randomBytes(32).toString('base64')) });
/** What was ordered of the webhook service. */
let ordered: Omit<WebhookOrder, 'v' | 'tenant'>[] = [];

/** The header `x-tenant` says who calls. */
async function serve(store = endpoints): Promise<AsyncDisposable & { url: string }> {
  const app = express();
  app.set('query parser', 'simple');
  app.use(
    createWebhookRoutes({
      ...{ endpoints: store, orders, eventLog, storage, guard, log },
      queues: createEndpointQueues(redis),
      tenantOf: (response) => String(response.req.headers['x-tenant'] ?? 'acme'),
    }),
  );
  app.use(answerProblem({ log }));
  const http = createServer(app).listen(0, '127.0.0.1');
  await once(http, 'listening');
  return {
    url: `http://127.0.0.1:${(http.address() as AddressInfo).port}/v1/webhooks/endpoints`,
    async [Symbol.asyncDispose]() {
      http.closeAllConnections();
      http.close();
    },
  };
}

const api = await serve();
after(async () => {
  await api[Symbol.asyncDispose]();
  await queue.close();
  await guard.close();
  redis.disconnect();
  storage.close();
  await server[Symbol.asyncDispose]();
  await rm(directory, { recursive: true, force: true });
});
let tenant = '';
beforeEach(() => {
  ordered = [];
  tenant = `acme-${randomUUID().slice(0, 8)}`;
});

interface Answer {
  status: number;
  // biome-ignore lint/suspicious/noExplicitAny: the answers' shapes are what is tested
  body: any;
  text: string;
}

async function call(method: string, at = '', body?: unknown, { url = api.url, by = tenant } = {}) {
  const answer = await fetch(url + at, {
    method,
    headers: { 'x-tenant': by, ...(body === undefined ? {} : { 'content-type': 'application/json' }) },
    ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
  const text = await answer.text();
  return { status: answer.status, text, body: text === '' ? undefined : JSON.parse(text) } as Answer;
}
const refused = ({ status, body }: Answer) => [status, body.code, body.field];

async function register(more: object = {}): Promise<{ id: string; at: string; secret: string; url: string }> {
  const { status, body, text } = await call('POST', '', {
    url: 'https://receiver.example.com/hooks',
    ...more,
  });
  assert.equal(status, 201, text);
  return { id: body.id, at: `/${body.id}`, secret: body.secret, url: body.url };
}
const prove = ({ id, url }: { id: string; url: string }) =>
  endpoints.verified(tenant, id, { at: Date.now(), ok: true, status: 200, url });

const event = {
  type: 'endpoint.disabled',
  timestamp: '2026-11-22T10:00:00.000Z',
  data: { endpointId: 'ep_x', url: 'https://x.example/', reason: 'gone', failingSince: null },
} as const satisfies StoredEvent;
const letter = (eventId: string, more: object = {}) => ({
  ...{ eventId, cursor: '1000-0', type: 'job.completed', url: 'https://receiver.example.com/hooks' },
  ...{ body: '{}', deadAt: Date.parse('2026-11-20T01:00:00Z'), reason: 'exhausted' },
  attempts: [{ at: 1_000, attempt: 1, outcome: 'failed', status: 500, ms: 4, problem: 'status' }],
  ...more,
});
const bury = (id: string, eventId: string, day: string, more: object = {}) =>
  storage.put(
    deadLetterKey(tenant, id, new Date(day), eventId),
    Buffer.from(JSON.stringify(letter(eventId, more))),
  );

test('an endpoint is registered, asked for its proof at once, and its secret is shown this once', async () => {
  const made = await call('POST', '', {
    url: 'https://receiver.example.com:443/hooks',
    types: ['job.completed'],
  });
  assert.equal(made.status, 201, made.text);
  const { secret, ...shown } = newEndpointSchema.parse(made.body);
  assert.match(secret, /^whsec_/);
  assert.deepEqual(
    [shown.url, shown.status, shown.types, shown.secrets.length],
    ['https://receiver.example.com/hooks', 'unverified', ['job.completed'], 1],
  );
  assert.deepEqual(
    ordered.map(({ kind, endpointId }) => [kind, endpointId]),
    [['verify', shown.id]],
  );
  const list = await call('GET');
  assert.deepEqual(endpointListSchema.parse(list.body).endpoints, [shown]);
  const one = await call('GET', `/${shown.id}`);
  const { backlog, attempts, ...rest } = endpointDetailSchema.parse(one.body);
  assert.deepEqual([rest, backlog, attempts], [shown, { waiting: 0, delayed: 0, active: 0 }, []]);
  for (const { text } of [list, one]) assert.ok(!text.includes('whsec_'));
});

test('a second endpoint with the same url is refused', async () => {
  await register();
  const again = await call('POST', '', { url: 'https://RECEIVER.example.com/hooks' });
  assert.deepEqual(refused(again), [409, 'endpoint_exists', 'url']);
});

test('of another tenant nothing is seen, changed or ordered', async () => {
  const { id, at } = await register();
  const before = [...ordered];
  const evil = { by: 'evil' };
  assert.deepEqual((await call('GET', '', undefined, evil)).body.endpoints, []);
  for (const [method, path, body] of [
    ['GET', ''],
    ['PATCH', '', { maxInFlight: 1 }],
    ['DELETE', ''],
    ['POST', '/verify'],
    ['POST', '/test'],
    ['GET', '/tests/x'],
    ['POST', '/rotate'],
    ['POST', '/disable'],
    ['POST', '/enable'],
    ['POST', '/resend', { eventId: 'evt_1' }],
    ['POST', '/replay', { after: '1-0' }],
    ['GET', '/dead-letters'],
    ['POST', '/dead-letters/resend', { all: true }],
  ] as const) {
    const answer = await call(method, at + path, body, evil);
    assert.deepEqual(refused(answer), [404, 'endpoint_not_found', undefined], `${method} ${path}`);
  }
  assert.deepEqual(ordered, before);
  assert.equal((await endpoints.get(tenant, id))?.status, 'unverified');
});

test('urls that are not called are refused, and what the operator opened is taken', async () => {
  for (const url of [
    'http://receiver.example.com/',
    'ftp://receiver.example.com/',
    'https://user:hush@receiver.example.com/',
    'https://receiver.example.com/#a',
    'https://receiver.example.com/a/../b',
    'https://10.1.2.3/',
    'https://[::1]/',
    'https://169.254.169.254/latest',
    'http://127.0.0.1:8098/',
    'https://2130706433/',
    'no url',
  ]) {
    const answer = await call('POST', '', { url });
    assert.deepEqual(refused(answer), [422, 'url_not_allowed', 'url'], url);
    assert.ok(!answer.text.includes('hush'));
  }
  const { at } = await register({ url: 'http://127.0.0.1:8099/hooks' });
  assert.deepEqual(refused(await call('PATCH', at, { url: 'https://127.0.0.1/' })), [
    422,
    'url_not_allowed',
    'url',
  ]);
});

test('requests that are none are refused by name of the field, without repeating a secret', async () => {
  const { at } = await register();
  const url = 'https://other.example.com/';
  const cases: [at: string, body: unknown, expected: unknown[]][] = [
    ['', {}, [400, 'bad_option', 'url']],
    ['', { url, types: ['job.exploded'] }, [400, 'bad_option', 'types']],
    ['', { url, maxInFlight: 101 }, [400, 'bad_option', 'maxInFlight']],
    ['', { url, maxPerSecond: 0 }, [400, 'bad_option', 'maxPerSecond']],
    ['', { url, secret: 'whsec_hush' }, [400, 'bad_option', 'secret']],
    ['', { url, status: 'enabled' }, [400, 'bad_option', 'status']],
    ['', '{"url": "hush', [400, 'bad_request', undefined]],
    [`${at}/rotate`, { secret: 'hush' }, [400, 'bad_option', 'secret']],
    [`${at}/rotate`, { overlapHours: 169 }, [400, 'bad_option', 'overlapHours']],
    [`${at}/resend`, {}, [400, 'bad_option', 'eventId']],
    [`${at}/replay`, {}, [400, 'bad_option', 'after']],
    [`${at}/replay`, { after: '1-0', from: '2026-11-22T10:00:00Z' }, [400, 'bad_option', 'after']],
    [`${at}/replay`, { after: 'yesterday' }, [400, 'bad_option', 'after']],
    [
      `${at}/replay`,
      { after: '1-0', until: '2-0', to: '2026-11-22T10:00:00Z' },
      [400, 'bad_option', 'until'],
    ],
    [`${at}/dead-letters/resend`, {}, [400, 'bad_option', 'eventId']],
    [`${at}/dead-letters/resend`, { all: true, day: '2026-11-22' }, [400, 'bad_option', 'eventId']],
    [`${at}/dead-letters/resend`, { day: '../2026' }, [400, 'bad_option', 'day']],
  ];
  for (const [path, body, expected] of cases) {
    const answer = await call('POST', path, body);
    assert.deepEqual(refused(answer), expected, answer.text);
    assert.ok(!answer.text.includes('hush'));
  }
  assert.deepEqual(refused(await call('GET', `${at}/dead-letters?day=x`)), [400, 'bad_option', 'day']);
  const form = await fetch(api.url, { method: 'POST', body: new URLSearchParams({ url }) });
  assert.equal(form.status, 415);
  const method = await fetch(`${api.url}${at}`, { method: 'PUT', headers: { 'x-tenant': tenant } });
  assert.deepEqual([method.status, method.headers.get('allow')], [405, 'GET, HEAD, PATCH, DELETE']);
});

test('without SECRETS_KEY no endpoint is registered, and the reason is told', async () => {
  await using keyless = await serve(createEndpoints({ redis, secrets: createSecrets(undefined) }));
  const answer = await call('POST', '', { url: 'https://receiver.example.com/' }, { url: keyless.url });
  assert.deepEqual(refused(answer), [501, 'secrets_not_kept', undefined]);
});

test('what is named is changed; another url has to prove itself, and is asked to at once', async () => {
  const endpoint = await register({ description: 'old' });
  await prove(endpoint);
  const { at } = endpoint;
  const changed = await call('PATCH', at, { maxInFlight: 2, description: '' });
  const { maxInFlight, maxPerSecond, description, status } = endpointResourceSchema.parse(changed.body);
  assert.deepEqual([maxInFlight, maxPerSecond, description, status], [2, 50, undefined, 'enabled']);
  assert.equal(ordered.length, 1);
  const moved = await call('PATCH', at, { url: 'https://new.example.com/' });
  assert.deepEqual([moved.body.url, moved.body.status], ['https://new.example.com/', 'unverified']);
  assert.equal(ordered.length, 2);
});

test('a proof, a failure and the last attempts are shown', async () => {
  const endpoint = await register();
  await endpoints.verified(tenant, endpoint.id, {
    ...{ at: 1_000, ok: false, status: 404, problem: 'It said no.', url: endpoint.url },
  });
  await endpoints.failed(tenant, endpoint.id, 2_000);
  await endpoints.recordAttempt(tenant, endpoint.id, {
    ...{ at: 2_000, eventId: 'evt_1', type: 'job.completed', attempt: 3, outcome: 'failed' },
    ...{ status: 503, ms: 12, problem: 'status', excerpt: 'busy' },
  });
  const { body } = await call('GET', endpoint.at);
  const { verification, failingSince, attempts } = endpointDetailSchema.parse(body);
  assert.deepEqual(
    [verification, failingSince],
    [
      { at: '1970-01-01T00:00:01.000Z', ok: false, status: 404, problem: 'It said no.' },
      '1970-01-01T00:00:02.000Z',
    ],
  );
  assert.deepEqual(attempts, [
    {
      ...{ at: '1970-01-01T00:00:02.000Z', eventId: 'evt_1', type: 'job.completed', attempt: 3 },
      ...{ outcome: 'failed', status: 503, ms: 12, problem: 'status', excerpt: 'busy' },
    },
  ]);
});

test('an endpoint is disabled and enabled on request, once it has proven itself', async () => {
  const endpoint = await register();
  const { at } = endpoint;
  assert.deepEqual(refused(await call('POST', `${at}/enable`)), [409, 'endpoint_unverified', undefined]);
  await prove(endpoint);
  const disabled = await call('POST', `${at}/disable`);
  assert.deepEqual([disabled.status, disabled.body.status], [200, 'disabled']);
  assert.equal(disabled.body.disabledReason, 'operator');
  const enabled = await call('POST', `${at}/enable`);
  assert.deepEqual([enabled.body.status, enabled.body.disabledReason], ['enabled', undefined]);
});

test('a proof and a test are ordered, and the outcome of a test is told once it is known', async () => {
  const { id, at } = await register();
  const verify = await call('POST', `${at}/verify`);
  const tested = await call('POST', `${at}/test`);
  assert.deepEqual([verify.status, tested.status], [202, 202]);
  const { orderId } = tested.body;
  assert.deepEqual(ordered.slice(1), [
    { kind: 'verify', endpointId: id, orderId: verify.body.orderId },
    { kind: 'test', endpointId: id, orderId },
  ]);
  assert.deepEqual((await call('GET', `${at}/tests/${orderId}`)).body, { orderId, state: 'waiting' });
  await endpoints.endTest(tenant, id, orderId, { at: 1_000, outcome: 'failed', ms: 7, problem: 'tls' });
  const { body } = await call('GET', `${at}/tests/${orderId}`);
  assert.deepEqual(testSchema.parse(body), {
    ...{ orderId, state: 'done', at: '1970-01-01T00:00:01.000Z', outcome: 'failed', ms: 7, problem: 'tls' },
  });
  assert.deepEqual(refused(await call('GET', `${at}/tests/none`)), [404, 'not_found', undefined]);
});

test('a secret is rotated: the new one is shown once, the older one signs until its overlap ends', async () => {
  const { id, at, secret } = await register();
  const rotated = await call('POST', `${at}/rotate`, { overlapHours: 1 });
  const signing = (afterMs: number) => endpoints.signingSecrets(tenant, id, Date.now() + afterMs);
  assert.deepEqual(await signing(0), [rotated.body.secret, secret]);
  assert.deepEqual(await signing(3_600_001), [rotated.body.secret]);
  const [first, second] = (await call('GET', at)).body.secrets;
  assert.deepEqual([first.until, typeof second.until], [undefined, 'string']);
  const own = `whsec_${randomBytes(24).toString('base64')}`;
  assert.deepEqual((await call('POST', `${at}/rotate`, { secret: own, overlapHours: 0 })).body, {
    secret: own,
  });
  assert.deepEqual(await signing(0), [own]);
  assert.equal((await call('GET', at)).body.secrets.length, 1);
  assert.equal((await call('POST', `${at}/rotate`)).status, 200, 'a body is not needed');
  assert.deepEqual((await signing(23 * 3_600_000)).length, 2, 'a day when nothing is said');
});

test('what is queued is counted, and goes with the endpoint', async () => {
  const { id, at } = await register();
  const name = endpointQueueName(id);
  await redis.rpush(`${queuePrefix(name)}:${name}:wait`, 'a', 'b', 'c');
  assert.deepEqual((await call('GET', at)).body.backlog, { waiting: 3, delayed: 0, active: 0 });
  await endpoints.addResends(tenant, id, [{ cursor: '1-0', eventId: 'evt_1' }]);
  assert.equal((await call('DELETE', at)).status, 204);
  assert.deepEqual(refused(await call('GET', at)), [404, 'endpoint_not_found', undefined]);
  assert.deepEqual(refused(await call('DELETE', at)), [404, 'endpoint_not_found', undefined]);
  assert.deepEqual(await redis.keys(`*${id}*`), []);
});

test('an event is sent again, to its callback when it had one under this endpoint', async () => {
  const { id, at } = await register();
  const callback = { endpointId: id, url: 'https://receiver.example.com/hooks/a' };
  const first = await eventLog.append(tenant, { id: 'evt_1', event });
  const second = await eventLog.append(tenant, { id: 'evt_2', event, callback });
  for (const eventId of ['evt_1', 'evt_2', 'evt_1']) {
    const answer = await call('POST', `${at}/resend`, { eventId });
    assert.deepEqual([answer.status, resentSchema.parse(answer.body)], [202, { resent: 1, more: false }]);
  }
  assert.deepEqual(await endpoints.resends(tenant, id, 10), [
    { cursor: first, eventId: 'evt_1' },
    { cursor: second, eventId: 'evt_2', url: callback.url },
  ]);
  const none = await call('POST', `${at}/resend`, { eventId: 'evt_3' });
  assert.deepEqual(refused(none), [404, 'event_not_found', undefined]);
});

test('a range is told again, by cursors or by times, to the newest event when nothing else is said', async () => {
  const { id, at } = await register();
  const newest = await eventLog.append(tenant, { id: 'evt_1', event });
  const asked = [
    { after: '5-1', until: '9-0', types: ['job.failed'] },
    { from: '1970-01-01T00:00:02Z', to: '1970-01-01T00:00:03Z' },
    { after: '0-0' },
  ];
  const ids = [];
  for (const body of asked) {
    const answer = await call('POST', `${at}/replay`, body);
    assert.equal(answer.status, 202, answer.text);
    ids.push(answer.body.id);
  }
  assert.deepEqual((await endpoints.get(tenant, id))?.replays, [
    { id: ids[0], after: '5-1', until: '9-0', types: ['job.failed'] },
    { id: ids[1], after: '1999-999999999999999', until: '2999-999999999999999' },
    { id: ids[2], after: '0-0', until: newest },
  ]);
  assert.deepEqual((await call('GET', at)).body.replays.length, 3);
  for (let n = 0; n < 2; n += 1) await call('POST', `${at}/replay`, asked[2]);
  assert.deepEqual(refused(await call('POST', `${at}/replay`, asked[2])), [
    409,
    'too_many_replays',
    undefined,
  ]);
});

test('dead letters are listed with every attempt, the newest day first', async () => {
  const { id, at } = await register();
  await bury(id, 'evt_a', '2026-11-20');
  await bury(id, 'evt_b', '2026-11-21');
  await bury(id, 'evt_c', '2026-11-21');
  await bury('ep_other', 'evt_d', '2026-11-22');
  const read = async (query = '') =>
    deadLetterListSchema.parse((await call('GET', `${at}/dead-letters${query}`)).body);
  const all = await read();
  assert.deepEqual(
    [all.deadLetters.map(({ eventId }) => eventId), all.more],
    [['evt_c', 'evt_b', 'evt_a'], false],
  );
  const { attempts, deadAt } = all.deadLetters[0]!;
  assert.deepEqual(
    [attempts[0]?.at, attempts[0]?.problem, deadAt],
    ['1970-01-01T00:00:01.000Z', 'status', '2026-11-20T01:00:00.000Z'],
  );
  const one = await read('?limit=1');
  assert.deepEqual([one.deadLetters[0]?.eventId, one.deadLetters.length, one.more], ['evt_c', 1, true]);
  assert.deepEqual(
    (await read('?day=2026-11-20')).deadLetters.map(({ eventId }) => eventId),
    ['evt_a'],
  );
});

test('dead letters are sent again: one, those of a day, all; a callback goes where it went', async () => {
  const { id, at } = await register();
  await bury(id, 'evt_a', '2026-11-20', { cursor: '3000-0', url: 'https://receiver.example.com/hooks/x' });
  await bury(id, 'evt_b', '2026-11-21', { cursor: '1000-0' });
  await bury(id, 'evt_c', '2026-11-21', { cursor: '2000-0', url: 'https://former.example.com/' });
  const ask = async (body: object) => (await call('POST', `${at}/dead-letters/resend`, body)).body;
  const a = {
    ...{ cursor: '3000-0', eventId: 'evt_a', url: 'https://receiver.example.com/hooks/x', day: '2026-11-20' },
  };
  assert.deepEqual(resentSchema.parse(await ask({ eventId: 'evt_a' })), { resent: 1, more: false });
  assert.deepEqual(await endpoints.resends(tenant, id, 10), [a]);
  assert.deepEqual(await ask({ day: '2026-11-21' }), { resent: 2, more: false });
  assert.deepEqual(await ask({ all: true }), { resent: 3, more: false });
  assert.deepEqual(await endpoints.resends(tenant, id, 10), [
    { cursor: '1000-0', eventId: 'evt_b', day: '2026-11-21' },
    { cursor: '2000-0', eventId: 'evt_c', day: '2026-11-21' },
    a,
  ]);
  assert.equal((await ask({ eventId: 'evt_none' })).code, 'event_not_found');
  assert.deepEqual(await ask({ day: '2020-01-01' }), { resent: 0, more: false });
});
