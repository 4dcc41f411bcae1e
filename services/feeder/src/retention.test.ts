import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { utimes } from 'node:fs/promises';
import path from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import type { BatchRef } from '@acousticsense/shared/batch-records';
import { batchKey, batchPrefix, chunkKey } from '@acousticsense/shared/object-keys';
import { deletePrefix } from '@acousticsense/shared/storage';
import { objects, startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

const hour = 3_600_000;
const day = 24 * hour;

describe('the retention of batches', () => {
  let catalogue: TestCatalogue;
  const stops: (() => Promise<unknown>)[] = [];
  before(async () => {
    catalogue = await startCatalogue();
  });
  beforeEach(async () => {
    await catalogue.redis.flushall();
    for (const prefix of ['batches/', 'index/']) await deletePrefix(catalogue.storage, prefix);
    for (const tenant of ['acme', 'other']) await catalogue.registerSource(tenant, 'music');
  });
  afterEach(async () => {
    for (const stop of stops.splice(0).reverse()) await stop();
  });
  after(() => catalogue[Symbol.asyncDispose]());

  function start(config: Parameters<TestCatalogue['runFeeder']>[0] = {}) {
    stops.push(catalogue.startWorkers().stop);
    const feeder = catalogue.runFeeder({ resultRetentionMs: 30 * day, ...config });
    stops.push(feeder.stop);
    return feeder;
  }
  async function finished(rows: number, tenant = 'acme', name = randomUUIDv7()): Promise<BatchRef> {
    const batch = await catalogue.submit(objects(rows, { name }), { tenant });
    await catalogue.ended(batch);
    return batch;
  }
  async function objectsOf({ tenant, id }: BatchRef): Promise<string[]> {
    const found: string[] = [];
    for await (const { key } of catalogue.storage.list(batchPrefix(tenant, id))) found.push(key);
    return found;
  }
  /** As if it had been written then. */
  async function date(ref: BatchRef, time: number): Promise<void> {
    for (const key of await objectsOf(ref))
      await utimes(path.join(catalogue.directory, 'objects', key), time / 1_000, time / 1_000);
  }

  test('deletes what has ended long ago, and remembers when; a younger one stays, and one that runs', async () => {
    const { sweep, index } = start();
    const old = await finished(5);
    const running = await catalogue.submit(objects(5), { modelDigest: 'f'.repeat(64) });
    const later = Date.now() + 30 * day + hour;
    assert.deepEqual(await sweep(Date.now() + 30 * day - hour), []);
    const young = await finished(5);
    await catalogue.redis.hset(`as:{acme}:batch:${young.id}`, 'endedAt', later - day);
    assert.deepEqual(await sweep(later), [old.id]);
    assert.deepEqual(await objectsOf(old), []);
    assert.equal(await catalogue.batches.get(old), undefined);
    assert.equal(await catalogue.batches.deletedAt(old), later);
    await index.refresh('acme');
    assert.ok((await objectsOf(young)).length > 0);
    assert.ok((await objectsOf(running)).length > 0);
    assert.deepEqual(await sweep(later), []);
  });

  test('of a batch that Redis has forgotten knows by what is stored', async () => {
    const { sweep } = start();
    const old = await finished(5);
    await catalogue.batches.forget(old);
    assert.deepEqual(await sweep(Date.now() + 29 * day), []);
    assert.deepEqual(await sweep(Date.now() + 31 * day), [old.id]);
    assert.deepEqual(await objectsOf(old), []);
  });

  test('its results are not found any more, by ref and as known answers', async () => {
    const { sweep, index } = start();
    const rows = objects(3, { name: 'gone' });
    const first = await catalogue.submit(rows);
    await catalogue.ended(first);
    await index.refresh('acme');
    assert.deepEqual(index.findRef('acme', 'gone-1'), { batchId: first.id, chunk: 0, row: 1, revision: 1 });
    const now = Date.now() + 31 * day;
    await sweep(now);
    await index.refresh('acme');
    assert.deepEqual(index.findRef('acme', 'gone-1'), { deletedAt: now });
    const again = await catalogue.submit(rows);
    assert.equal((await catalogue.ended(again)).reused, 0);
  });

  test('keeps so many results of each tenant, the latest ones', async () => {
    const { sweep } = start({ resultsKept: 25 });
    const mine: BatchRef[] = [];
    for (let n = 0; n < 4; n += 1) mine.push(await finished(10));
    const other = await finished(20, 'other');
    assert.deepEqual((await sweep()).sort(), [mine[0]!.id, mine[1]!.id].sort());
    for (const [n, ref] of [...mine, other].entries())
      assert.equal((await objectsOf(ref)).length > 0, n >= 2);
  });

  test('removes objects that belong to no batch, after a day', async () => {
    const { sweep } = start();
    const orphan = { tenant: 'acme', id: randomUUIDv7() };
    await catalogue.storage.put(chunkKey('acme', orphan.id, 0), Buffer.from('x'));
    await catalogue.storage.put(chunkKey('acme', orphan.id, 1), Buffer.from('x'));
    assert.deepEqual(await sweep(), []);
    await date(orphan, Date.now() - 25 * hour);
    await catalogue.storage.put(chunkKey('acme', orphan.id, 1), Buffer.from('y'));
    assert.deepEqual(await sweep(), [], 'something came lately');
    await date(orphan, Date.now() - 25 * hour);
    assert.deepEqual(await sweep(), [orphan.id]);
    assert.deepEqual(await objectsOf(orphan), []);
  });

  test('brings to its end what was deleted halfway, whoever was at it', async () => {
    const { sweep } = start();
    const batch = await finished(5);
    const json = await catalogue.storage.read(batchKey('acme', batch.id));
    await catalogue.batches.remove(batch, 1_234);
    // A late writer, or a deletion that stopped here.
    await catalogue.storage.put(batchKey('acme', batch.id), json);
    assert.deepEqual(await sweep(), [batch.id]);
    assert.deepEqual(await objectsOf(batch), []);
    assert.equal(await catalogue.batches.deletedAt(batch), 1_234);
  });

  test('leaves a batch that is being tried again', async () => {
    const { sweep } = start();
    const batch = await finished(2);
    await catalogue.redis.hset(`as:{acme}:batch:${batch.id}`, { state: 'running', failed: 1 });
    assert.deepEqual(await sweep(Date.now() + 60 * day), []);
    assert.ok((await objectsOf(batch)).length > 0);
  });
});
