import assert from 'node:assert/strict';
import type { ServerResponse } from 'node:http';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { eventSchema } from '@acousticsense/shared/events';
import { deadLetterPrefix } from '@acousticsense/shared/object-keys';
import { Webhook } from 'svix';
import { maxAttempts } from './messages.ts';
import { type Received, type Receiver, startReceiver } from './testing/receiver.ts';
import { publicUrl, type Running, startWebhookService, until } from './testing/running.ts';

const idOf = ({ headers }: Received) => headers['webhook-id'] as string;
const signatures = ({ headers }: Received) => (headers['webhook-signature'] as string).split(' ');

describe('the webhook service as a process', () => {
  let running: Running;
  let receiver: Receiver;
  let answer: (message: Received, response: ServerResponse) => unknown;

  before(async () => {
    running = await startWebhookService();
    receiver = await startReceiver((message, response) => answer(message, response));
  });
  afterEach(async () => {
    receiver.received.length = 0;
    answer = (_message, response) => response.end();
    for (const { id } of await running.endpoints.list('acme')) await running.endpoints.remove('acme', id);
  });
  after(async () => {
    await receiver[Symbol.asyncDispose]();
    await running[Symbol.asyncDispose]();
  });
  answer = (_message, response) => response.end();

  const url = (path = '/hook') => receiver.origin + path;
  const ids = () => receiver.received.map(idOf);

  test('an event reaches its endpoint whole, signed, with a link to the result, and is told once', async () => {
    const endpoint = await running.endpoint(url());
    const id = await running.tell({ ref: 'ISRC1', revision: 3 });
    await until(() => receiver.received.length > 0);
    const [message] = receiver.received;
    assert.equal(idOf(message!), id);
    new Webhook(endpoint.secret).verify(message!.body, message!.headers as Record<string, string>);
    const event = eventSchema.parse(JSON.parse(message!.body));
    assert.ok(event.type === 'job.completed');
    assert.deepEqual([event.data.ref, event.data.revision], ['ISRC1', 3]);
    assert.ok(event.data.resultUrl.startsWith(`${publicUrl}/v1/jobs/${event.data.jobId}?`));
    await sleep(300);
    assert.equal(receiver.received.length, 1);
    const [attempt] = await running.endpoints.attempts('acme', endpoint.id);
    assert.deepEqual([attempt?.eventId, attempt?.outcome, attempt?.status], [id, 'delivered', 200]);
  });

  test('what happened before an endpoint was there, of another tenant, or of a type that it does not name is not told', async () => {
    await running.tell();
    await running.endpoint(url(), { types: ['job.failed'] });
    await running.tell({}, 'other');
    await running.tell();
    const wanted = await running.tell({ state: 'failed' });
    const failed = `${wanted.slice(0, wanted.lastIndexOf('_'))}`;
    await running.events.append('acme', {
      id: failed,
      event: { ...(await running.events.find('acme', wanted))!.event, type: 'job.failed' } as never,
    });
    await until(() => receiver.received.length > 0);
    await sleep(200);
    assert.deepEqual(ids(), [failed]);
  });

  test('a job that names a callback URL is told there, signed with the secret of its endpoint, whatever that subscribes to', async () => {
    const endpoint = await running.endpoint(url('/hooks'), { types: ['batch.completed'] });
    await running.tell({}, 'acme', { endpointId: endpoint.id, url: url('/hooks/track/7?x=1') });
    await until(() => receiver.received.length > 0);
    const [message] = receiver.received;
    assert.equal(message!.path, '/hooks/track/7?x=1');
    new Webhook(endpoint.secret).verify(message!.body, message!.headers as Record<string, string>);
  });

  test('a rotated secret signs beside the old one, and alone once that has ended', async () => {
    const endpoint = await running.endpoint(url());
    const fresh = await running.endpoints.rotate('acme', endpoint.id, { overlapMs: 3_600_000 });
    await sleep(1_100);
    await running.tell();
    await until(() => receiver.received.length === 1);
    assert.equal(signatures(receiver.received[0]!).length, 2);
    for (const secret of [endpoint.secret, fresh])
      new Webhook(secret).verify(receiver.received[0]!.body, receiver.received[0]!.headers as never);
    await running.endpoints.rotate('acme', endpoint.id, { overlapMs: 0 });
    await sleep(1_100);
    await running.tell();
    await until(() => receiver.received.length === 2);
    assert.equal(signatures(receiver.received[1]!).length, 1);
    assert.throws(() =>
      new Webhook(fresh).verify(receiver.received[1]!.body, receiver.received[1]!.headers as never),
    );
  });

  test('no more messages than it may have wait for an endpoint at once, and a hanging one delays no other', async () => {
    let waiting = 0;
    let most = 0;
    const held: ServerResponse[] = [];
    answer = (message, response) => {
      if (message.path === '/live') return void response.end();
      waiting += 1;
      most = Math.max(most, waiting);
      held.push(response);
      response.on('finish', () => (waiting -= 1));
    };
    await running.endpoint(url('/slow'), { maxInFlight: 3 });
    await running.endpoint(url('/live'));
    for (let n = 0; n < 30; n += 1) await running.tell();
    await until(() => receiver.received.filter(({ path }) => path === '/live').length === 30);
    await until(() => held.length === 3);
    await sleep(300);
    assert.deepEqual([most, waiting], [3, 3]);
    answer = (_message, response) => response.end();
    for (const response of held) response.end();
    await until(() => receiver.received.filter(({ path }) => path === '/slow').length === 30);
    assert.equal(most, 3);
  });

  test('no more messages a second than it may have reach an endpoint', async () => {
    await running.endpoint(url(), { maxPerSecond: 10 });
    const from = Date.now();
    for (let n = 0; n < 35; n += 1) await running.tell();
    await until(() => receiver.received.length === 35);
    assert.ok(Date.now() - from > 2_500, `${Date.now() - from} ms`);
  });

  test('an endpoint that answers 410 is disabled; another is told so, and what comes later waits until it is enabled', async () => {
    const tired = await running.endpoint(url('/tired'));
    await running.endpoint(url('/other'), { types: ['endpoint.disabled'] });
    answer = (message, response) => response.writeHead(message.path === '/tired' ? 410 : 200).end();
    const first = await running.tell();
    await until(() => receiver.received.some(({ path }) => path === '/other'));
    const told = JSON.parse(receiver.received.find(({ path }) => path === '/other')!.body);
    eventSchema.parse(told);
    assert.deepEqual([told.data.endpointId, told.data.reason], [tired.id, 'gone']);
    assert.equal((await running.endpoints.get('acme', tired.id))?.disabledReason, 'gone');
    const letters = await Array.fromAsync(running.storage.list(deadLetterPrefix('acme', tired.id)));
    assert.ok(letters[0]?.key.endsWith(`${first}.json`));
    const later = await running.tell();
    await sleep(500);
    assert.ok(!ids().includes(later));
    answer = (_message, response) => response.end();
    await running.endpoints.enable('acme', tired.id);
    await until(() => ids().includes(later));
  });

  test('a message that was given up, and a range, are told again when that is asked for', async () => {
    const endpoint = await running.endpoint(url());
    const told: string[] = [];
    for (let n = 0; n < 5; n += 1) told.push(await running.tell());
    await until(() => receiver.received.length === 5);
    const first = (await running.events.find('acme', told[0]!))!;
    await running.endpoints.addResends('acme', endpoint.id, [{ cursor: first.cursor, eventId: first.id }]);
    await until(() => receiver.received.length === 6);
    assert.equal(ids()[5], told[0]);
    const third = (await running.events.find('acme', told[2]!))!;
    await running.endpoints.addReplay('acme', endpoint.id, { after: first.cursor, until: third.cursor });
    await until(() => receiver.received.length === 8);
    await sleep(1_200);
    assert.deepEqual(ids().slice(6).sort(), told.slice(1, 3).sort());
    assert.deepEqual((await running.endpoints.get('acme', endpoint.id))?.replays, []);
  });

  test('events of one ref follow one another at once; those of a removed endpoint go with it', async () => {
    const endpoint = await running.endpoint(url());
    for (let revision = 1; revision <= 100; revision += 1) await running.tell({ ref: 'A', revision });
    await until(() => receiver.received.length === 100);
    const revisions = receiver.received.map(({ body }) => JSON.parse(body).data.revision);
    assert.deepEqual(
      revisions,
      Array.from({ length: 100 }, (_, n) => n + 1),
    );
    answer = (_message, response) => response.writeHead(500).end();
    for (let revision = 101; revision <= 105; revision += 1) await running.tell({ ref: 'A', revision });
    await until(() => receiver.received.length > 100);
    const keys = () => running.redis.keys(`*${endpoint.id}*`);
    await until(async () => (await keys()).some((key) => key.endsWith(':held')));
    await running.endpoints.remove('acme', endpoint.id);
    await until(async () => (await keys()).length === 0);
  });

  test('its figures are told', async () => {
    await running.endpoint(url());
    await running.tell();
    await until(() => receiver.received.length === 1);
    const text = await (await fetch(`${running.healthUrl}/metrics`)).text();
    assert.match(text, /acousticsense_webhook_leads\{[^}]*\} 1/);
    assert.match(text, /acousticsense_webhook_attempts_total\{outcome="delivered",problem="none"[^}]*\} \d/);
    assert.match(text, /acousticsense_webhook_endpoints\{status="enabled"[^}]*\} 1/);
  });
});

