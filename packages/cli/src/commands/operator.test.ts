/** `keys` and `tenants` as an operator types them: the real program on a real Redis. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { connectRedis } from '@acousticsense/shared/redis';
import { createTenants } from '@acousticsense/shared/tenants';
import { startRedis, type TestRedis } from '../../../../test/redis.ts';

const program = path.resolve(import.meta.dirname, '../main.ts');
let server: TestRedis;
let directory: string;

before(async () => {
  server = await startRedis();
  directory = await mkdtemp(path.join(tmpdir(), 'as-operator-'));
});
after(async () => {
  await server?.[Symbol.asyncDispose]();
  if (directory) await rm(directory, { recursive: true });
});

async function run(args: readonly string[], env: Record<string, string> = { REDIS_URL: server.url }) {
  const child = spawn(process.execPath, [program, ...args], {
    env: { ...process.env, NO_COLOR: '1', REDIS_URL: '', DATA_DIR: directory, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const [stdout, stderr] = [child.stdout, child.stderr].map((stream) => stream.setEncoding('utf8').toArray());
  const [code] = await once(child, 'close');
  return { code, stdout: (await stdout!).join(''), stderr: (await stderr!).join('') };
}

async function refused(
  args: readonly string[],
  code: number,
  sentence: RegExp,
  env?: Record<string, string>,
) {
  const ended = await run(args, env);
  assert.equal(ended.code, code, ended.stderr);
  assert.match(ended.stderr, sentence);
  assert.doesNotMatch(ended.stderr, /\n\s+at /, 'a stack trace');
  assert.equal(ended.stdout, '');
}

test('a key is made, listed without its secret, and revoked', async () => {
  const made = await run(['keys', 'create', 'acme', '--name', 'nightly import']);
  assert.equal(made.code, 0, made.stderr);
  const key = made.stdout.trimEnd();
  assert.match(key, /^as_[\w-]{32}$/, 'standard output is the key alone');
  assert.match(made.stderr, /tenant acme is new.*not shown again/s);
  const redis = connectRedis(server.url);
  await once(redis, 'ready');
  try {
    const { keyId } = (await createTenants(redis).findKey(key))!;
    const list = await run(['keys', 'list']);
    assert.match(list.stdout, new RegExp(`^ID .*\\n${keyId} +acme +\\d{4}-.* nightly import\\n$`));
    assert.ok(!list.stdout.includes(key));
    const [only] = JSON.parse((await run(['keys', 'list', '--json'])).stdout) as Record<string, unknown>[];
    assert.deepEqual(Object.keys(only!), ['id', 'tenant', 'name', 'createdAt']);

    const revoked = await run(['keys', 'revoke', keyId]);
    assert.equal(revoked.stdout, `Revoked ${keyId} of acme (nightly import).\n`);
    assert.equal(await createTenants(redis).findKey(key), undefined);
    await refused(['keys', 'revoke', keyId], 1, /no key with the id/);
    assert.deepEqual(JSON.parse((await run(['keys', 'list', '--json'])).stdout), []);
  } finally {
    redis.disconnect();
  }
});

test('--json gives the key with its id', async () => {
  const { stdout } = await run(['keys', 'create', 'umbrella', '--json']);
  const made = JSON.parse(stdout) as Record<string, string>;
  assert.deepEqual([made['tenant'], made['name']], ['umbrella', '']);
  assert.match(made['key']!, /^as_/);
  assert.match(made['id']!, /^[0-9a-f]{12}$/);
});

test('limits are set one by one, shown, and go back to the default', async () => {
  const set = async (...args: string[]) => {
    const { code, stdout, stderr } = await run(['tenants', 'set', 'initech', ...args, '--json']);
    assert.equal(code, 0, stderr);
    return JSON.parse(stdout) as unknown;
  };
  assert.deepEqual(await set('--weight', '3', '--rows-per-day', '1000'), {
    tenant: 'initech',
    weight: 3,
    rowsPerDay: 1_000,
  });
  const all = {
    tenant: 'initech',
    weight: 3,
    requestsPerMinute: 0,
    openJobs: 5,
    bytesPerDay: 1_000_000_000_000,
  };
  assert.deepEqual(
    await set(
      ...['--requests-per-minute', '0', '--open-jobs', '5'],
      ...['--bytes-per-day', '1000000000000', '--rows-per-day', 'default'],
    ),
    all,
  );
  const listed = JSON.parse((await run(['tenants', 'list', '--json'])).stdout) as { tenant: string }[];
  assert.deepEqual(
    listed.find(({ tenant }) => tenant === 'initech'),
    all,
  );
  const { stdout } = await run(['tenants', 'list']);
  assert.match(stdout, /^TENANT +WEIGHT +REQUESTS-PER-MINUTE +OPEN-JOBS +ROWS-PER-DAY +BYTES-PER-DAY$/m);
  assert.match(stdout, /^initech +3 +0 +5 +- +1000000000000$/m);
  assert.match(stdout, /^default +1( +-){4}$/m);
});

test('what was typed wrongly changes nothing and is named', async () => {
  await refused(['tenants', 'set', 'hooli'], 2, /Say what to set: --weight, --requests-per-minute/);
  await refused(['tenants', 'set', 'hooli', '--weight', '0'], 2, /--weight 0 .*from 1/);
  await refused(['tenants', 'set', 'hooli', '--open-jobs', '0'], 2, /--open-jobs 0 .*from 1/);
  await refused(['tenants', 'set', 'hooli', '--rows-per-day', 'many'], 2, /--rows-per-day many/);
  await refused(['tenants', 'set', 'Hooli', '--weight', '2'], 1, /"Hooli" cannot be a tenant's name/);
  await refused(['keys', 'create'], 2, /needs TENANT/);
  await refused(['keys', 'create', 'a/b'], 1, /cannot be a tenant's name/);
  await refused(['keys', 'list', 'acme'], 2, /one word too many/);
  assert.doesNotMatch((await run(['tenants', 'list'])).stdout, /hooli/i);
});

test('without REDIS_URL it finds the system that runs on DATA_DIR, or says that none does', async () => {
  await refused(['tenants', 'list'], 1, /No AcousticSense runs on .*as-operator-/, {});
  await writeFile(path.join(directory, 'run.json'), JSON.stringify({ launcher: 1, redisUrl: server.url }));
  const { code, stdout } = await run(['tenants', 'list'], {});
  assert.equal(code, 0);
  assert.match(stdout, /^default /m);
});

test('a Redis that is not there is told in a sentence, without its password', async () => {
  const { code, stderr } = await run(['keys', 'list'], { REDIS_URL: 'redis://user:secret@127.0.0.1:1' });
  assert.equal(code, 1);
  assert.match(stderr, /cannot be reached at redis:\/\/127\.0\.0\.1:1 \(.*ECONNREFUSED/);
  assert.doesNotMatch(stderr, /secret/);
});
