/** Rows are read while the feeder closes their chunks: real Redis, both storages, parts as the feeder writes them. */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { BatchRecord, PartRow } from '@acousticsense/shared/batch';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { batchPrefix, partKey } from '@acousticsense/shared/object-keys';
import { deletePrefix } from '@acousticsense/shared/storage';
import { createBatchRows, type RowRange } from './batch-rows.ts';
import {
  badAudio,
  type Ending,
  heard,
  startCatalogue,
  type TestCatalogue,
  tracks,
} from './testing/catalogue.ts';

const never = new AbortController().signal;
const jazz: Ending = { outcome: heard('Jazz', 0.9) };

async function read(
  { rows }: Pick<TestCatalogue, 'rows'>,
  batch: BatchRecord,
  range: RowRange = {},
): Promise<PartRow[]> {
  return (await Array.fromAsync(rows.ended(batch, range, never))).flat();
}

const numbers = (rows: readonly PartRow[]) => rows.map(({ row }) => row);
const upTo = (end: number, from = 0) => Array.from({ length: end - from }, (_, n) => from + n);

for (const driver of ['directory', 's3'] as const) {
  describe(`rows of a batch, objects in ${driver === 's3' ? 'a bucket' : 'a directory'}`, () => {
    let catalogue: TestCatalogue;
    before(async () => {
      catalogue = await startCatalogue({ driver });
    });
    after(() => catalogue[Symbol.asyncDispose]());

    test('of a batch that runs, the rows that have ended are told in the order of the manifest', async () => {
      const batch = await catalogue.batch(tracks(2_500));
      await catalogue.openChunk(batch, 0);
      await Promise.all(upTo(1_000).map((row) => catalogue.end(batch, row, jazz)));
      await catalogue.close(batch, 0);
      await catalogue.openChunk(batch, 1);
      await catalogue.end(batch, 1_700, { error: badAudio });
      await catalogue.end(batch, 1_003, jazz);
      await catalogue.end(batch, 1_500, 'cancelled');
      await catalogue.end(batch, 1_001, 'running');
      const now = await catalogue.stored.read('acme', batch.id);
      const found = await read(catalogue, now);
      assert.deepEqual(numbers(found), [...upTo(1_000), 1_003, 1_500, 1_700]);
      assert.deepEqual(
        found.slice(-3).map(({ state }) => state),
        ['completed', 'cancelled', 'failed'],
      );
      assert.deepEqual(
        numbers(await read(catalogue, now, { from: 998, to: 1_501 })),
        [998, 999, 1_003, 1_500],
      );
      assert.deepEqual(await read(catalogue, now, { from: 2_000 }), []);
    });

    test('a row is the same from the record of an open chunk as from the part of a closed one', async () => {
      const batch = await catalogue.batch(tracks(3, (n) => ({ declaredGenre: [n === 0 ? 'Rock' : 'Jazz'] })));
      await catalogue.openChunk(batch, 0);
      await catalogue.end(batch, 0, jazz);
      await catalogue.end(batch, 1, { error: badAudio });
      await catalogue.end(batch, 2, 'cancelled');
      const opened = await catalogue.results.open('acme', batch.id);
      const all = async () => (await Array.fromAsync(catalogue.results.ended(opened, {}, never))).flat();
      const live = await all();
      await catalogue.close(batch, 0);
      const closed = await all();
      assert.equal(await catalogue.redis.exists(`as:{acme}:job:${live[0]!.jobId}`), 0);
      assert.deepEqual(live, closed);
      assert.equal(closed[0]!.verdict, 'disagree');
    });

    test('while chunks are being closed every row comes once, whoever is faster', async () => {
      const chunks = 5;
      const batch = await catalogue.batch(tracks(chunks * 1_000));
      for (let chunk = 0; chunk < chunks; chunk += 1) {
        await catalogue.openChunk(batch, chunk);
        const rows = upTo((chunk + 1) * 1_000, chunk * 1_000);
        await Promise.all(rows.map((row) => catalogue.end(batch, row, jazz)));
      }
      const now = await catalogue.stored.read('acme', batch.id);
      const reading = Array.from({ length: 6 }, async (_, reader) => {
        await sleep(reader * 20);
        return read(catalogue, now);
      });
      for (const chunk of [3, 1, 0, 4, 2]) await catalogue.close(batch, chunk);
      for (const found of await Promise.all(reading)) assert.deepEqual(numbers(found), upTo(chunks * 1_000));
    });
  });
}

