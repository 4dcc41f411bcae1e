/** The part of /openapi.json that speaks of the pull feed. */
import { deliveryQuerySchema } from './delivery-routes.ts';
import { feedQuerySchema } from './event-feed.ts';
import { queryOf } from './openapi-batches.ts';

type Json = (name: string, description: string) => Record<string, unknown>;
type Problem = (description: string) => Record<string, unknown>;

export function eventPaths(json: Json, problem: Problem) {
  return {
    '/v1/events': {
      get: {
        operationId: 'listEvents',
        summary: 'What happened, in order, over the whole retention; waits for more where asked to.',
        parameters: queryOf(feedQuerySchema),
        responses: {
          200: json('EventPage', 'A page; begin the next one with its `next`.'),
          400: problem('A parameter cannot be used.'),
          410: problem('Events behind `after` were deleted; the answer names the oldest cursor.'),
          501: problem('This service signs no links, since it has no SECRETS_KEY.'),
        },
      },
    },
    '/v1/webhooks/deliveries': {
      get: {
        operationId: 'listDeliveries',
        summary:
          'Every attempt to deliver an event, in the order in which they ended, over the whole retention.',
        parameters: queryOf(deliveryQuerySchema),
        responses: {
          200: json('DeliveryPage', 'A page; begin the next one with its `next`.'),
          400: problem('A parameter cannot be used.'),
          410: problem('Attempts behind `after` were deleted; the answer names the oldest cursor.'),
        },
      },
    },
  };
}
