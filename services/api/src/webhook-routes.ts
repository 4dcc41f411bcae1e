/** Endpoints of webhooks by HTTP: registered, verified, changed; what became of messages, and sending them again. */
import type { EndpointQueues } from '@acousticsense/shared/endpoint-queues';
import type { AddressRules, Endpoint, Endpoints, Resend } from '@acousticsense/shared/endpoints';
import {
  endpointChangeSchema,
  endpointDefinitionSchema,
  endpointUrl,
  isUnder,
  rotationSchema,
} from '@acousticsense/shared/endpoints';
import { ProblemError } from '@acousticsense/shared/errors';
import type { EventLog } from '@acousticsense/shared/event-log';
import { deadLetterPrefix } from '@acousticsense/shared/object-keys';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { WebhookOrders } from '@acousticsense/shared/webhook-orders';
import express, { type Request, type Response, type Router } from 'express';
import type { Logger } from 'pino';
import type { z } from 'zod';
import { jsonBodyOf, refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';
import {
  type deadLetterListSchema,
  deadLettersQuerySchema,
  deadLettersResendSchema,
  type endpointDetailSchema,
  type endpointListSchema,
  type newEndpointSchema,
  type orderSchema,
  presentEndpoint,
  presentLetter,
  presentOutcome,
  type replayIdSchema,
  replayRequestSchema,
  resendRequestSchema,
  type resentSchema,
  type secretSchema,
  storedLetterSchema,
  type testSchema,
} from './webhook-schemas.ts';

export interface WebhookRoutesDeps {
  readonly endpoints: Endpoints;
  readonly orders: Pick<WebhookOrders, 'add'>;
  readonly queues: EndpointQueues;
  readonly eventLog: Pick<EventLog, 'find'>;
  readonly storage: Pick<Storage, 'list' | 'read'>;
  readonly guard: AddressRules;
  readonly tenantOf: (response: Response) => string;
  readonly log: Pick<Logger, 'warn'>;
}

const at = '/v1/webhooks/endpoints';
const maxJsonBytes = 64 * 1024;
/** Read at once for one answer. */
const lettersAtOnce = 20;
/** Of one request; Redis keeps no more waiting. */
const mostResends = 10_000;

export function createWebhookRoutes(deps: WebhookRoutesDeps): Router {
  const { endpoints, orders, queues, eventLog, storage, guard, tenantOf, log } = deps;
  const router = express.Router();
  const json = express.json({ limit: maxJsonBytes });

  /** @throws {ProblemError} endpoint_not_found: also for those of other tenants. */
  async function own(request: Request<{ id: string }>, response: Response): Promise<Endpoint> {
    const endpoint = await endpoints.get(tenantOf(response), request.params.id);
    if (endpoint === undefined) throw notFound();
    return endpoint;
  }

  const present = (endpoint: Endpoint) => presentEndpoint(endpoint, Date.now());

  router.post(at, json, async (request, response) => {
    const tenant = tenantOf(response);
    const definition = parseOptions(endpointDefinitionSchema, jsonBodyOf(request, 'the endpoint'));
    const url = endpointUrl(definition.url, guard);
    const { endpoint, secret } = await endpoints.create(tenant, { ...definition, url });
    await verifySoon(endpoint);
    response
      .status(201)
      .location(`${at}/${endpoint.id}`)
      .set('cache-control', 'no-store')
      .json({ ...present(endpoint), secret } satisfies z.infer<typeof newEndpointSchema>);
  });

  router.get(at, async (_request, response) => {
    const list = await endpoints.list(tenantOf(response));
    response
      .set('cache-control', 'no-store')
      .json({ endpoints: list.map(present) } satisfies z.infer<typeof endpointListSchema>);
  });

  router.get(`${at}/:id`, async (request, response) => {
    const endpoint = await own(request, response);
    const { tenant, id } = endpoint;
    const [backlog, attempts] = await Promise.all([queues.backlog(id), endpoints.attempts(tenant, id)]);
    response.set('cache-control', 'no-store').json({
      ...present(endpoint),
      backlog,
      attempts: attempts.map(presentOutcome),
    } satisfies z.infer<typeof endpointDetailSchema>);
  });

  router.patch(`${at}/:id`, json, async (request, response) => {
    const { tenant, id, url: before } = await own(request, response);
    const change = parseOptions(endpointChangeSchema, jsonBodyOf(request, 'the change'));
    const url = change.url === undefined ? undefined : endpointUrl(change.url, guard);
    const endpoint = await endpoints.update(tenant, id, { ...change, url });
    if (endpoint.url !== before) await verifySoon(endpoint);
    response.set('cache-control', 'no-store').json(present(endpoint));
  });

  router.delete(`${at}/:id`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    // First the queue: when that fails, the endpoint is still there to be deleted again. Then what came in between.
    await queues.remove(id);
    await endpoints.remove(tenant, id);
    await queues
      .remove(id)
      .catch((error) =>
        log.warn({ err: error, tenant, endpointId: id }, 'messages may be left in its queue'),
      );
    response.status(204).end();
  });

  router.post(`${at}/:id/verify`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const orderId = await orders.add({ kind: 'verify', tenant, endpointId: id });
    response.status(202).json({ orderId } satisfies z.infer<typeof orderSchema>);
  });

  router.post(`${at}/:id/test`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const orderId = await orders.add({ kind: 'test', tenant, endpointId: id });
    await endpoints.beginTest(tenant, id, orderId);
    response
      .status(202)
      .location(`${at}/${id}/tests/${orderId}`)
      .json({ orderId } satisfies z.infer<typeof orderSchema>);
  });

  router.get(`${at}/:id/tests/:orderId`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const { orderId } = request.params;
    const outcome = await endpoints.test(tenant, id, orderId);
    if (outcome === undefined) {
      throw new ProblemError('not_found', 'There is no such test, or it was given more than an hour ago.');
    }
    response
      .set('cache-control', 'no-store')
      .json(
        (outcome === 'waiting'
          ? { orderId, state: 'waiting' }
          : { orderId, state: 'done', ...presentOutcome(outcome) }) satisfies z.infer<typeof testSchema>,
      );
  });

  router.post(`${at}/:id/rotate`, json, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const { secret: given, overlapHours } = parseOptions(rotationSchema, optionalBody(request, 'the secret'));
    const secret = await endpoints.rotate(tenant, id, { secret: given, overlapMs: overlapHours * 3_600_000 });
    response.set('cache-control', 'no-store').json({ secret } satisfies z.infer<typeof secretSchema>);
  });

  router.post(`${at}/:id/disable`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    await endpoints.disable(tenant, id, 'operator');
    response.set('cache-control', 'no-store').json(present(await own(request, response)));
  });

  router.post(`${at}/:id/enable`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    response.set('cache-control', 'no-store').json(present(await endpoints.enable(tenant, id)));
  });

  router.post(`${at}/:id/resend`, json, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const { eventId } = parseOptions(resendRequestSchema, jsonBodyOf(request, 'the event to send again'));
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    const found = await eventLog.find(tenant, eventId, gone.signal);
    if (found === undefined) throw noSuchEvent();
    const { cursor, callback } = found;
    const url = callback?.endpointId === id ? { url: callback.url } : {};
    response.status(202).json(await resend(tenant, id, [{ cursor, eventId, ...url }], false));
  });

  router.post(`${at}/:id/replay`, json, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const range = parseOptions(replayRequestSchema, jsonBodyOf(request, 'the range to tell again'));
    const { from, to, types } = range;
    const replayId = await endpoints.addReplay(tenant, id, {
      after: range.after ?? justBefore(from!),
      until: range.until ?? (to === undefined ? undefined : justBefore(to)),
      types,
    });
    response.status(202).json({ id: replayId } satisfies z.infer<typeof replayIdSchema>);
  });

  router.get(`${at}/:id/dead-letters`, async (request, response) => {
    const { tenant, id } = await own(request, response);
    const { day, limit } = parseOptions(deadLettersQuerySchema, request.query);
    const { keys, more } = await newestLetters(tenant, id, day, limit);
    const deadLetters = [];
    for (let from = 0; from < keys.length; from += lettersAtOnce) {
      const letters = await Promise.all(keys.slice(from, from + lettersAtOnce).map(readLetter));
      deadLetters.push(...letters.filter((letter) => letter !== undefined).map(presentLetter));
    }
    response
      .set('cache-control', 'no-store')
      .json({ deadLetters, more } satisfies z.infer<typeof deadLetterListSchema>);
  });

  router.post(`${at}/:id/dead-letters/resend`, json, async (request, response) => {
    const endpoint = await own(request, response);
    const { tenant, id } = endpoint;
    const { eventId, day } = parseOptions(
      deadLettersResendSchema,
      jsonBodyOf(request, 'which letters to send again'),
    );
    const resends: Resend[] = [];
    let more = false;
    for await (const { key } of storage.list(deadLetterPrefix(tenant, id, day))) {
      const place = placeOf(key);
      if (place === undefined || (eventId !== undefined && place.eventId !== eventId)) continue;
      if (resends.length === mostResends) {
        more = true;
        break;
      }
      const letter = await readLetter(key);
      if (letter === undefined) continue;
      resends.push({ cursor: letter.cursor, ...place, ...callbackOf(endpoint, letter.url) });
    }
    if (eventId !== undefined && resends.length === 0) throw noSuchEvent();
    response.status(202).json(await resend(tenant, id, resends, more));
  });

  router.all(at, refuseMethod('GET, HEAD, POST'));
  router.all(`${at}/:id`, refuseMethod('GET, HEAD, PATCH, DELETE'));
  router.all([`${at}/:id/tests/:orderId`, `${at}/:id/dead-letters`], refuseMethod('GET, HEAD'));
  router.all(
    [...['verify', 'test', 'rotate', 'disable', 'enable', 'resend', 'replay'], 'dead-letters/resend'].map(
      (what) => `${at}/:id/${what}`,
    ),
    refuseMethod('POST'),
  );
  return router;

  /** The endpoint is registered, whatever becomes of this: `verify` orders it again. */
  async function verifySoon({ tenant, id }: Endpoint): Promise<void> {
    await orders
      .add({ kind: 'verify', tenant, endpointId: id })
      .catch((error) => log.warn({ err: error, tenant, endpointId: id }, 'the challenge was not ordered'));
  }

  async function resend(tenant: string, id: string, resends: readonly Resend[], more: boolean) {
    const resent = await endpoints.addResends(tenant, id, resends);
    return { resent, more: more || resent < resends.length } satisfies z.infer<typeof resentSchema>;
  }

  /** Keys of the newest `limit`: by day, and within it by the event's id. */
  async function newestLetters(tenant: string, id: string, day: string | undefined, limit: number) {
    let keys: string[] = [];
    let more = false;
    const keepNewest = () => {
      more ||= keys.length > limit;
      keys = keys.sort((a, b) => (a < b ? 1 : -1)).slice(0, limit);
    };
    for await (const { key } of storage.list(deadLetterPrefix(tenant, id, day))) {
      if (placeOf(key) === undefined) continue;
      keys.push(key);
      // There may be a great many.
      if (keys.length >= 2 * limit + 1_000) keepNewest();
    }
    keepNewest();
    return { keys, more };
  }

  /** @returns undefined for one that was sent again or deleted meanwhile. */
  async function readLetter(key: string): Promise<z.infer<typeof storedLetterSchema> | undefined> {
    try {
      return storedLetterSchema.parse(JSON.parse((await storage.read(key)).toString('utf8')));
    } catch (error) {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    }
  }
}

/** What went to the endpoint's own url goes to the one that it has now. */
function callbackOf(endpoint: Endpoint, url: string): { url?: string } {
  return url !== endpoint.url && isUnder(endpoint, url) ? { url } : {};
}

function placeOf(key: string): { day: string; eventId: string } | undefined {
  const [, day, eventId] = /\/(\d{4}-\d\d-\d\d)\/([^/]+)\.json$/.exec(key) ?? [];
  return day && eventId ? { day, eventId } : undefined;
}

/** More than any millisecond has events. */
const mostInOneMs = 999_999_999_999_999;

/** The cursor behind which comes the first event of that time. @param time ISO 8601 */
function justBefore(time: string): string {
  return `${Math.max(0, Date.parse(time) - 1)}-${mostInOneMs}`;
}

/** For what can be asked without saying anything. */
function optionalBody(request: Request, what: string): unknown {
  const sent = Number(request.headers['content-length'] ?? 0) > 0 || 'transfer-encoding' in request.headers;
  return sent ? jsonBodyOf(request, what) : {};
}

const notFound = () => new ProblemError('endpoint_not_found', 'There is no endpoint with this id.');
const noSuchEvent = () =>
  new ProblemError('event_not_found', 'There is no event with this id; events are kept for their retention.');
