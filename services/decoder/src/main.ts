/** The decoder service: wiring only. */
import { hostname } from 'node:os';
import { loadBundle } from '@acousticsense/shared/bundle';
import { createJobRecords } from '@acousticsense/shared/job-records';
import { openStorage } from '@acousticsense/shared/open-storage';
import { queueName } from '@acousticsense/shared/pipeline';
import { createQueues } from '@acousticsense/shared/queues';
import { connectRedis, connectRedisForWorker, redisCheck } from '@acousticsense/shared/redis';
import { startService, storageTrustMs } from '@acousticsense/shared/service';
import { announce, describeModel } from '@acousticsense/shared/serving';
import { runStage } from '@acousticsense/shared/stage';
import { type DecoderConfig, loadConfig } from './config.ts';
import { checkFfmpeg, createFfmpeg } from './ffmpeg.ts';
import { createFrontEnd } from './front-end.ts';
import { createDecodeStage } from './stage.ts';

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

    const redis = connectRedis(config.redisUrl);
    const workerRedis = connectRedisForWorker(config.redisUrl);
    const subscriber = connectRedisForWorker(config.redisUrl);
    for (const connection of [redis, workerRedis, subscriber]) {
      service.onClose('redis connection', () => connection.disconnect());
    }
    service.addCheck('redis', redisCheck(redis));

    const storage = openStorage(config.storageUrl);
    service.onClose('storage', () => storage.close());
    service.addCheck('storage', () => storage.probe(), storageTrustMs);

    const queues = createQueues(redis);
    service.onClose('queues', () => queues.close());

    const route = { profileHash: bundle.profileHash, modelDigest: bundle.digest };
    const since = Date.now();
    const announcement = announce(redis, describeModel(bundle), () => {
      if (ffmpegVersion === undefined) return undefined;
      const workerId = `${hostname()}-${process.pid}`;
      return { kind: 'decoder', queue: queueName('decode', route), workerId, since, ...route };
    });
    service.onClose('announcement', () => announcement.stop());

    const ffmpeg = createFfmpeg(config.ffmpeg);
    const maxSeconds = config.ffmpeg.maxDurationSeconds;
    runStage({
      service,
      name: 'decode',
      route,
      stage: createDecodeStage({
        storage,
        frontEnd: createFrontEnd({ ffmpeg, profile, maxSeconds }),
        queues,
        profileHash: bundle.profileHash,
        scratchDirectory: config.scratchDirectory,
      }),
      concurrency: config.concurrency,
      records: createJobRecords(redis, config.retention),
      queues,
      storage,
      workerRedis,
      subscriber,
    });
  },
);
