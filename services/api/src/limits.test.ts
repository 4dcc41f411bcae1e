import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { connectRedis } from '@acousticsense/shared/redis';
import { createTenants } from '@acousticsense/shared/tenants';
import { startRedis } from '../../../test/redis.ts';
import { createLimits, type LimitsDeps } from './limits.ts';

const none = { requestsPerMinute: 0, rowsPerDay: 0, bytesPerDay: 0, maxOpenJobs: 10, eventsWaitingMost: 5 };

/** Two API processes on one Redis, with these limits of the service. */
async function openLimits(
  t: TestContext,
  of: Partial<typeof none>,
  open: LimitsDeps['records'] = { countOpen: async () => 0, countEvents: async () => 0 },
) {
  const server = await startRedis();
  const connections = [connectRedis(server.url, 500), connectRedis(server.url, 500)];
  await Promise.all(connections.map((redis) => once(redis, 'ready')));
  t.after(async () => {
    for (const redis of connections) redis.disconnect();
    await server[Symbol.asyncDispose]();
  });
  const processes = connections.map((redis) => {
    const tenants = createTenants(redis);
    return { tenants, limits: createLimits({ redis, tenants, records: open, ...none, ...of }) };
  });
  const redis = connections[0]!;
  const { tenants, limits } = processes[0]!;
  return { server, redis, tenants, limits, there: processes[1]!.limits };
}

async function refused(work: Promise<unknown>): Promise<ProblemError> {
  const error = await work.then(
    () => assert.fail('it was not refused'),
    (thrown: unknown) => thrown,
  );
  assert.ok(error instanceof ProblemError, String(error));
  return error;
}

test('a minute holds so many requests, of both processes together, and tells when the next one begins', async (t) => {
  const { redis, limits, there } = await openLimits(t, { requestsPerMinute: 4 });
  for (const process of [limits, there, limits, there]) await process.countRequest('acme');
  for (const process of [limits, there]) {
    const { code, status, details } = await refused(process.countRequest('acme'));
    assert.deepEqual([code, status], ['rate_limited', 429]);
    assert.ok(details.retryAfter! >= 58 && details.retryAfter! <= 60, String(details.retryAfter));
  }
  await limits.countRequest('umbrella');
  // The rest of the minute passes.
  await redis.pexpire('as:{acme}:used:requests', 50);
  await sleep(100);
  await limits.countRequest('acme');
  assert.ok((await redis.ttl('as:{acme}:used:requests')) > 58);
});

test('of many at once exactly as many pass as fit', async (t) => {
  const { limits, there } = await openLimits(t, { rowsPerDay: 70 });
  const done = await Promise.allSettled(
    Array.from({ length: 40 }, (_, n) => (n % 2 ? limits : there).charge('acme', { rows: 3 })),
  );
  assert.equal(done.filter(({ status }) => status === 'fulfilled').length, 23);
});

test('what does not fit is charged nothing, so that smaller things still fit', async (t) => {
  const { limits, there } = await openLimits(t, { rowsPerDay: 10, bytesPerDay: 100 });
  await limits.charge('acme', { rows: 4, bytes: 60 });
  const rows = await refused(there.charge('acme', { rows: 7 }));
  assert.deepEqual([rows.code, rows.status], ['quota_exceeded', 429]);
  assert.ok(rows.details.retryAfter! > 86_300 && rows.details.retryAfter! <= 86_400);
  assert.match(rows.message, /10 songs a day/);
  const bytes = await refused(limits.charge('acme', { rows: 6, bytes: 41 }));
  assert.match(bytes.message, /100 uploaded bytes a day/);
  await there.charge('acme', { rows: 6, bytes: 40 });
  await refused(limits.charge('acme', { rows: 1 }));
  await limits.charge('umbrella', { rows: 10, bytes: 100 });
});

test('what is larger than the whole quota is told so, without a time to try again', async (t) => {
  const { limits } = await openLimits(t, { rowsPerDay: 10 });
  for (let n = 0; n < 2; n += 1) {
    const { code, details, message } = await refused(limits.charge('acme', { rows: 11 }));
    assert.deepEqual([code, details.retryAfter], ['quota_exceeded', undefined]);
    assert.match(message, /this request alone is 11/);
  }
  await limits.charge('acme', { rows: 10 });
});

