import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, afterEach, before, describe, test } from 'node:test';
import { encodePart } from '@acousticsense/shared/batch';
import type { BatchRef } from '@acousticsense/shared/batch-records';
import type { JobRecord } from '@acousticsense/shared/job';
import type { ManifestRow } from '@acousticsense/shared/manifest';
import { batchPrefix, partKey, timelineKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { deletePrefix, type Storage } from '@acousticsense/shared/storage';
import { writeUpload } from '@acousticsense/shared/uploads';
import { startS3, type TestS3 } from '../../../test/s3.ts';
import { failsSome, objects, startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

describe('the rows of a batch', () => {
  let catalogue: TestCatalogue;
  let s3: TestS3;
  let bucket: Storage;
  /** Answers nothing at all. */
  let silent: Server;
  /** Connections that it holds. */
  let held = 0;
  const stops: (() => Promise<unknown>)[] = [];
  /** Audio that the stub decoder was given. */
  let decoded: JobRecord['audio'][] = [];

  before(async () => {
    catalogue = await startCatalogue();
    s3 = await startS3('music');
    bucket = openStorage(`s3://music?endpoint=${s3.endpoint}&region=us-east-1`);
    silent = createServer(() => {
      held += 1;
    });
    await new Promise<void>((resolve) => silent.listen(0, '127.0.0.1', resolve));
    await catalogue.registerSource('acme', 'music', s3.endpoint);
    const { port } = silent.address() as AddressInfo;
    await catalogue.registerSource('slow', 'music', `http://127.0.0.1:${port}`);
  });
  afterEach(async () => {
    for (const stop of stops.splice(0).reverse()) await stop();
    decoded = [];
    s3.requests.length = 0;
  });
  after(async () => {
    silent.closeAllConnections();
    silent.close();
    bucket.close();
    await catalogue[Symbol.asyncDispose]();
    await s3[Symbol.asyncDispose]();
  });

  function start(options: Parameters<TestCatalogue['startWorkers']>[0] = {}) {
    const workers = catalogue.startWorkers({
      async decode(job, signal) {
        decoded.push(job.record.audio);
        await failsSome(job, signal);
      },
      ...options,
    });
    stops.push(workers.stop);
    return runFeeder();
  }
  function runFeeder() {
    const feeder = catalogue.runFeeder();
    stops.push(feeder.stop);
    return feeder;
  }
  const row = (audio: ManifestRow['audio'], more: Partial<ManifestRow> = {}): ManifestRow => ({
    line: 1,
    audio,
    ...more,
  });
  const object = (key: string, more = {}) => row({ s3: { bucket: 'music', key, ...more } });
  async function endings(ref: BatchRef): Promise<(string | undefined)[]> {
    await catalogue.ended(ref);
    return (await catalogue.checkWhole(ref)).map(
      ({ state, error, reused }) => error?.code ?? (reused ? 'reused' : state),
    );
  }

  test('that can never run fail with their reason, and stop nothing', async () => {
    start();
    await bucket.put('there.mp3', Buffer.from('sound'));
    const upload = randomUUIDv7();
    const open = randomUUIDv7();
    const now = Date.now();
    const common = {
      v: 1,
      by: 'tus',
      size: 5,
      filename: 'f.mp3',
      createdAt: now,
      expiresAt: now + 60_000,
    } as const;
    await writeUpload(catalogue.storage, 'acme', upload, {
      ...common,
      state: 'finished',
      etag: '"e"',
      completedAt: now,
    });
    await writeUpload(catalogue.storage, 'acme', open, { ...common, state: 'open' });
    await writeUpload(catalogue.storage, 'other', upload, {
      ...common,
      state: 'finished',
      etag: '"e"',
      completedAt: now,
    });
    const batch = await catalogue.submit([
      object('there.mp3'),
      object('missing.mp3'),
      row({ s3: { bucket: 'foreign', key: 'there.mp3', etag: 'e' } }),
      row({ s3: { bucket: 'foreign', key: 'there.mp3' } }),
      row({ upload }),
      row({ upload: open }),
      row({ upload: randomUUIDv7() }),
      object('bad.mp3', { etag: 'e' }),
      object('there.mp3'),
    ]);
    assert.deepEqual(await endings(batch), [
      'completed',
      'source_not_found',
      'source_not_allowed',
      'source_not_allowed',
      'completed',
      'upload_unfinished',
      'upload_not_found',
      'not_audio',
      'completed',
    ]);
    const { size, etag } = (await bucket.stat('there.mp3'))!;
    const source = { bucket: 'music', key: 'there.mp3', etag: etag.replaceAll('"', ''), size };
    assert.deepEqual(decoded[0], { source, filename: 'there.mp3' });
    assert.deepEqual((await catalogue.results(batch))[0]?.audio, { s3: source }, 'known again by its ETag');
  });

  test('on a source that does not answer keep no other tenant waiting', async () => {
    start();
    const slow = await catalogue.submit(
      objects(300).map(({ audio, ...rest }) => {
        assert.ok('s3' in audio);
        return { ...rest, audio: { s3: { bucket: 'music', key: audio.s3.key } } };
      }),
      { tenant: 'slow' },
    );
    while (held < 5) await new Promise((resolve) => setTimeout(resolve, 10));
    const from = performance.now();
    const other = await catalogue.submit(objects(300, { name: 'quick' }));
    await catalogue.ended(other);
    const took = performance.now() - from;
    assert.ok(took < 15_000, `${took} ms`);
    assert.ok(held <= 32, `${held} requests at a time`);
    const { waiting } = await catalogue.read(slow);
    assert.equal(waiting, 300);
    await catalogue.batches.cancel(slow);
    assert.deepEqual((await catalogue.ended(slow)).cancelled, 300);
    await catalogue.checkWhole(slow);
  });

  describe('that are known', () => {
    test('are answered from the index without a single request to the source; force does them anew', async () => {
      const feeder = start();
      const rows = objects(1_100, { name: 'known' });
      const first = await catalogue.submit(rows);
      assert.equal((await catalogue.ended(first)).completed, 1_100);
      assert.equal(decoded.length, 1_100);
      const before = await catalogue.results(first);
      await feeder.stop();
      // Another process, that has nothing of it in its memory.
      runFeeder();
      s3.requests.length = 0;
      const again = await catalogue.submit(rows, { modelName: 'the same' });
      const { completed, reused, undeclared } = await catalogue.ended(again);
      assert.deepEqual([completed, reused, undeclared], [1_100, 1_100, 1_100]);
      assert.equal(decoded.length, 1_100, 'nothing was decoded again');
      assert.deepEqual(s3.requests, []);
      const after = await catalogue.checkWhole(again);
      for (const [at, result] of after.entries()) {
        assert.deepEqual(result.outcome, before[at]!.outcome);
        assert.deepEqual(result.decoded, before[at]!.decoded);
        assert.equal(result.reused, true);
        assert.ok(result.revision > before[at]!.revision);
      }
      const forced = await catalogue.submit(rows.slice(0, 50), { force: true });
      assert.equal((await catalogue.ended(forced)).reused, 0);
      assert.equal(decoded.length, 1_150);
      await catalogue.checkWhole(forced);
    });

    test('by their objects without ETag are asked for their ETag only', async () => {
      start();
      const keys = Array.from({ length: 40 }, (_, n) => `etag/${n}.mp3`);
      for (const key of keys) await bucket.put(key, Buffer.from(key));
      const rows = keys.map((key) => object(key));
      await catalogue.ended(await catalogue.submit(rows));
      await bucket.put(keys[7]!, Buffer.from('another sound'));
      s3.requests.length = 0;
      decoded = [];
      const again = await catalogue.submit(rows);
      assert.equal((await catalogue.ended(again)).reused, 39);
      assert.equal(decoded.length, 1);
      assert.equal(s3.requests.filter((line) => line.startsWith('HEAD')).length, 40);
      assert.equal(s3.requests.filter((line) => line.startsWith('GET')).length, 0);
    });

    test('by the caller’s word need not be the same object', async () => {
      start();
      const named = (key: string, contentId: string) => ({ ...object(key, { etag: key }), contentId });
      await catalogue.ended(await catalogue.submit([named('a', 'isrc-1'), named('b', 'isrc-2')]));
      const batch = await catalogue.submit([named('c', 'isrc-2'), named('d', 'isrc-3')]);
      assert.deepEqual(await endings(batch), ['reused', 'completed']);
    });

    test('only by the same selection and model, and only when they completed', async () => {
      start();
      const rows = [object('s', { etag: 'other-s' }), object('bad-s', { etag: 'other-b' })];
      await catalogue.ended(await catalogue.submit(rows));
      const whole = await catalogue.submit(rows, { selection: { windows: 'all', start: 0 } });
      assert.deepEqual(await endings(whole), ['completed', 'not_audio']);
      const same = await catalogue.submit(rows, { selection: { windows: 'all', start: 0 } });
      assert.deepEqual(await endings(same), ['reused', 'not_audio']);
      const extras = await catalogue.submit(rows.slice(0, 1), { extras: { explain: true, vectors: false } });
      assert.deepEqual(await endings(extras), ['completed']);
      const other = await catalogue.submit(rows.slice(0, 1), { tenant: 'slow' });
      assert.deepEqual(await endings(other), ['completed']);
    });

    test('in another order, and scattered over many batches, are known too', async () => {
      start();
      const rows: ManifestRow[] = [];
      for (let n = 0; n < 4; n += 1) {
        const some = objects(60, { name: `scattered${n}` });
        rows.push(...some);
        await catalogue.ended(await catalogue.submit(some));
      }
      decoded = [];
      const shuffled = rows.map((_, at) => rows[(at * 97) % rows.length]!);
      const again = await catalogue.submit(shuffled);
      assert.equal((await catalogue.ended(again)).reused, 240);
      assert.equal(decoded.length, 0);
      const [first] = await catalogue.checkWhole(again);
      assert.equal(first!.ref, 'scattered0-0');
      // Few of each: read one by one.
      const few = await catalogue.submit(shuffled.slice(3, 11));
      assert.equal((await catalogue.ended(few)).reused, 8);
    });

    test('are done anew when their results were deleted', async () => {
      start();
      const rows = objects(20, { name: 'deleted' });
      const first = await catalogue.submit(rows);
      await catalogue.ended(first);
      await deletePrefix(catalogue.storage, batchPrefix(first.tenant, first.id));
      const again = await catalogue.submit(rows);
      assert.equal((await catalogue.ended(again)).reused, 0);
      await catalogue.checkWhole(again);
    });

    test('bring the timeline of a long recording with them', async () => {
      start();
      const rows = objects(3, { name: 'long' });
      const first = await catalogue.submit(rows);
      await catalogue.ended(first);
      const part = await catalogue.results(first);
      // As the inference service leaves a recording of many windows.
      const long = part.map((result) => {
        const { windows: _, ...outcome } = result.outcome!;
        return { ...result, outcome };
      });
      await catalogue.storage.put(partKey(first.tenant, first.id, 0), encodePart(long));
      const placeOf = (ref: BatchRef, at: number, id: string) => ({
        tenant: 'acme',
        id,
        batch: { id: ref.id, chunk: 0, row: at },
      });
      for (const at of [0, 2])
        await catalogue.storage.put(
          timelineKey(placeOf(first, at, long[at]!.jobId)),
          Buffer.from(`timeline ${at}`),
        );
      const again = await catalogue.submit(rows);
      await catalogue.ended(again);
      const results = await catalogue.checkWhole(again);
      assert.deepEqual(
        results.map(({ reused = false }) => reused),
        [true, false, true],
      );
      for (const at of [0, 2])
        assert.equal(
          String(await catalogue.storage.read(timelineKey(placeOf(again, at, results[at]!.jobId)))),
          `timeline ${at}`,
        );
    });
  });

  describe('that are run again by another model', () => {
    test('begin at what was decoded for the run before', async () => {
      start();
      const rows = [...objects(1_010, { name: 'rerun' }), ...objects(1, { name: 'bad' })];
      const first = await catalogue.submit(rows);
      await catalogue.ended(first);
      const before = await catalogue.results(first);
      const digest = 'a'.repeat(64);
      const { profileHash } = catalogue.bundle;
      stops.push(catalogue.startWorkers({ of: { digest, profileHash }, decode: failsSome }).stop);
      decoded = [];
      const again = await catalogue.create({
        origin: { kind: 'rerun', of: first.id },
        modelDigest: digest,
        tensorsOf: first.id,
      });
      const { state, rows: count, completed, failed, reused, sealed } = await catalogue.ended(again);
      assert.deepEqual(
        [state, count, completed, failed, reused, sealed],
        ['completed', 1_011, 1_010, 1, 0, true],
      );
      const names = decoded.map(({ filename }) => filename);
      assert.deepEqual(names, ['bad-0.mp3'], 'of which nothing was decoded before');
      const after = await catalogue.checkWhole(again);
      for (const [at, { decoded, ref }] of after.entries()) {
        assert.equal(ref, before[at]!.ref);
        assert.deepEqual(decoded, before[at]!.decoded);
      }
    });

    test('also when Redis has forgotten the run before, for as long as it is stored', async () => {
      start();
      const first = await catalogue.submit(objects(30, { name: 'forgotten' }));
      await catalogue.ended(first);
      await catalogue.batches.forget(first);
      const again = await catalogue.create({ origin: { kind: 'rerun', of: first.id }, force: true });
      assert.equal((await catalogue.ended(again)).completed, 30);
      await deletePrefix(catalogue.storage, batchPrefix(first.tenant, first.id));
      const late = await catalogue.create({ origin: { kind: 'rerun', of: first.id } });
      const { state, error } = await catalogue.ended(late);
      assert.deepEqual([state, error?.code], ['failed', 'batch_gone']);
    });
  });

  test('are analysed as the batch says, or the row', async () => {
    const selections: unknown[] = [];
    start({
      async decode({ record }) {
        selections.push(record.selection);
      },
      concurrency: 1,
    });
    const batch = await catalogue.submit(
      [
        object('w1', { etag: 'w1' }),
        { ...object('w2', { etag: 'w2' }), selection: { windows: 3, duration: 12 } },
      ],
      { selection: { windows: 'all', start: 5 } },
    );
    await catalogue.ended(batch);
    assert.deepEqual(selections, [
      { windows: 'all', start: 5 },
      { windows: 3, start: 5, duration: 12 },
    ]);
  });
});
