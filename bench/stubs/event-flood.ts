/**
 * Events in a row, as fast as a tenant's log takes them: written as `commit.lua` writes them, but hundreds at a time. It
 * waits while as many lie in Redis as make the API and the feeder wait (EVENTS_WAITING_MOST).
 *
 *   event-flood.ts REDIS_URL TENANT EVENTS RATE WAITING_MOST      (RATE: events a second; 0: no limit)
 *
 * Tells how many it has written, and the cursor of the last one, when it is done; on the way every second.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { eventsChannel, type JobData, jobEventId } from '../../packages/shared/src/events.ts';
import { connectRedisForWorker } from '../../packages/shared/src/redis.ts';
import { jobEnded } from '../../services/webhook/src/testing/running.ts';

const [url, tenant, ...numbers] = process.argv.slice(2);
const [events, rate, waitingMost] = numbers.map(Number) as [number, number, number];
const page = 200;
const redis = connectRedisForWorker(url!);
const stream = `as:{${tenant}}:events`;
const from = performance.now();
let toldAt = from;
let heldMs = 0;
let last: unknown;
for (let written = 0; written < events; ) {
  const due = rate === 0 ? events : Math.floor(((performance.now() - from) / 1_000) * rate);
  if (written >= due) {
    await sleep(5);
    continue;
  }
  const pipeline = redis.pipeline();
  const until = Math.min(events, due, written + page);
  const count = until - written;
  for (; written < until; written += 1) {
    const event = jobEnded({ ref: `flood-${written}`, revision: 1 });
    const id = jobEventId({ jobId: (event.data as JobData).jobId, generation: 1 }, event.type);
    pipeline.xadd(stream, '*', 'id', id, 'event', JSON.stringify(event));
    pipeline.publish(eventsChannel, tenant!);
  }
  pipeline.xlen(stream);
  const answers = (await pipeline.exec())!;
  for (const [error] of answers) if (error) throw error;
  last = answers[2 * (count - 1)]![1];
  let waiting = Number(answers.at(-1)![1]);
  while (waiting > waitingMost) {
    const at = performance.now();
    await sleep(50);
    waiting = await redis.xlen(stream);
    heldMs += performance.now() - at;
  }
  if (performance.now() - toldAt > 1_000 || written === events) {
    toldAt = performance.now();
    process.send!({ written, last, heldMs, ms: toldAt - from });
  }
}
redis.disconnect();
process.disconnect!();
