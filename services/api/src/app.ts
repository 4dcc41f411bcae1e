/** The HTTP surface: which path does what. */
import { once } from 'node:events';
import path from 'node:path';
import type { EndpointQueues } from '@acousticsense/shared/endpoint-queues';
import type { AddressRules, Endpoints } from '@acousticsense/shared/endpoints';
import { InfrastructureFault, ProblemError, toProblemJson } from '@acousticsense/shared/errors';
import type { DeliveryLog, EventLog } from '@acousticsense/shared/event-log';
import { topGenres } from '@acousticsense/shared/events';
import type { JobRecord } from '@acousticsense/shared/job';
import { spectrogramKey } from '@acousticsense/shared/object-keys';
import { isFinished } from '@acousticsense/shared/pipeline';
import type { Service } from '@acousticsense/shared/service';
import type { UrlSigner } from '@acousticsense/shared/signed-url';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { Sources } from '@acousticsense/shared/sources';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Tenants } from '@acousticsense/shared/tenants';
import { parseNpy } from '@acousticsense/shared/tensor';
import type { Tell } from '@acousticsense/shared/told-event';
import type { WebhookOrders } from '@acousticsense/shared/webhook-orders';
import express, { type ErrorRequestHandler, type Express, type Request, type Response } from 'express';
import helmet from 'helmet';
import { Histogram } from 'prom-client';
import { guardAccess, tenantOf } from './access.ts';
import type { Diff } from './batch-diff.ts';
import { createBatchRoutes } from './batch-routes.ts';
import type { Batches } from './batches.ts';
import type { Changes } from './changes.ts';
import type { ApiConfig } from './config.ts';
import { createDeliveryRoutes } from './delivery-routes.ts';
import type { EventFeed } from './event-feed.ts';
import { createEventRoutes } from './event-routes.ts';
import { extras, readExtra } from './extras.ts';
import { refuseMethod } from './http-refusals.ts';
import type { Idempotency } from './idempotency.ts';
import { type Jobs, parseOptions } from './jobs.ts';
import { type Limits, limitRequests } from './limits.ts';
import type { Mappings } from './mappings.ts';
import { openApiDocument } from './openapi.ts';
import { createResultRoutes } from './result-routes.ts';
import type { Results } from './results.ts';
import { type ModelResource, type Prediction, spectrogramQuerySchema } from './schemas.ts';
import { createSourceRoutes } from './source-routes.ts';
import { drawSpectrogram, side } from './spectrogram.ts';
import { createUploadRoutes } from './upload-routes.ts';
import type { Uploads } from './uploads.ts';
import { createWebhookRoutes } from './webhook-routes.ts';

export interface AppDeps {
  readonly service: Service;
  readonly config: ApiConfig;
  readonly jobs: Jobs;
  readonly changes: Changes;
  readonly storage: Storage;
  readonly tenants: Tenants;
  readonly limits: Limits;
  readonly idempotency: Idempotency;
  readonly batches: Batches;
  readonly results: Results;
  readonly diff: Diff;
  readonly mappings: Mappings;
  readonly sources: Sources;
  readonly sourceReader: SourceReader;
  readonly uploads: Uploads;
  readonly signer: UrlSigner;
  readonly feed: EventFeed;
  readonly deliveries: DeliveryLog;
  readonly tell: Tell;
  readonly endpoints: Endpoints;
  readonly orders: WebhookOrders;
  readonly endpointQueues: EndpointQueues;
  readonly eventLog: EventLog;
  readonly guard: AddressRules;
}

/** How long a client may go on sending an upload that was refused. */
const lingerMs = 10_000;

