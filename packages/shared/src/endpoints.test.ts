import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, beforeEach, test } from 'node:test';
import { startRedis } from '../../../test/redis.ts';
import {
  createEndpoints,
  type EndpointDefinition,
  endpointChangeSchema,
  endpointDefinitionSchema,
  endpointUrl,
  isUnder,
  type Resend,
  subscribes,
} from './endpoints.ts';
import { ProblemError } from './errors.ts';
import { connectRedisForWorker } from './redis.ts';
import { createSecrets, SecretUnreadable } from './secrets.ts';

const server = await startRedis();
const redis = connectRedisForWorker(server.url);
after(async () => {
  redis.disconnect();
  await server[Symbol.asyncDispose]();
});
beforeEach(() => redis.flushall());

const oldKey = randomBytes(32).toString('base64');
const newKey = randomBytes(32).toString('base64');
const clock = 1_000_000;
const open = (keys: string | undefined = oldKey) =>
  createEndpoints({ redis, secrets: createSecrets(keys), now: () => clock });
const endpoints = open();
const define = (definition: Partial<EndpointDefinition> = {}) =>
  endpointDefinitionSchema.parse({ url: 'https://receiver.example.com/hooks', ...definition });
const register = async (definition: Partial<EndpointDefinition> = {}, tenant = 'acme') =>
  (await endpoints.create(tenant, define(definition))).endpoint;
const problem = (code: string) => (error: unknown) => error instanceof ProblemError && error.code === code;
const proof = (url = 'https://receiver.example.com/hooks') => ({ at: 5, ok: true, status: 200, url });
const statusOf = async (id: string) => (await endpoints.get('acme', id))?.status;
const secretOf = (bytes: number) => `whsec_${randomBytes(bytes).toString('base64')}`;

test('an endpoint is registered unverified, with defaults, and only its tenant finds it', async () => {
  const { endpoint, secret } = await endpoints.create('acme', define({ description: 'ours' }));
  assert.match(endpoint.id, /^ep_[A-Za-z0-9]{22}$/);
  const { cursor, ...stored } = (await endpoints.get('acme', endpoint.id))!;
  assert.deepEqual(stored, {
    ...{ tenant: 'acme', id: endpoint.id, url: 'https://receiver.example.com/hooks', types: [] },
    ...{ description: 'ours', maxInFlight: 8, maxPerSecond: 50, status: 'unverified', replays: [] },
    ...{ secrets: [{ createdAt: clock }], createdAt: clock, updatedAt: clock },
  });
  assert.deepEqual({ ...stored, cursor }, endpoint);
  assert.equal(Buffer.from(secret.replace(/^whsec_/, ''), 'base64').length, 32);
  assert.deepEqual(await endpoints.list('acme'), [endpoint]);
  assert.deepEqual(await endpoints.list('other'), []);
  assert.equal(await endpoints.get('other', endpoint.id), undefined);
  assert.deepEqual(await endpoints.signingSecrets('other', endpoint.id, clock), []);
  assert.deepEqual(await endpoints.tenants(), ['acme']);
});

test("a caller's own secret is taken when it is 24 to 64 bytes in base64, and nothing else is", async () => {
  for (const bytes of [24, 32, 64]) {
    const secret = secretOf(bytes);
    assert.equal(
      (await endpoints.create('acme', define({ url: `https://a.example/${bytes}`, secret }))).secret,
      secret,
    );
  }
  const url = 'https://a.example/';
  for (const secret of [
    secretOf(23),
    secretOf(65),
    randomBytes(32).toString('base64'),
    'whsec_',
    `${secretOf(32)}\n`,
    `whsec_${randomBytes(32).toString('base64').replace('=', '')}`,
    `whsec_${Buffer.alloc(32, 0xff).toString('base64url')}`,
  ])
    assert.equal(endpointDefinitionSchema.safeParse({ url, secret }).success, false, secret);
});

test('Redis holds no secret in the clear, and another endpoint opens none that is moved to it', async () => {
  const { endpoint, secret } = await endpoints.create('acme', define());
  const other = await register({ url: 'https://other.example/' });
  const hash = await redis.hgetall(`as:{acme}:endpoint:${endpoint.id}`);
  assert.ok(!JSON.stringify(hash).includes(secret.slice(6)));
  assert.ok(!JSON.stringify(await endpoints.get('acme', endpoint.id)).includes('sealed'));
  await redis.hset(`as:{acme}:endpoint:${other.id}`, 'secrets', hash['secrets']!);
  await assert.rejects(endpoints.signingSecrets('acme', other.id, clock), SecretUnreadable);
});

