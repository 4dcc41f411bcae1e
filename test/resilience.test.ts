/**
 * Nothing is lost and nothing is answered twice, whatever dies: each process killed with SIGKILL in mid-job,
 * each stage cancelled. A stage is held in mid-job by stopping (SIGSTOP) what it waits for.
 */
import assert from 'node:assert/strict';
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { sine, wav } from './audio.ts';
import { finished, isFinished, type Job, jobWhen, request, serverSentEvents, upload } from './client.ts';
import { childrenOf } from './processes.ts';
import { type System, startSystem } from './system.ts';

let seed = 0;
/** Another sound each time: nothing comes from the tensor cache. */
const song = (seconds = 12) =>
  wav([sine({ seconds, hz: 200 + 7 * seed++, sampleRate: 8_000 })], { sampleRate: 8_000 });

describe('a job', () => {
  let system: System;
  before(async () => {
    system = await startSystem();
  });
  after(() => system?.stop());

  const inState = (id: string, state: Job['state']) =>
    jobWhen(system.url, id, (job) => job.state === state || isFinished(job));
  const cancel = (id: string) => request(`${system.url}/v1/jobs/${id}`, { method: 'DELETE' });

  /** The events of one job in the tenant's stream: what webhooks will be told. */
  async function eventsOf(id: string): Promise<string[]> {
    const redis = connectRedisForWorker(system.redis.url);
    try {
      const all = await redis.xrange('as:{default}:events', '-', '+');
      return all
        .map(([, [, , , json]]) => JSON.parse(json!))
        .filter(({ data }) => data.jobId === id)
        .map(({ type }) => type);
    } finally {
      redis.disconnect();
    }
  }

  async function assertAnsweredOnce(id: string): Promise<Job> {
    const job = await finished(system.url, id, 90_000);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    await sleep(200);
    assert.deepEqual(await eventsOf(id), ['job.completed']);
    return job;
  }

  async function assertGone(id: string): Promise<void> {
    const objects = path.join(system.directory, 'objects');
    const mine = async () =>
      (await readdir(objects, { recursive: true })).filter((name) => name.includes(`${id}/`));
    for (let n = 0; n < 100 && (await mine()).length > 0; n += 1) await sleep(50);
    assert.deepEqual(await mine(), []);
  }

  async function modelProcess(): Promise<number[]> {
    const children = await childrenOf(system.pid('inference'));
    assert.ok(children.length > 0, 'the inference service has a child');
    return children;
  }

  /** Stops a process and its children for as long as `during` runs. */
  async function held(pids: number[], during: () => Promise<void>): Promise<void> {
    for (const pid of pids) process.kill(pid, 'SIGSTOP');
    try {
      await during();
    } finally {
      for (const pid of pids) {
        try {
          process.kill(pid, 'SIGCONT');
        } catch {}
      }
    }
  }

  describe('that is cancelled', () => {
    async function assertCancelled(id: string): Promise<void> {
      const answer = await cancel(id);
      assert.deepEqual([answer.status, answer.body.state], [200, 'cancelled']);
    }
    async function assertStaysCancelled(id: string): Promise<void> {
      const next = await finished(system.url, (await upload(system.url, song())).id);
      assert.equal(next.state, 'completed', 'the next job is unaffected');
      assert.equal((await finished(system.url, id)).state, 'cancelled');
      assert.deepEqual(await eventsOf(id), ['job.cancelled']);
      await assertGone(id);
    }

    test('while it waits for the decoder stays cancelled', async () => {
      let id = '';
      await held([system.pid('decoder')], async () => {
        id = (await upload(system.url, song())).id;
        await assertCancelled(id);
      });
      await assertStaysCancelled(id);
    });

    test('while it is decoded stays cancelled, and the decoder stops soon', async () => {
      const { id } = await upload(system.url, song(1_500), { fields: { windows: 'all' } });
      await inState(id, 'decoding');
      await assertCancelled(id);
      await assertStaysCancelled(id);
    });

    test('while it waits for the model stays cancelled', async () => {
      let id = '';
      await held([system.pid('inference')], async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'decoded');
        await assertCancelled(id);
      });
      await assertStaysCancelled(id);
    });

    test('while the model runs stays cancelled', async () => {
      let id = '';
      await held(await modelProcess(), async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'classifying');
        await assertCancelled(id);
      });
      await assertStaysCancelled(id);
    });

    test('twice is cancelled once, then deleted', async () => {
      let id = '';
      await held([system.pid('decoder')], async () => {
        id = (await upload(system.url, song())).id;
        await assertCancelled(id);
      });
      assert.equal((await cancel(id)).status, 204);
      assert.equal((await cancel(id)).status, 404);
    });
  });

  describe('survives', () => {
    test('kill -9 of the decoder in mid-job, which leaves no scratch files', async () => {
      const sent = await upload(system.url, song(1_500), { fields: { windows: 'all' } });
      for await (const { event } of serverSentEvents(system.url + sent.links.events))
        if (event === 'progress') break;
      await system.kill('decoder');
      const scratch = path.join(system.directory, 'scratch');
      const left = await readdir(scratch);
      assert.equal(left.length, 1, 'it was killed in mid-job');
      await system.start('decoder');
      await assertAnsweredOnce(sent.id);
      assert.ok(!(await readdir(scratch)).includes(left[0]!));
    });

    test('kill -9 of the inference service in mid-job', async () => {
      const stopped = await modelProcess();
      let id = '';
      await held(stopped, async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'classifying');
        await system.kill('inference');
      });
      await system.start('inference');
      await assertAnsweredOnce(id);
    });

    test("kill -9 of the model's process in mid-batch, which is restarted and counted", async () => {
      const children = await modelProcess();
      let ids: string[] = [];
      await held(children, async () => {
        ids = await Promise.all(
          [song(), song(), song()].map(async (audio) => (await upload(system.url, audio)).id),
        );
        for (const id of ids) await inState(id, 'classifying');
        await sleep(300);
        for (const pid of children) process.kill(pid, 'SIGKILL');
      });
      for (const id of ids) await assertAnsweredOnce(id);
      const metrics = await (await fetch(`${system.healthUrl('inference')}/metrics`)).text();
      const restarts = /^acousticsense_\w*child_restarts_total\{[^}]*\} (\d+)/m.exec(metrics);
      assert.ok(
        Number(restarts?.[1]) >= 1,
        metrics
          .split('\n')
          .filter((line) => line.includes('restart'))
          .join('\n'),
      );
    });

    test('kill -9 of the API in mid-job, which then tells the result', async () => {
      let id = '';
      await held(await modelProcess(), async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'classifying');
        await system.kill('api');
      });
      await system.start('api');
      await assertAnsweredOnce(id);
    });

    test('kill -9 of Redis in mid-job', async () => {
      let id = '';
      await held(await modelProcess(), async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'classifying');
        await system.redis.stop('SIGKILL');
        const answer = await request<{ code: string }>(`${system.url}/v1/jobs/${id}`);
        assert.deepEqual([answer.status, answer.body.code], [503, 'unavailable']);
        assert.equal((await fetch(`${system.url}/healthz`)).status, 200);
      });
      await sleep(1_000);
      await system.redis.start();
      await assertAnsweredOnce(id);
    });

    test('an orderly restart of every service in mid-job', async () => {
      const ids = await Promise.all(
        Array.from(
          { length: 4 },
          async () => (await upload(system.url, song(600), { fields: { windows: 'all' } })).id,
        ),
      );
      await inState(ids[0]!, 'decoding');
      await Promise.all((['decoder', 'inference'] as const).map((name) => system.kill(name, 'SIGTERM')));
      await Promise.all((['decoder', 'inference'] as const).map((name) => system.start(name)));
      for (const id of ids) await assertAnsweredOnce(id);
    });

    test('the loss of its tensor: it goes back to decode', async () => {
      let id = '';
      await held([system.pid('inference')], async () => {
        id = (await upload(system.url, song())).id;
        await inState(id, 'decoded');
        for (const name of await readdir(path.join(system.directory, 'objects/tensors'), {
          recursive: true,
        })) {
          if (name.endsWith('.npy')) {
            const { rm } = await import('node:fs/promises');
            await rm(path.join(system.directory, 'objects/tensors', name));
          }
        }
      });
      await assertAnsweredOnce(id);
      assert.ok(
        (await system.log('inference')).some(
          (line) => line['jobId'] === id && /back to decode/.test(String(line['msg'])),
        ),
      );
    });
  });

  test('that has stopped its worker again and again is quarantined, and the next one is unaffected', async () => {
    let id = '';
    await held([system.pid('decoder')], async () => {
      id = (await upload(system.url, song())).id;
      const redis = connectRedisForWorker(system.redis.url);
      await redis.hset(`as:{default}:job:${id}`, 'decodeStarts', 12);
      redis.disconnect();
    });
    const job = await finished(system.url, id);
    assert.deepEqual([job.state, job.error?.code], ['failed', 'quarantined']);
    assert.deepEqual(await eventsOf(id), ['job.failed']);
    assert.equal((await finished(system.url, (await upload(system.url, song())).id)).state, 'completed');
  });

  test('leaves no scratch files when it is over', async () => {
    const scratch = path.join(system.directory, 'scratch');
    for (let n = 0; n < 50 && (await readdir(scratch)).length > 0; n += 1) await sleep(100);
    assert.deepEqual(await readdir(scratch), []);
  });
});