export function createApp(deps: AppDeps): Express {
  const { service, config, jobs, changes, storage, sources, sourceReader } = deps;
  const { batches, mappings, tenants, limits, idempotency } = deps;
  const app = express();
  app.disable('x-powered-by');
  app.disable('etag');
  app.set('query parser', 'simple');
  app.use(measureRequests(service));
  app.use(securityHeaders);
  app.use(guardAccess(config, tenants, deps.signer));
  app.use(async (request, response, next) => {
    if (!(await service.handleHealth(request, response))) next();
  });
  app.use(limitRequests(limits));

  app.post('/v1/jobs', async (request, response) => {
    const tenant = tenantOf(response);
    const accepted = async (record: JobRecord) => {
      const job = await jobs.present(record);
      return { status: 202, headers: { location: job.links.self }, body: job };
    };
    await idempotency.answer(request, response, {
      tenant,
      route: 'POST /v1/jobs',
      read: () => jobs.fingerprint(request, 'file'),
      recall: async (id) => {
        const record = await jobs.find(tenant, id);
        return record && accepted(record);
      },
      make: async (bind) => accepted(await jobs.accept(request, tenant, 'file', bind)),
    });
  });
  app.get('/v1/jobs/:id', async (request, response) => {
    const record = await jobs.get(tenantOf(response), request.params.id);
    response.set('cache-control', 'no-store').json(await jobs.present(record));
  });
  app.delete('/v1/jobs/:id', async (request, response) => {
    const cancelled = await jobs.cancelOrDelete(tenantOf(response), request.params.id);
    if (cancelled) response.json(await jobs.present(cancelled));
    else response.status(204).end();
  });
  app.get('/v1/jobs/:id/events', async (request, response) => {
    await jobs.get(tenantOf(response), request.params.id);
    await streamEvents(request, response, request.params.id);
  });
  app.get('/v1/jobs/:id/spectrogram.png', async (request, response) => {
    const { scale } = parseOptions(spectrogramQuerySchema, request.query);
    const record = await jobs.get(tenantOf(response), request.params.id);
    if (!record.decoded) {
      if (!isFinished(record.state)) {
        throw new ProblemError(
          'job_not_finished',
          'The audio is not decoded yet; the spectrogram comes with the state "decoded".',
          { retryAfter: 1 },
        );
      }
      throw new ProblemError(
        'no_spectrogram',
        `The job ended as ${record.state} before its audio was decoded.`,
      );
    }
    const image = await storage.read(spectrogramKey(record)).catch((error) => {
      throw error instanceof ObjectNotFound
        ? new ProblemError('no_spectrogram', 'The spectrogram of this job is no longer stored.')
        : error;
    });
    const name = `${path.parse(record.audio.filename).name || 'spectrogram'}-mel.png`;
    response
      .set('content-type', 'image/png')
      .set('cache-control', 'private, max-age=3600')
      .set('content-disposition', `inline; filename*=UTF-8''${encodeURIComponent(name)}`)
      .end(drawSpectrogram(parseNpy(image), side * scale));
  });
  for (const extra of extras) {
    app.get(`/v1/jobs/:id/${extra}`, async (request, response) => {
      const json = await readExtra(storage, await jobs.get(tenantOf(response), request.params.id), extra);
      response
        .set('content-type', 'application/json')
        .set('cache-control', 'private, max-age=3600')
        .end(json);
    });
  }
  app.get('/v1/model', async (_request, response) => {
    const { description, provider } = await jobs.servedModel();
    response.set('cache-control', 'no-store').json({
      ...description,
      provider,
      retention: {
        audioHours: config.audioRetentionMs / 3_600_000,
        resultDays: config.resultRetentionMs / 86_400_000,
      },
      limits: { maxBytes: config.maxUploadBytes, maxDurationSeconds: config.maxDurationSeconds },
    } satisfies ModelResource);
  });
  app.post(['/api/predict', '/api/predict/'], async (request, response) => {
    const tenant = tenantOf(response);
    const accepted = await jobs.accept(request, tenant, 'data');
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    const record = await jobs.waitForEnd(tenant, accepted.id, config.predictTimeoutMs, gone.signal);
    if (record.error) throw new ProblemError(record.error.code, record.error.message);
    const job = await jobs.present(record);
    if (!job.result) throw new ProblemError('internal_error', `The job ended as ${record.state}.`);
    response.json({
      prediction: topGenres(
        Object.values(job.result.probabilities),
        Object.keys(job.result.probabilities),
        record.presentation.topK,
      ),
      mel_spectrogram_url: `${request.protocol}://${request.headers.host}${job.links.spectrogram}`,
    } satisfies Prediction);
  });
  const { closing, log } = service;
  app.use(
    createBatchRoutes({
      ...{ batches, mappings, jobs, idempotency, storage, tenantOf, closing, log },
    }),
  );
  app.use(createResultRoutes({ results: deps.results, diff: deps.diff, tenantOf, closing }));
  app.use(createSourceRoutes({ sources, reader: sourceReader, tenantOf }));
  app.use(createUploadRoutes(deps.uploads, tenantOf));
  app.use(createDeliveryRoutes({ deliveries: deps.deliveries, tenantOf }));
  app.use(createEventRoutes({ feed: deps.feed, tell: deps.tell, tenantOf }));
  const { endpoints, orders, endpointQueues, eventLog, guard } = deps;
  app.use(
    createWebhookRoutes({
      ...{ endpoints, orders, queues: endpointQueues, eventLog, storage, guard, tenantOf, log },
    }),
  );
  app.get('/openapi.json', (_request, response) => {
    response.json(openApiDocument());
  });
  for (const [at, allowed] of [
    [['/v1/jobs', '/api/predict', '/api/predict/'], 'POST'],
    [['/v1/jobs/:id'], 'GET, HEAD, DELETE'],
    [['/v1/jobs/:id/events', '/v1/jobs/:id/spectrogram.png'], 'GET, HEAD'],
    [extras.map((extra) => `/v1/jobs/:id/${extra}`), 'GET, HEAD'],
    [['/v1/model', '/openapi.json'], 'GET, HEAD'],
    [['/v1/batches'], 'GET, HEAD, POST'],
    [['/v1/batches/:id'], 'GET, HEAD, DELETE'],
    [['/v1/batches/:id/events', '/v1/batches/:id/bad-rows.jsonl', '/v1/mappings'], 'GET, HEAD'],
    [['cancel', 'pause', 'resume', 'retry-failed'].map((what) => `/v1/batches/:id/${what}`), 'POST'],
    [['/v1/mappings/:name'], 'PUT, DELETE'],
  ] as const) {
    app.all([...at], refuseMethod(allowed));
  }
  app.use(
    express.static(config.webDirectory, {
      setHeaders: (response, file) => {
        // Names under assets/ hold a hash of their content.
        const immutable = path.basename(path.dirname(file)) === 'assets';
        response.set('cache-control', immutable ? 'public, max-age=31536000, immutable' : 'no-cache');
      },
    }),
  );
  app.use((request) => {
    throw new ProblemError(
      'not_found',
      `There is nothing at ${request.path.slice(0, 100)}; see /openapi.json.`,
    );
  });
  app.use(answerProblem(service));

  /** Server-sent events: a snapshot, then every change; `Last-Event-ID` is the record's version. */
  async function streamEvents(request: Request, response: Response, id: string): Promise<void> {
    // Gone while the job was read: its 'close' will not come again, and nobody would end the following.
    if (response.destroyed) return;
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    response.writeHead(200, {
      'content-type': 'text/event-stream',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no',
    });
    if (request.method === 'HEAD') {
      response.end();
      return;
    }
    response.write('retry: 1000\n\n');
    const seen = Number(request.headers['last-event-id'] ?? 0) || 0;
    const signal = AbortSignal.any([gone.signal, service.closing]);
    try {
      for await (const change of changes.follow(tenantOf(response), id, signal)) {
        // A client that reads slowly is told less often, so that what it has not read does not pile up here.
        if (response.writableNeedDrain) await once(response, 'drain', { signal });
        if (change === 'heartbeat') response.write(': heartbeat\n\n');
        else if ('fraction' in change) {
          response.write(
            `event: progress\ndata: ${JSON.stringify({ state: change.stage, fraction: change.fraction })}\n\n`,
          );
        } else if (change.version > seen || isFinished(change.state)) {
          response.write(
            `id: ${change.version}\nevent: job\ndata: ${JSON.stringify(await jobs.present(change))}\n\n`,
          );
        }
      }
    } catch (error) {
      if (signal.aborted) return void response.end();
      // The client reconnects by itself, and gets a snapshot.
      service.log.warn({ err: error, jobId: id }, 'event stream ended');
    }
    response.end();
  }

  return app;
}

