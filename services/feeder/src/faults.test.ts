import assert from 'node:assert/strict';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { keys } from '@acousticsense/shared/job-records';
import { chunkKey, partKey } from '@acousticsense/shared/object-keys';
import type { Queues } from '@acousticsense/shared/queues';
import type { Storage } from '@acousticsense/shared/storage';
import { uploadRecordKey } from '@acousticsense/shared/uploads';
import { failsSome, objects, startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

describe('the feeder goes on', () => {
  let catalogue: TestCatalogue;
  const stops: (() => Promise<unknown>)[] = [];
  before(async () => {
    catalogue = await startCatalogue({ appendOnly: true });
    await catalogue.registerSource('acme', 'music');
  });
  afterEach(async () => {
    for (const stop of stops.splice(0).reverse()) await stop();
  });
  after(() => catalogue[Symbol.asyncDispose]());

  function start(replaced: Parameters<TestCatalogue['runFeeder']>[0] = {}) {
    stops.push(catalogue.startWorkers({ decode: failsSome }).stop);
    const feeder = catalogue.runFeeder(replaced);
    stops.push(feeder.stop);
    return feeder;
  }

  /** The real storage, which is away for some of what is asked of it. */
  function storageThatMayBeAway() {
    const asked: string[] = [];
    const faulty = { isAway: (_operation: string, _key: string) => false };
    const check = (operation: string, key: string) => {
      asked.push(`${operation} ${key}`);
      if (faulty.isAway(operation, key)) throw new InfrastructureFault('storage', 'the disk is gone');
    };
    const storage: Storage = {
      ...catalogue.storage,
      async put(key, ...rest) {
        check('put', key);
        return catalogue.storage.put(key, ...rest);
      },
      async read(key, ...rest) {
        check('read', key);
        return catalogue.storage.read(key, ...rest);
      },
    };
    return { storage, faulty, asked };
  }

  test('when the storage was away for a while, wherever it was', async () => {
    const { storage, faulty } = storageThatMayBeAway();
    faulty.isAway = (operation) => operation === 'read';
    const { faults } = start({ storage });
    const batch = await catalogue.submit(objects(1_100, { name: 'away' }));
    await sleep(1_200);
    assert.equal((await catalogue.read(batch)).open, 0);
    // Now its parts cannot be written.
    faulty.isAway = (operation) => operation === 'put';
    await catalogue.when(batch, ({ completed }) => completed === 1_100);
    await sleep(700);
    assert.deepEqual((await catalogue.read(batch)).closed, 0);
    // Nor the batch itself.
    faulty.isAway = (_, key) => key.endsWith('batch.json');
    await catalogue.when(batch, ({ state }) => state === 'completed');
    await sleep(700);
    assert.deepEqual((await catalogue.batches.pending(['acme']))[0]!.unsaved, [batch.id]);
    faulty.isAway = () => false;
    await catalogue.ended(batch);
    await catalogue.checkWhole(batch);
    assert.deepEqual(faults, [], 'none of it broke a round off');
  });

  test('in the other batches while one cannot be read, and asks for that ever more seldom', async () => {
    const { storage, faulty, asked } = storageThatMayBeAway();
    const broken = await catalogue.submit(objects(20, { name: 'broken' }));
    faulty.isAway = (_, key) => key === chunkKey('acme', broken.id, 0);
    start({ storage });
    const batch = await catalogue.submit(objects(200, { name: 'whole' }));
    await catalogue.ended(batch);
    await sleep(3_000);
    const times = asked.filter((line) => line.includes(broken.id)).length;
    assert.ok(times >= 2 && times <= 5, `${times} times in some seconds`);
    await catalogue.redis.hset(keys.batch('acme', broken.id), 'class', 'of another version');
    await catalogue.ended(await catalogue.submit(objects(5, { name: 'unreadable' })));
    await catalogue.redis.hset(keys.batch('acme', broken.id), 'class', 'backfill');
    faulty.isAway = () => false;
    assert.equal((await catalogue.ended(broken)).completed, 20);
    await catalogue.checkWhole(broken);
  });

  test('when queue jobs could not be added: what is recorded is added again', async () => {
    let failures = 0;
    const queues: Queues = {
      ...catalogue.queues,
      async addMany(stage, jobs) {
        if (failures < 6) {
          failures += 1;
          // Half of them came through.
          if (failures % 2) await catalogue.queues.addMany(stage, jobs.slice(0, jobs.length / 2));
          throw new InfrastructureFault('redis', 'Redis cannot be reached');
        }
        return catalogue.queues.addMany(stage, jobs);
      },
    };
    const { faults } = start({ queues });
    const batch = await catalogue.submit(objects(300, { name: 'unadded' }));
    await catalogue.ended(batch);
    await catalogue.checkWhole(batch);
    assert.equal(failures, 6);
    assert.equal(faults.length, 6);
  });

  test('when Redis was killed and came back', { timeout: 60_000 }, async () => {
    start();
    const batch = await catalogue.submit(objects(1_300, { name: 'redis' }));
    for (const some of [100, 700]) {
      await catalogue.when(batch, ({ completed }) => completed >= some);
      await catalogue.server.stop('SIGKILL');
      await sleep(700);
      await catalogue.server.start();
      while (catalogue.redis.status !== 'ready') await sleep(20);
    }
    const reconciling = setInterval(() => void catalogue.reconcile('acme').catch(() => {}), 500);
    await catalogue.ended(batch).finally(() => clearInterval(reconciling));
    assert.equal((await catalogue.checkWhole(batch)).length, 1_300);
  });

  test('without known answers, where their index cannot be kept', async () => {
    const file = path.join(catalogue.directory, 'a-file');
    await writeFile(file, '');
    start({ indexDirectory: path.join(file, 'index') });
    const rows = objects(50, { name: 'indexless' });
    await catalogue.ended(await catalogue.submit(rows));
    const again = await catalogue.ended(await catalogue.submit(rows));
    assert.deepEqual([again.completed, again.reused], [50, 0]);
  });

  test('past a row that it cannot prepare by a fault of its own', async () => {
    const upload = '01a20e03-144c-7c93-9d47-592987f2d2c6';
    await catalogue.storage.put(uploadRecordKey('acme', upload), Buffer.from('{"v":1'));
    start();
    const batch = await catalogue.submit([...objects(3, { name: 'around' }), { line: 4, audio: { upload } }]);
    const { completed, faults } = await catalogue.ended(batch);
    assert.deepEqual([completed, faults.map(({ error }) => error.code)], [3, ['internal_error']]);
    await catalogue.checkWhole(batch);
  });

  test('when an old part is damaged: its rows are done anew', async () => {
    start();
    const rows = objects(20, { name: 'damaged' });
    const first = await catalogue.submit(rows);
    await catalogue.ended(first);
    await catalogue.storage.put(partKey('acme', first.id, 0), Buffer.from('{"row":0,\n'));
    const again = await catalogue.ended(await catalogue.submit(rows));
    assert.deepEqual([again.completed, again.reused], [20, 0]);
  });
});