test('without a key there are no endpoints', async () => {
  await assert.rejects(open('').create('acme', define()), problem('secrets_not_kept'));
  assert.deepEqual(await endpoints.list('acme'), []);
});

test('the cursor begins at the newest event, also when that was trimmed away, and before the first one', async () => {
  const before = await register({ url: 'https://a.example/' });
  const first = await redis.xadd('as:{acme}:events', '*', 'id', 'e1');
  assert.equal((await redis.xread('STREAMS', 'as:{acme}:events', before.cursor!))?.[0]?.[1].length, 1);
  const second = await redis.xadd('as:{acme}:events', '*', 'id', 'e2');
  assert.equal((await register({ url: 'https://b.example/' })).cursor, second);
  await redis.xtrim('as:{acme}:events', 'MAXLEN', 0);
  const { id, cursor } = await register({ url: 'https://c.example/' });
  assert.equal(cursor, second);
  await endpoints.setCursor('acme', id, first!);
  assert.equal((await endpoints.get('acme', id))?.cursor, first);
});

test('a url is registered once, also of many that are registered at once', async () => {
  const results = await Promise.allSettled(
    Array.from({ length: 8 }, () => endpoints.create('acme', define())),
  );
  assert.equal(results.filter(({ status }) => status === 'fulfilled').length, 1);
  for (const result of results)
    if (result.status === 'rejected') assert.ok(problem('endpoint_exists')(result.reason));
  await register({}, 'other');
  const { id } = await register({ url: 'https://receiver.example.com/other' });
  await assert.rejects(endpoints.update('acme', id, { url: define().url }), problem('endpoint_exists'));
  await endpoints.update('acme', id, { url: 'https://receiver.example.com/other', maxInFlight: 3 });
});

test('fifty endpoints are taken, also of more that are registered at once', async () => {
  const results = await Promise.allSettled(
    Array.from({ length: 53 }, (_, n) => register({ url: `https://a.example/${n}` })),
  );
  const refused = results.filter((result) => result.status === 'rejected');
  assert.equal(refused.length, 3);
  for (const { reason } of refused) assert.ok(problem('too_many_endpoints')(reason));
  const [one] = await endpoints.list('acme');
  assert.equal(await endpoints.remove('acme', one!.id), true);
  await register({ url: 'https://a.example/again' });
});

test('a proof enables an unverified endpoint; a failed one is kept and enables nothing', async () => {
  const { id, url } = await register();
  await assert.rejects(endpoints.enable('acme', id), problem('endpoint_unverified'));
  await endpoints.verified('acme', id, { at: 4, ok: false, status: 404, problem: 'It said no.', url });
  assert.equal(await statusOf(id), 'unverified');
  const { verification } = (await endpoints.get('acme', id))!;
  assert.deepEqual(verification, { at: 4, ok: false, status: 404, problem: 'It said no.' });
  await endpoints.verified('acme', id, proof());
  assert.equal(await statusOf(id), 'enabled');
  await endpoints.verified('acme', id, { at: 6, ok: false, url });
  assert.equal(await statusOf(id), 'enabled', 'what was proven stays so');
});

test('another url is another place: unverified, and a proof of the old one counts for nothing', async () => {
  const { id, url } = await register();
  await endpoints.verified('acme', id, proof());
  await endpoints.failed('acme', id, 10);
  const moved = await endpoints.update('acme', id, { url: 'https://new.example/', description: 'x' });
  assert.equal(moved.status, 'unverified');
  assert.deepEqual([moved.verification, moved.failingSince], [undefined, undefined]);
  await endpoints.verified('acme', id, proof(url));
  assert.equal(await statusOf(id), 'unverified');
  await assert.rejects(endpoints.enable('acme', id), problem('endpoint_unverified'));
  assert.equal(await endpoints.disable('acme', id, 'gone', url), false, 'what the old one answered, too');
  await endpoints.verified('acme', id, proof('https://new.example/'));
  assert.equal(await statusOf(id), 'enabled');
  const same = await endpoints.update('acme', id, { url: 'https://new.example/', description: '' });
  assert.deepEqual([same.status, same.description], ['enabled', undefined]);
});

