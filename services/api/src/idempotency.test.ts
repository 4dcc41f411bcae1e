import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { ProblemError } from '@acousticsense/shared/errors';
import { connectRedis } from '@acousticsense/shared/redis';
import express, { type NextFunction, type Request, type Response } from 'express';
import { pino } from 'pino';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { createIdempotency, fingerprintOf } from './idempotency.ts';

const leaseMs = 300;

/** What the work of a test does between being bound and its answer. */
type Step = (id: string) => Promise<void> | void;

/**
 * A process that makes things on POST. `made` is what exists, for all of the processes that share it: what happened
 * twice is in it twice.
 */
async function openProcess(t: TestContext, server: TestRedis, made: string[], ids = { last: 0 }) {
  const redis = connectRedis(server.url);
  await once(redis, 'ready');
  const idempotency = createIdempotency(redis, pino({ level: 'silent' }), leaseMs);
  const steps = {
    beforeBind: (() => {}) as Step,
    afterBind: (() => {}) as Step,
    afterMake: (() => {}) as Step,
  };
  const app = express();
  app.post('/:route', async (request: Request<{ route: string }>, response) => {
    const fingerprint = async () => {
      const hash = createHash('sha256');
      for await (const chunk of request) hash.update(chunk);
      return fingerprintOf({ url: request.url, sha256: hash.digest('hex') });
    };
    const answerOf = (id: string) => ({ status: 202, headers: { location: `/things/${id}` }, body: { id } });
    await idempotency.answer(request, response, {
      tenant: request.get('x-tenant') ?? 'acme',
      route: request.params.route,
      read: fingerprint,
      recall: async (id) => (made.includes(id) ? answerOf(id) : undefined),
      async make(bind) {
        const read = await fingerprint();
        ids.last += 1;
        const id = `id-${ids.last}`;
        await steps.beforeBind(id);
        await bind(read, id);
        await steps.afterBind(id);
        made.push(id);
        await steps.afterMake(id);
        return answerOf(id);
      },
    });
  });
  app.use((error: unknown, _request: Request, response: Response, _next: NextFunction) => {
    const problem = error instanceof ProblemError ? error : new ProblemError('internal_error', String(error));
    response
      .status(problem.status)
      .set('retry-after', String(problem.details.retryAfter ?? ''))
      .json({ code: problem.code });
  });
  const http = createServer(app);
  http.listen(0, '127.0.0.1');
  await once(http, 'listening');
  t.after(async () => {
    http.closeAllConnections();
    http.close();
    redis.disconnect();
  });
  const base = `http://127.0.0.1:${(http.address() as AddressInfo).port}`;
  async function post(
    body: string,
    key?: string,
    { at = '/things', headers = {} as Record<string, string> } = {},
  ): Promise<{
    status: number;
    code?: string;
    id?: string;
    replayed: boolean;
    response: globalThis.Response;
  }> {
    const response = await fetch(base + at, {
      method: 'POST',
      body,
      headers: { ...headers, ...(key === undefined ? {} : { 'idempotency-key': key }) },
    });
    const replayed = response.headers.get('idempotent-replayed') === 'true';
    return { status: response.status, replayed, response, ...((await response.json()) as object) };
  }
  /** As kill -9 leaves it: nothing more reaches Redis from here, and no timer of its own gives the key back. */
  const crash = () => {
    redis.disconnect();
    http.closeAllConnections();
  };
  return { post, steps, crash, redis };
}

async function setUp(t: TestContext) {
  const server = await startRedis();
  t.after(() => server[Symbol.asyncDispose]());
  const made: string[] = [];
  const ids = { last: 0 };
  const here = await openProcess(t, server, made, ids);
  return { server, made, here, another: () => openProcess(t, server, made, ids) };
}

/** A step that stays where it is until it is let go, at the end of the test at the latest. */
function gate(t: TestContext) {
  const reached = Promise.withResolvers<void>();
  const open = Promise.withResolvers<void>();
  t.after(() => open.resolve());
  return {
    step: async () => {
      reached.resolve();
      await open.promise;
    },
    reached: reached.promise,
    open: () => open.resolve(),
  };
}

