/** The decoder service: wiring only. */
import { openSources } from '@acousticsense/egress/open-sources';
import { openBackends } from '@acousticsense/shared/backends';
import { loadBundle } from '@acousticsense/shared/bundle';
import { startService } from '@acousticsense/shared/service';
import { announceWorker } from '@acousticsense/shared/serving';
import { runStage } from '@acousticsense/shared/stage';
import { type DecoderConfig, loadConfig } from './config.ts';
import { checkFfmpeg, createFfmpeg } from './ffmpeg.ts';
import { createFrontEnd } from './front-end.ts';
import { exportProcessorTime } from './processor-time.ts';
import { clearScratch, createDecodeStage } from './stage.ts';

let config: DecoderConfig;

await startService(
  'decoder',
  () => {
    config = loadConfig(process.env);
    return config;
  },
  async (service) => {
    const bundle = await loadBundle(config.modelUrl, { verifyFiles: false });
    const { profile } = bundle.manifest;

    let ffmpegVersion: string | undefined;
    service.addCheck('ffmpeg', async () => {
      if (ffmpegVersion !== undefined) return;
      ffmpegVersion = await checkFfmpeg(config.ffmpeg, profile.resampler);
      service.log.info({ ffmpeg: ffmpegVersion }, 'ffmpeg found');
    });

    await clearScratch(config.scratchDirectory);
    const backends = openBackends(service, config);
    const { storage, queues } = backends;
    const { concurrency, candidate } = config;
    announceWorker(service, backends.redis, bundle, { kind: 'decoder', concurrency, candidate }, () =>
      ffmpegVersion === undefined ? undefined : {},
    );

    exportProcessorTime(service.registry);
    const ffmpeg = createFfmpeg(config.ffmpeg);
    const maxSeconds = config.ffmpeg.maxDurationSeconds;
    runStage({
      service,
      name: 'decode',
      route: { profileHash: bundle.profileHash, modelDigest: bundle.digest },
      stage: createDecodeStage({
        storage,
        frontEnd: createFrontEnd({ ffmpeg, profile, maxSeconds }),
        queues,
        ...openSources(service, backends, config),
        maxSourceBytes: config.maxSourceBytes,
        profileHash: bundle.profileHash,
        scratchDirectory: config.scratchDirectory,
      }),
      concurrency: config.concurrency,
      backends,
    });
  },
);
