/** The parts of /openapi.json that speak of webhooks: their endpoints, and what is sent to them. */
import {
  endpointChangeSchema,
  endpointDefinitionSchema,
  rotationSchema,
} from '@acousticsense/shared/endpoints';
import { eventExamples } from '@acousticsense/shared/event-examples';
import {
  type EventType,
  eventSchema,
  eventTypes,
  type VerificationEvent,
  verificationEventSchema,
} from '@acousticsense/shared/events';
import type { z } from 'zod';
import { queryOf } from './openapi-batches.ts';
import {
  deadLetterListSchema,
  deadLettersQuerySchema,
  deadLettersResendSchema,
  endpointDetailSchema,
  endpointListSchema,
  endpointResourceSchema,
  newEndpointSchema,
  orderSchema,
  replayIdSchema,
  replayRequestSchema,
  resendRequestSchema,
  resentSchema,
  secretSchema,
  testSchema,
} from './webhook-schemas.ts';

type Json = (name: string, description: string) => Record<string, unknown>;
type Problem = (description: string) => Record<string, unknown>;
type SchemaOf = (schema: z.ZodType, io?: 'input' | 'output') => Record<string, unknown>;

const id = {
  name: 'id',
  in: 'path',
  required: true,
  schema: { type: 'string', pattern: '^ep_[A-Za-z0-9]{22}$' },
};
const ref = (name: string) => ({ $ref: `#/components/schemas/${name}` });
const body = (name: string, required = true) => ({
  required,
  content: { 'application/json': { schema: ref(name) } },
});
const at = '/v1/webhooks/endpoints';