test('the same key and body again: the stored answer with its headers, and nothing is made', async (t) => {
  const { made, here, another } = await setUp(t);
  const first = await here.post('song', 'k1');
  assert.deepEqual([first.status, first.id, first.replayed], [202, 'id-1', false]);
  for (const process of [here, await another()]) {
    const again = await process.post('song', 'k1');
    assert.deepEqual([again.status, again.id, again.replayed], [202, 'id-1', true]);
    assert.equal(again.response.headers.get('location'), '/things/id-1');
    assert.equal(again.response.headers.get('content-type'), first.response.headers.get('content-type'));
  }
  assert.deepEqual(made, ['id-1']);
});

test('the answer is kept for 24 hours', async (t) => {
  const { here } = await setUp(t);
  await here.post('song', 'k1');
  const names = await here.redis.keys('*');
  assert.equal(names.length, 1, 'the lease is gone');
  assert.match(names[0]!, /^as:\{acme\}:idempotency:/, 'in the slot of its tenant');
  const left = await here.redis.pttl(names[0]!);
  assert.ok(left > 24 * 3_600_000 - 10_000 && left <= 24 * 3_600_000, `${left} ms`);
});

test('without a key every request is carried out', async (t) => {
  const { made, here } = await setUp(t);
  await here.post('song');
  assert.equal((await here.post('song')).replayed, false);
  assert.equal(made.length, 2);
});

test('another body or query with the same key is refused, and the first answer stays', async (t) => {
  const { made, here } = await setUp(t);
  await here.post('song', 'k1');
  const refused = await here.post('another song', 'k1');
  assert.deepEqual([refused.status, refused.code], [422, 'idempotency_key_reused']);
  assert.equal((await here.post('song', 'k1', { at: '/things?topK=3' })).status, 422);
  assert.equal((await here.post('song', 'k1')).id, 'id-1');
  assert.deepEqual(made, ['id-1']);
});

test('a key means something else to another tenant and on another route', async (t) => {
  const { made, here } = await setUp(t);
  const [own, other, route] = [
    await here.post('song', 'k1'),
    await here.post('song', 'k1', { headers: { 'x-tenant': 'umbrella' } }),
    await here.post('song', 'k1', { at: '/batches' }),
  ];
  assert.deepEqual([own.id, other.id, route.id], ['id-1', 'id-2', 'id-3']);
  assert.equal(made.length, 3);
});

test('while the first is under way the second is told so, however long it takes; then it gets the answer', async (t) => {
  const { made, here, another } = await setUp(t);
  const there = await another();
  const { step, reached, open } = gate(t);
  here.steps.beforeBind = step;
  const first = here.post('song', 'k1');
  await reached;
  for (let n = 0; n < 8; n += 1) {
    const second = await there.post('song', 'k1');
    assert.deepEqual([second.status, second.code], [409, 'idempotency_in_flight']);
    assert.equal(second.response.headers.get('retry-after'), '1');
    await sleep(leaseMs / 2);
  }
  open();
  assert.equal((await first).id, 'id-1');
  const third = await there.post('song', 'k1');
  assert.deepEqual([third.status, third.id, third.replayed], [202, 'id-1', true]);
  assert.deepEqual(made, ['id-1']);
});

test('of many at once exactly one is carried out', async (t) => {
  const { made, here, another } = await setUp(t);
  const there = await another();
  for (let round = 0; round < 10; round += 1) {
    made.length = 0;
    const answers = await Promise.all(
      Array.from({ length: 20 }, (_, n) => (n % 2 ? here : there).post('song', `k${round}`)),
    );
    assert.equal(made.length, 1, `round ${round}`);
    assert.equal(answers.filter(({ status, replayed }) => status === 202 && !replayed).length, 1);
    for (const { status, id, code } of answers) {
      if (status === 202) assert.equal(id, made[0]);
      else assert.equal(code, 'idempotency_in_flight');
    }
  }
});

test('a request that is refused leaves the key free, for a better one too', async (t) => {
  const { made, here } = await setUp(t);
  for (const [name, at] of [
    ['k1', 'beforeBind'],
    ['k2', 'afterBind'],
  ] as const) {
    here.steps[at] = () => {
      throw new ProblemError('quota_exceeded', 'Not today.');
    };
    assert.equal((await here.post('song', name)).status, 429);
    here.steps[at] = () => {};
    assert.equal((await here.post('a shorter song', name)).status, 202);
  }
  assert.equal(made.length, 2);
});

