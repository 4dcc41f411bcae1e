/** Every attempt to deliver an event, over the whole retention: the proof of who was told what, when, and said what. */
import { isCursor } from '@acousticsense/shared/archived-log';
import { type Delivery, type DeliveryLog, deliverySchema } from '@acousticsense/shared/event-log';
import express, { type Response, type Router } from 'express';
import { z } from 'zod';
import { refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';
import { beginning, pageOf } from './log-pages.ts';
import { number } from './schemas.ts';

export const deliveryQuerySchema = z.strictObject({
  after: z
    .string()
    .refine(isCursor, 'must be the `next` or a `cursor` of an answer')
    .optional()
    .describe('`next` of the page before; absent: from the oldest'),
  limit: number(z.number().int().min(1).max(1_000)).default(100),
  event: z.string().max(200).optional().describe('only of this `webhook-id`'),
  endpoint: z.string().max(100).optional().describe('only to this endpoint'),
});

export const deliveryPageSchema = z.strictObject({
  deliveries: z.array(
    deliverySchema.extend({ at: z.iso.datetime().describe('when it began'), cursor: z.string() }),
  ),
  next: z.string().describe('`after` of the next page; moves on over attempts that were not asked for'),
  more: z.boolean().describe('whether there is more already'),
});
type DeliveryPage = z.infer<typeof deliveryPageSchema>;

export interface DeliveryRoutesDeps {
  readonly deliveries: DeliveryLog;
  readonly tenantOf: (response: Response) => string;
}

const path = '/v1/webhooks/deliveries';
export function createDeliveryRoutes({ deliveries, tenantOf }: DeliveryRoutesDeps): Router {
  const router = express.Router();

  router.get(path, async (request, response) => {
    const query = parseOptions(deliveryQuerySchema, request.query);
    response.set('cache-control', 'no-store').json(await read(tenantOf(response), query));
  });

  async function read(
    tenant: string,
    { after, limit, event, endpoint }: z.infer<typeof deliveryQuerySchema>,
  ): Promise<DeliveryPage> {
    const all = event === undefined && endpoint === undefined;
    const { found, next, more } = await pageOf<Delivery>(
      {
        read: (from, most) => deliveries.page(tenant, from, most),
        oldest: () => deliveries.oldest(tenant),
      },
      { after, limit },
      'Attempts',
      all
        ? undefined
        : ({ eventId, endpointId }) =>
            (event ?? eventId) === eventId && (endpoint ?? endpointId) === endpointId,
    );
    const told = found.map((entry) => ({ ...entry, at: new Date(entry.at).toISOString() }));
    return { deliveries: told, next: next ?? beginning, more };
  }

  router.all(path, refuseMethod('GET, HEAD'));
  return router;
}