export function webhookPaths(json: Json, problem: Problem) {
  const absent = { 404: problem('No such endpoint.') };
  const unusable = { 400: problem('A field cannot be used.'), 415: problem('Not JSON.') };
  return {
    [at]: {
      get: {
        operationId: 'listEndpoints',
        summary: 'The endpoints that events are sent to.',
        responses: { 200: json('EndpointList', 'Oldest first.') },
      },
      post: {
        operationId: 'createEndpoint',
        summary: 'Register an endpoint. It is sent a challenge at once, and events once it has answered it.',
        requestBody: body('EndpointDefinition'),
        responses: {
          201: {
            ...json('NewEndpoint', 'Registered; its secret is shown this once.'),
            headers: { Location: { schema: { type: 'string' } } },
          },
          ...unusable,
          409: problem('This URL is registered already, or there are too many endpoints.'),
          422: problem('This URL is not called.'),
          501: problem('This service keeps no secrets.'),
        },
      },
    },
    [`${at}/{id}`]: {
      parameters: [id],
      get: {
        operationId: 'getEndpoint',
        summary: 'An endpoint: its state, what is queued for it, its last attempts.',
        responses: { 200: json('EndpointDetail', 'The endpoint.'), ...absent },
      },
      patch: {
        operationId: 'changeEndpoint',
        summary: 'Change what is named. Another URL has to answer a challenge of its own.',
        requestBody: body('EndpointChange'),
        responses: {
          200: json('Endpoint', 'As it is now.'),
          ...{ ...unusable, ...absent },
          409: problem('Another endpoint has this URL.'),
          422: problem('This URL is not called.'),
        },
      },
      delete: {
        operationId: 'deleteEndpoint',
        summary: 'Remove an endpoint, with what is queued for it.',
        responses: { 204: { description: 'Removed.' }, ...absent },
      },
    },
    [`${at}/{id}/verify`]: {
      parameters: [id],
      post: {
        operationId: 'verifyEndpoint',
        summary: 'Send the challenge again; the endpoint tells how it went in `verification`.',
        responses: { 202: json('WebhookOrder', 'It is sent soon.'), ...absent },
      },
    },
    [`${at}/{id}/test`]: {
      parameters: [id],
      post: {
        operationId: 'testEndpoint',
        summary: 'Send one example of an event, signed, whatever the state of the endpoint.',
        responses: { 202: json('WebhookOrder', 'It is sent soon; Location tells how it went.'), ...absent },
      },
    },
    [`${at}/{id}/tests/{orderId}`]: {
      parameters: [
        id,
        { name: 'orderId', in: 'path', required: true, schema: { type: 'string', format: 'uuid' } },
      ],
      get: {
        operationId: 'getEndpointTest',
        summary: 'What became of a test; known for an hour.',
        responses: {
          200: json('EndpointTest', 'Its outcome, once there is one.'),
          404: problem('No such endpoint or test.'),
        },
      },
    },
    [`${at}/{id}/rotate`]: {
      parameters: [id],
      post: {
        operationId: 'rotateEndpointSecret',
        summary: 'A new secret; until the overlap ends every message is signed with the older ones too.',
        requestBody: body('SecretRotation', false),
        responses: {
          200: json('EndpointSecret', 'The new secret, shown this once.'),
          ...unusable,
          ...absent,
        },
      },
    },
    [`${at}/{id}/disable`]: {
      parameters: [id],
      post: {
        operationId: 'disableEndpoint',
        summary: 'Send it nothing; what happens meanwhile waits.',
        responses: { 200: json('Endpoint', 'As it is now.'), ...absent },
      },
    },
    [`${at}/{id}/enable`]: {
      parameters: [id],
      post: {
        operationId: 'enableEndpoint',
        summary: 'Go on where it stood.',
        responses: {
          200: json('Endpoint', 'As it is now.'),
          ...absent,
          409: problem('It has not proven yet whose it is.'),
        },
      },
    },
    [`${at}/{id}/resend`]: {
      parameters: [id],
      post: {
        operationId: 'resendEvent',
        summary: 'Send one event again, under the same webhook-id, subscribed to or not.',
        requestBody: body('ResendRequest'),
        responses: {
          202: json('Resent', 'It is sent soon.'),
          ...unusable,
          404: problem('No such endpoint or event.'),
        },
      },
    },
    [`${at}/{id}/replay`]: {
      parameters: [id],
      post: {
        operationId: 'replayEvents',
        summary: 'Send a range of events again, in order, beside those that happen now.',
        requestBody: body('ReplayRequest'),
        responses: {
          202: json('Replay', 'It has begun; the endpoint lists it in `replays` until it is done.'),
          ...{ ...unusable, ...absent },
          409: problem('Five ranges are being sent again already.'),
        },
      },
    },
    [`${at}/{id}/dead-letters`]: {
      parameters: [id],
      get: {
        operationId: 'listDeadLetters',
        summary: 'Messages that are not tried any more, with every attempt.',
        parameters: queryOf(deadLettersQuerySchema),
        responses: {
          200: json('DeadLetterList', 'The newest day first.'),
          400: problem('A parameter cannot be used.'),
          ...absent,
        },
      },
    },
    [`${at}/{id}/dead-letters/resend`]: {
      parameters: [id],
      post: {
        operationId: 'resendDeadLetters',
        summary:
          'Send dead letters again: one, those of a day, or all. What is on its way is no dead letter any more.',
        requestBody: body('DeadLettersResend'),
        responses: {
          202: json('Resent', 'How many are sent soon.'),
          ...unusable,
          404: problem('No such endpoint or letter.'),
        },
      },
    },
  };
}

const happened: Readonly<Record<EventType, string>> = {
  'job.completed': 'A job has its result; of a row only where the batch asks for `rows`.',
  'job.failed': 'A job has failed, and why.',
  'job.cancelled': 'A job was cancelled.',
  'results.part': 'The results of some rows of a batch, a thousand at most, can be read.',
  'batch.progress': 'How far a batch is, once a minute at most; for those who subscribe to it by name.',
  'batch.completed': 'Every row of a batch has ended.',
  'batch.failed': 'A batch could not be read to its end; the rows that were found have run.',
  'batch.cancelled': 'A batch was cancelled, and what ran of it has ended.',
  'endpoint.disabled': 'An endpoint is sent nothing any more: told to the others, and in the pull feed.',
};

/** `job.completed` -> `JobCompletedEvent` */
const nameOf = (type: EventType) =>
  `${type.replaceAll(/(?:^|\.)(\w)/g, (_, letter: string) => letter.toUpperCase())}Event`;

