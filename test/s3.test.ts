/** The whole pipeline on S3 storage, and through an absence of it. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import S3rver from 's3rver';
import { openStorage } from '../packages/shared/src/open-storage.ts';
import { song, wav } from './audio.ts';
import { finished, type Problem, request, upload } from './client.ts';
import { startSystem } from './system.ts';

test('jobs run on S3 storage; while it is away they wait, spending no attempt, and are done when it is back', async () => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-s3-'));
  const options = {
    address: '127.0.0.1',
    silent: true,
    directory,
    configureBuckets: [{ name: 'music', configs: [] }],
  };
  let server = new S3rver({ port: 0, ...options });
  const { port } = await server.run();
  const credentials = { AWS_ACCESS_KEY_ID: 'S3RVER', AWS_SECRET_ACCESS_KEY: 'S3RVER' };
  const storageUrl = `s3://music/prefix?endpoint=http://127.0.0.1:${port}&region=us-east-1`;
  // s3rver removes a folder that a delete has emptied, also under another's put: this one is never empty.
  Object.assign(process.env, credentials);
  const keep = openStorage(storageUrl);
  await keep.put('probe/keep', Buffer.from('keep'));
  keep.close();
  try {
    await using system = await startSystem({ storageUrl, env: credentials });
    const first = await finished(system.url, (await upload(system.url, wav([song({ seconds: 10 })]))).id);
    assert.equal(first.state, 'completed', JSON.stringify(first.error));
    const picture = await fetch(system.url + first.links.spectrogram);
    assert.equal(picture.status, 200);
    await picture.arrayBuffer();

    process.kill(system.pid('decoder'), 'SIGSTOP');
    const { id } = await upload(system.url, wav([song({ seconds: 11, seed: 2 })]));
    await server.close();
    process.kill(system.pid('decoder'), 'SIGCONT');
    const away = async () => {
      const log = await system.log('decoder');
      return log.some((line) => line['jobId'] === id && /goes back/.test(String(line['msg'])));
    };
    for (let n = 0; n < 200 && !(await away()); n += 1) await sleep(50);
    assert.ok(await away(), 'the decoder gave the job back');
    const refused = await request<Problem>(`${system.url}${first.links.spectrogram}`);
    assert.deepEqual([refused.status, refused.body.code], [503, 'unavailable']);
    assert.equal((await fetch(`${system.healthUrl('decoder')}/readyz`)).status, 503);
    assert.equal((await fetch(`${system.healthUrl('decoder')}/healthz`)).status, 200);
    // Longer than all attempts with their backoff would last.
    await sleep(4_000);

    server = new S3rver({ port, ...options });
    await server.run();
    const job = await finished(system.url, id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
  } finally {
    await server.close().catch(() => {});
    await rm(directory, { recursive: true, force: true });
  }
});
