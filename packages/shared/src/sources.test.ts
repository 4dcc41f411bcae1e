import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, beforeEach, test } from 'node:test';
import { startRedis } from '../../../test/redis.ts';
import { ProblemError } from './errors.ts';
import { connectRedisForWorker } from './redis.ts';
import { createSecrets } from './secrets.ts';
import { createSources, presentSource, type SourceDefinition, sourceDefinitionSchema } from './sources.ts';

const server = await startRedis();
const redis = connectRedisForWorker(server.url);
after(async () => {
  redis.disconnect();
  await server[Symbol.asyncDispose]();
});
beforeEach(() => redis.flushall());

const secretsKey = randomBytes(32).toString('base64');
const open = (storageUrl = 'file:///objects', keys: string | undefined = secretsKey) =>
  createSources({ redis, secrets: createSecrets(keys), storageUrl });
const define = (definition: Partial<SourceDefinition>) =>
  sourceDefinitionSchema.parse({ bucket: 'music', ...definition });
async function register(
  sources: ReturnType<typeof open>,
  name: string,
  definition: Partial<SourceDefinition>,
) {
  const source = await sources.prepare('acme', name, define(definition));
  await sources.save(source);
  return source;
}
const problem = (code: string, field?: string) => (error: unknown) =>
  error instanceof ProblemError &&
  error.code === code &&
  (field === undefined || error.details.field === field);

const credentials = { accessKeyId: 'AKIA1', secretAccessKey: 'wJalrXUtnFEMI', sessionToken: 'FwoGZX' };

test('a registered source is listed without its secrets, and Redis holds none of them', async () => {
  const sources = open();
  await register(sources, 'catalogue', {
    prefix: 'albums/',
    endpoint: 'https://S3.example.com:443/',
    credentials,
  });
  const [source] = await sources.list('acme');
  const shown = presentSource(source!);
  assert.deepEqual(
    { ...shown, createdAt: '', updatedAt: '' },
    {
      name: 'catalogue',
      bucket: 'music',
      prefix: 'albums/',
      endpoint: 'https://s3.example.com',
      region: 'us-east-1',
      pathStyle: true,
      access: 'credentials',
      accessKeyId: 'AKIA1',
      createdAt: '',
      updatedAt: '',
    },
  );
  const stored = JSON.stringify(await redis.hgetall('as:{acme}:sources'));
  for (const secret of [credentials.secretAccessKey, credentials.sessionToken]) {
    assert.ok(!stored.includes(secret) && !JSON.stringify(shown).includes(secret));
  }
});

test('the source with the longest prefix reads an object; other tenants, buckets and prefixes have none', async () => {
  const sources = open();
  await register(sources, 'all', {});
  await register(sources, 'albums', { prefix: 'albums/' });
  await register(sources, 'live', { prefix: 'albums/live/' });
  await register(sources, 'part', { bucket: 'speech', prefix: 'en/' });
  const match = await sources.matcher('acme');
  assert.equal(match('music', 'albums/live/1.mp3')?.name, 'live');
  assert.equal(match('music', 'albums/1.mp3')?.name, 'albums');
  assert.equal(match('music', 'singles/1.mp3')?.name, 'all');
  assert.equal(match('speech', 'en/1.mp3')?.name, 'part');
  assert.equal(match('speech', 'fr/1.mp3'), undefined);
  assert.equal(match('other', 'albums/1.mp3'), undefined);
  assert.equal(await sources.sourceFor('evil', 'music', 'albums/1.mp3'), undefined);
  assert.equal((await sources.sourceFor('acme', 'music', 'albums/1.mp3'))?.name, 'albums');
});

test('a key that could leave the prefix on the way matches nothing', async () => {
  const sources = open();
  await register(sources, 'albums', { prefix: 'albums/' });
  const match = await sources.matcher('acme');
  for (const key of ['albums/../private/1.mp3', 'albums/..', 'albums/./1.mp3'])
    assert.equal(match('music', key), undefined, key);
  assert.ok(match('music', 'albums/..hidden/a..b.mp3'));
  await assert.rejects(register(sources, 'up', { prefix: '../' }), problem('bad_option', 'prefix'));
});

test('a removed source matches no more, and removing it again says so', async () => {
  const sources = open();
  await register(sources, 'albums', {});
  const before = await sources.matcher('acme');
  assert.equal(await sources.remove('acme', 'albums'), true);
  assert.equal(await sources.remove('acme', 'albums'), false);
  assert.equal(await sources.sourceFor('acme', 'music', 'x'), undefined);
  assert.ok(before('music', 'x'), 'a matcher is of the moment at which it was made');
});