describe('the webhook service under a clock that runs fast', () => {
  /** 75 hours in about 14 seconds. */
  const speed = { WEBHOOK_CLOCK_SPEED: '20000' };
  const timing = { timeout: 90_000 };

  test(
    'a message that fails is tried ten times over three days, then is a dead letter; the endpoint, which took nothing in all the time, is disabled',
    timing,
    async () => {
      await using running = await startWebhookService(speed);
      await using receiver = await startReceiver((_message, response) =>
        response.writeHead(500).end('x'.repeat(1_000)),
      );
      const { id: endpointId } = await running.endpoint(`${receiver.origin}/dead`);
      const id = await running.tell();
      const isDead = async () => (await running.endpoints.get('acme', endpointId))?.status === 'disabled';
      await until(isDead, 60_000);
      assert.deepEqual(new Set(receiver.received.map(idOf)), new Set([id]));
      assert.equal(new Set(receiver.received.map(({ body }) => body)).size, 1);
      assert.equal(receiver.received.length, maxAttempts);
      const times = receiver.received.map(({ headers }) => Number(headers['webhook-timestamp']));
      const hours = (times.at(-1)! - times[0]!) / 3_600;
      assert.ok(hours > 65 && hours < 200, `${hours} h`);
      assert.equal((await running.endpoints.get('acme', endpointId))?.disabledReason, 'failing');
      const [letter] = await Array.fromAsync(running.storage.list(deadLetterPrefix('acme', endpointId)));
      const { attempts, reason, eventId } = JSON.parse((await running.storage.read(letter!.key)).toString());
      assert.deepEqual([attempts.length, reason, eventId], [maxAttempts, 'exhausted', id]);
      assert.deepEqual(
        [attempts[0].status, attempts[0].problem, attempts[0].excerpt],
        [500, 'status', 'x'.repeat(256)],
      );
      await until(
        async () => (await running.events.find('acme', id)) && (await running.events.length('acme')) === 2,
      );
    },
  );

  test('a receiver that asks to be left alone for a while is', timing, async () => {
    await using running = await startWebhookService(speed);
    let refused = 0;
    await using receiver = await startReceiver((_message, response) => {
      refused += 1;
      if (refused === 1) response.writeHead(503, { 'retry-after': '36000' }).end();
      else response.end();
    });
    await running.endpoint(`${receiver.origin}/busy`);
    await running.tell();
    await until(() => receiver.received.length === 2);
    const [first, second] = receiver.received.map(({ headers }) => Number(headers['webhook-timestamp']));
    assert.ok(second! - first! >= 35_000, `${second! - first!} s`);
  });

  test('of one ref a later event waits for the earlier one, of others it does not', timing, async () => {
    await using running = await startWebhookService(speed);
    const seen = new Map<string, number>();
    await using receiver = await startReceiver((message, response) => {
      const times = (seen.get(idOf(message)) ?? 0) + 1;
      seen.set(idOf(message), times);
      const { ref, revision } = JSON.parse(message.body).data;
      response.writeHead(ref === 'A' && revision === 1 && times < 4 ? 500 : 200).end();
    });
    await running.endpoint(`${receiver.origin}/ordered`);
    const order = [];
    for (const [ref, revision] of [
      ['A', 1],
      ['A', 2],
      ['B', 1],
      ['A', 3],
      ['B', 2],
    ] as const)
      order.push(await running.tell({ ref, revision }));
    const accepted = () => {
      const counts = new Map<string, number>();
      return receiver.received.filter((message) => {
        const { ref, revision } = JSON.parse(message.body).data;
        counts.set(idOf(message), (counts.get(idOf(message)) ?? 0) + 1);
        return !(ref === 'A' && revision === 1 && counts.get(idOf(message))! < 4);
      });
    };
    await until(() => new Set(accepted().map(idOf)).size === 5, 60_000);
    const told = accepted().map(
      ({ body }) => `${JSON.parse(body).data.ref}${JSON.parse(body).data.revision}`,
    );
    assert.deepEqual(
      told.filter((one) => one.startsWith('A')),
      ['A1', 'A2', 'A3'],
    );
    assert.deepEqual(told.slice(0, 2), ['B1', 'B2']);
  });
});

