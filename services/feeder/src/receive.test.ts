import assert from 'node:assert/strict';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { openStorage } from '@acousticsense/shared/open-storage';
import type { Storage } from '@acousticsense/shared/storage';
import { startS3, type TestS3 } from '../../../test/s3.ts';
import { startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

const tracks = 1_150;
const nameOf = (n: number) => `walk/${String(n).padStart(5, '0')}.flac`;

describe('a prefix that is walked', () => {
  let catalogue: TestCatalogue;
  let s3: TestS3;
  let bucket: Storage;
  const stops: (() => Promise<unknown>)[] = [];

  before(async () => {
    catalogue = await startCatalogue();
    s3 = await startS3('music');
    bucket = openStorage(`s3://music?endpoint=${s3.endpoint}&region=us-east-1`);
    const put = (key: string, text = key) => bucket.put(key, Buffer.from(text));
    for (let n = 0; n < tracks; n += 50)
      await Promise.all(Array.from({ length: Math.min(50, tracks - n) }, (_, m) => put(nameOf(n + m))));
    for (const key of [
      'walk/cover.jpg',
      'walk/notes.txt',
      'walking/other.mp3',
      'empty/x.jpg',
      'small/One.MP3',
    ])
      await put(key);
    await put('walk/00000-nothing.mp3', '');
    await catalogue.registerSource('acme', 'music', s3.endpoint);
  });
  afterEach(async () => {
    s3.fails = () => false;
    for (const stop of stops.splice(0).reverse()) await stop();
  });
  after(async () => {
    bucket.close();
    await catalogue[Symbol.asyncDispose]();
    await s3[Symbol.asyncDispose]();
  });

  async function startFeeder() {
    const feeder = await catalogue.startFeeder();
    stops.push(() => catalogue.stopFeeder(feeder));
    return feeder;
  }
  function startWorkers() {
    stops.push(catalogue.startWorkers({ concurrency: 16 }).stop);
  }
  const walk = (prefix: string, of = 'music') =>
    catalogue.create({ origin: { kind: 'prefix', bucket: of, prefix } });

  test('becomes a batch of its audio, known by key and ETag; killed in the middle it goes on behind what it has', async () => {
    startWorkers();
    const first = await startFeeder();
    // The second page does not come.
    s3.fails = (line) => line.includes('start-after=');
    const batch = await walk('walk/');
    await catalogue.when(batch, ({ chunks }) => chunks === 0);
    await sleep(500);
    await catalogue.stopFeeder(first, 'SIGKILL');
    await catalogue.redis.del('as:feeder:lease');
    s3.fails = () => false;
    const second = await startFeeder();
    await catalogue.when(batch, ({ chunks, sealed }) => chunks === 1 || sealed);
    await catalogue.stopFeeder(second, 'SIGKILL');
    await catalogue.redis.del('as:feeder:lease');
    await startFeeder();
    const reconciling = setInterval(() => void catalogue.reconcile('acme').catch(() => {}), 500);
    const { state, completed, walked } = await catalogue
      .ended(batch)
      .finally(() => clearInterval(reconciling));
    assert.deepEqual([state, completed, walked], ['completed', tracks, nameOf(tracks - 1)]);
    const results = await catalogue.checkWhole(batch);
    assert.deepEqual(
      results.map(({ ref, line }) => [ref, line]),
      Array.from({ length: tracks }, (_, n) => [nameOf(n), n + 1]),
    );
    const { etag, size } = (await bucket.stat(nameOf(7)))!;
    const s3Audio = { bucket: 'music', key: nameOf(7), etag: etag.replaceAll('"', ''), size };
    assert.deepEqual(results[7]!.audio, { s3: s3Audio });
  });

  test('of more objects than a batch may have is walked no further, and what was found runs', async () => {
    startWorkers();
    stops.push(catalogue.runFeeder({ maxRows: 900 }).stop);
    const batch = await walk('walk/');
    const { state, rows, completed, error } = await catalogue.ended(batch);
    assert.deepEqual([state, rows, completed, error?.code], ['failed', 1_000, 1_000, 'manifest_too_large']);
    await catalogue.checkWhole(batch);
    // Tried again, it is found to be so again.
    await catalogue.batches.retry(batch, 99);
    const again = await catalogue.ended(batch);
    assert.deepEqual([again.state, again.rows, again.round], ['failed', 1_000, 1]);
  });

  test('without audio is a batch without rows', async () => {
    await startFeeder();
    const batch = await walk('empty/');
    const { state, rows } = await catalogue.ended(batch);
    assert.deepEqual([state, rows], ['completed', 0]);
  });

  test('outside the registered sources, or in a bucket that is not there, fails with the reason', async () => {
    await startFeeder();
    const foreign = await catalogue.ended(await walk('walk/', 'foreign'));
    assert.deepEqual([foreign.state, foreign.error?.code], ['failed', 'source_not_allowed']);
    await catalogue.registerSource('acme', 'nowhere', s3.endpoint);
    const missing = await catalogue.ended(await walk('walk/', 'nowhere'));
    assert.deepEqual([missing.state, missing.error?.code], ['failed', 'source_not_found']);
  });

  test('that could not be read is walked on when it is tried again', async () => {
    startWorkers();
    await startFeeder();
    const batch = await walk('small/', 'later');
    assert.equal((await catalogue.ended(batch)).error?.code, 'source_not_allowed');
    const definition = { bucket: 'later', prefix: '', region: 'us-east-1', endpoint: s3.endpoint };
    const source = await catalogue.sources.prepare('acme', 'later', definition);
    await catalogue.sources.save({ ...source, bucket: 'later' });
    await catalogue.batches.retry(batch, 99);
    assert.equal((await catalogue.ended(batch)).error?.code, 'source_not_found');
    assert.equal((await catalogue.read(batch)).round, 1);
  });

  test('that is cancelled is walked no further', async () => {
    await startFeeder();
    s3.fails = (line) => line.includes('start-after=');
    const batch = await walk('walk/');
    await sleep(500);
    await catalogue.batches.cancel(batch);
    const { state, sealed } = await catalogue.ended(batch);
    assert.deepEqual([state, sealed], ['cancelled', false]);
    s3.fails = () => false;
    await sleep(2_000);
    const { chunks } = await catalogue.read(batch);
    assert.ok(chunks <= 1);
  });
});