test('registering again replaces all of a source, credentials included, and keeps when it was made', async () => {
  const sources = open();
  const first = await register(sources, 'albums', { credentials });
  const again = await sources.prepare('acme', 'albums', define({ prefix: 'new/' }));
  const saved = await sources.save({ ...again, createdAt: first.createdAt + 5 });
  const stored = await sources.get('acme', 'albums');
  assert.deepEqual(saved, { source: stored, isNew: false });
  assert.equal(stored?.sealed, undefined);
  assert.equal(presentSource(stored!).access, 'anonymous');
  assert.equal(stored?.createdAt, first.createdAt);
  assert.notEqual(stored?.revision, first.revision);
});

test('two sources for the same bucket and prefix would be read in two ways: the second is refused', async () => {
  const sources = open();
  await register(sources, 'one', { prefix: 'a/' });
  await assert.rejects(
    register(sources, 'two', { prefix: 'a/', endpoint: 'https://elsewhere.example' }),
    problem('bad_option', 'prefix'),
  );
});

test('a tenant has room for a hundred sources', async () => {
  const sources = open();
  for (let n = 0; n < 100; n += 1) await register(sources, `s${n}`, { prefix: `${n}/` });
  await assert.rejects(register(sources, 'more', { prefix: 'more/' }), problem('too_many_sources'));
  await register(sources, 's7', { prefix: 'seven/' });
  const match = await sources.matcher('acme');
  const from = performance.now();
  for (let n = 0; n < 1_000_000; n += 1) assert.ok(match('music', '99/track.mp3'));
  assert.ok(
    performance.now() - from < 5_000,
    `${Math.round(performance.now() - from)} ms for a million rows`,
  );
});

test("the service's own bucket is refused under every spelling of its endpoint", async () => {
  const cases: [storageUrl: string, definition: Partial<SourceDefinition>][] = [
    ['s3://own/x', { bucket: 'own' }],
    ['s3://own', { bucket: 'own', region: 'eu-west-1' }],
    ['s3://own', { bucket: 'own', endpoint: 'https://s3.amazonaws.com' }],
    ['s3://own', { bucket: 'own', endpoint: 'https://s3.dualstack.eu-west-1.amazonaws.com' }],
    ['s3://own', { bucket: 'own', endpoint: 'https://s3-accelerate.amazonaws.com' }],
    ['s3://own', { bucket: 'jobs', endpoint: 'https://own.s3.eu-west-1.amazonaws.com' }],
    ['s3://own?endpoint=http://minio:9000', { bucket: 'own', endpoint: 'http://minio:9000' }],
    ['s3://own?endpoint=http://minio:9000', { bucket: 'own', endpoint: 'http://MINIO:9000/' }],
    ['s3://own?endpoint=http://minio:9000', { bucket: 'own', endpoint: 'http://minio.:9000' }],
    [
      's3://own?endpoint=http://minio:9000',
      { bucket: 'own', endpoint: 'http://minio:9000', pathStyle: false },
    ],
    ['s3://own?endpoint=http://minio:9000', { bucket: 'jobs', endpoint: 'http://own.minio:9000' }],
    ['s3://own?endpoint=http://abc.minio', { bucket: 'abc', endpoint: 'http://minio', pathStyle: false }],
    ['s3://own?endpoint=http://abc.minio', { bucket: 'own.abc', endpoint: 'http://minio', pathStyle: false }],
    ['s3://own?endpoint=http://minio:80', { bucket: 'own', endpoint: 'http://minio' }],
    ['s3://own?endpoint=https://minio/', { bucket: 'own', endpoint: 'http://minio' }],
    ['s3://own?endpoint=http://127.0.0.1:9000', { bucket: 'own', endpoint: 'http://localhost:9000' }],
    ['s3://own?endpoint=http://127.0.0.1:9000', { bucket: 'own', endpoint: 'http://[::1]:9000' }],
    [
      's3://own?endpoint=http://127.0.0.1:9000',
      { bucket: 'own', endpoint: 'http://[::ffff:127.0.0.1]:9000' },
    ],
    ['s3://own?endpoint=http://127.0.0.1:9000', { bucket: 'own', endpoint: 'http://0x7f.1:9000' }],
  ];
  for (const [storageUrl, definition] of cases) {
    await assert.rejects(
      register(open(storageUrl), 'own', definition),
      problem('source_not_allowed', 'bucket'),
      `${storageUrl} ${JSON.stringify(definition)}`,
    );
  }
});