test('a disabled endpoint is enabled by request alone, and its failures are forgotten then', async () => {
  const { id, url } = await register();
  await endpoints.verified('acme', id, proof());
  await endpoints.failed('acme', id, 10);
  assert.equal(await endpoints.disable('acme', id, 'failing', url), true);
  assert.equal(await endpoints.disable('acme', id, 'operator'), false);
  await endpoints.verified('acme', id, proof());
  const { status, disabledReason, failingSince } = (await endpoints.get('acme', id))!;
  assert.deepEqual([status, disabledReason, failingSince], ['disabled', 'failing', 10]);
  const enabled = await endpoints.enable('acme', id);
  assert.deepEqual(
    [enabled.status, enabled.disabledReason, enabled.failingSince],
    ['enabled', undefined, undefined],
  );
  assert.equal((await endpoints.enable('acme', id)).status, 'enabled');
});

test('an endpoint that nobody verified is not enabled by being disabled first', async () => {
  const { id } = await register();
  await endpoints.disable('acme', id, 'operator');
  await assert.rejects(endpoints.enable('acme', id), problem('endpoint_unverified'));
  await assert.rejects(endpoints.enable('acme', 'ep_none'), problem('endpoint_not_found'));
});

test('of many who disable it at once, one is told that it did', async () => {
  const { id } = await register();
  await endpoints.verified('acme', id, proof());
  const did = await Promise.all(Array.from({ length: 10 }, () => endpoints.disable('acme', id, 'failing')));
  assert.equal(did.filter(Boolean).length, 1);
});

test('one that disabled itself is to be told of until that is done; one disabled on request is not', async () => {
  const untold = async (id: string) => (await endpoints.get('acme', id))?.disabledUntold;
  const { id } = await register();
  await endpoints.disable('acme', id, 'gone');
  assert.equal(await untold(id), clock);
  await endpoints.toldDisabled('acme', id, clock - 1);
  assert.equal(await untold(id), clock, 'what was told is another time that it was disabled');
  await endpoints.toldDisabled('acme', id, clock);
  assert.equal(await untold(id), undefined);
  const other = await register({ url: 'https://other.example/' });
  await endpoints.disable('acme', other.id, 'operator');
  assert.equal(await untold(other.id), undefined);
});

test('failing begins with the first failure after the last success, whatever the order they come in', async () => {
  const { id } = await register();
  const since = async () => (await endpoints.get('acme', id))?.failingSince;
  await endpoints.failed('acme', id, 1_000);
  await endpoints.failed('acme', id, 2_000);
  assert.equal(await since(), 1_000);
  await endpoints.succeeded('acme', id, 500);
  assert.equal(await since(), 1_000, 'a success before it ends nothing');
  await endpoints.succeeded('acme', id, 5_000);
  assert.equal(await since(), undefined);
  assert.equal((await endpoints.get('acme', id))?.lastSuccessAt, 5_000);
  await endpoints.failed('acme', id, 4_000);
  assert.equal(await since(), undefined, 'a failure before it begins nothing');
  await endpoints.failed('acme', id, 6_000);
  assert.equal(await since(), 6_000);
});

test('older secrets sign beside the new one until their overlap ends', async () => {
  const { endpoint, secret: first } = await endpoints.create('acme', define());
  const { id } = endpoint;
  const own = secretOf(24);
  const second = await endpoints.rotate('acme', id, { secret: own, overlapMs: 1_000 });
  const third = await endpoints.rotate('acme', id, { overlapMs: 5_000 });
  assert.equal(second, own);
  assert.deepEqual(await endpoints.signingSecrets('acme', id, clock), [third, second, first]);
  assert.deepEqual(await endpoints.signingSecrets('acme', id, clock + 1_000), [third, second]);
  assert.deepEqual(await endpoints.signingSecrets('acme', id, clock + 5_000), [third]);
  assert.deepEqual(
    (await endpoints.get('acme', id))?.secrets.map(({ until }) => until),
    [undefined, clock + 5_000, clock + 1_000],
  );
  const last = await endpoints.rotate('acme', id, { overlapMs: 0 });
  assert.deepEqual(await endpoints.signingSecrets('acme', id, clock), [last], 'a leaked one ends at once');
});

