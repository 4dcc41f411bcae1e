/** The feeder service: wiring, and the loop that runs while this process holds the lease. */
import { openSources } from '@acousticsense/egress/open-sources';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { openBackends } from '@acousticsense/shared/backends';
import { createBatchRecords } from '@acousticsense/shared/batch-records';
import { createLease } from '@acousticsense/shared/lease';
import { type Service, startService } from '@acousticsense/shared/service';
import { createTenants } from '@acousticsense/shared/tenants';
import { Counter, Gauge } from 'prom-client';
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
  const retention = createRetention({ records, batches, storage, index, log, ...config });

  const running = run(service, feeder, retention, createLease(redis, 'as:feeder:lease', leaseMs), signal);
  service.onClose('feeder', async () => {
    stop.abort(new Error('the feeder stops'));
    await running;
    await feeder.settle();
  });
}

/** Feeds while this process holds the lease, and waits for it otherwise. */
async function run(
  service: Service,
  feeder: Feeder,
  retention: ReturnType<typeof createRetention>,
  lease: ReturnType<typeof createLease>,
  signal: AbortSignal,
): Promise<void> {
  const { log, registry } = service;
  const leads = new Gauge({
    name: 'acousticsense_feeder_leads',
    help: '1 in the process that feeds.',
    registers: [registry],
  });
  const rounds = new Counter({
    name: 'acousticsense_feeder_rounds_total',
    help: 'Looks at what is to be fed, closed or ended.',
    registers: [registry],
  });
  let heldUntil = 0;
  let renewAt = 0;
  while (!signal.aborted) {
    let busy = false;
    try {
      if (performance.now() >= renewAt) {
        const held = await lease.hold();
        if (held && heldUntil <= performance.now()) feeder.forget();
        heldUntil = held ? performance.now() + leaseMs : 0;
        renewAt = performance.now() + renewMs;
        leads.set(held ? 1 : 0);
      }
      if (heldUntil > performance.now()) {
        busy = await feeder.round();
        rounds.inc();
        await retention.maybe();
      }
    } catch (error) {
      log.warn({ err: error }, 'a round of feeding broke off');
      renewAt = 0;
      await pause(1_000, signal);
    }
    if (!busy) await pause(feeder.idleMs, signal);
  }
  if (heldUntil > 0) await lease.release().catch(() => {});
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      signal.removeEventListener('abort', done);
      resolve();
    }
    signal.addEventListener('abort', done);
    if (signal.aborted) done();
  });
}
