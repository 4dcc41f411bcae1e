/**
 * Orders to the webhook service, by the BullMQ queue `webhook`: whatever calls out to a receiver is its matter, the API
 * never does. An order is carried out once at most, since somebody waits for it and can give it again.
 */
import { randomUUID } from 'node:crypto';
import { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { tenantNameSchema } from './pipeline.ts';
import { queuePrefix } from './queues.ts';
import { withRedis } from './redis.ts';

export const ordersQueueName = 'webhook';

const orderSchema = z.object({
  v: z.literal(1),
  /** `verify`: the challenge of ownership. `test`: one signed event that says it is a test. */
  kind: z.enum(['verify', 'test']),
  tenant: tenantNameSchema,
  endpointId: z.string(),
  orderId: z.uuid(),
});
export type WebhookOrder = Readonly<z.infer<typeof orderSchema>>;

export interface WebhookOrders {
  /** @throws {InfrastructureFault} when Redis is away. */
  add(order: Pick<WebhookOrder, 'kind' | 'tenant' | 'endpointId'> & { orderId?: string }): Promise<string>;
  close(): Promise<void>;
}

const hour = 3_600;

/** @param connection that fails while Redis is away ({@link connectRedis}): callers wait for the answer. */
export function createOrders(connection: Redis): WebhookOrders {
  const queue = new Queue(ordersQueueName, {
    connection,
    prefix: queuePrefix(ordersQueueName),
    skipVersionCheck: true,
  });
  queue.on('error', () => {});
  return {
    async add({ orderId = randomUUID(), ...order }) {
      const data = orderSchema.parse({ v: 1, orderId, ...order });
      await withRedis(() =>
        queue.add(order.kind, data, {
          jobId: orderId,
          attempts: 1,
          removeOnComplete: { age: hour, count: 1_000 },
          removeOnFail: { age: 24 * hour, count: 1_000 },
        }),
      );
      return orderId;
    },
    close: () => queue.close(),
  };
}

/** @returns undefined for what is no order that this version understands: anybody on this Redis can add. */
export function parseOrder(data: unknown): WebhookOrder | undefined {
  const parsed = orderSchema.safeParse(data);
  return parsed.success ? parsed.data : undefined;
}
