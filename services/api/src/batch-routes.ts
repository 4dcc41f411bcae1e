/** Batches by HTTP. */
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { pipeline } from 'node:stream/promises';
import { isEnded } from '@acousticsense/shared/batch';
import { ProblemError } from '@acousticsense/shared/errors';
import { badRowsKey } from '@acousticsense/shared/object-keys';
import { pause } from '@acousticsense/shared/pause';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import express, { type Request, type Response, type Router } from 'express';
import type { Logger } from 'pino';
import { z } from 'zod';
import { type AcceptedBatch, type Batches, formatOf, presentBatch, readBody } from './batches.ts';
import type { Bind, Idempotency } from './idempotency.ts';
import { type Jobs, parseOptions } from './jobs.ts';
import type { Mappings } from './mappings.ts';
import { batchListQuerySchema, batchOptionsSchema, mappingNameSchema } from './schemas.ts';

export interface BatchRoutesDeps {
  readonly batches: Batches;
  readonly mappings: Mappings;
  readonly jobs: Pick<Jobs, 'servedModel'>;
  readonly idempotency: Idempotency;
  readonly storage: Pick<Storage, 'get'>;
  readonly tenantOf: (response: Response) => string;
  /** Aborted when the service closes. */
  readonly closing: AbortSignal;
  readonly log: Logger;
}

const maxJsonBytes = 64 * 1024;
const maxMappingBytes = 1024 * 1024;
/** A batch of thousands of rows a second is told this often; nobody reads faster. */
const eventsEveryMs = 1_000;
const heartbeatMs = 15_000;

