/** Uploads by HTTP: which path does what. */
import express, { type Response, type Router } from 'express';
import { jsonBodyOf, refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';
import { uploadCompletionSchema, uploadPartsQuerySchema, uploadRequestSchema } from './schemas.ts';
import { tusPath } from './tus.ts';
import type { Uploads } from './uploads.ts';

/** 10,000 parts with their ETags. */
const maxJsonBytes = 2 * 1024 * 1024;

export function createUploadRoutes(uploads: Uploads, tenantOf: (response: Response) => string): Router {
  const router = express.Router();
  const json = express.json({ limit: maxJsonBytes });

  // The protocol's own methods and errors; nothing may have read the body before.
  for (const method of ['head', 'post', 'patch', 'delete', 'options'] as const) {
    router[method]([tusPath, `${tusPath}/:id`], (request, response) =>
      uploads.handleTus(request, response, tenantOf(response)),
    );
  }
  router.all([tusPath, `${tusPath}/:id`], refuseMethod('OPTIONS, POST, HEAD, PATCH, DELETE'));

  router.post('/v1/uploads', json, async (request, response) => {
    const tenant = tenantOf(response);
    const {
      size,
      filename,
      parts: wished,
    } = parseOptions(uploadRequestSchema, jsonBodyOf(request, 'the request'));
    const { id, record } = await uploads.beginPresigned(tenant, size, filename, wished);
    const parts = await uploads.signParts(tenant, id, record, 0);
    const upload = uploads.present(id, record);
    const next = nextLink(id, parts.at(-1)!.number, record.parts!.count);
    response
      .status(201)
      .location(upload.links.self)
      .set('cache-control', 'no-store')
      .json({ ...upload, parts, links: { ...upload.links, ...next } });
  });

  router.get('/v1/uploads/:id', async (request, response) => {
    const tenant = tenantOf(response);
    response.set('cache-control', 'no-store').json(await uploads.describe(tenant, request.params.id));
  });

  router.delete('/v1/uploads/:id', async (request, response) => {
    await uploads.remove(tenantOf(response), request.params.id);
    response.status(204).end();
  });

  router.get('/v1/uploads/:id/parts', async (request, response) => {
    const { id } = request.params;
    const tenant = tenantOf(response);
    const { after } = parseOptions(uploadPartsQuerySchema, request.query);
    const record = await uploads.get(tenant, id);
    const parts = await uploads.signParts(tenant, id, record, after);
    const count = record.state === 'open' ? (record.parts?.count ?? 0) : 0;
    response
      .set('cache-control', 'no-store')
      .json({ parts, links: nextLink(id, parts.at(-1)?.number ?? count, count) });
  });

  router.post('/v1/uploads/:id/complete', json, async (request, response) => {
    const { parts } = parseOptions(uploadCompletionSchema, jsonBodyOf(request, 'the request'));
    const { id } = request.params;
    response.json(uploads.present(id, await uploads.complete(tenantOf(response), id, parts)));
  });

  router.all('/v1/uploads', refuseMethod('POST'));
  router.all('/v1/uploads/:id', refuseMethod('GET, HEAD, DELETE'));
  router.all('/v1/uploads/:id/parts', refuseMethod('GET, HEAD'));
  router.all('/v1/uploads/:id/complete', refuseMethod('POST'));
  return router;
}

function nextLink(id: string, last: number, count: number): { next?: string } {
  return last < count ? { next: `/v1/uploads/${id}/parts?after=${last}` } : {};
}
