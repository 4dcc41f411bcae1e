/** The part of /openapi.json that speaks of results of batches. */
import type { z } from 'zod';
import { queryOf } from './openapi-batches.ts';
import {
  auditCsvQuerySchema,
  auditQuerySchema,
  csvQuerySchema,
  diffQuerySchema,
  refQuerySchema,
  resultsQuerySchema,
  viewSchema,
} from './result-schemas.ts';

type Json = (name: string, description: string) => Record<string, unknown>;
type Problem = (description: string) => Record<string, unknown>;

const id = { name: 'id', in: 'path', required: true, schema: { type: 'string', format: 'uuid' } };
const row = {
  name: 'row',
  in: 'path',
  required: true,
  description: 'counted from 0',
  schema: { type: 'integer', minimum: 0 },
};
const ref = (name: string) => ({ $ref: `#/components/schemas/${name}` });
const lines = (name: string, description: string) => ({
  description: `${description} One object a line; an answer that breaks off is not complete.`,
  content: { 'application/x-ndjson': { schema: ref(name) } },
});
const csv = (description: string) => ({
  description: `${description} RFC 4180, with a header line.`,
  content: { 'text/csv': { schema: { type: 'string' } } },
});

export function resultPaths(json: Json, problem: Problem) {
  const refusals = {
    400: problem('A parameter cannot be used.'),
    404: problem('No such batch.'),
    410: problem('It was deleted; the answer tells when.'),
  };
  const get = (operationId: string, summary: string, query: z.ZodObject, ok: Record<string, unknown>) => ({
    parameters: [id, ...queryOf(query)],
    get: { operationId, summary, responses: { 200: ok, ...refusals } },
  });
  const beside = (operationId: string, summary: string, ok: Record<string, unknown>) => ({
    parameters: [id, row],
    get: {
      operationId,
      summary,
      responses: { 200: ok, ...refusals, 409: problem('The row has not ended yet.') },
    },
  });
  return {
    '/v1/batches/{id}/results.jsonl': get(
      'getResults',
      'The rows that have ended, in the order of the manifest; of a batch that runs, those so far.',
      resultsQuerySchema,
      lines('ResultRow', 'The results.'),
    ),
    '/v1/batches/{id}/results.csv': get(
      'getResultsAsCsv',
      'The same for spreadsheets, without what fits in no cell.',
      csvQuerySchema,
      csv('The results.'),
    ),
    '/v1/batches/{id}/rows/{row}': {
      parameters: [id, row, ...queryOf(viewSchema)],
      get: {
        operationId: 'getRow',
        summary: 'One row, ended or not.',
        responses: { 200: json('ResultRow', 'The row.'), ...refusals },
      },
    },
    '/v1/batches/{id}/rows/{row}/timeline': beside(
      'getRowTimeline',
      'Every window of the recording.',
      json('RowTimeline', 'The windows.'),
    ),
    '/v1/batches/{id}/rows/{row}/explanation': beside(
      'getRowExplanation',
      'What the model looked at; of a batch with `explain=true`.',
      json('Explanation', 'Shares of attention over time and pitch.'),
    ),
    '/v1/batches/{id}/rows/{row}/vectors': beside(
      'getRowVectors',
      "The model's own numbers; of a batch with `vectors=true`.",
      json('Vectors', 'One vector for the whole and those of each window.'),
    ),
    '/v1/results': {
      parameters: queryOf(refQuerySchema),
      get: {
        operationId: 'getLatestResult',
        summary: 'The latest result of a ref, of batches and uploads.',
        responses: {
          200: json('LatestResult', 'The result of the highest revision.'),
          400: problem('No ref.'),
          404: problem('There is no result of this ref, or none yet.'),
          410: problem('All results of this ref were deleted; the answer tells when the last one was.'),
        },
      },
    },
    '/v1/batches/{id}/diff': get(
      'compareBatches',
      'Two runs compared: the rows that differ, or figures with `summary=true`.',
      diffQuerySchema,
      {
        ...lines('DiffRow', 'The rows that differ.'),
        content: {
          'application/x-ndjson': { schema: ref('DiffRow') },
          'application/json': { schema: ref('DiffSummary') },
        },
      },
    ),
    '/v1/batches/{id}/audit': get(
      'auditBatch',
      'What the catalogue declares against what is heard, and the most confident disagreements.',
      auditQuerySchema,
      json('Audit', 'All rows that have ended were read for it.'),
    ),
    '/v1/batches/{id}/audit.csv': get(
      'getAuditAsCsv',
      'The disagreements alone.',
      auditCsvQuerySchema,
      csv('The most confident first.'),
    ),
  };
}
