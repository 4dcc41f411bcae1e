/** The feeder service: wiring, and the loop that runs while this process holds the lease. */
import { setTimeout } from 'node:timers/promises';
import { openSources } from '@acousticsense/egress/open-sources';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { openBackends } from '@acousticsense/shared/backends';
import { createBatchRecords } from '@acousticsense/shared/batch-records';
import { createLease, type Lease } from '@acousticsense/shared/lease';
import { type Service, startService } from '@acousticsense/shared/service';
import { createTenants } from '@acousticsense/shared/tenants';
import { Gauge, Histogram } from 'prom-client';
import { type FeederConfig, loadConfig } from './config.ts';
import { createFeeder, type Feeder } from './feeder.ts';
import { createParts } from './parts.ts';
import { createReceiver } from './receive.ts';
import { createRetention } from './retention.ts';
import { createRows } from './rows.ts';

const leaseMs = 10_000;
const renewMs = 2_000;

let config: FeederConfig;
await startService('feeder', () => (config = loadConfig(process.env)), wire);

async function wire(service: Service): Promise<void> {
  const { log } = service;
  const backends = openBackends(service, config);
  const { redis, storage, records, queues } = backends;
  const batches = createBatchRecords(redis, config.retention);
  const { sources, sourceReader: reader } = openSources(service, backends, config);
  const tenants = createTenants(redis);
  const index = createAnswerIndex({ storage, directory: config.indexDirectory, log });
  service.onClose('index', () => index.close());

  const stop = new AbortController();
  const { signal } = stop;
  const parts = createParts({ redis, storage, records, batches, index, sources, log });
  const rows = createRows({ storage, sources, reader, index, parts, log, heads: config.heads });
  const receiver = createReceiver({ storage, batches, sources, reader });
  const feeder = createFeeder({
    redis,
    records,
    batches,
    queues,
    storage,
    parts,
    rows,
    receive: receiver.receive,
    weightOf: async (tenant) => (await tenants.getTenant(tenant))?.weight ?? 1,
    log,
    factor: config.factor,
    openChunks: config.openChunks,
    signal,
  });
  const retention = createRetention({ records, batches, storage, index, log, signal, ...config });

  const lease = keepLease(createLease(redis, 'as:feeder:lease', leaseMs), feeder, service, signal);
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
  retention: ReturnType<typeof createRetention>,
  lease: ReturnType<typeof keepLease>,
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

/** Beside the feeding, so that a long round does not lose it. */
function keepLease(lease: Lease, feeder: Feeder, { log, registry }: Service, signal: AbortSignal) {
  let heldUntil = 0;
  const isHeld = () => performance.now() < heldUntil;
  new Gauge({
    name: 'acousticsense_feeder_leads',
    help: '1 in the process that feeds.',
    registers: [registry],
    collect() {
      this.set(isHeld() ? 1 : 0);
    },
  });

  async function keep(): Promise<void> {
    while (!signal.aborted) {
      const from = performance.now();
      try {
        const held = await lease.hold();
        if (held && !isHeld()) feeder.forget();
        heldUntil = held ? from + leaseMs : 0;
      } catch (error) {
        log.warn({ err: error }, 'the lease could not be renewed');
      }
      await pause(renewMs, signal);
    }
    if (isHeld()) await lease.release().catch(() => {});
    heldUntil = 0;
  }
  return { isHeld, ended: keep() };
}

function pause(ms: number, signal: AbortSignal): Promise<unknown> {
  return setTimeout(ms, undefined, { signal }).catch(() => {});
}
