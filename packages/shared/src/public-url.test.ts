import assert from 'node:assert/strict';
import { once } from 'node:events';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startRedis } from '../../../test/redis.ts';
import { InfrastructureFault } from './errors.ts';
import { announcePublicUrl, readPublicUrl } from './public-url.ts';
import { connectRedis } from './redis.ts';

test('what the API announces is read by others, also after Redis has lost it', async () => {
  await using server = await startRedis();
  const [api, other] = [connectRedis(server.url), connectRedis(server.url)];
  await Promise.all([once(api, 'ready'), once(other, 'ready')]);
  const read = readPublicUrl(other);
  await assert.rejects(read(), InfrastructureFault);

  const stop = announcePublicUrl(api, 'https://music.example.com/as');
  while ((await other.get('as:public-url')) === null) await sleep(5);
  assert.equal(await read(), 'https://music.example.com/as');
  await other.set('as:public-url', 'https://elsewhere.example.com');
  assert.equal(await read(), 'https://music.example.com/as', 'it is believed for a while');
  assert.equal(await readPublicUrl(other)(), 'https://elsewhere.example.com');

  await server.stop('SIGKILL');
  await server.start();
  if (other.status !== 'ready') await once(other, 'ready');
  while ((await other.get('as:public-url')) === null) await sleep(5);
  assert.equal(await readPublicUrl(other)(), 'https://music.example.com/as');
  stop();
  assert.equal(api.listenerCount('ready'), 0);
  api.disconnect();
  other.disconnect();
});
