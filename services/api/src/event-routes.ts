/** The pull feed by HTTP. */
import type { Tell } from '@acousticsense/shared/told-event';
import express, { type Response, type Router } from 'express';
import { type EventFeed, type FedPage, feedQuerySchema } from './event-feed.ts';
import { refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';

export interface EventRoutesDeps {
  readonly feed: EventFeed;
  readonly tell: Tell;
  readonly tenantOf: (response: Response) => string;
}

export function createEventRoutes({ feed, tell, tenantOf }: EventRoutesDeps): Router {
  const router = express.Router();

  router.get('/v1/events', async (request, response) => {
    const query = parseOptions(feedQuerySchema, request.query);
    const tenant = tenantOf(response);
    if (request.method === 'HEAD') query.wait = 0;
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    const { events, next, more } = await feed.next(tenant, query, gone.signal);
    const now = Date.now();
    const told = await Promise.all(
      events.map(async ({ id, cursor, ...event }) => ({ id, cursor, ...(await tell(tenant, event, now)) })),
    );
    response
      .set('cache-control', 'no-store')
      .json({ events: told as FedPage['events'], next, more } satisfies FedPage);
  });

  router.all('/v1/events', refuseMethod('GET, HEAD'));
  return router;
}
