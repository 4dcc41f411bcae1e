import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { openSources } from '@acousticsense/egress/open-sources';
import { createAnswerIndex } from '@acousticsense/shared/answer-index';
import { openBackends } from '@acousticsense/shared/backends';
import { createBatchRecords } from '@acousticsense/shared/batch-records';
import { createEndpointQueues } from '@acousticsense/shared/endpoint-queues';
import { createEndpoints } from '@acousticsense/shared/endpoints';
import { StartupError } from '@acousticsense/shared/errors';
import { createDeliveryLog, createEventLog } from '@acousticsense/shared/event-log';
import { announcePublicUrl } from '@acousticsense/shared/public-url';
import { type Service, startService } from '@acousticsense/shared/service';
import { createUrlSigner } from '@acousticsense/shared/signed-url';
import { createTenants } from '@acousticsense/shared/tenants';
import { createTelling } from '@acousticsense/shared/told-event';
import { createOrders } from '@acousticsense/shared/webhook-orders';
import { createApp } from './app.ts';
import { exportQueues, lookAtQueues } from './backlogs.ts';
import { createDiff } from './batch-diff.ts';
import { createBatchRows } from './batch-rows.ts';
import { createBatches } from './batches.ts';
import { createCallbacks } from './callbacks.ts';
import { createChanges } from './changes.ts';
import { type ApiConfig, loadConfig, urlOf } from './config.ts';
import { createEventFeed } from './event-feed.ts';
import { createIdempotency } from './idempotency.ts';
import { createJobs } from './jobs.ts';
import { createLimits } from './limits.ts';
import { createMappings } from './mappings.ts';
import { createReconciler } from './reconciler.ts';
import { createResults } from './results.ts';
import { createStoredBatches } from './stored-batches.ts';
import { createUploadedRefs } from './uploaded-refs.ts';
import { createUploads } from './uploads.ts';

/** A caller waits: within a second it has its answer, or hears that Redis does not give one. */
const redisPatienceMs = 800;

let config: ApiConfig;
await startService('api', () => (config = loadConfig(process.env)), wire);

async function wire(service: Service): Promise<void> {
  const { log } = service;
  const backends = openBackends(service, config, redisPatienceMs);
  const { redis, storage, records, queues } = backends;
  const subscriber = backends.connect();
  const changes = createChanges(subscriber, records);

  const tenants = createTenants(redis);
  const limits = createLimits({ redis, tenants, records, ...config });
  const charge = (tenant: string, bytes: number) => limits.charge(tenant, { bytes });
  const uploads = createUploads({ redis, storage, log, charge, ...config });

  const reconciler = createReconciler({ redis, records, queues, storage, uploads, log, ...config });
  reconciler.start();
  service.onClose('reconciler', () => reconciler.stop());
  exportQueues(service.registry, () => lookAtQueues(redis, queues), reconciler.leads);

  const batchRecords = createBatchRecords(redis, config.retention);
  const uploadedRefs = createUploadedRefs({ redis, batches: batchRecords, retention: config.retention });
  const idempotency = createIdempotency(redis, log);
  const { sources, sourceReader, secrets, guard } = openSources(service, backends, config);
  const endpoints = createEndpoints({ redis, secrets });
  const callbackFor = createCallbacks(endpoints);
  const { maxUploadBytes } = config;
  const jobs = createJobs({
    ...{ redis, storage, records, queues, changes, log, limits, uploads, uploadedRefs, maxUploadBytes },
    callbackFor,
  });
  service.addCheck('model', async () => {
    await jobs.servedModel();
  });

  redis.once('ready', () => {
    for (const [of, sealed] of Object.entries({ sources, endpoints })) {
      sealed.reseal().then(
        (resealed) => resealed > 0 && log.info({ of, resealed }, 'secrets sealed with the current key'),
        (error) => log.warn({ err: error, of }, 'secrets are not sealed with the current key yet'),
      );
    }
  });

  const index = createAnswerIndex({ storage, directory: config.indexDirectory, log });
  service.onClose('index', () => index.close());
  const stored = createStoredBatches({ batches: batchRecords, storage });
  const mappings = createMappings(storage);
  const { maxBatchRows: maxRows, maxActiveBatches: maxActive } = config;
  const batches = createBatches({
    ...{ storage, batches: batchRecords, stored, sources, mappings, jobs, limits, index, log },
    ...{ maxRows, maxActive, callbackFor },
  });

  const rows = createBatchRows({ batches: batchRecords, records, storage, stored });
  const results = createResults({
    ...{ redis, storage, records, batches: batchRecords, stored, rows, index, uploadedRefs },
  });
  const diff = createDiff({ results, stored });

  const signer = createUrlSigner(config.secretsKey);
  let publicUrl = config.publicUrl ?? '';
  const tell = createTelling({ signer, publicUrl: () => publicUrl });
  const eventLog = createEventLog({ redis, storage, log });
  const feed = createEventFeed({ subscriber, log: eventLog });
  const deliveries = createDeliveryLog({ redis, storage, log });
  const orders = createOrders(redis);
  service.onClose('webhook orders', () => orders.close());
  const endpointQueues = createEndpointQueues(redis);

  const app = createApp({
    ...{ service, config, jobs, changes, storage, sources, sourceReader },
    ...{ batches, results, diff, mappings, tenants, limits, idempotency, uploads, signer, feed, tell },
    deliveries,
    ...{ endpoints, orders, endpointQueues, eventLog, guard },
  });
  const server = createServer(app);
  // An upload may take as long as it moves: idle time is limited, the whole is not.
  server.requestTimeout = 0;
  server.headersTimeout = 30_000;
  server.timeout = Math.max(60_000, config.predictTimeoutMs + 10_000);
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      const reason =
        error.code === 'EADDRINUSE'
          ? `is taken: stop what uses it, or choose another with PORT=${config.port + 1}`
          : `cannot be used: ${error.message}`;
      reject(new StartupError(`Port ${config.port} on ${config.host} ${reason}.`));
    });
    server.listen(config.port, config.host, resolve);
  });
  const { port } = server.address() as AddressInfo;
  publicUrl ||= urlOf(config.host, port);
  service.onClose('public URL', announcePublicUrl(redis, publicUrl));
  service.onClose('http server', async () => {
    const closed = new Promise((resolve) => server.close(resolve));
    server.closeIdleConnections();
    // Event streams would hold the server open; their clients reconnect elsewhere.
    const overtime = setTimeout(() => server.closeAllConnections(), 2_000);
    await closed;
    clearTimeout(overtime);
  });
  // Closed first: who waits is answered, so that the server need not wait for them.
  service.onClose('event feed', () => feed.close());
  log.info({ port, host: config.host, storage: storage.description }, 'listening');
  service.announcePort(port);
}
