import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { batchPrefix, vectorsKey } from '@acousticsense/shared/object-keys';
import { queueName } from '@acousticsense/shared/pipeline';
import { createTenants } from '@acousticsense/shared/tenants';
import { failsSome, objects, startCatalogue, type TestCatalogue, type Work } from './testing/catalogue.ts';

describe('the feeder', () => {
  let catalogue: TestCatalogue;
  const stops: (() => Promise<unknown>)[] = [];
  before(async () => {
    catalogue = await startCatalogue();
    for (const tenant of ['acme', 'other']) await catalogue.registerSource(tenant, 'music');
  });
  afterEach(async () => {
    for (const stop of stops.splice(0).reverse()) await stop();
  });
  after(() => catalogue[Symbol.asyncDispose]());

  async function startFeeder(env: Record<string, string> = {}) {
    const child = await catalogue.startFeeder(env);
    stops.push(() => catalogue.stopFeeder(child));
    return child;
  }
  function startWorkers(options: Parameters<TestCatalogue['startWorkers']>[0] = {}) {
    const workers = catalogue.startWorkers(options);
    stops.push(workers.stop);
    return workers;
  }
  function runFeeder(options: Parameters<TestCatalogue['runFeeder']>[0] = {}) {
    const feeder = catalogue.runFeeder(options);
    stops.push(feeder.stop);
    return feeder;
  }

  test('takes a batch through its chunks to its end: every row once, in order, and nothing left in Redis', async () => {
    await startFeeder();
    startWorkers({ decode: failsSome });
    const rows = [...objects(2_499), ...objects(1, { name: 'bad' })];
    const batch = await catalogue.submit(rows);
    const { state, completed, failed, faults, rate } = await catalogue.ended(batch);
    assert.deepEqual([state, completed, failed], ['completed', 2_499, 1]);
    assert.deepEqual(faults, [{ row: 2_499, error: { code: 'not_audio', message: 'This is no audio.' } }]);
    assert.ok(rate === undefined || rate > 0);
    const results = await catalogue.checkWhole(batch);
    assert.deepEqual(
      results.map(({ ref, line }) => [ref, line]),
      rows.map(({ ref, line }) => [ref, line]),
    );
    assert.ok(results.slice(0, 2_499).every(({ outcome, verdict }) => outcome && verdict === 'undeclared'));
    assert.equal(await catalogue.queued(), 0);
  });

  test('while nobody puts the events of a tenant away its rows wait, and those of others do not', {
    timeout: 60_000,
  }, async () => {
    const { redis } = catalogue;
    await catalogue.registerSource('told', 'music');
    for (let n = 0; n < 12; n += 1)
      await redis.xadd('as:{told}:events', '*', 'id', `evt_${n}`, 'event', '{}');
    runFeeder({ eventsWaitingMost: 10 });
    startWorkers();
    const held = await catalogue.submit(objects(20, { name: 'held' }), { tenant: 'told' });
    const free = await catalogue.submit(objects(20, { name: 'free' }));
    await catalogue.ended(free);
    const { waiting, completed } = await catalogue.when(held, () => true);
    assert.deepEqual([waiting, completed], [20, 0]);
    await redis.del('as:{told}:events');
    assert.equal((await catalogue.ended(held)).completed, 20);
  });

  test('the rows that no queue has room for are told of, by the queues that they will go through, until they are in', {
    timeout: 60_000,
  }, async () => {
    const probe = createServer().listen(0, '127.0.0.1');
    await once(probe, 'listening');
    const { port } = probe.address() as AddressInfo;
    await new Promise((resolve) => probe.close(resolve));
    await startFeeder({ METRICS_PORT: String(port) });
    const told = async () => {
      const metrics = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
      return /^acousticsense_feeder_rows_waiting\{(.*)\} (\d+)$/m.exec(metrics)?.slice(1) ?? [];
    };
    const batch = await catalogue.submit(objects(500, { name: 'told' }));
    // Without a worker nothing has room.
    let labels = '';
    for (let rows = ''; rows !== '500'; await sleep(20)) [labels = '', rows = ''] = await told();
    const { profileHash, modelDigest } = await catalogue.when(batch, () => true);
    assert.match(labels, new RegExp(`decode_queue="${queueName('decode', { profileHash, modelDigest })}"`));
    assert.match(
      labels,
      new RegExp(`inference_queue="${queueName('inference', { profileHash, modelDigest })}"`),
    );
    startWorkers();
    await catalogue.ended(batch);
    while ((await told()).length > 0) await sleep(20);
  });

  test('a batch without rows ends', async () => {
    runFeeder();
    const batch = await catalogue.submit([]);
    assert.equal((await catalogue.ended(batch)).state, 'completed');
    await catalogue.checkWhole(batch);
  });

  test('killed in the middle, again and again, and started again, it comes to the same', async () => {
    startWorkers({ decode: failsSome });
    const rows = [...objects(1_500, { name: 'kill' }), ...objects(5, { name: 'bad' })];
    const batch = await catalogue.submit(rows);
    for (const some of [50, 400, 990, 1_200]) {
      const feeder = await startFeeder();
      await catalogue.when(batch, ({ completed }) => completed >= some);
      await catalogue.stopFeeder(feeder, 'SIGKILL');
      // What a killed process leases, it holds for some seconds.
      await catalogue.redis.del('as:feeder:lease');
    }
    await startFeeder();
    const reconciling = setInterval(() => void catalogue.reconcile('acme').catch(() => {}), 1_000);
    const { completed, failed } = await catalogue.ended(batch).finally(() => clearInterval(reconciling));
    assert.deepEqual([completed, failed], [1_500, 5]);
    const results = await catalogue.checkWhole(batch);
    assert.deepEqual(
      results.map(({ ref }) => ref),
      rows.map(({ ref }) => ref),
    );
  });

  test('of two one feeds; when it hangs, the other goes on, and when it comes back, it does no harm', async () => {
    startWorkers();
    const first = await startFeeder();
    await sleep(300);
    const second = await startFeeder();
    const batch = await catalogue.submit(objects(1_200, { name: 'lease' }));
    await catalogue.when(batch, ({ completed }) => completed >= 100);
    first.kill('SIGSTOP');
    const stoppedAt = Date.now();
    const { completed } = await catalogue.read(batch);
    await catalogue.when(batch, (now) => now.completed >= completed + 300);
    assert.ok(Date.now() - stoppedAt > 5_000, 'it waited for the lease');
    first.kill('SIGCONT');
    await catalogue.ended(batch);
    assert.equal((await catalogue.checkWhole(batch)).length, 1_200);
    assert.ok(second.connected);
  });

  test('three that feed at once come to the same', async () => {
    startWorkers({ decode: failsSome });
    for (let n = 0; n < 3; n += 1) runFeeder();
    const rows = [...objects(1_100, { name: 'three' }), ...objects(4, { name: 'flaky' })];
    const batch = await catalogue.submit(rows);
    await catalogue.ended(batch);
    await catalogue.checkWhole(batch);
    await catalogue.batches.retry(batch, await catalogue.batches.nextRevision('acme'));
    const { completed } = await catalogue.ended(batch);
    assert.equal(completed, 1_104);
    const results = await catalogue.checkWhole(batch);
    assert.deepEqual(
      results.map(({ ref, state }) => [ref, state]),
      rows.map(({ ref }) => [ref, 'completed']),
    );
  });

  test('a pause stops the feeding, what is fed comes to its end; after it the batch goes on', async () => {
    runFeeder({ factor: 2 });
    startWorkers({ concurrency: 4 });
    const batch = await catalogue.submit(objects(1_050, { name: 'pause' }));
    await catalogue.when(batch, ({ completed }) => completed >= 60);
    await catalogue.batches.pause(batch);
    const { completed, open } = await catalogue.read(batch);
    await catalogue.when(batch, (now) => now.open === 0);
    assert.equal((await catalogue.read(batch)).completed, completed + open);
    await sleep(600);
    const paused = await catalogue.read(batch);
    assert.deepEqual([paused.state, paused.completed], ['paused', completed + open]);
    assert.equal(await catalogue.queued(), 0);
    await catalogue.batches.resume(batch);
    assert.equal((await catalogue.ended(batch)).completed, 1_050);
    await catalogue.checkWhole(batch);
  });

  test('after a cancel everything ends, and neither job nor record is left', async () => {
    runFeeder();
    const begun: string[] = [];
    const aborted: string[] = [];
    const hangs: Work = async ({ record }, signal) => {
      if (!record.audio.filename.startsWith('hang')) return;
      await catalogue.storage.put(vectorsKey(record), Buffer.from('{}'));
      begun.push(record.id);
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      aborted.push(record.id);
      signal.throwIfAborted();
    };
    startWorkers({ concurrency: 10, decode: hangs });
    const batch = await catalogue.submit([
      ...objects(100, { name: 'goes' }),
      ...objects(2_000, { name: 'hang' }),
    ]);
    await catalogue.when(batch, ({ completed }) => completed === 100 && begun.length === 10);
    await catalogue.batches.cancel(batch);
    const { state, completed, cancelled } = await catalogue.ended(batch);
    assert.deepEqual([state, completed, cancelled], ['cancelled', 100, 2_000]);
    const results = await catalogue.checkWhole(batch);
    assert.ok(results.length >= 1_000);
    assert.ok(results.every(({ state }, row) => state === (row < 100 ? 'completed' : 'cancelled')));
    for (let n = 0; n < 200 && (await catalogue.queued()) > 0; n += 1) await sleep(20);
    assert.equal(await catalogue.queued(), 0);
    assert.deepEqual(aborted.sort(), begun.sort());
    // What their workers had written went with them, though the records went before.
    for await (const { key } of catalogue.storage.list(`${batchPrefix('acme', batch.id)}rows/`))
      assert.fail(key);
  });

  test('a cancel at any moment ends all rows once', async () => {
    runFeeder();
    startWorkers({ decode: failsSome });
    for (const wait of [0, 30, 120, 300, 600]) {
      const batch = await catalogue.submit(objects(1_010, { name: `wait${wait}` }));
      await sleep(wait);
      await catalogue.batches.cancel(batch);
      const { completed, cancelled } = await catalogue.ended(batch);
      assert.equal(completed + cancelled, 1_010);
      await catalogue.checkWhole(batch);
    }
  });

  test('only what failed is tried again: the rest keeps its results', async () => {
    runFeeder();
    startWorkers({ decode: failsSome });
    const rows = [
      ...objects(400, { name: 'retry' }),
      ...objects(3, { name: 'flaky-retry' }),
      ...objects(2, { name: 'bad' }),
      ...objects(595, { name: 'more' }),
      // A chunk in which nothing fails.
      ...objects(20, { name: 'last' }),
    ];
    const batch = await catalogue.submit(rows);
    const before = await catalogue.ended(batch);
    assert.deepEqual([before.completed, before.failed, before.faults.length], [1_015, 5, 5]);
    const first = await catalogue.checkWhole(batch);
    await catalogue.batches.retry(batch, await catalogue.batches.nextRevision('acme'));
    const { completed, failed, faults, round, revision, state, undeclared } = await catalogue.ended(batch);
    assert.deepEqual([state, completed, failed, faults.length, round], ['completed', 1_018, 2, 2, 1]);
    assert.ok(revision > before.revision);
    assert.equal(undeclared, 1_018, 'each result is judged once');
    const second = await catalogue.checkWhole(batch);
    for (const [row, result] of second.entries()) {
      const tried = row >= 400 && row < 405;
      if (!tried) assert.deepEqual(result, first[row]);
      else {
        assert.equal(result.state, row < 403 ? 'completed' : 'failed');
        assert.deepEqual([result.revision, result.generation], [revision, 1_001]);
      }
    }
  });

  test('tried again and again, by a feeder that is killed meanwhile, a batch ends each time', async () => {
    startWorkers({ decode: failsSome });
    const batch = await catalogue.submit([...objects(1_001, { name: 'bad' })]);
    for (let round = 0; round < 3; round += 1) {
      const feeder = await startFeeder();
      await catalogue.when(batch, ({ failed, round: at }) => at === round && failed >= 300 && failed < 1_001);
      await catalogue.stopFeeder(feeder, 'SIGKILL');
      await catalogue.redis.del('as:feeder:lease');
      const next = await startFeeder();
      const reconciling = setInterval(() => void catalogue.reconcile('acme').catch(() => {}), 500);
      const { failed } = await catalogue.ended(batch).finally(() => clearInterval(reconciling));
      assert.equal(failed, 1_001);
      const results = await catalogue.checkWhole(batch);
      assert.ok(results.every(({ generation }) => Math.floor(generation / 1_000) === round));
      await catalogue.stopFeeder(next);
      if (round < 2) await catalogue.batches.retry(batch, await catalogue.batches.nextRevision('acme'));
    }
  });

  describe('keeps the queues short', () => {
    test('so that a release overtakes the backfill of its tenant', async () => {
      runFeeder({ factor: 2 });
      startWorkers({ concurrency: 8, decode: () => sleep(100) });
      const backfill = await catalogue.submit(objects(1_500, { name: 'back' }));
      let most = 0;
      const watching = setInterval(async () => {
        most = Math.max(most, await catalogue.queued().catch(() => 0));
      }, 20);
      try {
        await catalogue.when(backfill, ({ completed }) => completed >= 50);
        const from = await catalogue.read(backfill);
        const release = await catalogue.submit(objects(100, { name: 'release' }), { class: 'release' });
        await catalogue.when(release, ({ completed }) => completed === 100);
        const between = (await catalogue.read(backfill)).completed - from.completed;
        // Those that workers held, and those that went before the feeder had seen the release.
        assert.ok(between <= 8 + 150, `${between} rows of the backfill came before the release`);
        assert.ok(most >= 16 && most <= 2 * (8 + 8) + 8, `${most} in the queues of 8 + 8 workers`);
      } finally {
        clearInterval(watching);
      }
      await catalogue.batches.cancel(backfill);
      await catalogue.ended(backfill);
    });

    test('so that tenants get on by their weights, whatever the classes of their batches', async () => {
      const tenants = createTenants(catalogue.redis);
      await tenants.setTenant('acme', { weight: 2 });
      stops.push(() => tenants.setTenant('acme', { weight: 1 }));
      await sleep(100);
      runFeeder();
      startWorkers({ concurrency: 8, decode: () => sleep(10) });
      for (const lightClass of ['release', 'backfill'] as const) {
        const heavy = await catalogue.submit(objects(2_000, { name: `heavy-${lightClass}` }));
        const light = await catalogue.submit(objects(2_000, { name: `light-${lightClass}` }), {
          tenant: 'other',
          class: lightClass,
        });
        await catalogue.when(heavy, ({ completed }) => completed > 20);
        await catalogue.when(light, ({ completed }) => completed > 10);
        const before = [(await catalogue.read(heavy)).completed, (await catalogue.read(light)).completed];
        await catalogue.when(heavy, ({ completed }) => completed >= before[0]! + 500);
        const [a, b] = [(await catalogue.read(heavy)).completed, (await catalogue.read(light)).completed];
        const ratio = (a - before[0]!) / (b - before[1]!);
        assert.ok(ratio > 1.7 && ratio < 2.35, `${ratio}: ${before} ${[a, b]} ${lightClass}`);
        for (const batch of [heavy, light]) {
          await catalogue.batches.cancel(batch);
          await catalogue.ended(batch);
        }
      }
    });

    test('and feeds nothing to a model that nobody serves, until somebody does', async () => {
      runFeeder();
      const digest = 'f'.repeat(64);
      const batch = await catalogue.submit(objects(20, { name: 'served' }), { modelDigest: digest });
      const other = await catalogue.submit(objects(20, { name: 'other' }));
      startWorkers();
      await catalogue.ended(other);
      const { waiting, open } = await catalogue.read(batch);
      assert.deepEqual([waiting, open], [20, 0]);
      startWorkers({ of: { digest, profileHash: catalogue.bundle.profileHash } });
      assert.equal((await catalogue.ended(batch)).completed, 20);
      await catalogue.checkWhole(batch);
    });
  });
});