const securityHeaders = helmet({
  contentSecurityPolicy: {
    useDefaults: false,
    directives: {
      defaultSrc: ["'self'"],
      imgSrc: ["'self'", 'blob:', 'data:'],
      mediaSrc: ["'self'", 'blob:'],
      styleSrc: ["'self'"],
      scriptSrc: ["'self'"],
      connectSrc: ["'self'"],
      objectSrc: ["'none'"],
      baseUri: ["'none'"],
      formAction: ["'self'"],
      frameAncestors: ["'none'"],
    },
  },
  // On plain HTTP this header would be ignored at best; whoever ends TLS in front sets it.
  strictTransportSecurity: false,
});

function measureRequests(service: Service): express.RequestHandler {
  const seconds = new Histogram({
    name: 'acousticsense_http_request_seconds',
    help: 'Time to answer a request, by route.',
    labelNames: ['method', 'route', 'status'],
    buckets: [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30],
    registers: [service.registry],
  });
  return (request, response, next) => {
    const from = performance.now();
    response.on('finish', () => {
      const route = (request.route as { path?: string | string[] } | undefined)?.path ?? 'other';
      seconds.observe(
        {
          method: request.method,
          route: String(Array.isArray(route) ? route[0] : route),
          status: response.statusCode,
        },
        (performance.now() - from) / 1_000,
      );
    });
    next();
  };
}

