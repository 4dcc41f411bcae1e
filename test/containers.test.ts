/** The pipeline on a Redis in a container, as deployments run it. Skipped where no container engine answers. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';
import { GenericContainer, Wait } from 'testcontainers';
import { song, wav } from './audio.ts';
import { finished, upload } from './client.ts';
import { startSystem } from './system.ts';

const image = 'redis:7.2-bookworm';

/** @returns why it cannot be run here; false when it can. */
function notHere(): string | false {
  const docker = (...args: string[]) => {
    try {
      execFileSync('docker', args, { stdio: 'ignore', timeout: 60_000 });
      return true;
    } catch {
      return false;
    }
  };
  if (!docker('info')) return 'no container engine answers';
  return (
    !docker('image', 'inspect', image) && !docker('pull', image) && `there is no image ${image} to be had`
  );
}

test('jobs run on a Redis 7 container over TCP', {
  skip: notHere(),
}, async () => {
  // The container is stopped below; the reaper would be one more image to have.
  process.env['TESTCONTAINERS_RYUK_DISABLED'] = 'true';
  const redis = await new GenericContainer(image)
    .withExposedPorts(6379)
    .withWaitStrategy(Wait.forLogMessage(/Ready to accept connections/))
    .start();
  try {
    await using system = await startSystem({
      redisUrl: `redis://${redis.getHost()}:${redis.getMappedPort(6379)}`,
    });
    const job = await finished(system.url, (await upload(system.url, wav([song({ seconds: 10 })]))).id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
  } finally {
    await redis.stop();
  }
});
