/** The feeder service: wiring, and the loop that runs while this process holds the lease. */
import { openSources } from '@acousticsense/egress/open-sources';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { openBackends } from '@acousticsense/shared/backends';
import { type KeptLease, keepLease } from '@acousticsense/shared/lease';
import { pause } from '@acousticsense/shared/pause';
import { type Service, startService } from '@acousticsense/shared/service';
import { Gauge, Histogram } from 'prom-client';
import { type FeederConfig, loadConfig } from './config.ts';
import type { Feeder } from './feeder.ts';
import type { Retention } from './retention.ts';
import { wireFeeder } from './wiring.ts';

let config: FeederConfig;
await startService('feeder', () => (config = loadConfig(process.env)), wire);

async function wire(service: Service): Promise<void> {
  const { log } = service;
  const backends = openBackends(service, config);
  const { sources, sourceReader } = openSources(service, backends, config);
  const index = createAnswerIndex({ storage: backends.storage, directory: config.indexDirectory, log });
  service.onClose('index', () => index.close());
  const stop = new AbortController();
  const { signal } = stop;
  const { feeder, retention } = wireFeeder({ backends, sources, sourceReader, index, log, signal, config });

  const { redis } = backends;
  const lease = keepLease({ redis, key: 'as:feeder:lease', log, signal, onTaken: () => feeder.forget() });
  new Gauge({
    name: 'acousticsense_feeder_leads',
    help: '1 in the process that feeds.',
    registers: [service.registry],
    collect() {
      this.set(lease.isHeld() ? 1 : 0);
    },
  });
  new Gauge({
    name: 'acousticsense_feeder_rows_waiting',
    help: 'Rows of running batches that wait for room in the queues, by the queues that they will go through.',
    labelNames: ['decode_queue', 'inference_queue'],
    registers: [service.registry],
    collect() {
      this.reset();
      if (!lease.isHeld()) return;
      for (const { decodeQueue, inferenceQueue, rows } of feeder.waitingRows())
        this.set({ decode_queue: decodeQueue, inference_queue: inferenceQueue }, rows);
    },
  });
  const running = run(service, feeder, retention, lease, signal);
  service.onClose('feeder', async () => {
    stop.abort(new Error('the feeder stops'));
    await Promise.all([running, lease.ended]);
    await Promise.all([feeder.settle(), retention.settle()]);
  });
}

/** Feeds while this process holds the lease, and waits for it otherwise. */
async function run(
  { log, registry }: Service,
  feeder: Feeder,
  retention: Retention,
  lease: KeptLease,
  signal: AbortSignal,
): Promise<void> {
  const seconds = new Histogram({
    name: 'acousticsense_feeder_round_seconds',
    help: 'One look at what is to be fed, closed or ended, and what was handed over in it.',
    buckets: [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5],
    registers: [registry],
  });
  while (!signal.aborted) {
    let busy = false;
    if (lease.isHeld()) {
      const measured = seconds.startTimer();
      try {
        busy = await feeder.round();
        retention.maybe();
      } catch (error) {
        log.warn({ err: error }, 'a round of feeding broke off');
        await pause(1_000, signal);
      }
      measured();
    }
    if (!busy) await pause(feeder.idleMs, signal);
  }
}
