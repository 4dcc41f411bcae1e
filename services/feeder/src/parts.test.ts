import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import type { AnswerIndex } from '@acousticsense/shared/answer-index';
import { type BatchRef, rowJobId } from '@acousticsense/shared/batch-records';
import { anyOpenState, type JobRecords, refOf } from '@acousticsense/shared/job-records';
import type { ManifestRow } from '@acousticsense/shared/manifest';
import { audioKey, mappingKey, partKey, timelineKey } from '@acousticsense/shared/object-keys';
import { pino } from 'pino';
import { acceptedJob } from '../../../test/job.ts';
import { createParts } from './parts.ts';
import { objects, startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

type Segment = Parameters<AnswerIndex['writeSegment']>[0];

describe('a part', () => {
  let catalogue: TestCatalogue;
  before(async () => {
    catalogue = await startCatalogue();
    await catalogue.redis.set(
      `as:model:${catalogue.bundle.digest}`,
      JSON.stringify({
        ...{ digest: catalogue.bundle.digest, name: 'm', version: '1', licence: '', provenance: '' },
        ...{ labels: ['jazz', 'rock'], profileHash: 'p', windowSeconds: 30, stepSeconds: 30, threshold: 0.5 },
        ...{ calibrated: false, accuracy: 'none' },
      }),
    );
  });
  after(() => catalogue[Symbol.asyncDispose]());

  function open(replaced: { records?: JobRecords; writeSegment?: (segment: Segment) => Promise<void> } = {}) {
    const segments: Segment[] = [];
    const parts = createParts({
      ...catalogue,
      index: { writeSegment: async (segment) => void segments.push(segment) },
      log: pino({ level: 'silent' }),
      ...(replaced.records ? { records: replaced.records } : {}),
      ...(replaced.writeSegment ? { index: { writeSegment: replaced.writeSegment } } : {}),
    });
    return { ...parts, segments };
  }

  /** A batch of one chunk whose rows have ended: in jazz with this probability, or failed. */
  async function ended(
    rows: readonly ManifestRow[],
    heard: readonly (number | 'failed')[],
    more = {},
  ): Promise<BatchRef> {
    const ref = await catalogue.submit(rows, more);
    await catalogue.batches.open(ref, { chunk: 0 });
    await endAll(ref, rows, heard, 1);
    return ref;
  }
  async function endAll(
    ref: BatchRef,
    rows: readonly ManifestRow[],
    heard: readonly (number | 'failed' | 'kept')[],
    generation: number,
  ): Promise<void> {
    const { revision } = await catalogue.read(ref);
    for (const [row, jazz] of heard.entries()) {
      if (jazz === 'kept') continue;
      const { audio } = rows[row]!;
      const outcome = { probabilities: [Number(jazz), 1 - Number(jazz)], windows: [], provider: 'cpu' };
      const error = { code: 'not_audio', message: 'm', retryable: false } as const;
      const job = acceptedJob({
        tenant: ref.tenant,
        id: rowJobId(ref.id, row),
        batch: { id: ref.id, chunk: 0, row },
        generation,
        revision,
        audio: 's3' in audio ? { source: audio.s3, filename: 'f' } : { url: 'https://x/f', filename: 'f' },
      });
      await catalogue.records.create({ ...job, state: 'queued' });
      const step =
        jazz === 'failed'
          ? ({ to: 'failed', set: { error } } as const)
          : ({ to: 'completed', set: { outcome } } as const);
      assert.equal(
        (await catalogue.records.commit(refOf(job), { from: anyOpenState, ...step })).outcome,
        'committed',
      );
    }
  }
  const read = async ({ tenant, id }: BatchRef) =>
    String(await catalogue.storage.read(partKey(tenant, id, 0)));

  test('is judged row by row, and counted once', async () => {
    const rows = objects(6, { name: 'judged' }).map((row, at) => ({
      ...row,
      ...(at === 3 ? {} : { declaredGenre: [at === 4 ? 'klezmer' : 'rock'] }),
    }));
    const ref = await ended(rows, [0.1, 0.9, 0.55, 0.9, 0.9, 'failed'], {
      presentation: { topK: 5, threshold: 0.6 },
    });
    const { close, segments } = open();
    await close(ref.tenant, ref.id, 0);
    await close(ref.tenant, ref.id, 0);
    const batch = await catalogue.read(ref);
    const { agree, disagree, uncertain, undeclared, unknown_genre, closed, state } = batch;
    assert.deepEqual(
      { agree, disagree, uncertain, undeclared, unknown_genre, closed, state },
      {
        ...{
          agree: 1,
          disagree: 1,
          uncertain: 1,
          undeclared: 1,
          unknown_genre: 1,
          closed: 1,
          state: 'completed',
        },
      },
    );
    const verdicts = (await catalogue.results(ref)).map(({ verdict }) => verdict);
    assert.deepEqual(verdicts, ['agree', 'disagree', 'uncertain', 'undeclared', 'unknown_genre', undefined]);
    const [segment] = segments;
    assert.deepEqual(segments.length, 1);
    assert.deepEqual(
      segment!.entries.map(({ row, ref: of, keys }) => [row, of, keys.length]),
      [...[0, 1, 2, 3, 4].map((row) => [row, `judged-${row}`, 1]), [5, 'judged-5', 0]],
    );
  });

  test('speaks in the words of the house', async () => {
    const rows = objects(2, { name: 'house' }).map((row) => ({ ...row, declaredGenre: ['Guitars'] }));
    const ref = await ended(rows, [0.9, 0.1], { mapped: true });
    const mapping = { labels: ['jazz', 'rock'], house: [['Horns'], ['Guitars']] };
    await catalogue.storage.put(mappingKey('acme', ref.id), Buffer.from(JSON.stringify(mapping)));
    await open().close(ref.tenant, ref.id, 0);
    assert.deepEqual(
      (await catalogue.results(ref)).map(({ predicted, verdict }) => [predicted, verdict]),
      [
        ['Horns', 'disagree'],
        ['Guitars', 'agree'],
      ],
    );
  });

  test('is not written by one who comes too late: whose records are gone would be taken for lost', async () => {
    const rows = objects(3, { name: 'late' });
    const ref = await ended(rows, [0.9, 0.1, 'failed']);
    const reached = Promise.withResolvers<void>();
    const go = Promise.withResolvers<void>();
    const late = open({
      records: {
        ...catalogue.records,
        async getMany(...args) {
          reached.resolve();
          await go.promise;
          return catalogue.records.getMany(...args);
        },
      },
    });
    const slow = late.close(ref.tenant, ref.id, 0);
    await reached.promise;
    await open().close(ref.tenant, ref.id, 0);
    const before = await read(ref);
    go.resolve();
    await slow;
    assert.equal(await read(ref), before);
    assert.deepEqual(late.segments, []);
    assert.equal((await catalogue.read(ref)).closed, 1);
  });

  test('is not written by one who has seen the round before', async () => {
    const rows = objects(2, { name: 'rounds' });
    const ref = await ended(rows, ['failed', 'failed']);
    const reached = Promise.withResolvers<void>();
    const go = Promise.withResolvers<void>();
    const late = open({
      records: {
        ...catalogue.records,
        async getMany(...args) {
          const found = await catalogue.records.getMany(...args);
          reached.resolve();
          await go.promise;
          return found;
        },
      },
    });
    const slow = late.close(ref.tenant, ref.id, 0);
    await reached.promise;
    await open().close(ref.tenant, ref.id, 0);
    await catalogue.batches.retry(ref, 2);
    await catalogue.batches.reopen(ref, { chunk: 0, states: '..' });
    await endAll(ref, rows, ['failed', 'failed'], 1_001);
    const before = await read(ref);
    go.resolve();
    await slow;
    assert.equal(await read(ref), before);
    assert.equal((await catalogue.read(ref)).closed, 0);
    await open().close(ref.tenant, ref.id, 0);
    assert.deepEqual(
      (await catalogue.results(ref)).map(({ generation }) => generation),
      [1_001, 1_001],
    );
  });

  test('of a retry keeps the rows that were not tried again, and only the others stand in its segment', async () => {
    const rows = objects(3, { name: 'kept' });
    const ref = await ended(rows, [0.9, 'failed', 0.2]);
    await open().close(ref.tenant, ref.id, 0);
    const before = await catalogue.results(ref);
    await catalogue.batches.retry(ref, 7);
    await catalogue.batches.reopen(ref, { chunk: 0, states: 'k.k' });
    await endAll(ref, rows, ['kept', 0.7, 'kept'], 1_001);
    const { close, segments } = open();
    await close(ref.tenant, ref.id, 0);
    const after = await catalogue.results(ref);
    assert.deepEqual([after[0], after[2]], [before[0], before[2]]);
    assert.deepEqual([after[1]!.state, after[1]!.revision], ['completed', 7]);
    assert.deepEqual(
      segments.map(({ round, entries }) => [round, entries.map(({ row }) => row)]),
      [[1, [1]]],
    );
  });

  test('that was not finished is written again, the same', async () => {
    const rows: ManifestRow[] = [
      ...objects(2, { name: 'again' }),
      { line: 3, audio: { url: 'https://x/f' } },
    ];
    const ref = await ended(rows, [0.9, 0.1, 0.3]);
    const place = (row: number) => ({
      tenant: ref.tenant,
      id: `${row}`,
      batch: { id: ref.id, chunk: 0, row },
    });
    await catalogue.storage.put(audioKey(place(2)), Buffer.from('fetched'));
    await catalogue.storage.put(timelineKey(place(2)), Buffer.from('{}'));
    const broken = open({ writeSegment: () => Promise.reject(new Error('killed here')) });
    await assert.rejects(broken.close(ref.tenant, ref.id, 0), /killed here/);
    const first = await read(ref);
    assert.equal((await catalogue.read(ref)).closed, 0);
    await open().close(ref.tenant, ref.id, 0);
    assert.equal(await read(ref), first);
    assert.equal((await catalogue.read(ref)).state, 'completed');
    assert.equal(await catalogue.storage.stat(audioKey(place(2))), undefined, 'fetched audio is not kept');
    assert.ok(await catalogue.storage.stat(timelineKey(place(2))));
  });

  test('of a batch that is no more is nobody’s errand', async () => {
    const ref = { tenant: 'acme', id: '01a20e03-144c-7c93-9d47-592987f2d2c6' };
    await catalogue.redis.sadd('as:{acme}:ended-chunks', `${ref.id}/0`);
    await open().close(ref.tenant, ref.id, 0);
    assert.equal(
      (await catalogue.batches.pending(['acme']))[0]!.chunks.some(({ id }) => id === ref.id),
      false,
    );
  });
});