test('ten secrets are kept, and none is lost when two rotate at once', async () => {
  const { id } = await register();
  const made = await Promise.all(
    Array.from({ length: 6 }, () => endpoints.rotate('acme', id, { overlapMs: 1_000 })),
  );
  const signing = await endpoints.signingSecrets('acme', id, clock);
  assert.equal(signing.length, 7);
  for (const secret of made) assert.ok(signing.includes(secret));
  for (let n = 0; n < 6; n += 1) await endpoints.rotate('acme', id, { overlapMs: 1_000 });
  assert.equal((await endpoints.signingSecrets('acme', id, clock)).length, 10);
  await assert.rejects(endpoints.rotate('acme', 'ep_none', { overlapMs: 0 }), problem('endpoint_not_found'));
});

test('secrets are sealed with the current key, and what no key opens is left alone', async () => {
  const { endpoint, secret } = await endpoints.create('acme', define());
  const later = await endpoints.rotate('acme', endpoint.id, { overlapMs: 1_000 });
  const both = open(`${newKey},${oldKey}`);
  assert.equal(await both.reseal(), 2);
  assert.equal(await both.reseal(), 0);
  assert.deepEqual(await open(newKey).signingSecrets('acme', endpoint.id, clock), [later, secret]);
  await assert.rejects(endpoints.signingSecrets('acme', endpoint.id, clock), SecretUnreadable);
  assert.equal(await endpoints.reseal(), 0);
});

test('one unreadable secret beside a readable one keeps nothing from being signed', async () => {
  const { endpoint } = await endpoints.create('acme', define());
  const later = await open(newKey).rotate('acme', endpoint.id, { overlapMs: 1_000 });
  assert.deepEqual(await open(newKey).signingSecrets('acme', endpoint.id, clock), [later]);
});

test('changes of different fields at once all happen', async () => {
  const { id } = await register();
  await Promise.all([
    endpoints.update('acme', id, endpointChangeSchema.parse({ types: ['batch.completed', 'job.failed'] })),
    endpoints.update('acme', id, { maxInFlight: 2 }),
    endpoints.setCursor('acme', id, '7-1'),
    endpoints.failed('acme', id, 9),
    endpoints.verified('acme', id, proof()),
    endpoints.rotate('acme', id, { overlapMs: 1_000 }),
    endpoints.addReplay('acme', id, { after: '1-0', until: '2-0' }),
  ]);
  const all = (await endpoints.get('acme', id))!;
  assert.deepEqual(
    [all.types, all.maxInFlight, all.cursor, all.status, all.secrets.length, all.replays.length],
    [['job.failed', 'batch.completed'], 2, '7-1', 'enabled', 2, 1],
  );
});

test('what is done to an endpoint that was removed brings nothing of it back', async () => {
  const { id, url } = await register();
  const resend: Resend = { cursor: '1-0', eventId: 'evt_1' };
  const attempt = {
    at: 1,
    eventId: 'evt_1',
    type: 'job.failed',
    attempt: 1,
    outcome: 'failed',
    ms: 1,
  } as const;
  await endpoints.addResends('acme', id, [resend]);
  await endpoints.recordAttempt('acme', id, attempt);
  assert.equal(await endpoints.remove('acme', id), true);
  assert.equal(await endpoints.remove('acme', id), false);
  await endpoints.setCursor('acme', id, '9-0');
  await endpoints.setReplay('acme', id, 'rp_1', '9-0');
  await endpoints.succeeded('acme', id, 9);
  await endpoints.failed('acme', id, 9);
  await endpoints.recordAttempt('acme', id, attempt);
  await endpoints.verified('acme', id, proof(url));
  assert.equal(await endpoints.addResends('acme', id, [resend]), 0);
  assert.equal(await endpoints.disable('acme', id, 'gone'), false);
  const gone = problem('endpoint_not_found');
  await assert.rejects(endpoints.update('acme', id, { maxInFlight: 1 }), gone);
  await assert.rejects(endpoints.addReplay('acme', id, { after: '1-0' }), gone);
  await assert.rejects(endpoints.rotate('acme', id, { overlapMs: 0 }), gone);
  assert.deepEqual(await redis.keys('as:{acme}:*'), []);
});

