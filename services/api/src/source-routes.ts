/** Source buckets by HTTP: registered, shown without their secrets, removed. */
import { ProblemError } from '@acousticsense/shared/errors';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import {
  presentSource,
  type Source,
  type Sources,
  sourceDefinitionSchema,
  sourceNameSchema,
  sourceSchema,
} from '@acousticsense/shared/sources';
import express, { type Response, type Router } from 'express';
import { z } from 'zod';
import { jsonBodyOf, refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';

const sourceQuerySchema = z.strictObject({
  verify: z
    .enum(['true', 'false'], 'must be true or false')
    .default('true')
    .describe('list one object first, and register nothing when that fails'),
});

export const sourceListSchema = z.strictObject({ sources: z.array(sourceSchema) });

export const registeredSourceSchema = sourceSchema.extend({
  verification: z
    .strictObject({ firstKey: z.string().nullable().describe('null: there is no object yet') })
    .optional()
    .describe('what the source answered; absent with `verify=false`'),
});

export interface SourceRoutesDeps {
  readonly sources: Sources;
  readonly reader: Pick<SourceReader, 'check'>;
  readonly tenantOf: (response: Response) => string;
}

const maxJsonBytes = 64 * 1024;
/** Somebody waits for the answer. */
const verifyMs = 15_000;

export function createSourceRoutes({ sources, reader, tenantOf }: SourceRoutesDeps): Router {
  const router = express.Router();

  router.get('/v1/sources', async (_request, response) => {
    const list = await sources.list(tenantOf(response));
    response
      .set('cache-control', 'no-store')
      .json({ sources: list.map(presentSource) } satisfies z.infer<typeof sourceListSchema>);
  });

  router.get('/v1/sources/:name', async (request, response) => {
    const source = await sources.get(tenantOf(response), request.params.name);
    if (!source) throw notRegistered(request.params.name);
    response.set('cache-control', 'no-store').json(presentSource(source));
  });

  router.put('/v1/sources/:name', express.json({ limit: maxJsonBytes }), async (request, response) => {
    const { verify } = parseOptions(sourceQuerySchema, request.query);
    const { name } = parseOptions(z.object({ name: sourceNameSchema }), request.params);
    const definition = parseOptions(sourceDefinitionSchema, jsonBodyOf(request, 'the source'));
    const prepared = await sources.prepare(tenantOf(response), name, definition);
    const verification = verify === 'true' ? { firstKey: (await checked(prepared)) ?? null } : undefined;
    const { source, isNew } = await sources.save(prepared);
    response
      .status(isNew ? 201 : 200)
      .location(`/v1/sources/${name}`)
      .set('cache-control', 'no-store')
      .json({
        ...presentSource(source),
        ...(verification ? { verification } : {}),
      } satisfies z.infer<typeof registeredSourceSchema>);
  });

  router.delete('/v1/sources/:name', async (request, response) => {
    if (!(await sources.remove(tenantOf(response), request.params.name))) {
      throw notRegistered(request.params.name);
    }
    response.status(204).end();
  });

  router.all('/v1/sources', refuseMethod('GET, HEAD'));
  router.all('/v1/sources/:name', refuseMethod('GET, HEAD, PUT, DELETE'));
  return router;

  /** @throws {ProblemError} source_*: what the source said. */
  async function checked(source: Source): Promise<string | undefined> {
    const limit = AbortSignal.timeout(verifyMs);
    try {
      return await reader.check(source, limit);
    } catch (error) {
      if (limit.aborted) {
        throw notVerified(
          'source_unavailable',
          `The source did not answer within ${verifyMs / 1_000} s.`,
          error,
        );
      }
      if (error instanceof ProblemError) throw notVerified(error.code, error.message, error);
      throw error;
    }
  }
}

function notVerified(code: ProblemError['code'], message: string, cause: unknown): ProblemError {
  return new ProblemError(
    code,
    `${message} Nothing was registered; a source that may be read but not listed takes ?verify=false.`,
    {},
    cause,
  );
}

function notRegistered(name: string): ProblemError {
  return new ProblemError('not_found', `No source is registered under the name "${name.slice(0, 63)}".`);
}