test('a fault before anything was made: the same request is carried out the next time', async (t) => {
  const { made, here } = await setUp(t);
  here.steps.afterBind = () => {
    throw new Error('Redis has gone');
  };
  assert.equal((await here.post('song', 'k1')).status, 500);
  here.steps.afterBind = () => {};
  assert.equal((await here.post('another', 'k1')).status, 422, 'the first may have come about');
  const again = await here.post('song', 'k1');
  assert.deepEqual([again.status, again.replayed], [202, false]);
  assert.deepEqual(made, [again.id]);
});

test('a fault after it was made: the next attempt answers with what is there', async (t) => {
  const { made, here } = await setUp(t);
  here.steps.afterMake = () => {
    throw new Error('Redis has gone');
  };
  assert.equal((await here.post('song', 'k1')).status, 500);
  for (let n = 0; n < 2; n += 1) {
    const again = await here.post('song', 'k1');
    assert.deepEqual([again.status, again.id, again.replayed], [202, 'id-1', true]);
    assert.equal(again.response.headers.get('location'), '/things/id-1');
  }
  assert.deepEqual(made, ['id-1']);
});

for (const [when, then] of [
  ['beforeBind', 'carried out by the next'],
  ['afterBind', 'carried out by the next'],
  ['afterMake', 'answered with what it made'],
] as const) {
  test(`a process that dies ${when}: its key is free after the lease, and the request is ${then}`, async (t) => {
    const { made, here, another } = await setUp(t);
    const there = await another();
    const { step, reached } = gate(t);
    here.steps[when] = step;
    const lost = here.post('song', 'k1').catch(() => 'no answer');
    await reached;
    here.crash();
    assert.equal(await lost, 'no answer');
    const from = performance.now();
    let again = await there.post('song', 'k1');
    while (again.status === 409) {
      assert.ok(performance.now() - from < 3 * leaseMs, 'the key stays blocked');
      await sleep(20);
      again = await there.post('song', 'k1');
    }
    assert.equal(again.status, 202);
    assert.equal(again.replayed, when === 'afterMake');
    assert.deepEqual(made, [again.id], 'made once');
  });
}

test('one that slept through its lease makes nothing once another has begun', async (t) => {
  const { made, here, another } = await setUp(t);
  const there = await another();
  for (const [key, name] of [
    ['k1', 'while the other is under way'],
    ['k2', 'after the other has ended'],
    ['k3', 'after the other has died in the middle'],
  ] as const) {
    made.length = 0;
    const sleeper = gate(t);
    here.steps.beforeBind = sleeper.step;
    const first = here.post('song', key);
    await sleeper.reached;
    // Its renewals do not come through.
    const leases = await here.redis.keys('*:lease');
    await here.redis.del(leases);
    const other = gate(t);
    if (key !== 'k2') there.steps.afterBind = other.step;
    const second = there.post('song', key).catch(() => undefined);
    if (key === 'k2') await second;
    else await other.reached;
    if (key === 'k3') await here.redis.del(leases);
    sleeper.open();
    const answer = await first;
    assert.deepEqual([answer.status, answer.code], [409, 'idempotency_in_flight'], name);
    other.open();
    await second;
    assert.equal(made.length, 1, name);
    there.steps.afterBind = () => {};
  }
});

test('a key in quotes is the same as a bare one; one that cannot be a key is refused', async (t) => {
  const { made, here } = await setUp(t);
  const first = await here.post('song', '8e03978e-40d5');
  assert.equal((await here.post('song', '"8e03978e-40d5"')).id, first.id);
  assert.equal(made.length, 1);
  for (const key of ['', '""', 'x'.repeat(256), 'sp\u00e9cial'])
    assert.deepEqual([(await here.post('song', key)).code, key], ['bad_option', key]);
  assert.equal((await here.post('song', 'x'.repeat(255))).status, 202);
});

test('a form is the same whatever the order of its fields, and another with another file, field or query', () => {
  const form = { url: '/v1/jobs', fields: { topK: '3', windows: 'all' }, sha256: 'a' };
  const same = fingerprintOf({ ...form, fields: { windows: 'all', topK: '3' } });
  assert.equal(fingerprintOf(form), same);
  const others = [
    { ...form, sha256: 'b' },
    { ...form, fields: { topK: '3' } },
    { ...form, fields: { topK: '3all', windows: '' } },
    { ...form, url: '/v1/jobs?x=1' },
  ].map(fingerprintOf);
  assert.equal(new Set([same, ...others]).size, 5);
});
