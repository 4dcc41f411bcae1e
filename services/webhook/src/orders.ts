/** Orders of callers: prove that an endpoint is theirs, try it once. Of both somebody waits for the outcome. */
import type { Endpoints } from '@acousticsense/shared/endpoints';
import { eventExamples } from '@acousticsense/shared/event-examples';
import { queuePrefix } from '@acousticsense/shared/queues';
import { ordersQueueName, parseOrder, type WebhookOrder } from '@acousticsense/shared/webhook-orders';
import { heedErrors } from '@acousticsense/shared/worker-errors';
import { type Job, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import { verifyOwnership } from './challenge.ts';
import type { Clock } from './clock.ts';
import { type Deliver, receiptOf } from './deliver.ts';

export interface OrdersDeps {
  /** For the worker's blocking reads. */
  readonly connection: Redis;
  readonly endpoints: Endpoints;
  readonly deliver: Deliver;
  readonly clock: Clock;
  readonly log: Logger;
  readonly closing: AbortSignal;
}

/** Each takes as long as its receiver: one that hangs keeps this many others from nothing. */
const ordersAtOnce = 64;

export function createOrderWorker({
  connection,
  endpoints,
  deliver,
  clock,
  log,
  closing,
}: OrdersDeps): Worker {
  async function process({ data }: Job): Promise<void> {
    const order = parseOrder(data);
    if (order === undefined) {
      log.error({ data }, 'an order that is not understood is left out');
      return;
    }
    const { tenant, endpointId } = order;
    const endpoint = await endpoints.get(tenant, endpointId);
    if (endpoint === undefined) return;
    const secrets = await endpoints.signingSecrets(tenant, endpointId, clock.now());
    if (order.kind === 'verify') {
      const result = await verifyOwnership(deliver, endpoint, secrets, closing, clock);
      await endpoints.verified(tenant, endpointId, {
        ...result,
        at: Math.round(clock.now()),
        url: endpoint.url,
      });
      log.info({ tenant, endpointId, ...result }, 'endpoint asked for its proof');
    } else await test(order, endpoint.url, secrets);
  }

  /** The receiver knows it by its id; it changes nothing of what is known of the endpoint. */
  async function test(
    { tenant, endpointId, orderId }: WebhookOrder,
    url: string,
    secrets: readonly string[],
  ) {
    const event = { ...eventExamples['job.completed'], timestamp: new Date(clock.now()).toISOString() };
    const message = { id: `evt_test_${orderId}`, url, body: JSON.stringify(event) };
    const at = clock.now();
    const outcome = await deliver(message, secrets, closing);
    await endpoints.endTest(tenant, endpointId, orderId, receiptOf(outcome, at));
  }

  const worker = new Worker(ordersQueueName, process, {
    connection,
    prefix: queuePrefix(ordersQueueName),
    concurrency: ordersAtOnce,
    skipVersionCheck: true,
    autorun: false,
  });
  heedErrors(worker, log);
  void worker.run().catch((error) => log.error({ err: error }, 'queue worker ended'));
  return worker;
}