test('other buckets at the same endpoint, and a bucket of that name elsewhere, are not the own one', async () => {
  const storageUrl = 's3://own?endpoint=http://minio:9000';
  const others: Partial<SourceDefinition>[] = [
    { bucket: 'music', endpoint: 'http://minio:9000' },
    { bucket: 'own-music', endpoint: 'http://minio:9000' },
    { bucket: 'own', endpoint: 'http://minio:9001' },
    { bucket: 'own', endpoint: 'http://other:9000' },
    { bucket: 'own' },
  ];
  for (const [n, definition] of others.entries()) {
    await redis.flushall();
    await register(open(storageUrl), `s${n}`, definition);
  }
});

test("a source that became the service's own bucket later matches no more", async () => {
  const definition = { bucket: 'own', endpoint: 'http://minio:9000' };
  await register(open(), 'early', definition);
  assert.ok(await open().sourceFor('acme', 'own', 'jobs/x'));
  assert.equal(
    await open('s3://own?endpoint=http://minio:9000').sourceFor('acme', 'own', 'jobs/x'),
    undefined,
  );
});

test('where the variables of the SDK name the own endpoint, it counts as such', async () => {
  process.env['AWS_ENDPOINT_URL_S3'] = 'http://minio:9000';
  try {
    await assert.rejects(
      register(open('s3://own'), 'own', { bucket: 'own', endpoint: 'http://minio:9000' }),
      problem('source_not_allowed'),
    );
  } finally {
    delete process.env['AWS_ENDPOINT_URL_S3'];
  }
});

test('an endpoint is scheme, host and port: what could carry a path, a user or another protocol is refused', async () => {
  for (const endpoint of [
    'minio:9000',
    'ftp://minio',
    'file:///etc',
    'http://minio/own',
    'http://minio//',
    'http://user:pass@minio',
    'http://minio?x=/own',
    'http://minio#x',
    'https://',
  ])
    await assert.rejects(register(open(), 'x', { endpoint }), problem('bad_option', 'endpoint'), endpoint);
});

test('names that are ARNs, paths or options of the definition that do not exist are refused', () => {
  const bad: object[] = [
    { bucket: 'arn:aws:s3:eu-west-1:123456789012:accesspoint/mine' },
    { bucket: 'a/b' },
    { bucket: '..' },
    { bucket: 'a..b' },
    { bucket: 'music', region: 'eu-west-1.evil.example/' },
    { bucket: 'music', roleArn: 'role' },
    { bucket: 'music', credentials: { accessKeyId: 'A' } },
    { bucket: 'music', secret: 'x' },
  ];
  for (const definition of bad)
    assert.equal(sourceDefinitionSchema.safeParse(definition).success, false, JSON.stringify(definition));
});

test('credentials are not taken without SECRETS_KEY, and a public bucket still is', async () => {
  const sources = open('file:///objects', '');
  await assert.rejects(register(sources, 'x', { credentials }), problem('secrets_not_kept'));
  await register(sources, 'public', {});
});

test("a role assumed as the service has the tenant's own external id, never one of the caller's choice", async () => {
  const sources = open();
  const roleArn = 'arn:aws:iam::123456789012:role/reader';
  const asService = await register(sources, 'a', { roleArn, prefix: 'a/' });
  assert.equal(asService.externalId, 'acousticsense:acme');
  assert.equal(presentSource(asService).access, 'role');
  await assert.rejects(
    register(sources, 'b', { roleArn, externalId: 'acousticsense:other', prefix: 'b/' }),
    problem('bad_option', 'externalId'),
  );
  const asTenant = await register(sources, 'c', { roleArn, externalId: 'mine', credentials, prefix: 'c/' });
  assert.equal(asTenant.externalId, 'mine');
  await assert.rejects(register(sources, 'd', { externalId: 'mine' }), problem('bad_option', 'externalId'));
});

test('after a rotation all credentials that can be opened are sealed with the new key, and the old one can go', async () => {
  await register(open(), 'one', { credentials });
  await register(open(), 'public', { prefix: 'p/' });
  await register(open('file:///objects', randomBytes(32).toString('base64')), 'lost', {
    credentials,
    prefix: 'l/',
  });
  const next = randomBytes(32).toString('base64');
  const both = open('file:///objects', `${next},${secretsKey}`);
  assert.equal(await both.reseal(), 1);
  assert.equal(await both.reseal(), 0);
  const { sealed } = (await both.get('acme', 'one'))!;
  const opened = createSecrets(next).open(sealed!, { tenant: 'acme', name: 'source:one' });
  assert.deepEqual(JSON.parse(opened), credentials);
});