test('what was charged in vain is given back, never more than was used and never to another day', async (t) => {
  const { redis, limits } = await openLimits(t, { rowsPerDay: 10, bytesPerDay: 5e12 });
  await limits.charge('acme', { rows: 10, bytes: 4e12 });
  await limits.refund('acme', { rows: 4, bytes: 4e12 });
  await limits.charge('acme', { rows: 4, bytes: 5e12 });
  await limits.refund('acme', { rows: 1_000 });
  await limits.charge('acme', { rows: 10 });
  await refused(limits.charge('acme', { rows: 1 }));
  await redis.del('as:{acme}:used:rows');
  await limits.refund('acme', { rows: 5 });
  assert.equal(await redis.exists('as:{acme}:used:rows'), 0);
});

test('looking ahead charges nothing', async (t) => {
  const { redis, limits } = await openLimits(t, { rowsPerDay: 2, bytesPerDay: 100 });
  for (let n = 0; n < 5; n += 1) await limits.foresee('acme', { rows: 2, bytes: 100 });
  assert.deepEqual(await redis.keys('*used*'), []);
  const never = await refused(limits.foresee('acme', { bytes: 101 }));
  assert.deepEqual([never.code, never.details.retryAfter], ['quota_exceeded', undefined]);
  await limits.charge('acme', { rows: 1, bytes: 50 });
  const { details } = await refused(limits.foresee('acme', { rows: 1, bytes: 51 }));
  assert.ok(details.retryAfter! > 86_300);
  await limits.foresee('acme', { rows: 1, bytes: 50 });
});

test("a tenant's own settings come before the service's; 0 is no limit", async (t) => {
  const { redis, tenants, limits } = await openLimits(t, { rowsPerDay: 2, requestsPerMinute: 1 });
  await tenants.setTenant('big', { rowsPerDay: 1_000, requestsPerMinute: 0 });
  await limits.charge('big', { rows: 1_000 });
  await refused(limits.charge('big', { rows: 1 }));
  for (let n = 0; n < 20; n += 1) await limits.countRequest('big');
  await tenants.setTenant('big', { rowsPerDay: 1_001 });
  await limits.charge('big', { rows: 1 });
  await tenants.setTenant('big', { rowsPerDay: undefined });
  await refused(limits.charge('big', { rows: 1 }));
  await refused(limits.charge('small', { rows: 3 }));
  assert.deepEqual((await redis.keys('*used*')).sort(), ['as:{big}:used:rows']);
});

test('a tenant with as many open jobs as it may have is refused, with a time', async (t) => {
  const open: Record<string, number> = { acme: 9, umbrella: 3 };
  const { tenants, limits } = await openLimits(
    t,
    {},
    { countOpen: async (tenant) => open[tenant] ?? 0, countEvents: async () => 0 },
  );
  await tenants.setTenant('umbrella', { openJobs: 3 });
  await limits.refuseWhenFull('acme');
  open['acme'] = 10;
  for (const tenant of ['acme', 'umbrella']) {
    const { code, status, details } = await refused(limits.refuseWhenFull(tenant));
    assert.deepEqual([code, status, details.retryAfter], ['too_busy', 429, 30]);
  }
  await limits.refuseWhenFull('initech');
});

test('while Redis is frozen nothing is let through uncounted: within a second that is a fault', async (t) => {
  const { server, limits } = await openLimits(t, { requestsPerMinute: 5, rowsPerDay: 5 });
  await limits.charge('acme', { rows: 1 });
  process.kill(server.pid, 'SIGSTOP');
  for (const work of [
    () => limits.countRequest('acme'),
    () => limits.charge('acme', { rows: 1 }),
    () => limits.foresee('acme', { rows: 1 }),
  ]) {
    const from = performance.now();
    await assert.rejects(work(), InfrastructureFault);
    assert.ok(performance.now() - from < 1_000);
  }
});

test('while the events of a tenant are not put away its jobs wait, and no other tenant does', async (t) => {
  const events: Record<string, number> = { acme: 6, umbrella: 5 };
  const { limits } = await openLimits(
    t,
    {},
    { countOpen: async () => 0, countEvents: async (tenant) => events[tenant] ?? 0 },
  );
  const { code, status, message } = await refused(limits.refuseWhenFull('acme'));
  assert.deepEqual([code, status], ['too_busy', 429]);
  assert.match(message, /events/);
  await limits.refuseWhenFull('umbrella');
});
