/** The pipeline on a Redis in a container, as deployments run it. Skipped where no container engine answers. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';
import { GenericContainer, Wait } from 'testcontainers';
import { song, wav } from './audio.ts';
import { finished, upload } from './client.ts';
import { startSystem } from './system.ts';

function engineAnswers(): boolean {
  try {
    execFileSync('docker', ['info'], { stdio: 'ignore', timeout: 5_000 });
    return true;
  } catch {
    return false;
  }
}

test('jobs run on a Redis 7 container over TCP', {
  skip: !engineAnswers() && 'no container engine answers',
}, async () => {
  // The container is stopped below; the reaper would be one more image to have.
  process.env['TESTCONTAINERS_RYUK_DISABLED'] = 'true';
  const redis = await new GenericContainer('redis:7-bookworm')
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