/** Every error leaves as problem+json; what is not a caller's problem is logged and told without its insides. */
export function answerProblem(service: Pick<Service, 'log'>): ErrorRequestHandler {
  return (error: unknown, request, response, _next) => {
    const problem = toProblem(error);
    if (problem.status >= 500) service.log.error({ err: error, path: request.path }, 'request failed');
    if (response.headersSent) {
      response.destroy();
      return;
    }
    // What is left of a refused upload is read away for a moment: closing at once would reset the connection, and
    // the client would lose the answer.
    if (!request.complete) {
      request.resume();
      const patience = setTimeout(() => request.destroy(), lingerMs);
      request.on('close', () => clearTimeout(patience));
    }
    if (problem.details.retryAfter !== undefined)
      response.set('retry-after', String(problem.details.retryAfter));
    if (problem.status === 401) response.set('www-authenticate', 'Bearer');
    response.status(problem.status).set('cache-control', 'no-store');
    response
      .type('application/problem+json')
      .send(JSON.stringify(toProblemJson(problem, request.originalUrl.split('?')[0])));
  };
}

function toProblem(error: unknown): ProblemError {
  if (error instanceof ProblemError) return error;
  if (error instanceof InfrastructureFault) {
    return new ProblemError(
      'unavailable',
      'A part of the service is away at present; try again in a moment.',
      { retryAfter: 2 },
      error,
    );
  }
  const status = (error as { status?: unknown } | undefined)?.status;
  if (typeof status === 'number' && status >= 400 && status < 500) {
    return new ProblemError(
      status === 404 ? 'not_found' : 'bad_request',
      'The request could not be understood.',
      {},
      error,
    );
  }
  return new ProblemError(
    'internal_error',
    'Something went wrong on our side; the log says more.',
    {},
    error,
  );
}