test('a range is told again up to now, moves on, and is over; five at most at once', async () => {
  const { id } = await register();
  const newest = await redis.xadd('as:{acme}:events', '*', 'id', 'e1');
  const replayId = await endpoints.addReplay('acme', id, { after: '1-0', types: ['job.failed'] });
  const replays = async () => (await endpoints.get('acme', id))!.replays;
  assert.deepEqual(await replays(), [{ id: replayId, after: '1-0', until: newest, types: ['job.failed'] }]);
  const results = await Promise.allSettled(
    Array.from({ length: 6 }, () => endpoints.addReplay('acme', id, { after: '2-0', until: '3-0' })),
  );
  assert.equal(results.filter(({ status }) => status === 'fulfilled').length, 4);
  for (const result of results)
    if (result.status === 'rejected') assert.ok(problem('too_many_replays')(result.reason));
  await endpoints.setReplay('acme', id, replayId, '2-5');
  assert.equal((await replays())[0]?.after, '2-5');
  await endpoints.setReplay('acme', id, replayId, undefined);
  await endpoints.setReplay('acme', id, replayId, '2-6');
  assert.deepEqual(
    (await replays()).map(({ after }) => after),
    ['2-0', '2-0', '2-0', '2-0'],
  );
});

test('events to send again wait once each, the oldest first, until they are said to be queued', async () => {
  const { id } = await register();
  const later = { cursor: '2000-0', eventId: 'evt_b', url: 'https://receiver.example.com/hooks/b' };
  const early = { cursor: '1000-0', eventId: 'evt_a', day: '2026-11-24' };
  assert.equal(await endpoints.addResends('acme', id, [later, early]), 2);
  assert.equal(await endpoints.addResends('acme', id, [early]), 1);
  assert.deepEqual(await endpoints.resends('acme', id, 10), [early, later]);
  assert.deepEqual(await endpoints.resends('acme', id, 1), [early]);
  assert.deepEqual(await endpoints.resends('acme', id, 0), []);
  await endpoints.dropResends('acme', id, [early]);
  assert.deepEqual(await endpoints.resends('acme', id, 10), [later]);
});

test('ten thousand events wait to be sent again, and it is told how many of more do', async () => {
  const { id } = await register();
  const many = Array.from({ length: 10_002 }, (_, n) => ({ cursor: `${n}-0`, eventId: `evt_${n}` }));
  assert.equal(await endpoints.addResends('acme', id, many), 10_000);
  assert.equal(await endpoints.addResends('acme', id, many.slice(9_990)), 10);
  assert.equal((await endpoints.resends('acme', id, 20_000)).length, 10_000);
});

test('the last ten attempts are on record, newest first', async () => {
  const { id } = await register();
  for (let n = 1; n <= 12; n += 1) {
    await endpoints.recordAttempt('acme', id, {
      ...{ at: n, eventId: `evt_${n}`, type: 'job.completed', attempt: n, outcome: 'failed' },
      ...{ ms: 3, problem: 'timeout' },
    });
  }
  const attempts = await endpoints.attempts('acme', id);
  assert.deepEqual(
    attempts.map(({ at }) => at),
    [12, 11, 10, 9, 8, 7, 6, 5, 4, 3],
  );
  assert.equal(attempts[0]?.problem, 'timeout');
});

test('a test waits until its outcome is known, and is forgotten after an hour', async () => {
  const { id } = await register();
  const outcome = { at: 5, outcome: 'delivered', status: 200, ms: 12, excerpt: 'ok' } as const;
  assert.equal(await endpoints.test('acme', id, 'o1'), undefined);
  await endpoints.beginTest('acme', id, 'o1');
  assert.equal(await endpoints.test('acme', id, 'o1'), 'waiting');
  await endpoints.endTest('acme', id, 'o1', outcome);
  await endpoints.beginTest('acme', id, 'o1');
  assert.deepEqual(await endpoints.test('acme', id, 'o1'), outcome, 'the outcome may be there first');
  const left = await redis.ttl(`as:{acme}:endpoint:${id}:test:o1`);
  assert.ok(left > 3_500 && left <= 3_600);
});