test('results survive a restart of everything, and jobs that waited are done after it', async () => {
  await using system = await startSystem();
  const first = await finished(system.url, (await upload(system.url, song())).id);
  await system.kill('decoder');
  const waiting = await upload(system.url, song());
  for (const name of ['inference', 'api'] as const) await system.kill(name);
  await system.redis.stop('SIGKILL');
  await system.redis.start();
  await Promise.all((['decoder', 'inference', 'api'] as const).map((name) => system.start(name)));
  assert.deepEqual((await request(`${system.url}/v1/jobs/${first.id}`)).body, first);
  assert.equal((await finished(system.url, waiting.id)).state, 'completed');
});

test('a job whose queue job vanished is found by the reconciler and done', async () => {
  await using system = await startSystem({ env: { RECONCILE_SECONDS: '0.5', RECONCILE_AFTER_SECONDS: '1' } });
  process.kill(system.pid('decoder'), 'SIGSTOP');
  const { id } = await upload(system.url, song());
  const redis = connectRedisForWorker(system.redis.url);
  const waiting = async () => {
    const metrics = await (await fetch(`${system.url}/metrics`)).text();
    return Number(/^acousticsense_queue_waiting\{[^}]*stage="decode"[^}]*\} (\d+)/m.exec(metrics)?.[1]);
  };
  for (let n = 0; n < 100 && (await waiting()) !== 1; n += 1) await sleep(50);
  assert.equal(await waiting(), 1, 'the depth of the queue is a metric');
  const keys = await redis.keys('{as-decode-*');
  assert.ok(keys.length > 0);
  await redis.del(...keys);
  redis.disconnect();
  process.kill(system.pid('decoder'), 'SIGCONT');
  const job = await finished(system.url, id);
  assert.equal(job.state, 'completed');
  assert.ok(
    (await system.log('api')).some((line) => line['jobId'] === id && /vanished/.test(String(line['msg']))),
  );
});
