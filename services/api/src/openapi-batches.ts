/** The part of /openapi.json that speaks of batches and house mappings. */
import { z } from 'zod';
import { batchListQuerySchema, batchOptionsSchema } from './schemas.ts';

type Json = (name: string, description: string) => Record<string, unknown>;
type Problem = (description: string) => Record<string, unknown>;

const id = { name: 'id', in: 'path', required: true, schema: { type: 'string', format: 'uuid' } };
const name = {
  name: 'name',
  in: 'path',
  required: true,
  schema: { type: 'string', pattern: '^[a-z0-9][a-z0-9._-]{0,62}$' },
};

/** Every option as a query parameter. */
export function queryOf(schema: z.ZodObject): Record<string, unknown>[] {
  const { properties = {}, required = [] } = z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any' });
  return Object.entries(properties).map(([field, of]) => {
    const { description, ...rest } = of as { description?: string };
    const more = {
      ...(description ? { description } : {}),
      ...(required.includes(field) ? { required: true } : {}),
    };
    return { name: field, in: 'query', ...more, schema: rest };
  });
}

export function batchPaths(json: Json, problem: Problem, idempotencyKey: Record<string, unknown>) {
  const change = (operationId: string, summary: string) => ({
    parameters: [id],
    post: {
      operationId,
      summary,
      responses: {
        200: json('Batch', 'The batch as it is now.'),
        404: problem('No such batch.'),
        409: problem('Not in the state that it is in.'),
        410: problem('It was deleted.'),
      },
    },
  });
  const read = { 404: problem('No such batch.'), 410: problem('It was deleted; the answer tells when.') };
  return {
    '/v1/batches': {
      post: {
        operationId: 'createBatch',
        summary:
          'Send a manifest of up to a million rows; or name a prefix to walk, or a batch to repeat. Every row is answered once, in the background.',
        parameters: [idempotencyKey, ...queryOf(batchOptionsSchema)],
        requestBody: {
          required: true,
          content: {
            'application/x-ndjson': {
              schema: { type: 'string', description: 'a row a line, see docs/batches-manifest.md' },
            },
            'text/csv': { schema: { type: 'string', description: 'the same with a header line' } },
            'application/json': {
              schema: {
                type: 'object',
                description: 'one of the two; the options may stand beside it',
                properties: {
                  prefix: { type: 'string', description: 's3://BUCKET/PREFIX of a registered source' },
                  rerunOf: { type: 'string', format: 'uuid' },
                },
              },
            },
          },
        },
        responses: {
          202: {
            ...json('Batch', 'Accepted: the batch, where Location points.'),
            headers: { Location: { schema: { type: 'string' } } },
          },
          400: problem('An option cannot be used, or the manifest broke off.'),
          403: problem('The prefix lies in no registered source.'),
          409: problem('A request with this Idempotency-Key is under way.'),
          413: problem('The manifest is too large.'),
          415: problem('Neither JSON Lines, CSV nor JSON.'),
          422: problem(
            'The manifest as a whole cannot be used, or the Idempotency-Key was used for another.',
          ),
          429: problem('Too many batches are under way, or the quota is used up.'),
          503: problem('No worker serves the model.'),
        },
      },
      get: {
        operationId: 'listBatches',
        summary: 'The newest batches.',
        parameters: queryOf(batchListQuerySchema),
        responses: { 200: json('BatchList', 'Newest first.') },
      },
    },
    '/v1/batches/{id}': {
      parameters: [id],
      get: {
        operationId: 'getBatch',
        summary: 'How far a batch is: counts, rate, estimated end, first errors.',
        responses: { 200: json('Batch', 'The batch.'), ...read },
      },
      delete: {
        operationId: 'deleteBatch',
        summary: 'Cancel a batch that runs; delete one that has ended, with its results.',
        responses: { 200: json('Batch', 'Being cancelled.'), 204: { description: 'Deleted.' }, ...read },
      },
    },
    '/v1/batches/{id}/events': {
      parameters: [id],
      get: {
        operationId: 'followBatch',
        summary:
          'Server-sent events: `batch` (a Batch, first as a snapshot, then at most once a second); ends with the batch.',
        responses: {
          200: {
            description: 'The stream.',
            content: { 'text/event-stream': { schema: { type: 'string' } } },
          },
          ...read,
        },
      },
    },
    '/v1/batches/{id}/bad-rows.jsonl': {
      parameters: [id],
      get: {
        operationId: 'getBadRows',
        summary: 'Every row of the manifest that could not be used: line, code, message.',
        responses: {
          200: {
            description: 'A row a line.',
            content: { 'application/x-ndjson': { schema: { type: 'string' } } },
          },
          ...read,
        },
      },
    },
    '/v1/batches/{id}/cancel': change(
      'cancelBatch',
      'Stop: rows that wait never run, those that run are given up.',
    ),
    '/v1/batches/{id}/pause': change(
      'pauseBatch',
      'Hand out no further rows; those that are queued still run.',
    ),
    '/v1/batches/{id}/resume': change('resumeBatch', 'Go on.'),
    '/v1/batches/{id}/retry-failed': change(
      'retryFailedRows',
      'Try the failed rows of an ended batch again.',
    ),
    '/v1/mappings': {
      get: {
        operationId: 'listMappings',
        summary: 'Names of the house mappings.',
        responses: { 200: json('MappingList', 'By name.') },
      },
    },
    '/v1/mappings/{name}': {
      parameters: [name],
      put: {
        operationId: 'putMapping',
        summary: "Keep a house mapping: the model's labels to a catalogue's own genres, many to many.",
        requestBody: {
          required: true,
          content: {
            'application/json': {
              schema: { type: 'object', additionalProperties: { type: 'array', items: { type: 'string' } } },
            },
            'text/csv': { schema: { type: 'string', description: 'columns model,house' } },
          },
        },
        responses: {
          200: json('Mapping', 'As the labels of the served model are mapped.'),
          422: problem('It names a label that the model does not have.'),
        },
      },
      delete: {
        operationId: 'deleteMapping',
        summary: 'Remove a house mapping; batches keep what they began with.',
        responses: { 204: { description: 'Removed.' }, 404: problem('No such mapping.') },
      },
    },
  };
}
