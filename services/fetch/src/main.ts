/** The fetch service: wiring only. */
import { createEgressGuard } from '@acousticsense/egress/guard';
import { openBackends } from '@acousticsense/shared/backends';
import { startService } from '@acousticsense/shared/service';
import { announceWorker } from '@acousticsense/shared/serving';
import { runStage } from '@acousticsense/shared/stage';
import { Counter } from 'prom-client';
import { type FetchConfig, loadConfig } from './config.ts';
import { createDownload } from './download.ts';
import { createPlaces } from './places.ts';
import { createFetchStage } from './stage.ts';

/** Jobs taken for each download at a time: the surplus waits for its host, so that a slow host holds up no other. */
const takenPerDownload = 4;

let config: FetchConfig;

await startService(
  'fetch',
  () => {
    config = loadConfig(process.env);
    return config;
  },
  async (service) => {
    const { concurrency, perHost, limits } = config;
    const guard = createEgressGuard({ allow: config.egressAllow });
    service.onClose('egress', () => guard.close());
    const backends = openBackends(service, config);
    const { storage, queues } = backends;
    const places = createPlaces({ total: concurrency, perHost });
    const taken = concurrency * takenPerDownload;
    const fetchedBytes = new Counter({
      name: 'acousticsense_fetched_bytes_total',
      help: 'Bytes of the files that were fetched from URLs, complete ones only.',
      registers: [service.registry],
    });
    announceWorker(service, backends.redis, undefined, { kind: 'fetch', concurrency: taken }, () => ({}));
    runStage({
      service,
      name: 'fetch',
      // One queue for all models: what is fetched is the same for each.
      route: { profileHash: '', modelDigest: '' },
      stage: createFetchStage({
        download: createDownload({ storage, guard, places, limits }),
        queues,
        fetchedBytes,
      }),
      concurrency: taken,
      backends,
    });
  },
);
