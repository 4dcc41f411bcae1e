/** The queues of endpoints, from the side that looks: the webhook service fills and empties them. */
import { Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { endpointQueueName } from './endpoints.ts';
import { queuePrefix } from './queues.ts';
import { withRedis } from './redis.ts';

export interface EndpointQueues {
  backlog(endpointId: string): Promise<{ waiting: number; delayed: number; active: number }>;
  /** Deletes the queue with all that lies in it, messages that are being sent included. */
  remove(endpointId: string): Promise<void>;
}

export function createEndpointQueues(connection: Redis): EndpointQueues {
  /** For one look: there are as many queues as endpoints, and most are never looked at. */
  async function using<T>(endpointId: string, look: (queue: Queue) => Promise<T>): Promise<T> {
    const name = endpointQueueName(endpointId);
    const queue = new Queue(name, {
      ...{ connection, prefix: queuePrefix(name), skipVersionCheck: true },
      // Else a look at a queue that was removed would write part of it again.
      skipMetasUpdate: true,
    });
    queue.on('error', () => {});
    try {
      return await withRedis(() => look(queue));
    } finally {
      await queue.close().catch(() => {});
    }
  }

  return {
    backlog: (endpointId) =>
      using(endpointId, async (queue) => {
        const counts = await queue.getJobCounts('waiting', 'prioritized', 'delayed', 'active');
        return {
          waiting: (counts['waiting'] ?? 0) + (counts['prioritized'] ?? 0),
          delayed: counts['delayed'] ?? 0,
          active: counts['active'] ?? 0,
        };
      }),
    remove: (endpointId) => using(endpointId, (queue) => queue.obliterate({ force: true })),
  };
}
