/** Every attempt to deliver an event, over the whole retention: the proof of who was told what, when, and said what. */
import { isCursor } from '@acousticsense/shared/archived-log';
import { ProblemError } from '@acousticsense/shared/errors';
import { type DeliveryLog, deliverySchema } from '@acousticsense/shared/event-log';
import express, { type Response, type Router } from 'express';
import { z } from 'zod';
import { refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';
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
/** Attempts that are passed over before the caller hears how far it is. */
const mostPassedOver = 20_000;
const scanPage = 1_000;
const beginning = '0-0';

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
    const found: DeliveryPage['deliveries'] = [];
    const all = event === undefined && endpoint === undefined;
    let next = after;
    for (let seen = 0; ; ) {
      const page = await deliveries.page(tenant, next, all ? limit : scanPage);
      if (page.expired && after !== undefined) {
        const oldest = await deliveries.oldest(tenant);
        throw new ProblemError(
          'cursor_expired',
          `Attempts behind this cursor were deleted when their retention ended; the oldest that is left has the cursor ${oldest ?? beginning}.`,
          { field: 'after' },
        );
      }
      for (const [index, entry] of page.entries.entries()) {
        next = entry.cursor;
        if ((event ?? entry.eventId) !== entry.eventId || (endpoint ?? entry.endpointId) !== entry.endpointId)
          continue;
        found.push({ ...entry, at: new Date(entry.at).toISOString() });
        if (found.length === limit)
          return { deliveries: found, next, more: page.more || index + 1 < page.entries.length };
      }
      next = page.cursor ?? next;
      seen += page.entries.length;
      if (all || !page.more || seen >= mostPassedOver)
        return { deliveries: found, next: next ?? beginning, more: page.more };
    }
  }

  router.all(path, refuseMethod('GET, HEAD'));
  return router;
}