test('an endpoint without types is told of all but progress; one with types of these alone', async () => {
  assert.equal(subscribes({ types: [] }, 'job.completed'), true);
  assert.equal(subscribes({ types: [] }, 'batch.progress'), false);
  assert.equal(subscribes({ types: ['batch.progress'] }, 'batch.progress'), true);
  assert.equal(subscribes({ types: ['batch.progress'] }, 'job.completed'), false);
});

test('a callback lies under an endpoint of the same origin, at its path or below', () => {
  const cases: [endpoint: string, callback: string, expected: boolean][] = [
    ['https://r.example/hooks', 'https://r.example/hooks', true],
    ['https://r.example/hooks', 'https://R.example:443/hooks/a/b?x=1&y=..', true],
    ['https://r.example/hooks?key=1', 'https://r.example/hooks?key=2', true],
    ['https://r.example/', 'https://r.example', true],
    ['https://r.example/', 'https://r.example/anything', true],
    ['https://r.example/hooks/', 'https://r.example/hooks/a', true],
    ['http://127.0.0.1:99/a', 'http://127.0.0.1:99/a/b', true],
    ['https://r.example/hooks/', 'https://r.example/hooks', false],
    ['https://r.example/hooks', 'https://r.example/hooksandmore', false],
    ['https://r.example/hooks', 'https://r.example/', false],
    ['https://r.example/hooks', 'https://r.example/HOOKS', false],
    ['https://r.example/hooks', 'http://r.example/hooks', false],
    ['https://r.example/hooks', 'https://r.example:8443/hooks', false],
    ['https://r.example/hooks', 'https://r.example.evil.example/hooks', false],
    ['https://r.example/hooks', 'https://evil.example/https://r.example/hooks', false],
    ['https://r.example/hooks', 'https://r.example/hooks#x', false],
    ['https://r.example/hooks', 'https://r.example/hooks#', false],
    ['https://r.example/hooks', 'https://u:p@r.example/hooks', false],
    ['https://r.example/hooks', 'https://@r.example/hooks', false],
    ['https://r.example/hooks', 'https:\\\\r.example\\hooks', false],
    ['https://r.example/hooks', 'https://r.example/hooks/../admin', false],
    ['https://r.example/hooks', 'https://r.example/other/../hooks', false],
    ['https://r.example/hooks', 'https://r.example/hooks/%2e%2E/admin', false],
    ['https://r.example/hooks', 'https://r.example/hooks/.%2e', false],
    ['https://r.example/hooks', 'https://r.example/hooks/..;x/admin', false],
    ['https://r.example/hooks', 'https://r.example/hooks/..%2fadmin', false],
    ['https://r.example/hooks', 'https://r.example/hooks/a%5C..%5Cb', false],
    ['https://r.example/hooks', 'https://r.example/hooks/.\t./admin', false],
    ['https://r.example/hooks', ' https://r.example/hooks', false],
    ['https://r.example/hooks', '/hooks', false],
    ['https://r.example/hooks', 'hooks', false],
  ];
  for (const [url, callback, expected] of cases) assert.equal(isUnder({ url }, callback), expected, callback);
});

test('the url of an endpoint is https and public, or what the operator has opened', () => {
  const guard = {
    opens: (host: string, port: number) => host === 'inside.example' && port === 8080,
    refusalOf: (host: string) => (host === '10.0.0.1' ? new Error('private') : undefined),
  };
  assert.equal(endpointUrl('HTTPS://R.example:443/a?b=c', guard), 'https://r.example/a?b=c');
  assert.equal(endpointUrl('http://inside.example:8080/a', guard), 'http://inside.example:8080/a');
  for (const [url, words] of [
    ['receiver', /is no URL/],
    ['http://r.example/', /https/],
    ['http://inside.example/', /https/],
    ['ftp://r.example/', /https/],
    ['file:///etc/passwd', /https/],
    ['https://u@r.example/', /user or a password/],
    ['https://:p@r.example/', /user or a password/],
    ['https://@r.example/', /user or a password/],
    ['https://r.example/#', /fragment/],
    ['https://r.example/a/../b', /more than one way/],
    ['https://r.example/a b', /more than one way/],
    ['https://10.0.0.1/', /public internet/],
  ] as const)
    assert.throws(
      () => endpointUrl(url, guard),
      (error) => problem('url_not_allowed')(error) && words.test((error as Error).message),
      url,
    );
});
