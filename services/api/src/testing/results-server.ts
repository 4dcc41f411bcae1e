/** A process of its own that serves results, so that its memory can be measured: URLs of Redis and storage, a folder. */

import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { serveResults } from './catalogue.ts';

const [redisUrl, storageUrl, directory] = process.argv.slice(2);
const { url } = await serveResults({
  redis: connectRedisForWorker(redisUrl!),
  storage: openStorage(storageUrl!),
  directory: directory!,
});
process.stdout.write(`${url}\n`);
