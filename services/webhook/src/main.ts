/** The webhook service: events out of the log, to those who asked for them. Wiring. */
import { createEgressGuard } from '@acousticsense/egress/guard';
import { openBackends } from '@acousticsense/shared/backends';
import { createEndpoints } from '@acousticsense/shared/endpoints';
import { createDeliveryLog, createEventLog } from '@acousticsense/shared/event-log';
import { keepLease } from '@acousticsense/shared/lease';
import { readPublicUrl } from '@acousticsense/shared/public-url';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { createSecrets } from '@acousticsense/shared/secrets';
import { type Service, startService } from '@acousticsense/shared/service';
import { createUrlSigner } from '@acousticsense/shared/signed-url';
import { createTelling } from '@acousticsense/shared/told-event';
import { fastClock, systemClock } from './clock.ts';
import { loadConfig, type WebhookConfig } from './config.ts';
import { createDeadLetters } from './dead-letters.ts';
import { createDeliver } from './deliver.ts';
import { createDeliveries } from './deliveries.ts';
import { allEndpoints, createDispatcher } from './dispatcher.ts';
import { createKeeper } from './keeper.ts';
import { createMessageQueues } from './messages.ts';
import { createMetrics, exportState } from './metrics.ts';
import { createOrder } from './order-of-refs.ts';
import { createOrderWorker } from './orders.ts';

let config: WebhookConfig;
await startService('webhook', () => (config = loadConfig(process.env)), wire);

async function wire(service: Service): Promise<void> {
  const { log, registry, closing } = service;
  const { backlog, timeoutMs, clockSpeed, eventsKept: kept, retentionMs, secretsKey, egressAllow } = config;
  const clock = clockSpeed === 1 ? systemClock : fastClock(clockSpeed);
  const guard = createEgressGuard({ allow: egressAllow });
  service.onClose('egress', () => guard.close());
  const backends = openBackends(service, config);
  const { redis, storage, records } = backends;

  const endpoints = createEndpoints({ redis, secrets: createSecrets(secretsKey), now: clock.now });
  const events = createEventLog({ redis, storage, log, kept });
  const receipts = createDeliveryLog({ redis, storage, log, kept });
  const queues = createMessageQueues(redis);
  service.onClose('message queues', () => queues.close());
  const order = createOrder(redis);
  const deadLetters = createDeadLetters(storage);
  const metrics = createMetrics(registry);
  const deliver = createDeliver({ guard, clock, timeoutMs });

  const stop = new AbortController();
  const { signal } = stop;
  const lease = keepLease({ redis, key: 'as:webhook:lease', log, signal });
  const subscriber = backends.connect();
  const tell = createTelling({ signer: createUrlSigner(secretsKey), publicUrl: readPublicUrl(redis) });
  const dispatcher = createDispatcher({
    subscriber,
    endpoints,
    events,
    queues,
    order,
    deadLetters,
    tell,
    lease,
    clock,
    log,
    signal,
    backlog,
  });
  const tenants = async () => [...new Set([...(await records.tenants()), ...(await endpoints.tenants())])];
  const keeper = createKeeper({
    ...{ subscriber, events, deliveries: receipts, storage, tenants, lease, log, signal, retentionMs, kept },
  });
  service.onClose('dispatcher', async () => {
    stop.abort(new Error('the webhook service stops'));
    await Promise.all([dispatcher.ended, keeper.ended, lease.ended]);
  });

  const deliveries = createDeliveries({
    ...{ endpoints, queues, order, receipts, deadLetters, deliver, clock, metrics, log, closing },
    connect: () => connectRedisForWorker(config.redisUrl),
  });
  const orders = createOrderWorker({
    connection: backends.connect(),
    endpoints,
    deliver,
    clock,
    log,
    closing,
  });
  service.onClose('deliveries', async () => {
    await Promise.all([deliveries.close(), orders.close()]);
  });

  exportState(registry, {
    leads: lease.isHeld,
    lagSeconds: dispatcher.lagSeconds,
    statuses: deliveries.statuses,
    outstanding: async () => {
      const all = await allEndpoints(endpoints);
      const counts = await Promise.all(all.map(({ id }) => queues.outstanding(id)));
      return counts.reduce((sum, count) => sum + count, 0);
    },
    unarchived: keeper.unarchived,
  });
}