const headers = [
  ['webhook-id', 'The same however often the event is sent: what came already can be left out by it.', {}],
  [
    'webhook-timestamp',
    'Seconds since 1970 at which this attempt was made; refuse what is more than five minutes off.',
    { pattern: '^\\d+$' },
  ],
  [
    'webhook-signature',
    'One `v1,` and base64 for each secret that signs now, parted by spaces: HMAC-SHA256 of id, timestamp and body, joined by dots (Standard Webhooks). One that fits is enough.',
    {},
  ],
].map(([name, description, more]) => ({
  ...{ name, in: 'header', required: true, description },
  schema: { type: 'string', ...(more as object) },
}));

const verification = 'endpoint.verification';
const verificationExample: VerificationEvent = {
  type: verification,
  timestamp: '2026-11-24T16:40:05.123Z',
  data: { endpointId: 'ep_4nT0cQx9ZbL2mYw7RkVdHs', challenge: 'dGhpcyBpcyB0byBiZSBzYWlkIGJhY2s' },
};

/** The top-level `webhooks`: requests that this service makes. */
export function webhooks() {
  const post = (type: EventType) => ({
    operationId: `on${nameOf(type)}`,
    summary: happened[type],
    parameters: headers,
    requestBody: {
      required: true,
      content: { 'application/json': { schema: ref(nameOf(type)), example: eventExamples[type] } },
    },
    // The signature says who sends; no API key goes to receivers.
    security: [],
    responses: {
      '2XX': { description: 'Received. Answer within 15 seconds; work on it afterwards.' },
      410: { description: 'Nobody listens here any more: the endpoint is disabled.' },
      default: {
        description: 'Tried again, ten times over about 75 hours; not before `Retry-After`, if there is one.',
      },
    },
  });
  return {
    ...Object.fromEntries(eventTypes.map((type) => [type, { post: post(type) }])),
    [verification]: {
      post: {
        operationId: 'onEndpointVerificationEvent',
        summary: 'Whether the endpoint is yours: say the challenge back, and it is enabled.',
        parameters: headers,
        requestBody: {
          required: true,
          content: {
            'application/json': { schema: ref('EndpointVerificationEvent'), example: verificationExample },
          },
        },
        security: [],
        responses: {
          '2XX': {
            description: 'The challenge, as the whole answer.',
            content: {
              'text/plain': { schema: { type: 'string' } },
              'application/json': {
                schema: {
                  type: 'object',
                  properties: { challenge: { type: 'string' } },
                  required: ['challenge'],
                },
              },
            },
          },
          default: { description: 'It stays unverified, and can be asked again.' },
        },
      },
    },
  };
}

export function webhookSchemas(schemaOf: SchemaOf): Record<string, unknown> {
  return {
    Endpoint: schemaOf(endpointResourceSchema),
    NewEndpoint: schemaOf(newEndpointSchema),
    EndpointDetail: schemaOf(endpointDetailSchema),
    EndpointList: schemaOf(endpointListSchema),
    EndpointDefinition: schemaOf(endpointDefinitionSchema, 'input'),
    EndpointChange: schemaOf(endpointChangeSchema, 'input'),
    EndpointSecret: schemaOf(secretSchema),
    SecretRotation: schemaOf(rotationSchema, 'input'),
    WebhookOrder: schemaOf(orderSchema),
    EndpointTest: schemaOf(testSchema),
    ResendRequest: schemaOf(resendRequestSchema, 'input'),
    Resent: schemaOf(resentSchema),
    ReplayRequest: schemaOf(replayRequestSchema, 'input'),
    Replay: schemaOf(replayIdSchema),
    DeadLetterList: schemaOf(deadLetterListSchema),
    DeadLettersResend: schemaOf(deadLettersResendSchema, 'input'),
    ...Object.fromEntries(
      eventSchema.options.map((option) => [nameOf(option.shape.type.value), schemaOf(option)]),
    ),
    EndpointVerificationEvent: schemaOf(verificationEventSchema),
  };
}