describe('a chunk that is closed between a look and the next', () => {
  let catalogue: TestCatalogue;
  before(async () => {
    catalogue = await startCatalogue();
  });
  after(() => catalogue[Symbol.asyncDispose]());

  /** Rows read with something happening at one certain moment. */
  function readerWith(getMany: JobRecords['getMany']) {
    const { batches, storage, stored } = catalogue;
    return { rows: createBatchRows({ batches, storage, stored, records: { getMany } }) };
  }

  async function ended(endings: readonly Ending[]) {
    const batch = await catalogue.batch(tracks(endings.length));
    await catalogue.openChunk(batch, 0);
    for (const [row, ending] of endings.entries()) await catalogue.end(batch, row, ending);
    return catalogue.stored.read('acme', batch.id);
  }

  for (const moment of ['before', 'after'] as const) {
    test(`is read again from its part, closed ${moment} its records were read`, async () => {
      const batch = await ended([jazz, { error: badAudio }, 'cancelled', jazz]);
      let looks = 0;
      const reader = readerWith(async (...of) => {
        looks += 1;
        if (moment === 'before') await catalogue.close(batch, 0);
        const found = await catalogue.records.getMany(...of);
        if (moment === 'after') await catalogue.close(batch, 0);
        return found;
      });
      const found = await read(reader, batch);
      assert.deepEqual(numbers(found), [0, 1, 2, 3]);
      assert.deepEqual(
        found.map(({ state }) => state),
        ['completed', 'failed', 'cancelled', 'completed'],
      );
      assert.equal(looks, 1, 'then the part tells all');
    });

    test(`holds one row of it, closed ${moment} its record was read`, async () => {
      const batch = await ended([jazz, 'cancelled']);
      const reader = readerWith(async (...of) => {
        if (moment === 'before') await catalogue.close(batch, 0);
        const found = await catalogue.records.getMany(...of);
        if (moment === 'after') await catalogue.close(batch, 0);
        return found;
      });
      const found = await reader.rows.find(batch, 0);
      assert.equal(found?.state, 'completed');
      assert.equal((await reader.rows.find(batch, 1))?.state, 'cancelled');
      assert.equal(await reader.rows.find(batch, 2), undefined);
    });
  }

  test('is not taken for rows that were never fed, when its records vanish', async () => {
    const batch = await ended(['cancelled']);
    const reader = readerWith(async (...of) => {
      await catalogue.close(batch, 0);
      return catalogue.records.getMany(...of);
    });
    const [row] = await read(reader, batch);
    assert.deepEqual(row?.timings, { decode: 5 }, 'what its record knew, its part knows');
  });

  test('is read as it is, when it is opened again for what failed', async () => {
    const first = await ended([jazz, { error: badAudio }, jazz]);
    await catalogue.close(first, 0);
    const revision = await catalogue.batches.nextRevision('acme');
    await catalogue.batches.retry(first, revision);
    await catalogue.batches.reopen(first, { chunk: 0, states: 'k.k' });
    const again = await catalogue.stored.read('acme', first.id);
    assert.deepEqual(numbers(await read(catalogue, again)), [0, 2], 'the row in between is tried again');
    assert.equal((await catalogue.rows.find(again, 0))?.state, 'completed');
    assert.equal((await catalogue.rows.find(again, 1))?.state, 'waiting');
    await catalogue.end(again, 1, { outcome: heard('Pop', 0.8) });
    // Closed while it is read: the kept rows and the new one then come from the new part.
    const reader = readerWith(async (...of) => {
      await catalogue.close(again, 0);
      return catalogue.records.getMany(...of);
    });
    const found = await read(reader, again);
    assert.deepEqual(numbers(found), [0, 1, 2]);
    assert.deepEqual(
      found.map((row) => row.revision),
      [first.revision, revision, first.revision],
    );
  });

  test('is read again when it was closed and opened once more before its records were read', async () => {
    const batch = await ended([jazz, { error: badAudio }]);
    let first = true;
    const reader = readerWith(async (...of) => {
      if (first) {
        await catalogue.close(batch, 0);
        await catalogue.batches.retry(batch, await catalogue.batches.nextRevision('acme'));
        await catalogue.batches.reopen(batch, { chunk: 0, states: 'k.' });
      }
      first = false;
      return catalogue.records.getMany(...of);
    });
    assert.deepEqual(numbers(await read(reader, batch)), [0]);
  });

  test('has rows that were never fed, of a batch that is being cancelled', async () => {
    const batch = await catalogue.batch(tracks(1_200));
    await catalogue.openChunk(batch, 0);
    await catalogue.end(batch, 5, jazz);
    await catalogue.batches.cancel(batch);
    await catalogue.batches.cancelRows(batch, { chunk: 0 });
    const cancelling = await catalogue.stored.read('acme', batch.id);
    const open = await read(catalogue, cancelling);
    assert.deepEqual(numbers(open), upTo(1_000));
    assert.equal(open.filter(({ state }) => state === 'cancelled').length, 999);
    await catalogue.close(batch, 0);
    const cancelled = await catalogue.stored.read('acme', batch.id);
    assert.equal(cancelled.state, 'cancelled');
    const closed = await read(catalogue, cancelled);
    assert.deepEqual(
      closed.map(({ row, state }) => [row, state]),
      open.map(({ row, state }) => [row, state]),
    );
    const unopened = await catalogue.rows.find(cancelled, 1_100);
    assert.deepEqual([unopened?.row, unopened?.state], [1_100, 'cancelled']);
  });

  test('is of a batch that is deleted meanwhile: the reader is told, and when', async () => {
    const batch = await ended([jazz, jazz]);
    await catalogue.close(batch, 0);
    const now = await catalogue.stored.read('acme', batch.id);
    const deletedAt = Date.parse('2026-11-20T10:00:00Z');
    await catalogue.batches.remove(batch, deletedAt);
    await deletePrefix(catalogue.storage, batchPrefix('acme', batch.id));
    await assert.rejects(read(catalogue, now), (error) => {
      assert.ok(error instanceof ProblemError);
      assert.deepEqual([error.code, error.details.deletedAt], ['batch_gone', deletedAt]);
      assert.match(error.message, /2026-11-20T10:00:00.000Z/);
      return true;
    });
  });

  test('whose part is not where it should be is a fault of the storage, not an empty answer', async () => {
    const batch = await ended([jazz]);
    await catalogue.close(batch, 0);
    await catalogue.storage.delete(partKey('acme', batch.id, 0));
    const now = await catalogue.stored.read('acme', batch.id);
    await assert.rejects(read(catalogue, now), InfrastructureFault);
  });

  test('is not read for somebody who has gone', async () => {
    const { batches, records, stored } = catalogue;
    const batch = await catalogue.finish(await catalogue.batch(tracks(3_500)), () => jazz);
    const signals: AbortSignal[] = [];
    const storage: typeof catalogue.storage = {
      ...catalogue.storage,
      read: (key, signal, options) => {
        signals.push(signal!);
        return catalogue.storage.read(key, signal, options);
      },
    };
    const rows = createBatchRows({ batches, records, stored, storage }).ended(batch, {}, never);
    assert.equal((await rows.next()).value?.length, 100);
    await rows.return(undefined);
    assert.equal(signals.length, 3, 'one chunk that is told, two ahead');
    assert.ok(signals.every(({ aborted }) => aborted));
  });

  test('stops being read when nobody reads on', async () => {
    const batch = await ended([jazz, jazz, jazz]);
    const stop = new AbortController();
    stop.abort(new Error('gone'));
    await assert.rejects(Array.fromAsync(catalogue.rows.ended(batch, {}, stop.signal)));
  });
});
