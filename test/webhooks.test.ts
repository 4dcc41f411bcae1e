/** Webhooks on the whole product: an endpoint proves itself, songs are sent, and the receiver hears how each ended. */
import assert from 'node:assert/strict';
import { createServer, type IncomingHttpHeaders, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Webhook } from 'svix';
import { type Event, eventSchema } from '../packages/shared/src/events.ts';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { deliveryPageSchema } from '../services/api/src/delivery-routes.ts';
import { jobSchema } from '../services/api/src/schemas.ts';
import { sine, wav } from './audio.ts';
import { formOf, type Job, type Problem, request } from './client.ts';
import { type System, startSystem } from './system.ts';

const song = wav([sine({ seconds: 2, hz: 440, sampleRate: 8_000 })], { sampleRate: 8_000 });

interface Heard {
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: string;
}

interface Shown {
  readonly id: string;
  readonly secret: string;
  readonly status: string;
  readonly attempts?: { readonly outcome: string; readonly status?: number }[];
}

describe('webhooks', () => {
  let system: System;
  let receiver: Server;
  let origin: string;
  let endpoint: Shown;
  const heard: Heard[] = [];

  before(async () => {
    receiver = createServer(async (message, response) => {
      const body = Buffer.concat(await message.toArray()).toString();
      const event = JSON.parse(body) as { type: string; data: { challenge?: string } };
      if (event.type === 'endpoint.verification')
        return void response.end(JSON.stringify({ challenge: event.data.challenge }));
      heard.push({ path: message.url!, headers: message.headers, body });
      response.writeHead(message.url === '/closed' ? 410 : 204).end();
    }).listen(0, '127.0.0.1');
    await new Promise((resolve) => receiver.once('listening', resolve));
    origin = `http://127.0.0.1:${(receiver.address() as AddressInfo).port}`;
    system = await startSystem({ env: { EGRESS_ALLOW: '127.0.0.0/8' } });
  });
  after(async () => {
    await system?.stop();
    receiver.closeAllConnections();
    await new Promise((resolve) => receiver.close(resolve));
  });

  const endpoints = () => `${system.url}/v1/webhooks/endpoints`;
  const post = <T>(url: string, body?: unknown) =>
    request<T>(url, {
      method: 'POST',
      ...(body === undefined
        ? {}
        : { headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) }),
    });
  const send = (audio: Uint8Array, fields: Record<string, string>) =>
    request<Job & Problem>(`${system.url}/v1/jobs`, { method: 'POST', body: formOf(audio, { fields }) });
  async function until<T>(look: () => T | undefined | Promise<T | undefined>, ms = 30_000): Promise<T> {
    for (const end = Date.now() + ms; Date.now() < end; await sleep(25)) {
      const found = await look();
      if (found !== undefined) return found;
    }
    throw new Error(`never: ${look}; heard ${heard.map(({ body }) => body).join('\n')}`);
  }
  const told = (fits: (event: Event, message: Heard) => boolean) =>
    until(() => heard.find((message) => fits(JSON.parse(message.body) as Event, message)));
  const statusOf = async (id: string) => (await request<Shown>(`${endpoints()}/${id}`)).body;

  test('an endpoint that says the challenge back is enabled by itself', async () => {
    const made = await post<Shown>(endpoints(), { url: `${origin}/hooks`, types: [] });
    assert.equal(made.status, 201, JSON.stringify(made.body));
    endpoint = made.body;
    await until(async () => ((await statusOf(endpoint.id)).status === 'enabled' ? true : undefined));
  });

  test('a song that ends is told, signed; its link opens the result without a key', async () => {
    const { body: job } = await send(song, { ref: 'track-1' });
    const message = await told(({ data }) => 'jobId' in data && data.jobId === job.id);
    new Webhook(endpoint.secret).verify(message.body, message.headers as Record<string, string>);
    const event = eventSchema.parse(JSON.parse(message.body));
    assert.ok(event.type === 'job.completed');
    assert.deepEqual([event.data.ref, event.data.batchId], ['track-1', null]);
    const result = jobSchema.parse((await request(event.data.resultUrl)).body);
    assert.deepEqual(
      event.data.genres,
      result.result?.top.map(({ label, confidence }) => ({ label, confidence })),
    );
    assert.equal(event.data.uncertain, result.result?.uncertain);
    assert.deepEqual(event.data.model, result.model);
  });

  test('what is no audio is told with its error', async () => {
    const { body: job } = await send(new TextEncoder().encode('no audio at all'), {});
    const message = await told(({ data }) => 'jobId' in data && data.jobId === job.id);
    const event = eventSchema.parse(JSON.parse(message.body));
    assert.ok(event.type === 'job.failed');
    assert.equal(event.data.error?.code, 'not_audio');
  });

  test('a job may name a place of its own under an endpoint, and nowhere else', async () => {
    const { body: job, status } = await send(song, { callbackUrl: `${origin}/hooks/of/track-2` });
    assert.equal(status, 202);
    const message = await told(({ data }) => 'jobId' in data && data.jobId === job.id);
    assert.equal(message.path, '/hooks/of/track-2');
    new Webhook(endpoint.secret).verify(message.body, message.headers as Record<string, string>);
    for (const callbackUrl of [
      `${origin}/elsewhere`,
      `${origin}/hooksandmore`,
      origin.replace('http://', 'http://user:word@').concat('/hooks/x'),
      'ftp://127.0.0.1/hooks/x',
      `${origin}/hooks/../admin`,
      'https://other.example/hooks/x',
    ]) {
      const refused = await send(song, { callbackUrl });
      assert.deepEqual([refused.status, refused.body.code], [400, 'callback_not_allowed'], callbackUrl);
    }
  });

  test('of a batch its parts and its end are told, its rows only where that is asked for', async () => {
    const manifest = (ref: string) =>
      `{"audio":"upload:019abf2d-11a3-7b02-8e4d-5a7c90b1d3f6","ref":"${ref}"}\n`;
    const batchOf = async (query: string, ref: string) => {
      const answer = await request<{ id: string }>(`${system.url}/v1/batches${query}`, {
        method: 'POST',
        headers: { 'content-type': 'application/x-ndjson' },
        body: manifest(ref),
      });
      assert.equal(answer.status, 202, JSON.stringify(answer.body));
      const { id } = answer.body;
      const types = () =>
        heard
          .map(({ body }) => JSON.parse(body) as Event)
          .filter(({ data }) => 'batchId' in data && data.batchId === id)
          .map(({ type }) => type)
          .sort();
      // Between an end and its last part there is no order on the way.
      await until(() =>
        ['batch.completed', 'results.part'].every((type) => types().includes(type as Event['type']))
          ? true
          : undefined,
      );
      await sleep(300);
      return types();
    };
    assert.deepEqual(await batchOf('', 'a'), ['batch.completed', 'results.part']);
    assert.deepEqual(await batchOf('?notify=rows', 'b'), ['batch.completed', 'job.failed', 'results.part']);
  });

  test('an endpoint can be tried, and shows what became of it', async () => {
    const { body: ordered } = await post<{ orderId: string }>(`${endpoints()}/${endpoint.id}/test`);
    const outcome = await until(async () => {
      const { body } = await request<{ outcome?: string; status?: number }>(
        `${endpoints()}/${endpoint.id}/tests/${ordered.orderId}`,
      );
      return body.outcome ? body : undefined;
    });
    assert.deepEqual([outcome.outcome, outcome.status], ['delivered', 204]);
    await told((_, { headers }) => headers['webhook-id'] === `evt_test_${ordered.orderId}`);
    const { attempts = [] } = await statusOf(endpoint.id);
    assert.ok(attempts.length > 0 && attempts.every(({ status }) => status === 204));
  });

  test('every attempt is on record, found by its event and its endpoint', async () => {
    const { body: job } = await send(song, { ref: 'proof' });
    const message = await told(({ data }) => 'jobId' in data && data.jobId === job.id);
    const id = message.headers['webhook-id'] as string;
    const at = (query: string) => `${system.url}/v1/webhooks/deliveries?${query}`;
    const page = await until(async () => {
      const { body } = await request(at(`event=${id}`));
      const parsed = deliveryPageSchema.parse(body);
      return parsed.deliveries.length > 0 ? parsed : undefined;
    });
    const [only, ...others] = page.deliveries;
    assert.deepEqual(others, []);
    assert.deepEqual(
      [only?.eventId, only?.endpointId, only?.outcome, only?.status, only?.attempt],
      [id, endpoint.id, 'delivered', 204, 1],
    );
    const all = deliveryPageSchema.parse((await request(at('limit=2'))).body);
    assert.deepEqual([all.deliveries.length, all.more], [2, true]);
    const rest = deliveryPageSchema.parse(
      (await request(at(`after=${all.next}&endpoint=${endpoint.id}`))).body,
    );
    assert.ok(rest.deliveries.some(({ eventId }) => eventId === id) && !rest.more);
    const refused = await request<Problem>(at('after=yesterday'));
    assert.deepEqual([refused.status, refused.body.code], [400, 'bad_option']);
  });

  test('an endpoint that wants no more is disabled, and another hears of that', async () => {
    const { body: closed } = await post<Shown>(endpoints(), { url: `${origin}/closed` });
    await until(async () => ((await statusOf(closed.id)).status === 'enabled' ? true : undefined));
    await send(song, {});
    const message = await told(({ type }) => type === 'endpoint.disabled');
    assert.equal(message.path, '/hooks');
    const event = eventSchema.parse(JSON.parse(message.body));
    assert.ok(event.type === 'endpoint.disabled');
    assert.deepEqual([event.data.endpointId, event.data.reason], [closed.id, 'gone']);
    assert.equal((await statusOf(closed.id)).status, 'disabled');
  });

  test('a removed endpoint hears nothing any more and leaves nothing in Redis', async () => {
    const removed = await fetch(`${endpoints()}/${endpoint.id}`, { method: 'DELETE' });
    assert.equal(removed.status, 204);
    await sleep(2_500);
    const before = heard.length;
    const { body: job } = await send(song, {});
    await until(async () =>
      (await request<Job>(`${system.url}/v1/jobs/${job.id}`)).body.state === 'completed' ? true : undefined,
    );
    await sleep(500);
    assert.equal(heard.length, before);
    const redis = connectRedisForWorker(system.redis.url);
    const left = await redis.keys(`*${endpoint.id}*`);
    redis.disconnect();
    // What became of a test is readable for an hour.
    assert.deepEqual(
      left.filter((key) => !key.includes(':test:')),
      [],
    );
  });
});
