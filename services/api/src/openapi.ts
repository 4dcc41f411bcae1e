/** /openapi.json, generated from the schemas that validate. */
import { explanationSchema, vectorsSchema } from '@acousticsense/shared/job';
import { sourceDefinitionSchema, sourceSchema } from '@acousticsense/shared/sources';
import { z } from 'zod';
import { deliveryPageSchema } from './delivery-routes.ts';
import { eventPageSchema } from './event-feed.ts';
import { batchPaths } from './openapi-batches.ts';
import { eventPaths } from './openapi-events.ts';
import { resultPaths } from './openapi-results.ts';
import { webhookPaths, webhookSchemas, webhooks } from './openapi-webhooks.ts';
import {
  auditSchema,
  diffRowSchema,
  diffSummarySchema,
  latestResultSchema,
  resultRowSchema,
  rowTimelineSchema,
} from './result-schemas.ts';
import {
  batchListSchema,
  batchSchema,
  jobOptionsSchema,
  jobRequestSchema,
  jobSchema,
  mappingListSchema,
  modelSchema,
  namedMappingSchema,
  predictionSchema,
  problemSchema,
  uploadCompletionSchema,
  uploadPartsSchema,
  uploadRequestSchema,
  uploadSchema,
} from './schemas.ts';
import { registeredSourceSchema, sourceListSchema } from './source-routes.ts';

const ref = (name: string) => ({ $ref: `#/components/schemas/${name}` });
const json = (name: string, description: string) => ({
  description,
  content: { 'application/json': { schema: ref(name) } },
});
const problem = (description: string) => ({
  description,
  content: { 'application/problem+json': { schema: ref('Problem') } },
});
/** Of the routes that make something. */
const idempotencyKey = {
  name: 'Idempotency-Key',
  in: 'header',
  description: 'The same request with the same key within 24 hours is carried out once and answered alike.',
  schema: { type: 'string', maxLength: 255 },
};
const id = { name: 'id', in: 'path', required: true, schema: { type: 'string', format: 'uuid' } };

function schemaOf(schema: z.ZodType, io: 'input' | 'output' = 'output'): Record<string, unknown> {
  const { $schema: _, ...rest } = z.toJSONSchema(schema, { io, unrepresentable: 'any' });
  return rest;
}

function form(field: string) {
  const options = schemaOf(jobOptionsSchema, 'input') as { properties: Record<string, unknown> };
  const properties = {
    ...options.properties,
    [field]: { type: 'string', format: 'binary', description: 'the audio file' },
  };
  return {
    required: true,
    content: { 'multipart/form-data': { schema: { type: 'object', properties, required: [field] } } },
  };
}

const jsonBody = (name: string) => ({
  required: true,
  content: { 'application/json': { schema: ref(name) } },
});

/** What any request may be told: the key, the host, the method, a part that is away. */
const anyProblem = problem('Another problem; its `code` says which.');

export function openApiDocument(): Record<string, unknown> {
  const document = describeApi();
  for (const operations of Object.values(document.paths)) {
    for (const operation of Object.values(operations)) {
      if ('responses' in operation) Object.assign(operation.responses, { default: anyProblem });
    }
  }
  return document;
}

