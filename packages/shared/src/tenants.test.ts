import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startRedis } from '../../../test/redis.ts';
import { InfrastructureFault, ProblemError } from './errors.ts';
import { connectRedis } from './redis.ts';
import { createTenants } from './tenants.ts';

/** The tenants as two processes see them, on one Redis. */
async function openTenants(t: TestContext) {
  const server = await startRedis();
  const connections = [connectRedis(server.url, 500), connectRedis(server.url, 500)];
  t.after(async () => {
    for (const redis of connections) redis.disconnect();
    await server[Symbol.asyncDispose]();
  });
  await Promise.all(connections.map((redis) => once(redis, 'ready')));
  const [here, there] = connections.map((redis) => createTenants(redis));
  return { server, redis: connections[0]!, here: here!, there: there! };
}

async function within<T>(ms: number, look: () => Promise<T>, done: (found: T) => boolean): Promise<void> {
  const deadline = Date.now() + ms;
  while (!done(await look())) {
    assert.ok(Date.now() < deadline, `not within ${ms} ms`);
    await sleep(50);
  }
}

test('a key speaks for its tenant in every process, and its secret is nowhere in Redis', async (t) => {
  const { redis, here, there } = await openTenants(t);
  const { key, id, ...made } = await here.createKey('acme', 'nightly import');
  assert.match(key, /^as_[\w-]{32}$/);
  assert.deepEqual(await there.findKey(key), { tenant: 'acme', keyId: id });
  assert.deepEqual(await there.listKeys(), [{ id, ...made }]);
  assert.equal(made.name, 'nightly import');
  for (const name of await redis.keys('*')) {
    const stored = JSON.stringify([name, await redis.hgetall(name)]);
    assert.ok(!stored.includes(key) && !stored.includes(key.slice(3)), name);
  }
});

test("no two keys are alike, and a key with one letter changed is nobody's", async (t) => {
  const { here } = await openTenants(t);
  const made = await Promise.all(Array.from({ length: 50 }, () => here.createKey('acme', '')));
  assert.equal(new Set(made.map(({ key }) => key)).size, 50);
  assert.equal(new Set(made.map(({ id }) => id)).size, 50);
  const { key } = made[0]!;
  for (const other of [`${key.slice(0, -1)}${key.endsWith('A') ? 'B' : 'A'}`, key.toUpperCase(), '', 'as_'])
    assert.equal(await here.findKey(other), undefined, other);
});

test('a revoked key is dead within 5 seconds in a process that has just used it, the others live on', async (t) => {
  const { here, there } = await openTenants(t);
  const [gone, stays] = [await here.createKey('acme', 'a'), await here.createKey('acme', 'b')];
  assert.ok(await there.findKey(gone.key));
  assert.equal((await here.revokeKey(gone.id))?.name, 'a');
  assert.equal(await here.findKey(gone.key), undefined, 'at once where it was revoked');
  await within(
    5_000,
    () => there.findKey(gone.key),
    (found) => found === undefined,
  );
  assert.equal((await there.findKey(stays.key))?.keyId, stays.id);
  assert.equal(await here.revokeKey(gone.id), undefined, 'there is nothing left to revoke');
});

test('a key works as soon as it is made, even where it was asked for before', async (t) => {
  const { redis, here, there } = await openTenants(t);
  const { key } = await here.createKey('acme', '');
  const stored = await redis.hgetall('as:api-keys');
  await redis.del('as:api-keys');
  assert.equal(await there.findKey(key), undefined);
  await redis.hset('as:api-keys', stored);
  assert.equal((await there.findKey(key))?.tenant, 'acme');
});

test('a tenant exists once it has a key or a setting, and the default tenant always', async (t) => {
  const { here, there } = await openTenants(t);
  assert.equal(await there.tenantExists('acme'), false);
  assert.equal(await there.tenantExists('default'), true);
  await here.createKey('acme', '');
  await here.setTenant('umbrella', { weight: 3 });
  assert.equal(await there.tenantExists('acme'), true);
  assert.deepEqual(await there.listTenants(), [
    { tenant: 'acme', weight: 1 },
    { tenant: 'default', weight: 1 },
    { tenant: 'umbrella', weight: 3 },
  ]);
  assert.equal(await there.getTenant('nobody'), undefined);
  assert.equal(await there.tenantExists('acme/weight'), false);
});

test('two operators that change other settings of a tenant at once both get their way', async (t) => {
  const { here, there } = await openTenants(t);
  await here.setTenant('acme', { rowsPerDay: 5 });
  await Promise.all([
    here.setTenant('acme', { weight: 4, requestsPerMinute: 60 }),
    there.setTenant('acme', { bytesPerDay: 1e12, openJobs: 10 }),
  ]);
  const all = { weight: 4, requestsPerMinute: 60, openJobs: 10, rowsPerDay: 5, bytesPerDay: 1e12 };
  assert.deepEqual((await here.listTenants())[0], { tenant: 'acme', ...all });
  const { rowsPerDay: _, ...rest } = all;
  assert.deepEqual(await here.setTenant('acme', { rowsPerDay: undefined }), rest);
});

test('a changed setting holds in every process within 5 seconds', async (t) => {
  const { here, there } = await openTenants(t);
  await here.setTenant('acme', { weight: 2 });
  assert.equal((await there.getTenant('acme'))?.weight, 2);
  await here.setTenant('acme', { weight: 7 });
  await within(
    5_000,
    () => there.getTenant('acme'),
    (found) => found?.weight === 7,
  );
});

test('a name that is none and a setting that makes no sense are refused by name', async (t) => {
  const { here } = await openTenants(t);
  const refused = (work: Promise<unknown>, field: string) =>
    assert.rejects(work, (error) => {
      assert.ok(error instanceof ProblemError);
      assert.deepEqual([error.code, error.details.field], ['bad_option', field]);
      return true;
    });
  for (const name of ['', 'Acme', 'a b', '-a', 'a/b', '{a}', 'a'.repeat(64), '../a', 'ä'])
    await refused(here.createKey(name, ''), 'tenant');
  await refused(here.setTenant('a:b', { weight: 1 }), 'tenant');
  await refused(here.setTenant('acme', { weight: 0 }), 'weight');
  await refused(here.setTenant('acme', { rowsPerDay: -1 }), 'rowsPerDay');
  await refused(here.setTenant('acme', { requestsPerMinute: 0.5 }), 'requestsPerMinute');
  await refused(here.setTenant('acme', { openJobs: 0 }), 'openJobs');
  assert.deepEqual(await here.listTenants(), [{ tenant: 'default', weight: 1 }]);
  assert.deepEqual(await here.listKeys(), []);
});

test('while Redis is frozen a key is neither known nor unknown: within a second that is told as a fault', async (t) => {
  const { server, here, there } = await openTenants(t);
  const { key } = await here.createKey('acme', '');
  process.kill(server.pid, 'SIGSTOP');
  for (let n = 0; n < 5; n += 1) {
    const from = performance.now();
    await assert.rejects(there.findKey(key), InfrastructureFault);
    assert.ok(performance.now() - from < 1_000, `${performance.now() - from} ms`);
  }
  process.kill(server.pid, 'SIGCONT');
  await within(
    5_000,
    () => there.findKey(key).catch(() => undefined),
    (found) => found?.tenant === 'acme',
  );
});