test('what a receiver refuses for ever does not keep it from what it takes', {
  timeout: 90_000,
}, async () => {
  await using running = await startWebhookService({ WEBHOOK_BACKLOG: '10' });
  await using receiver = await startReceiver((message, response) =>
    response.writeHead(JSON.parse(message.body).data.ref === null ? 204 : 400).end(),
  );
  await running.endpoint(`${receiver.origin}/choosy`);
  await running.tell();
  await until(() => receiver.received.length === 1);
  for (let n = 0; n < 20; n += 1) await running.tell({ ref: `refused ${n}` });
  const taken: string[] = [];
  for (let n = 0; n < 20; n += 1) taken.push(await running.tell());
  await until(() => taken.every((id) => receiver.received.some((message) => idOf(message) === id)));
});

describe('a webhook service that dies', () => {
  const timing = { timeout: 90_000 };

  test(
    'in mid-delivery leaves the message to the next, which tells it under the same id',
    timing,
    async () => {
      await using running = await startWebhookService({}, { appendOnly: true });
      let hold = true;
      await using receiver = await startReceiver((_message, response) => {
        if (!hold) response.end();
      });
      await running.endpoint(`${receiver.origin}/hook`);
      const ids: string[] = [];
      for (let n = 0; n < 20; n += 1) ids.push(await running.tell());
      await until(() => receiver.received.length > 0);
      await running.stop('SIGKILL');
      hold = false;
      await running.start();
      await until(() => ids.every((id) => receiver.received.some((message) => idOf(message) === id)), 40_000);
      assert.deepEqual(new Set(receiver.received.map(idOf)), new Set(ids));
    },
  );

  test('of a Redis that is killed under it nothing is lost', timing, async () => {
    await using running = await startWebhookService({}, { appendOnly: true });
    await using receiver = await startReceiver((_message, response) => setTimeout(() => response.end(), 30));
    await running.endpoint(`${receiver.origin}/hook`);
    const ids: string[] = [];
    for (let n = 0; n < 60; n += 1) ids.push(await running.tell());
    await until(() => receiver.received.length > 5);
    await running.server.stop('SIGKILL');
    await sleep(500);
    await running.server.start();
    for (let n = 0; n < 20; n += 1) ids.push(await running.tell());
    await until(() => ids.every((id) => receiver.received.some((message) => idOf(message) === id)), 40_000);
    assert.deepEqual(new Set(receiver.received.map(idOf)), new Set(ids));
  });
});