function describeApi() {
  return {
    openapi: '3.1.0',
    info: {
      title: 'AcousticSense',
      version: '1',
      description: 'Tells the genre of music at catalogue scale, and shows why.',
    },
    paths: {
      '/v1/jobs': {
        post: {
          operationId: 'createJob',
          summary: 'Send audio; its genres are found in the background.',
          parameters: [idempotencyKey],
          requestBody: {
            required: true,
            content: { ...form('file').content, 'application/json': { schema: ref('JobRequest') } },
          },
          responses: {
            202: {
              ...json('Job', 'Accepted: the job, where Location points.'),
              headers: { Location: { schema: { type: 'string' } } },
            },
            400: problem('The form, the JSON or an option cannot be used.'),
            404: problem('No such upload.'),
            409: problem(
              'A request with this Idempotency-Key is being carried out, or the upload is unfinished.',
            ),
            413: problem('The file is too large.'),
            415: problem('Neither multipart/form-data nor JSON.'),
            422: problem('The file is empty, or the Idempotency-Key came with another request before.'),
            429: problem('A limit of the tenant is reached; Retry-After says when to come again.'),
            503: problem('Nobody takes jobs at present.'),
          },
        },
      },
      '/v1/jobs/{id}': {
        parameters: [id],
        get: {
          operationId: 'getJob',
          summary: 'Read a job.',
          responses: { 200: json('Job', 'The job.'), 404: problem('No such job.') },
        },
        delete: {
          operationId: 'deleteJob',
          summary: 'Cancel an unfinished job; delete a finished one with all that is stored of it.',
          responses: {
            200: json('Job', 'Cancelled.'),
            204: { description: 'Deleted.' },
            404: problem('No such job.'),
          },
        },
      },
      '/v1/jobs/{id}/events': {
        parameters: [id],
        get: {
          operationId: 'followJob',
          summary:
            'Server-sent events: `job` (a Job, first as a snapshot) and `progress`; ends when the job is finished.',
          responses: {
            200: {
              description: 'The stream.',
              content: { 'text/event-stream': { schema: { type: 'string' } } },
            },
            404: problem('No such job.'),
          },
        },
      },
      '/v1/jobs/{id}/spectrogram.png': {
        parameters: [
          id,
          { name: 'scale', in: 'query', schema: { type: 'integer', minimum: 1, maximum: 8, default: 1 } },
        ],
        get: {
          operationId: 'getSpectrogram',
          summary:
            'The log-mel spectrogram, 224x224 times scale: time left to right, low frequencies at the bottom.',
          responses: {
            200: {
              description: 'The picture.',
              content: { 'image/png': { schema: { type: 'string', format: 'binary' } } },
            },
            400: problem('The scale cannot be used.'),
            404: problem('No such job, or no spectrogram.'),
            409: problem('Not decoded yet.'),
          },
        },
      },
      '/v1/jobs/{id}/explanation': {
        parameters: [id],
        get: {
          operationId: 'getExplanation',
          summary:
            'What the model looked at, in windows that are not silent (of many, some evenly spaced); for a job sent with `explain=true`.',
          responses: {
            200: json('Explanation', 'Shares of attention over time and pitch.'),
            404: problem('No such job, not asked for, or no longer stored.'),
            409: problem('Not classified yet.'),
          },
        },
      },
      '/v1/jobs/{id}/vectors': {
        parameters: [id],
        get: {
          operationId: 'getVectors',
          summary: "The model's own numbers: logits, and its embedding; for a job sent with `vectors=true`.",
          responses: {
            200: json('Vectors', 'One vector for the whole and those of each window.'),
            404: problem('No such job, not asked for, or no longer stored.'),
            409: problem('Not classified yet.'),
          },
        },
      },
      '/v1/model': {
        get: {
          operationId: 'getModel',
          summary: 'The model that new jobs are pinned to.',
          responses: { 200: json('Model', 'The model.'), 503: problem('None is served.') },
        },
      },
      '/v1/uploads': {
        post: {
          operationId: 'createUpload',
          summary: 'Begin an upload straight to the bucket, by signed URLs (where objects lie in one).',
          requestBody: jsonBody('UploadRequest'),
          responses: {
            201: json('Upload', 'Where to PUT the first 100 parts.'),
            400: problem('An option cannot be used, or objects lie in a directory here.'),
            413: problem('The file is too large.'),
            415: problem('Not JSON.'),
            429: problem('A limit of the tenant is reached.'),
          },
        },
      },
      '/v1/uploads/{id}': {
        parameters: [id],
        get: {
          operationId: 'getUpload',
          summary: 'How far an upload is, and when it expires.',
          responses: { 200: json('Upload', 'The upload.'), 404: problem('No such upload.') },
        },
        delete: {
          operationId: 'deleteUpload',
          summary: 'Delete an upload, finished or not.',
          responses: { 204: { description: 'Deleted.' }, 404: problem('No such upload.') },
        },
      },
      '/v1/uploads/{id}/parts': {
        parameters: [
          id,
          {
            ...{ name: 'after', in: 'query', description: 'the last number of the page before' },
            schema: { type: 'integer', minimum: 0, maximum: 10_000, default: 0 },
          },
        ],
        get: {
          operationId: 'signUploadParts',
          summary: 'New URLs for the parts, and the ETags of those that have come.',
          responses: {
            200: json('UploadParts', '100 parts at most.'),
            404: problem('No such upload.'),
            409: problem('It is finished.'),
          },
        },
      },
      '/v1/uploads/{id}/complete': {
        parameters: [id],
        post: {
          operationId: 'completeUpload',
          summary: 'Put the parts together; each is named by the ETag that its PUT was answered with.',
          requestBody: jsonBody('UploadCompletion'),
          responses: {
            200: json('Upload', 'Finished, now or before.'),
            400: problem('Not every part is named once.'),
            404: problem('No such upload.'),
            409: problem('A part is missing, or is not the one that is named.'),
          },
        },
      },
      '/v1/uploads/tus': {
        post: {
          operationId: 'createTusUpload',
          summary: 'Begin a resumable upload by tus 1.0; docs/uploads.md says more.',
          responses: { 201: { description: 'Created, where Location points.' } },
        },
        options: {
          operationId: 'describeTus',
          summary: "The protocol's extensions, and the largest upload.",
          responses: { 204: { description: 'In the headers Tus-Extension and Tus-Max-Size.' } },
        },
      },
      '/v1/uploads/tus/{id}': {
        parameters: [id],
        head: {
          operationId: 'getTusOffset',
          summary: 'How many bytes have come.',
          responses: { 200: { description: 'In the header Upload-Offset.' } },
        },
        patch: {
          operationId: 'sendTusBytes',
          summary: 'Send bytes from that offset on.',
          responses: { 204: { description: 'In the header Upload-Offset.' } },
        },
        delete: {
          operationId: 'deleteTusUpload',
          summary: 'Delete it.',
          responses: { 204: { description: 'Deleted.' } },
        },
      },
      ...batchPaths(json, problem, idempotencyKey),
      ...resultPaths(json, problem),
      ...webhookPaths(json, problem),
      ...eventPaths(json, problem),
      '/v1/sources': {
        get: {
          operationId: 'listSources',
          summary: 'The source buckets that are registered, without their secrets.',
          responses: { 200: json('SourceList', 'By name.') },
        },
      },
      '/v1/sources/{name}': {
        parameters: [
          {
            name: 'name',
            in: 'path',
            required: true,
            schema: { type: 'string', pattern: '^[a-z0-9][a-z0-9-]{0,62}$' },
          },
        ],
        get: {
          operationId: 'getSource',
          summary: 'Read a source bucket, without its secrets.',
          responses: { 200: json('Source', 'The source.'), 404: problem('No such source.') },
        },
        put: {
          operationId: 'putSource',
          summary: 'Register a bucket whose objects are read in place, or replace all of one.',
          parameters: [
            {
              name: 'verify',
              in: 'query',
              description: 'list one object first, and register nothing when that fails',
              schema: { type: 'boolean', default: true },
            },
          ],
          requestBody: {
            required: true,
            content: { 'application/json': { schema: ref('SourceDefinition') } },
          },
          responses: {
            200: json('RegisteredSource', 'Replaced.'),
            201: json('RegisteredSource', 'Registered.'),
            400: problem('The definition cannot be used.'),
            403: problem("The service's own bucket, or an endpoint at a private address."),
            409: problem('Too many sources.'),
            415: problem('Not JSON.'),
            422: problem('The source refused to be listed, or has no such bucket.'),
            501: problem('This service keeps no credentials.'),
            502: problem('The source does not answer.'),
          },
        },
        delete: {
          operationId: 'deleteSource',
          summary: 'Remove a source; rows that name its objects fail from now on.',
          responses: { 204: { description: 'Removed.' }, 404: problem('No such source.') },
        },
      },
      '/api/predict/': {
        post: {
          operationId: 'predict',
          summary: 'Send audio and wait for its genres.',
          requestBody: form('data'),
          responses: {
            200: json('Prediction', 'The likeliest genres.'),
            400: problem('The form cannot be used.'),
            413: problem('The file is too large.'),
            415: problem('Not multipart/form-data, or a container that is not supported.'),
            422: problem('The audio cannot be used.'),
            503: problem('Nobody takes jobs at present.'),
            504: problem('Not ready in time.'),
          },
        },
      },
    },
    webhooks: webhooks(),
    security: [{}, { bearer: [] }, { header: [] }],
    components: {
      securitySchemes: {
        bearer: { type: 'http', scheme: 'bearer', description: 'The API key, where one is asked for.' },
        header: { type: 'apiKey', in: 'header', name: 'X-Api-Key' },
      },
      schemas: {
        Job: schemaOf(jobSchema),
        JobRequest: schemaOf(jobRequestSchema, 'input'),
        Upload: schemaOf(uploadSchema),
        UploadParts: schemaOf(uploadPartsSchema),
        UploadRequest: schemaOf(uploadRequestSchema, 'input'),
        UploadCompletion: schemaOf(uploadCompletionSchema, 'input'),
        Batch: schemaOf(batchSchema),
        BatchList: schemaOf(batchListSchema),
        ResultRow: schemaOf(resultRowSchema),
        RowTimeline: schemaOf(rowTimelineSchema),
        LatestResult: schemaOf(latestResultSchema),
        DiffRow: schemaOf(diffRowSchema),
        DiffSummary: schemaOf(diffSummarySchema),
        Audit: schemaOf(auditSchema),
        Mapping: schemaOf(namedMappingSchema),
        MappingList: schemaOf(mappingListSchema),
        Model: schemaOf(modelSchema),
        Explanation: schemaOf(explanationSchema),
        Vectors: schemaOf(vectorsSchema),
        Prediction: schemaOf(predictionSchema),
        EventPage: schemaOf(eventPageSchema),
        DeliveryPage: schemaOf(deliveryPageSchema),
        Source: schemaOf(sourceSchema),
        SourceList: schemaOf(sourceListSchema),
        SourceDefinition: schemaOf(sourceDefinitionSchema, 'input'),
        RegisteredSource: schemaOf(registeredSourceSchema),
        ...webhookSchemas(schemaOf),
        Problem: schemaOf(problemSchema),
      },
    },
  };
}