export function createBatchRoutes(deps: BatchRoutesDeps): Router {
  const { batches, mappings, jobs, idempotency, storage, tenantOf, closing, log } = deps;
  const router = express.Router();
  const json = express.json({ limit: maxJsonBytes, type: 'application/json' });

  router.post('/v1/batches', json, async (request, response) => {
    const tenant = tenantOf(response);
    const accepted = ({ batch, notes }: AcceptedBatch) => {
      const body = presentBatch(batch, notes);
      return { status: 202, headers: { location: body.links.self }, body };
    };
    const referred: unknown = request.body;
    const asJson = typeof referred === 'object' && referred !== null;
    if (!asJson) formatOf(request);
    await idempotency.answer(request, response, {
      tenant,
      route: 'POST /v1/batches',
      read: async () => (asJson ? digestOf(request, referred) : digestOfBody(request)),
      recall: async (id) => {
        try {
          const batch = await batches.read(tenant, id);
          return batch.state === 'receiving' ? undefined : accepted({ batch, notes: [] });
        } catch (error) {
          if (error instanceof ProblemError && error.status !== 503) return undefined;
          throw error;
        }
      },
      make: async (bind) =>
        accepted(
          asJson
            ? await acceptReferred(request, tenant, referred, bind)
            : await batches.acceptManifest(
                request,
                tenant,
                parseOptions(batchOptionsSchema, request.query),
                bind,
              ),
        ),
    });
  });

  function acceptReferred(
    request: Request,
    tenant: string,
    body: object,
    bind: Bind,
  ): Promise<AcceptedBatch> {
    const { prefix, rerunOf, ...rest } = body as Record<string, unknown>;
    const asText = Object.fromEntries(
      Object.entries({ ...request.query, ...rest }).map(([name, value]) => [
        name,
        typeof value === 'string' ? value : JSON.stringify(value),
      ]),
    );
    const options = parseOptions(batchOptionsSchema, asText);
    const fingerprint = digestOf(request, body);
    if (typeof prefix === 'string' && rerunOf === undefined)
      return batches.acceptPrefix(tenant, prefix, options, bind, fingerprint);
    if (typeof rerunOf === 'string' && prefix === undefined)
      return batches.acceptRerun(tenant, rerunOf, options, bind, fingerprint);
    throw new ProblemError(
      'bad_option',
      'JSON names either "prefix" (s3://BUCKET/PREFIX) or "rerunOf" (the id of a batch); a manifest is sent as application/x-ndjson or text/csv.',
      { field: 'prefix' },
    );
  }

  router.get('/v1/batches', async (request, response) => {
    const { limit, before } = parseOptions(batchListQuerySchema, request.query);
    const found = await batches.list(
      tenantOf(response),
      limit,
      before === undefined ? undefined : Date.parse(before),
    );
    response.set('cache-control', 'no-store').json({ batches: found.map((batch) => presentBatch(batch)) });
  });

  router.get('/v1/batches/:id', async (request, response) => {
    const batch = await batches.read(tenantOf(response), request.params.id);
    response.set('cache-control', 'no-store').json(presentBatch(batch));
  });

  router.delete('/v1/batches/:id', async (request, response) => {
    const cancelled = await batches.remove(tenantOf(response), request.params.id);
    if (cancelled) response.json(presentBatch(cancelled));
    else response.status(204).end();
  });

  for (const what of ['cancel', 'pause', 'resume'] as const) {
    router.post(`/v1/batches/:id/${what}`, async (request, response) => {
      response.json(
        presentBatch(await batches.change(tenantOf(response), String(request.params['id']), what)),
      );
    });
  }

  router.post('/v1/batches/:id/retry-failed', async (request, response) => {
    response.json(presentBatch(await batches.retryFailed(tenantOf(response), request.params.id)));
  });

  router.get('/v1/batches/:id/bad-rows.jsonl', async (request, response) => {
    const tenant = tenantOf(response);
    const { id } = await batches.read(tenant, request.params.id);
    response.set('content-type', 'application/x-ndjson').set('cache-control', 'no-store');
    const rows = await storage.get(badRowsKey(tenant, id)).catch((error) => {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    });
    if (rows === undefined || request.method === 'HEAD') {
      rows?.destroy();
      response.end();
    } else await pipeline(rows, response);
  });

  router.get('/v1/batches/:id/events', async (request, response) => {
    const tenant = tenantOf(response);
    await batches.read(tenant, request.params.id);
    await streamEvents(request, response, tenant, request.params.id);
  });

  /** Server-sent events: `batch`, first as a snapshot, then at most once a second when anything has changed. */
  async function streamEvents(
    request: Request,
    response: Response,
    tenant: string,
    id: string,
  ): Promise<void> {
    if (response.destroyed) return;
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    const signal = AbortSignal.any([gone.signal, closing]);
    response.writeHead(200, {
      'content-type': 'text/event-stream',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no',
    });
    if (request.method === 'HEAD') return void response.end();
    response.write('retry: 1000\n\n');
    let known = '';
    let toldAt = performance.now();
    try {
      while (!signal.aborted) {
        const batch = await batches.read(tenant, id);
        const { estimatedEnd, ...body } = presentBatch(batch);
        const text = JSON.stringify(body);
        if (response.writableNeedDrain) await once(response, 'drain', { signal });
        if (text !== known) {
          known = text;
          toldAt = performance.now();
          const more = estimatedEnd === undefined ? body : { ...body, estimatedEnd };
          response.write(`event: batch\ndata: ${JSON.stringify(more)}\n\n`);
          if (isEnded(batch.state)) break;
        } else if (performance.now() - toldAt >= heartbeatMs) {
          toldAt = performance.now();
          response.write(': heartbeat\n\n');
        }
        await pause(eventsEveryMs, signal);
      }
    } catch (error) {
      // The client reconnects by itself, and gets a snapshot.
      if (!signal.aborted) log.warn({ err: error, batchId: id }, 'event stream ended');
    }
    response.end();
  }

  router.get('/v1/mappings', async (_request, response) => {
    response.json({ mappings: await mappings.list(tenantOf(response)) });
  });
  router.put(
    '/v1/mappings/:name',
    express.text({ limit: maxMappingBytes, type: () => true }),
    async (request, response) => {
      const { name } = parseOptions(z.object({ name: mappingNameSchema }), request.params);
      const { description } = await jobs.servedModel();
      const text = typeof request.body === 'string' ? request.body : '';
      const type = request.headers['content-type'] ?? '';
      const mapping = await mappings.save(tenantOf(response), name, text, type, description.labels);
      response.json({ name, ...mapping });
    },
  );
  router.delete('/v1/mappings/:name', async (request, response) => {
    const { name } = parseOptions(z.object({ name: mappingNameSchema }), request.params);
    if (!(await mappings.remove(tenantOf(response), name)))
      throw new ProblemError('mapping_not_found', `There is no mapping "${name}".`);
    response.status(204).end();
  });

  return router;
}

function digestOf(request: Request, body: unknown): string {
  return `${request.url} ${createHash('sha256').update(JSON.stringify(body)).digest('hex')}`;
}

async function digestOfBody(request: Request): Promise<string> {
  const body = readBody(request);
  for await (const _ of body.stream) {
    // Only its fingerprint is wanted.
  }
  return body.fingerprint(request.url);
}
