/** A new model comes while work goes on: two sets of workers, and no result that mixes them. */
import assert from 'node:assert/strict';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { sine, wav } from './audio.ts';
import { finished, type Job, request, upload } from './client.ts';
import { startSystem } from './system.ts';

const root = path.resolve(import.meta.dirname, '..');

test('a roll-out under load answers every job by the model it was pinned to, and loses none', async () => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-rollout-'));
  await using old = await startSystem();
  const bundle = path.join(directory, 'model');
  await cp(path.join(root, 'models/default'), bundle, { recursive: true });
  const manifest = JSON.parse(await readFile(path.join(bundle, 'model.json'), 'utf8'));
  // Other names in the same places: an answer that mixed the models would show it.
  const labels = (manifest.labels as string[]).map((label) => `New ${label}`);
  const { taxonomy: _, ...rest } = manifest;
  const accuracy = 'none';
  await writeFile(
    path.join(bundle, 'model.json'),
    JSON.stringify({ ...rest, labels, accuracy, version: '9.9.9' }),
  );

  const sent: Job[] = [];
  let sending = true;
  const load = (async () => {
    for (let n = 0; sending; n += 1) {
      const audio = wav([sine({ seconds: 3, hz: 200 + n, sampleRate: 8_000 })], { sampleRate: 8_000 });
      sent.push(await upload(old.url, audio, { name: `${n}.wav` }));
      await sleep(50);
    }
  })();
  try {
    await sleep(1_000);
    await using _new = await startSystem({
      redisUrl: old.redis.url,
      storageUrl: pathToFileURL(path.join(old.directory, 'objects')).href,
      without: ['api', 'decoder', 'fetch', 'feeder', 'webhook'],
      env: { MODEL_URL: bundle },
    });
    const version = async () => (await request<{ version: string }>(`${old.url}/v1/model`)).body.version;
    for (let n = 0; (await version()) !== '9.9.9'; n += 1) {
      assert.ok(n < 200, 'the newest model becomes the default');
      await sleep(50);
    }
    await sleep(1_000);
    sending = false;
    await load;
    const jobs = await Promise.all(sent.map(({ id }) => finished(old.url, id, 90_000)));
    assert.deepEqual([...new Set(jobs.map(({ state }) => state))], ['completed']);
    const pinned = new Map(sent.map((job) => [job.id, job.model.version]));
    for (const job of jobs) {
      const isNew = job.model.version === '9.9.9';
      assert.equal(job.model.version, pinned.get(job.id));
      const names = [...job.result!.top, ...job.result!.windows.flatMap(({ top }) => top)];
      assert.ok(names.every(({ label }) => label.startsWith('New ') === isNew));
    }
    const versions = new Set(jobs.map(({ model }) => model.version));
    assert.equal(versions.size, 2, 'both models answered');
    // The old workers go once nothing is left for them.
    await old.kill('inference', 'SIGTERM');
    const after = wav([sine({ seconds: 3, hz: 150, sampleRate: 8_000 })], { sampleRate: 8_000 });
    const last = await finished(old.url, (await upload(old.url, after)).id);
    assert.deepEqual([last.state, last.model.version], ['completed', '9.9.9']);
  } finally {
    sending = false;
    await load.catch(() => {});
    await rm(directory, { recursive: true });
  }
});
