import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { type BatchRecord, isEnded } from './batch.ts';
import {
  type BatchRecords,
  type BatchRef,
  type BatchResult,
  createBatchRecords,
  type NewBatch,
  rowJobId,
} from './batch-records.ts';
import { type Event, eventSchema } from './events.ts';
import type { Decoded, Outcome } from './job.ts';
import {
  anyOpenState,
  type CommitResult,
  changesChannel,
  createJobRecords,
  firstGeneration,
  type JobRecords,
  keys,
} from './job-records.ts';
import { rowIndex } from './manifest.ts';
import type { JobState } from './pipeline.ts';
import { connectRedisForWorker } from './redis.ts';

const tenant = 'acme';
/** Rows of a chunk here, where not said otherwise. */
const small = 3;

const error = { code: 'not_audio', message: 'This is no audio.', retryable: false } as const;
const fault = { code: error.code, message: error.message };

function draft(overrides: Partial<NewBatch> = {}): NewBatch {
  return {
    id: randomUUIDv7(),
    tenant,
    name: 'A catalogue',
    state: 'receiving',
    origin: { kind: 'manifest' },
    class: 'backfill',
    modelDigest: 'd'.repeat(64),
    modelName: 'm',
    modelVersion: '1',
    profileHash: 'p'.repeat(16),
    selection: { windows: 'middle', start: 0 },
    presentation: { topK: 5, threshold: 0.5 },
    extras: undefined,
    traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`,
    tensorsOf: undefined,
    mapped: false,
    force: false,
    notify: 'rows',
    revision: 1,
    ...overrides,
  };
}

/** How the rows ended, by their letters. */
function countOf(letters: string) {
  const count = (letter: string) => letters.split(letter).length - 1;
  return { rows: letters.length, completed: count('c'), failed: count('f'), cancelled: count('x') };
}

describe('the batches', () => {
  let server: TestRedis;
  let redis: Redis;
  let records: JobRecords;
  let batches: BatchRecords;
  /** What lies in storage of closed chunks: a letter a row. By batch and chunk. */
  let parts: Map<string, string>;

  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    const retention = { resultSeconds: 3_600 };
    records = createJobRecords(redis, retention);
    batches = createBatchRecords(redis, retention, small);
  });
  beforeEach(async () => {
    await redis.flushall();
    parts = new Map();
  });
  after(async () => {
    redis.disconnect();
    await server[Symbol.asyncDispose]();
  });

  /** A batch that runs, with these many rows in each of its chunks. */
  async function running(chunks: readonly number[], overrides: Partial<NewBatch> = {}): Promise<BatchRef> {
    const ref = await receiving(chunks, overrides);
    assert.equal((await batches.seal(ref, { bad: 0 })).outcome, 'done');
    return ref;
  }
  async function receiving(chunks: readonly number[], overrides: Partial<NewBatch> = {}): Promise<BatchRef> {
    const batch = draft(overrides);
    await batches.create(batch);
    for (const [chunk, rows] of chunks.entries())
      assert.deepEqual(await batches.append(batch, { chunk, rows, bad: 0 }), {
        outcome: 'done',
        state: batch.state,
      });
    return { tenant: batch.tenant, id: batch.id };
  }
  const read = async (ref: BatchRef): Promise<BatchRecord> => (await batches.get(ref))!;

  const rowOf = (ref: BatchRef, chunk: number, row: number, round = 0) => ({
    tenant: ref.tenant,
    jobId: rowJobId(ref.id, rowIndex({ chunk, row })),
    generation: firstGeneration(round),
    batch: { id: ref.id, chunk, row },
  });
  function feed(ref: BatchRef, chunk: number, row: number, round = 0, more = {}): Promise<CommitResult> {
    const { jobId, ...rest } = rowOf(ref, chunk, row, round);
    return records.create(acceptedJob({ id: jobId, ...rest, ...more }));
  }
  function end(
    ref: BatchRef,
    chunk: number,
    row: number,
    to: JobState = 'completed',
    round = 0,
  ): Promise<CommitResult> {
    const set = to === 'failed' ? { error } : {};
    return records.commit(rowOf(ref, chunk, row, round), { from: anyOpenState, to, set });
  }
  /** Opens a chunk and ends its rows as the letters say. */
  async function runChunk(ref: BatchRef, chunk: number, letters: string, round = 0): Promise<void> {
    if (round === 0) assert.equal((await batches.open(ref, { chunk })).outcome, 'done');
    for (const [row, letter] of [...letters].entries()) {
      if (letter === 'k') continue;
      assert.equal((await feed(ref, chunk, row, round)).outcome, 'committed');
      const to = ({ c: 'completed', f: 'failed', x: 'cancelled' } as const)[letter];
      assert.ok(to, letter);
      assert.equal((await end(ref, chunk, row, to, round)).outcome, 'committed');
    }
  }
  /** As the feeder does it: the part first, then the step that lets go of it. */
  async function close(ref: BatchRef, chunk: number): Promise<BatchResult> {
    const key = `${ref.id}/${chunk}`;
    const round = (await batches.get(ref))?.round ?? 0;
    const states = (await batches.rowStates(ref, chunk)) ?? '';
    const part = [...states].map((state, row) => (state === 'k' ? parts.get(key)![row]! : state)).join('');
    const jobIds = [...states].map((_, row) => rowOf(ref, chunk, row).jobId);
    const result = await batches.close(ref, { chunk, round, states, jobIds, tally: {}, part: countOf(part) });
    if (result.outcome === 'done') parts.set(key, part);
    return result;
  }
  function reopen(ref: BatchRef, chunk: number): Promise<BatchResult> {
    const states = parts.get(`${ref.id}/${chunk}`)!.replaceAll(/[cx]/g, 'k').replaceAll('f', '.');
    return batches.reopen(ref, { chunk, states });
  }
  const events = async (of = tenant) =>
    (await redis.xrange(keys.events(of), '-', '+')).map(([, [, id, , json, , callback]]) => ({
      id: id!,
      ...(JSON.parse(json!) as Pick<Event, 'type'> & { data: Record<string, unknown> }),
      ...(callback ? { callback: JSON.parse(callback) as unknown } : {}),
    }));

  /**
   * Reads all that Redis has of the tenant, and compares every counter with the rows.
   * @returns the batches.
   */
  async function check(of = tenant): Promise<BatchRecord[]> {
    const all = await redis.keys(`as:{${of}}:*`);
    const known = new Set([keys.open(of), keys.events(of), keys.activeBatches(of), keys.batches(of)]);
    for (const key of [keys.ended(of), keys.revision(of)]) known.add(key);
    const ids = await redis.zrange(keys.batches(of), '0', '-1');
    const found: BatchRecord[] = [];
    const active: string[] = [];
    const ended: string[] = [];
    const open: string[] = [];
    for (const id of ids) {
      const ref = { tenant: of, id };
      const [batch, hash, ttl] = await Promise.all([
        read(ref),
        redis.hgetall(keys.batch(of, id)),
        redis.ttl(keys.batch(of, id)),
      ]);
      known.add(keys.batch(of, id));
      found.push(batch);
      if (!isEnded(batch.state)) active.push(id);
      const cancelled = batch.state === 'cancelling' || batch.state === 'cancelled';
      const counted = { waiting: 0, open: 0, completed: 0, failed: 0, cancelled: 0 };
      const ofByte = {
        '.': cancelled ? 'cancelled' : 'waiting',
        o: 'open',
        c: 'completed',
        f: 'failed',
        x: 'cancelled',
      } as const;
      const count = (byte: string) => {
        counted[ofByte[byte as keyof typeof ofByte]] += 1;
      };
      const openChunks: number[] = [];
      let rows = 0;
      for (let chunk = 0; chunk < batch.chunks; chunk += 1) {
        const size = Math.min(small, batch.rows - chunk * small);
        rows += size;
        const states = await batches.rowStates(ref, chunk);
        const left = hash[`left:${chunk}`];
        assert.equal(left === undefined, states === undefined, 'a chunk is open in both places or in none');
        const part = parts.get(`${id}/${chunk}`);
        if (states === undefined) {
          if (chunk < batch.opened) [...part!].forEach(count);
          else for (let row = 0; row < size; row += 1) count('.');
          continue;
        }
        assert.equal(states.length, size);
        openChunks.push(chunk);
        known.add(keys.rows(of, id, chunk));
        const unfinished = states.replaceAll(/[^.o]/g, '').length;
        assert.equal(Number(left), unfinished, `left of ${chunk}: ${states}`);
        if (unfinished === 0) ended.push(`${id}/${chunk}`);
        const jobIds = [...states].map((_, row) => rowOf(ref, chunk, row).jobId);
        const jobs = await records.getMany(of, jobIds);
        for (const [row, byte] of [...states].entries()) {
          count(byte === 'k' ? part![row]! : byte);
          const jobId = jobIds[row]!;
          const record = jobs[row];
          if (record) known.add(keys.record(of, jobId));
          const state = record?.state;
          const expected = { c: 'completed', f: 'failed', x: 'cancelled' }[byte];
          if (byte === '.' || byte === 'k') assert.equal(record, undefined, `row ${row} is ${byte}`);
          else if (byte === 'o') {
            assert.ok(state && anyOpenState.includes(state), `${state}`);
            open.push(jobId);
          } else if (byte !== 'x' || record) assert.equal(state, expected);
        }
      }
      const { waiting, open: running, completed, failed, cancelled: gone } = batch;
      assert.deepEqual({ waiting, open: running, completed, failed, cancelled: gone }, counted, batch.state);
      assert.equal(batch.rows, rows);
      assert.deepEqual(batch.openChunks, openChunks);
      assert.equal(batch.opened - batch.closed, openChunks.length);
      if (isEnded(batch.state)) {
        assert.deepEqual(openChunks, []);
        assert.equal(batch.waiting + batch.open, 0);
        assert.ok(ttl > 0, `${ttl}`);
        assert.ok(batch.endedAt);
      } else assert.deepEqual([ttl, batch.endedAt], [-1, undefined]);
    }
    const told = await redis.smembers(keys.ended(of));
    assert.deepEqual(told.filter((member) => !member.endsWith('/batch')).sort(), ended.sort());
    for (const member of told.filter((one) => one.endsWith('/batch')))
      assert.ok(
        found.some(({ id, state }) => member === `${id}/batch` && isEnded(state)) || !active.includes(member),
      );
    assert.deepEqual((await redis.smembers(keys.activeBatches(of))).sort(), active.sort());
    assert.deepEqual((await redis.zrange(keys.open(of), '0', '-1')).sort(), open.sort());
    const stray = all.filter((key) => !known.has(key) && !key.startsWith(`as:{${of}}:deleted-batch:`));
    assert.deepEqual(stray, []);
    return found;
  }

  test('a created batch reads back as it was written, with nothing counted', async () => {
    const batch = draft({ extras: { explain: true, vectors: false }, tensorsOf: randomUUIDv7() });
    await batches.create(batch);
    const { createdAt, updatedAt, ...found } = await read(batch);
    assert.ok(Math.abs(createdAt - Date.now()) < 5_000 && updatedAt >= createdAt);
    const zeros = Object.fromEntries(
      'chunks opened closed rows bad waiting open completed failed cancelled reused uncertain agree disagree undeclared unknown_genre round'
        .split(' ')
        .map((name) => [name, 0]),
    );
    assert.deepEqual(found, { ...batch, ...zeros, sealed: false, openChunks: [], faults: [], firstBad: [] });
    assert.deepEqual(await batches.active(tenant), [batch.id]);
    assert.deepEqual(await records.tenants(), [tenant]);
    assert.equal(await batches.get({ tenant, id: randomUUIDv7() }), undefined);
    await check();
  });

  test('batches are listed newest first, page by page', async () => {
    const at = (ms: number) => {
      const time = ms.toString(16).padStart(12, '0');
      return `${time.slice(0, 8)}-${time.slice(8)}${randomUUIDv7().slice(13)}`;
    };
    const ids = [1, 2, 3, 4, 5].map((n) => at(1_800_000_000_000 + n));
    for (const id of ids) await batches.create(draft({ id }));
    assert.deepEqual(await batches.list(tenant, 2), [ids[4], ids[3]]);
    const { createdAt } = await read({ tenant, id: ids[3]! });
    assert.deepEqual(await batches.list(tenant, 2, createdAt), [ids[2], ids[1]]);
    assert.deepEqual(await batches.list('other', 2), []);
  });

  test('a revision is never given twice', async () => {
    const all = await Promise.all(Array.from({ length: 50 }, () => batches.nextRevision(tenant)));
    assert.equal(new Set(all).size, 50);
    assert.equal(await batches.nextRevision('other'), 1);
  });

  test('the job of a row has the same id for everybody, another one in every row and batch, at the time of its batch', () => {
    const batch = randomUUIDv7();
    const ids = Array.from({ length: 2_000 }, (_, row) => rowJobId(batch, row));
    assert.equal(new Set(ids).size, 2_000);
    assert.deepEqual(
      ids,
      Array.from({ length: 2_000 }, (_, row) => rowJobId(batch, row)),
    );
    for (const id of ids) {
      assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
      assert.equal(id.slice(0, 13), batch.slice(0, 13));
    }
    assert.notEqual(ids[0], rowJobId(randomUUIDv7(), 0));
  });

  describe('while the manifest comes in', () => {
    test('each chunk is counted once, in its order', async () => {
      const batch = draft();
      await batches.create(batch);
      const step = { rows: small, bad: 2 };
      assert.equal((await batches.append(batch, { ...step, chunk: 1 })).outcome, 'refused');
      assert.equal((await batches.append(batch, { ...step, chunk: 0 })).outcome, 'done');
      assert.equal((await batches.append(batch, { ...step, chunk: 0 })).outcome, 'already');
      assert.equal((await batches.append(batch, { chunk: 1, rows: 1, bad: 0 })).outcome, 'done');
      const { rows, bad, waiting, chunks } = await read(batch);
      assert.deepEqual({ rows, bad, waiting, chunks }, { rows: 4, bad: 2, waiting: 4, chunks: 2 });
      await check();
    });

    test('a chunk behind a short one, an empty one and one that is too long are mistakes of the caller', async () => {
      const ref = await receiving([small, 1]);
      await assert.rejects(
        batches.append(ref, { chunk: 2, rows: 1, bad: 0 }),
        /every chunk but the last is full/,
      );
      const other = await receiving([small]);
      await assert.rejects(batches.append(other, { chunk: 1, rows: 0, bad: 0 }), /none is empty/);
      await assert.rejects(batches.append(other, { chunk: 1, rows: small + 1, bad: 0 }), /is full/);
      assert.equal((await read(ref)).rows, small + 1);
      await check();
    });

    test('nothing of it can be opened, paused, fed or tried again', async () => {
      const ref = await receiving([small]);
      for (const step of [
        batches.open(ref, { chunk: 0 }),
        batches.pause(ref),
        batches.resume(ref),
        batches.retry(ref, 2),
        batches
          .reopen(ref, { chunk: 0, states: '...' })
          .then(({ outcome }) => ({ outcome: outcome === 'already' ? 'refused' : outcome })),
      ])
        assert.equal((await step).outcome, 'refused');
      assert.deepEqual(await feed(ref, 0, 0), {
        outcome: 'already',
        state: 'none',
        generation: 0,
        version: 0,
      });
      await check();
    });

    test('it runs once it is sealed, and takes no further chunk', async () => {
      const ref = await receiving([small]);
      const firstBad = [{ line: 7, code: 'row_not_json' as const, message: 'm' }];
      assert.deepEqual(await batches.seal(ref, { bad: 1, firstBad }), { outcome: 'done', state: 'running' });
      assert.equal((await batches.seal(ref, { bad: 1 })).outcome, 'already');
      assert.equal((await batches.append(ref, { chunk: 1, rows: 1, bad: 0 })).outcome, 'refused');
      assert.equal((await batches.append(ref, { chunk: 0, rows: small, bad: 0 })).outcome, 'already');
      const { bad, sealed, firstBad: told } = await read(ref);
      assert.deepEqual([bad, sealed, told], [1, true, firstBad]);
      await check();
    });

    test('a last chunk seals it', async () => {
      const batch = draft();
      await batches.create(batch);
      const step = { chunk: 0, rows: 2, bad: 0, walked: 'music/z.mp3', last: true };
      assert.deepEqual(await batches.append(batch, step), { outcome: 'done', state: 'running' });
      const { sealed, walked } = await read(batch);
      assert.deepEqual([sealed, walked], [true, 'music/z.mp3']);
      await runChunk(batch, 0, 'cc');
      assert.deepEqual(await close(batch, 0), { outcome: 'done', state: 'completed' });
      await check();
    });

    test('without any row it ends with its manifest', async () => {
      const ref = await receiving([]);
      assert.deepEqual(await batches.seal(ref, { bad: 3 }), { outcome: 'done', state: 'completed' });
      const { state, bad, rows } = await read(ref);
      assert.deepEqual([state, bad, rows], ['completed', 3, 0]);
      assert.deepEqual((await batches.pending([tenant]))[0]!.unsaved, [ref.id]);
      const [event] = await events();
      const zeros = { rows: 0, completed: 0, failed: 0, cancelled: 0, reused: 0 };
      assert.deepEqual(
        [event?.type, event?.data['batchId'], event?.data['counts']],
        ['batch.completed', ref.id, { ...zeros, bad: 3 }],
      );
      await check();
    });

    test('it is cancelled at once, whatever has come', async () => {
      const ref = await receiving([small, small]);
      assert.deepEqual(await batches.cancel(ref), { outcome: 'done', state: 'cancelled' });
      assert.equal((await batches.append(ref, { chunk: 2, rows: 1, bad: 0 })).outcome, 'refused');
      assert.equal((await batches.seal(ref, { bad: 0 })).outcome, 'refused');
      assert.equal((await read(ref)).cancelled, 2 * small);
      await check();
      assert.equal((await batches.forget(ref)).outcome, 'done');
      assert.deepEqual(await redis.keys(`as:{${tenant}}:*`), [keys.events(tenant)]);
      assert.equal(await batches.deletedAt(ref), undefined);
    });

    test('its chunks may be opened before it is complete, when it is walked', async () => {
      const ref = await receiving([small], {
        state: 'running',
        origin: { kind: 'prefix', bucket: 'b', prefix: '' },
      });
      await runChunk(ref, 0, 'ccc');
      assert.deepEqual(await close(ref, 0), { outcome: 'done', state: 'running' });
      await check();
      assert.equal((await batches.append(ref, { chunk: 1, rows: 1, bad: 0 })).outcome, 'done');
      assert.equal((await batches.seal(ref, { bad: 0 })).state, 'running');
      await runChunk(ref, 1, 'c');
      assert.equal((await close(ref, 1)).state, 'completed');
      await check();
    });
  });

  describe('the chunks', () => {
    test('are opened one after another, each once', async () => {
      const ref = await running([small, small, 1]);
      assert.equal((await batches.open(ref, { chunk: 1 })).outcome, 'refused');
      assert.equal((await batches.open(ref, { chunk: 0 })).outcome, 'done');
      assert.equal((await batches.open(ref, { chunk: 0 })).outcome, 'already');
      await feed(ref, 0, 1);
      assert.equal((await batches.open(ref, { chunk: 0 })).outcome, 'already');
      assert.equal(await batches.rowStates(ref, 0), '.o.');
      assert.equal((await batches.open(ref, { chunk: 1 })).outcome, 'done');
      assert.equal((await batches.open(ref, { chunk: 2 })).outcome, 'done');
      assert.equal((await batches.open(ref, { chunk: 3 })).outcome, 'refused');
      assert.equal(await batches.rowStates(ref, 2), '.');
      assert.equal(await batches.rowStates(ref, 3), undefined);
      assert.deepEqual(await batches.openChunks(ref), [0, 1, 2]);
      await check();
    });

    test('are told as soon as the last row has ended, and closed once', async () => {
      const ref = await running([small, 1]);
      await runChunk(ref, 0, 'cf');
      assert.deepEqual((await batches.pending([tenant]))[0]!.chunks, []);
      assert.equal((await close(ref, 0)).outcome, 'already');
      await check();
      await feed(ref, 0, 2);
      await end(ref, 0, 2);
      assert.deepEqual(await batches.pending(['other', tenant]), [
        { active: [], chunks: [], unsaved: [] },
        { active: [ref.id], chunks: [{ id: ref.id, chunk: 0 }], unsaved: [] },
      ]);
      await check();
      assert.deepEqual(await close(ref, 0), { outcome: 'done', state: 'running' });
      assert.deepEqual(await close(ref, 0), { outcome: 'already', state: 'running' });
      assert.equal((await read(ref)).closed, 1);
      await check();
      await runChunk(ref, 1, 'c');
      assert.deepEqual(await close(ref, 1), { outcome: 'done', state: 'completed' });
      assert.deepEqual(await close(ref, 1), { outcome: 'already', state: 'completed' });
      const types = (await events()).map(({ type }) => type);
      assert.deepEqual(
        types.filter((type) => !type.startsWith('job.')),
        ['results.part', 'results.part', 'batch.completed'],
      );
      await check();
    });

    test('that end before the manifest does leave the batch running', async () => {
      const ref = await receiving([small], { state: 'running' });
      await runChunk(ref, 0, 'ccc');
      assert.equal((await close(ref, 0)).state, 'running');
      assert.equal((await batches.seal(ref, { bad: 0 })).state, 'completed');
      await check();
    });

    test('of many that close one at once exactly one does', async () => {
      const ref = await running([small, 1]);
      await runChunk(ref, 0, 'ccc');
      const all = await Promise.all(Array.from({ length: 20 }, () => close(ref, 0)));
      assert.deepEqual(all.map(({ outcome }) => outcome).filter((one) => one === 'done').length, 1);
      assert.equal((await read(ref)).closed, 1);
      await check();
    });

    test('are not closed by one who has seen another round of them', async () => {
      const ref = await running([2]);
      await runChunk(ref, 0, 'ff');
      const late = { chunk: 0, round: 0, states: 'ff', jobIds: [], tally: {}, part: countOf('') };
      await close(ref, 0);
      await batches.retry(ref, 2);
      await reopen(ref, 0);
      assert.equal((await batches.close(ref, late)).outcome, 'already');
      await runChunk(ref, 0, 'ff', 1);
      assert.equal((await batches.close(ref, late)).outcome, 'refused');
      await check();
      assert.equal((await close(ref, 0)).outcome, 'done');
      await check();
    });

    test('count in what their rows are judged as', async () => {
      const ref = await running([2]);
      await runChunk(ref, 0, 'cc');
      const tally = { agree: 1, uncertain: 2 };
      await batches.close(ref, { chunk: 0, round: 0, states: 'cc', jobIds: [], tally, part: countOf('') });
      const { agree, uncertain, disagree } = await read(ref);
      assert.deepEqual([agree, uncertain, disagree], [1, 2, 0]);
    });
  });

  describe('a row', () => {
    test("is none of the tenant's open jobs, of which there may be only so many", async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      const before = await records.countOpen(tenant);
      await feed(ref, 0, 0);
      assert.equal(await records.countOpen(tenant), before);
      const upload = acceptedJob({ tenant });
      await records.create(upload);
      assert.equal(await records.countOpen(tenant), before + 1);
      const step = { from: anyOpenState, to: 'cancelled' } as const;
      await records.commit({ tenant, jobId: upload.id, generation: 1 }, step);
      await end(ref, 0, 0);
      assert.equal(await records.countOpen(tenant), before);
    });

    test('is fed once, and moves the counters with every end', async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      assert.equal((await feed(ref, 0, 0)).outcome, 'committed');
      assert.deepEqual(await feed(ref, 0, 0), {
        outcome: 'already',
        state: 'queued',
        generation: 1,
        version: 1,
      });
      await check();
      const ref0 = rowOf(ref, 0, 0);
      await records.commit(ref0, { from: ['queued'], to: 'decoding' });
      await check();
      assert.equal((await end(ref, 0, 0)).outcome, 'committed');
      assert.equal((await end(ref, 0, 0)).outcome, 'already');
      assert.equal((await end(ref, 0, 0, 'failed')).outcome, 'refused');
      assert.equal((await end(ref, 0, 0, 'cancelled')).outcome, 'refused');
      const { completed, waiting } = await read(ref);
      assert.deepEqual([completed, waiting], [1, 2]);
      assert.equal(await redis.ttl(keys.record(tenant, ref0.jobId)), -1, 'stays until its chunk is closed');
      await check();
    });

    test('of a chunk that is not open, or was closed, is no job', async () => {
      const ref = await running([small, small]);
      assert.equal((await feed(ref, 0, 0)).outcome, 'already');
      await runChunk(ref, 0, 'ccc');
      await close(ref, 0);
      assert.equal((await feed(ref, 0, 0)).outcome, 'already');
      assert.equal(await records.exists(tenant, rowOf(ref, 0, 0).jobId), false);
      await check();
    });

    test('is refused while its batch is paused, and from the moment of a cancel', async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      await feed(ref, 0, 0);
      await batches.pause(ref);
      assert.equal((await feed(ref, 0, 1)).outcome, 'refused');
      assert.equal((await feed(ref, 0, 1, 0, { state: 'completed', reused: true })).outcome, 'refused');
      await check();
      assert.equal((await end(ref, 0, 0)).outcome, 'committed', 'what runs goes on');
      await batches.resume(ref);
      assert.equal((await feed(ref, 0, 1)).outcome, 'committed');
      await batches.cancel(ref);
      assert.equal((await feed(ref, 0, 2)).outcome, 'refused');
      await check();
      await batches.cancelRows(ref, { chunk: 0 });
      assert.equal((await feed(ref, 0, 2)).outcome, 'already');
      await check();
    });

    test('that was prepared for an earlier round is refused', async () => {
      const ref = await running([small]);
      await runChunk(ref, 0, 'cff');
      await close(ref, 0);
      await batches.retry(ref, 2);
      await reopen(ref, 0);
      assert.equal((await feed(ref, 0, 1, 0)).outcome, 'refused');
      assert.equal((await feed(ref, 0, 1, 1)).outcome, 'committed');
      assert.equal((await feed(ref, 0, 0, 1)).outcome, 'already', 'it keeps its result');
      await check();
    });

    test('that is known already, or can never run, ends as it is made', async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      assert.equal((await feed(ref, 0, 0, 0, { state: 'completed', reused: true })).outcome, 'committed');
      assert.equal((await feed(ref, 0, 1, 0, { state: 'failed', error })).outcome, 'committed');
      await check();
      assert.equal((await feed(ref, 0, 2, 0, { state: 'completed' })).outcome, 'committed');
      const { completed, reused, failed, faults } = await read(ref);
      assert.deepEqual([completed, reused, failed, faults], [2, 1, 1, [{ row: 1, error: fault }]]);
      assert.deepEqual((await batches.pending([tenant]))[0]!.chunks, [{ id: ref.id, chunk: 0 }]);
      assert.deepEqual(
        (await events()).map(({ type, data }) => [type, data.batchId, data.row, data.error]),
        [
          ['job.completed', ref.id, 0, null],
          ['job.failed', ref.id, 1, error],
          ['job.completed', ref.id, 2, null],
        ],
      );
      await check();
    });

    test('cannot end without its batch', async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      await feed(ref, 0, 0);
      const { batch: _, ...alone } = rowOf(ref, 0, 0);
      for (const to of ['completed', 'failed', 'cancelled'] as const)
        await assert.rejects(
          records.commit(alone, { from: anyOpenState, to }),
          /ends together with its counters/,
        );
      await check();
    });

    test('that has ended cannot start over by itself', async () => {
      const ref = await running([small]);
      await batches.open(ref, { chunk: 0 });
      for (const [row, to] of (['completed', 'failed', 'cancelled'] as const).entries()) {
        await feed(ref, 0, row);
        await end(ref, 0, row, to);
        const again = await records.commit(rowOf(ref, 0, row), {
          from: [to],
          to: 'queued',
          raiseGeneration: true,
        });
        assert.notEqual(again.outcome, 'committed');
      }
      await check();
    });

    test('that goes back to the decoder under another generation is counted once', async () => {
      const ref = await running([1]);
      await batches.open(ref, { chunk: 0 });
      await feed(ref, 0, 0);
      const step = { from: ['queued'], to: 'queued', raiseGeneration: true } as const;
      assert.equal((await records.commit(rowOf(ref, 0, 0), step)).outcome, 'committed');
      assert.equal((await end(ref, 0, 0)).outcome, 'refused');
      await check();
      const raised = { ...rowOf(ref, 0, 0), generation: 2 };
      assert.equal(
        (await records.commit(raised, { from: ['queued'], to: 'failed', set: { error } })).outcome,
        'committed',
      );
      assert.equal((await close(ref, 0)).state, 'completed');
      await batches.retry(ref, 2);
      await reopen(ref, 0);
      const again = await feed(ref, 0, 0, 1);
      assert.ok(again.outcome === 'committed' && again.generation > 2, 'its queue ids are new');
      await check();
    });

    test('delivered again after its chunk was closed does no harm', async () => {
      const ref = await running([1]);
      await runChunk(ref, 0, 'c');
      await close(ref, 0);
      for (const to of ['decoding', 'decoded', 'completed', 'failed', 'cancelled'] as const)
        assert.deepEqual(await end(ref, 0, 0, to), {
          outcome: 'missing',
          state: 'none',
          generation: 0,
          version: 0,
        });
      await check();
    });

    test('is told to nobody but when it is cancelled', async () => {
      const subscriber = connectRedisForWorker(server.url);
      const heard: string[] = [];
      await subscriber.subscribe(changesChannel);
      subscriber.on('message', (_channel, message) => heard.push(JSON.parse(message).state));
      const ref = await running([2]);
      await runChunk(ref, 0, 'cx');
      while (heard.length === 0) await sleep(5);
      await redis.publish(changesChannel, '{"state":"last"}');
      while (!heard.includes('last')) await sleep(5);
      subscriber.disconnect();
      assert.deepEqual(heard, ['cancelled', 'last']);
    });

    test('that failed is told with the batch, the first twenty of them', async () => {
      const big = createBatchRecords(redis, { resultSeconds: 60 });
      const batch = draft();
      await big.create(batch);
      await big.append(batch, { chunk: 0, rows: 30, bad: 0, last: true });
      await big.open(batch, { chunk: 0 });
      for (let row = 29; row >= 0; row -= 1) await feed(batch, 0, row, 0, { state: 'failed', error });
      const { faults } = await read(batch);
      assert.deepEqual(
        faults,
        Array.from({ length: 20 }, (_, n) => ({ row: 29 - n, error: fault })),
      );
      const states = 'f'.repeat(30);
      await big.close(batch, { chunk: 0, round: 0, states, jobIds: [], tally: {}, part: countOf('') });
      await big.retry(batch, 2);
      assert.deepEqual((await read(batch)).faults, []);
    });

    test('of 16 labels and 4 windows takes at most 4 kB of Redis', async (t) => {
      const ref = await running([1]);
      await batches.open(ref, { chunk: 0 });
      const scores = () => Array.from({ length: 16 }, (_, n) => (3_127 * n + 12_345) / 1e6);
      const decoded: Decoded = {
        contentId: 'c'.repeat(64),
        tensorKey: `tensors/acme/${'c'.repeat(64)}/${'p'.repeat(16)}/${'s'.repeat(16)}.1`,
        windows: [0, 30, 60, 90].map((start) => ({
          start,
          end: start + 30,
          validFrames: 1_292,
          dbAt0: -79.8234,
          dbAt255: 0.1766,
          peakDbfs: -0.3012,
          silent: false,
        })),
        input: {
          container: 'mp3',
          codec: 'mp3',
          sampleRate: 44_100,
          channels: 2,
          duration: 241.45632,
          bitRate: 256_000,
          analysedStart: 0,
          analysedEnd: 241.45632,
          bandwidth: 16_021.4,
        },
        warnings: [
          { code: 'clipped', message: 'Peaks are cut off: the loudness is not what it was.', value: 0.0123 },
        ],
      };
      const outcome: Outcome = {
        probabilities: scores(),
        windows: Array.from({ length: 4 }, scores),
        outlier: 0.1234,
        outliers: [0.1234, 0.2345, 0.3456, 0.4567],
        provider: 'cpu',
      };
      const key = `catalogue/2019/${'label'.repeat(8)}/07 - A title of some length.flac`;
      const source = { bucket: 'music-of-acme', key, etag: 'e'.repeat(32), size: 30_123_456 };
      await feed(ref, 0, 0, 0, {
        audio: { source, filename: '07 - A title of some length.flac' },
        class: 'backfill',
        ref: 'urn:isrc:GBAYE0601498',
        revision: 12,
        traceparent: `00-${'0123456789abcdef'.repeat(2)}-0123456789abcdef-01`,
      });
      const timings = {
        decodeWait: 12_345,
        decodeFetch: 123,
        decode: 456,
        inferenceWait: 789,
        batchWait: 12.345678,
        inference: 345.678901,
      };
      await records.commit(rowOf(ref, 0, 0), { from: ['queued'], to: 'decoding', add: { decodeStarts: 1 } });
      await records.commit(rowOf(ref, 0, 0), {
        from: ['decoding'],
        to: 'decoded',
        set: { decoded, timings },
      });
      await records.commit(rowOf(ref, 0, 0), {
        from: ['decoded'],
        to: 'classifying',
        add: { inferenceStarts: 1 },
      });
      await records.commit(rowOf(ref, 0, 0), {
        from: ['classifying'],
        to: 'completed',
        set: { outcome, timings },
      });
      const bytes = Number(
        await redis.memory('USAGE', keys.record(tenant, rowOf(ref, 0, 0).jobId), 'SAMPLES', 0),
      );
      t.diagnostic(`${bytes} bytes`);
      assert.ok(bytes > 1_000 && bytes <= 4_096, `${bytes} bytes`);
    });
  });

  describe('a pause', () => {
    test('and its end are the same however often they are said', async () => {
      const ref = await running([small]);
      assert.deepEqual(await batches.resume(ref), { outcome: 'already', state: 'running' });
      assert.deepEqual(await batches.pause(ref), { outcome: 'done', state: 'paused' });
      assert.deepEqual(await batches.pause(ref), { outcome: 'already', state: 'paused' });
      assert.equal((await batches.open(ref, { chunk: 0 })).outcome, 'refused');
      assert.deepEqual(await batches.resume(ref), { outcome: 'done', state: 'running' });
      assert.equal((await batches.open(ref, { chunk: 0 })).outcome, 'done');
      await check();
    });

    test('lets what runs come to its end, and the batch too', async () => {
      const ref = await running([2]);
      await batches.open(ref, { chunk: 0 });
      await feed(ref, 0, 0);
      await feed(ref, 0, 1);
      await batches.pause(ref);
      await end(ref, 0, 0);
      await end(ref, 0, 1);
      assert.deepEqual(await close(ref, 0), { outcome: 'done', state: 'completed' });
      assert.equal((await batches.resume(ref)).outcome, 'refused');
      assert.equal((await batches.pause(ref)).outcome, 'refused');
      await check();
    });
  });

  describe('a cancel', () => {
    test('ends at once what has no chunk open', async () => {
      const ref = await running([small, 1]);
      assert.deepEqual(await batches.cancel(ref), { outcome: 'done', state: 'cancelled' });
      assert.deepEqual(await batches.cancel(ref), { outcome: 'already', state: 'cancelled' });
      assert.equal((await read(ref)).cancelled, 4);
      assert.equal((await batches.retry(ref, 2)).outcome, 'refused');
      await check();
    });

    test('ends the rest when the open chunks are closed: rows that ran keep their ends', async () => {
      const ref = await running([small, small, small, 1]);
      await runChunk(ref, 0, 'ccf');
      await close(ref, 0);
      await batches.open(ref, { chunk: 1 });
      await feed(ref, 1, 0);
      await feed(ref, 1, 1);
      await end(ref, 1, 1);
      await batches.open(ref, { chunk: 2 });
      assert.deepEqual(await batches.cancel(ref), { outcome: 'done', state: 'cancelling' });
      await check();
      assert.deepEqual(await batches.cancel(ref), { outcome: 'already', state: 'cancelling' });
      for (const step of [
        batches.pause(ref),
        batches.resume(ref),
        batches.open(ref, { chunk: 3 }),
        batches.retry(ref, 2),
      ])
        assert.equal((await step).outcome, 'refused');
      assert.equal((await batches.cancelRows(ref, { chunk: 1 })).outcome, 'done');
      assert.equal((await batches.cancelRows(ref, { chunk: 1 })).outcome, 'already');
      await check();
      assert.equal((await end(ref, 1, 0, 'cancelled')).outcome, 'committed');
      await check();
      assert.deepEqual(await close(ref, 1), { outcome: 'done', state: 'cancelling' });
      assert.equal((await batches.cancelRows(ref, { chunk: 2 })).outcome, 'done');
      assert.deepEqual((await batches.pending([tenant]))[0]!.chunks, [{ id: ref.id, chunk: 2 }]);
      assert.deepEqual(await close(ref, 2), { outcome: 'done', state: 'cancelled' });
      const { completed, failed, cancelled } = await read(ref);
      assert.deepEqual([completed, failed, cancelled], [3, 1, 6]);
      assert.deepEqual([parts.get(`${ref.id}/1`), parts.get(`${ref.id}/2`)], ['xcx', 'xxx']);
      await check();
    });

    test('of a paused batch, and in the middle of a retry', async () => {
      const ref = await running([small, small]);
      await runChunk(ref, 0, 'cff');
      await close(ref, 0);
      await runChunk(ref, 1, 'fff');
      await close(ref, 1);
      await batches.retry(ref, 2);
      await reopen(ref, 0);
      await feed(ref, 0, 1, 1);
      await batches.pause(ref);
      assert.equal((await reopen(ref, 1)).outcome, 'refused');
      await batches.cancel(ref);
      await check();
      await batches.cancelRows(ref, { chunk: 0 });
      await end(ref, 0, 1, 'completed', 1);
      assert.deepEqual(await close(ref, 0), { outcome: 'done', state: 'cancelled' });
      assert.equal(parts.get(`${ref.id}/0`), 'ccx');
      const { completed, failed, cancelled } = await read(ref);
      assert.deepEqual([completed, failed, cancelled], [2, 3, 1], 'what was not tried again stays as it was');
      await check();
    });

    test('changes nothing in a batch that does not take it', async () => {
      const ref = await running([1]);
      assert.equal((await batches.cancelRows(ref, { chunk: 0 })).outcome, 'refused');
      await runChunk(ref, 0, 'c');
      await close(ref, 0);
      assert.deepEqual(await batches.cancel(ref), { outcome: 'refused', state: 'completed' });
      assert.equal((await batches.cancel({ tenant, id: randomUUIDv7() })).outcome, 'missing');
      await check();
    });
  });

  describe('a retry', () => {
    test('opens what failed again, chunk by chunk, and keeps the rest', async () => {
      const ref = await running([small, small, small, 1]);
      for (const [chunk, letters] of ['cfc', 'ccc', 'fff', 'c'].entries()) {
        await runChunk(ref, chunk, letters);
        await close(ref, chunk);
      }
      await batches.saved(ref, { endedAt: (await read(ref)).endedAt! });
      await check();
      assert.deepEqual(await batches.retry(ref, 9), { outcome: 'done', state: 'running' });
      assert.equal((await batches.retry(ref, 10)).outcome, 'refused');
      const { revision, round, failed, retryNext } = await read(ref);
      assert.deepEqual([revision, round, failed, retryNext], [9, 1, 4, 0]);
      await check();
      assert.equal((await reopen(ref, 2)).outcome, 'refused');
      assert.equal((await reopen(ref, 0)).outcome, 'done');
      assert.equal((await reopen(ref, 0)).outcome, 'already');
      await check();
      assert.equal((await reopen(ref, 1)).outcome, 'done');
      assert.equal(await batches.rowStates(ref, 1), undefined, 'nothing failed in it');
      assert.equal((await reopen(ref, 2)).outcome, 'done');
      assert.equal((await reopen(ref, 3)).outcome, 'done');
      assert.equal((await batches.reopen(ref, { chunk: 3, states: '.' })).outcome, 'already');
      assert.equal((await read(ref)).retryNext, undefined);
      await check();
      await runChunk(ref, 0, 'kck', 1);
      await runChunk(ref, 2, 'cfc', 1);
      assert.deepEqual(await close(ref, 2), { outcome: 'done', state: 'running' });
      assert.deepEqual(await close(ref, 0), { outcome: 'done', state: 'completed' });
      assert.deepEqual(
        [0, 1, 2, 3].map((chunk) => parts.get(`${ref.id}/${chunk}`)),
        ['ccc', 'ccc', 'cfc', 'c'],
      );
      assert.deepEqual(
        (await read(ref)).faults.map(({ row }) => row),
        [2_001],
      );
      assert.deepEqual((await batches.pending([tenant]))[0]!.unsaved, [ref.id]);
      await check();
      await batches.retry(ref, 11);
      for (const chunk of [0, 1, 2, 3]) await reopen(ref, chunk);
      await runChunk(ref, 2, 'kck', 2);
      assert.equal((await close(ref, 2)).state, 'completed');
      assert.equal((await read(ref)).failed, 0);
      await check();
    });

    test('without anything that failed changes nothing', async () => {
      const ref = await running([2]);
      await runChunk(ref, 0, 'cc');
      await close(ref, 0);
      const before = await read(ref);
      assert.deepEqual(await batches.retry(ref, 2), { outcome: 'already', state: 'completed' });
      assert.deepEqual(await read(ref), before);
      await check();
    });

    test('that was looked through without opening anything ends the batch again', async () => {
      const ref = await running([2]);
      await runChunk(ref, 0, 'cf');
      await close(ref, 0);
      await batches.retry(ref, 2);
      // Its part says otherwise: written by hand, or restored from elsewhere.
      assert.deepEqual(await batches.reopen(ref, { chunk: 0, states: 'kk' }), {
        outcome: 'done',
        state: 'completed',
      });
      await check();
    });

    test('goes on with a walk that broke off, after what it found', async () => {
      const ref = await receiving([small], {
        state: 'running',
        origin: { kind: 'prefix', bucket: 'b', prefix: '' },
      });
      await runChunk(ref, 0, 'ccf');
      await close(ref, 0);
      const broken = { code: 'source_forbidden', message: 'The bucket is closed.' };
      assert.deepEqual(await batches.seal(ref, { bad: 0, error: broken }), {
        outcome: 'done',
        state: 'failed',
      });
      assert.deepEqual((await read(ref)).error, broken);
      await check();
      assert.deepEqual(await batches.retry(ref, 2), { outcome: 'done', state: 'running' });
      const { sealed, error: told } = await read(ref);
      assert.deepEqual([sealed, told], [false, undefined]);
      assert.equal((await batches.append(ref, { chunk: 1, rows: 2, bad: 0, last: true })).outcome, 'done');
      assert.equal(
        (await batches.open(ref, { chunk: 1 })).outcome,
        'refused',
        'what is tried again comes first',
      );
      await reopen(ref, 0);
      assert.equal((await batches.open(ref, { chunk: 1 })).outcome, 'done');
      await check();
      await feed(ref, 0, 2, 1);
      await end(ref, 0, 2, 'completed', 1);
      assert.equal((await close(ref, 0)).state, 'running');
      for (const row of [0, 1]) {
        await feed(ref, 1, row, 1);
        await end(ref, 1, row, 'completed', 1);
      }
      assert.equal((await close(ref, 1)).state, 'completed');
      await check();
    });

    test('of a walk that broke off before anything was found', async () => {
      const ref = await receiving([], {
        state: 'running',
        origin: { kind: 'prefix', bucket: 'b', prefix: '' },
      });
      await batches.seal(ref, { bad: 0, error: { code: 'source_forbidden', message: 'm' } });
      assert.deepEqual(await batches.retry(ref, 2), { outcome: 'done', state: 'running' });
      assert.equal((await batches.seal(ref, { bad: 0 })).state, 'completed');
      await check();
    });
  });

  describe('a batch that has ended', () => {
    test('is written once for each ending', async () => {
      const ref = await running([1]);
      await runChunk(ref, 0, 'f');
      await close(ref, 0);
      const { endedAt } = await read(ref);
      await batches.retry(ref, 2);
      await reopen(ref, 0);
      await runChunk(ref, 0, 'c', 1);
      await sleep(2);
      await close(ref, 0);
      assert.equal(
        (await batches.saved(ref, { endedAt: endedAt! })).outcome,
        'refused',
        'it has ended again',
      );
      assert.deepEqual((await batches.pending([tenant]))[0]!.unsaved, [ref.id]);
      const last = { endedAt: (await read(ref)).endedAt! };
      assert.equal((await batches.saved(ref, last)).outcome, 'done');
      assert.equal((await batches.saved(ref, last)).outcome, 'already');
      assert.deepEqual(await batches.pending([tenant]), [{ active: [], chunks: [], unsaved: [] }]);
      await check();
    });

    test('can be removed, and the date of it is kept', async () => {
      const ref = await running([1]);
      assert.deepEqual(await batches.remove(ref, 1_234), { outcome: 'refused', state: 'running' });
      assert.equal((await batches.forget(ref)).outcome, 'refused');
      assert.equal(await batches.deletedAt(ref), undefined);
      await runChunk(ref, 0, 'c');
      await close(ref, 0);
      assert.equal((await batches.remove(ref, 1_234)).outcome, 'done');
      assert.equal((await batches.remove(ref, 5_678)).outcome, 'done', 'also what Redis has forgotten');
      assert.equal(await batches.deletedAt(ref), 1_234);
      assert.equal(await batches.get(ref), undefined);
      assert.deepEqual(await batches.list(tenant, 10), []);
      assert.deepEqual(await batches.pending([tenant]), [{ active: [], chunks: [], unsaved: [] }]);
      await check();
    });

    test('leaves no errand behind when Redis forgot it too soon', async () => {
      const ref = await running([2]);
      await runChunk(ref, 0, 'cc');
      await close(ref, 0);
      await redis.sadd(keys.ended(tenant), `${ref.id}/7`);
      await redis.del(keys.batch(tenant, ref.id));
      assert.equal((await batches.saved(ref, { endedAt: 1 })).outcome, 'missing');
      const step = { chunk: 7, round: 0, states: 'c', jobIds: [], tally: {}, part: countOf('') };
      assert.equal((await batches.close(ref, step)).outcome, 'missing');
      assert.deepEqual(await batches.pending([tenant]), [{ active: [], chunks: [], unsaved: [] }]);
      assert.equal(await redis.exists(keys.batch(tenant, ref.id)), 0, 'no step makes it anew');
    });
  });

  test('what is told of a batch is whole, and only as much as it asked for', async () => {
    const callback = { endpointId: 'ep_1', url: 'https://receiver.example/hooks' };
    for (const [notify, expected] of [
      ['rows', ['job.completed', 'job.failed', 'results.part', 'batch.completed']],
      ['batch', ['results.part', 'batch.completed']],
      ['none', []],
    ] as const) {
      await redis.flushall();
      const ref = await running([2], { notify, callback });
      await batches.open(ref, { chunk: 0 });
      await feed(ref, 0, 0, 0, { state: 'completed' });
      await feed(ref, 0, 1, 0, { state: 'failed', error });
      await close(ref, 0);
      const told = await events();
      assert.deepEqual(
        told.map(({ type }) => type),
        expected,
      );
      assert.equal(new Set(told.map(({ id }) => id)).size, expected.length);
      for (const { id, callback: to, ...event } of told) {
        assert.match(id, /^evt_[0-9a-z_-]+$/);
        assert.deepEqual(to, callback);
        eventSchema.parse({ ...event, data: { ...event.data, resultUrl: 'https://acousticsense.example/' } });
      }
      const part = told.find(({ type }) => type === 'results.part')?.data['part'];
      if (notify !== 'none')
        assert.deepEqual(part, { number: 0, from: 0, to: 2, completed: 1, failed: 1, cancelled: 0 });
    }
  });

  test('how fast it goes is told now and then, only while it runs', async () => {
    const ref = await running([small]);
    await batches.progress(ref, { rate: 12.345, tell: false });
    assert.equal((await read(ref)).rate, 12.345);
    await batches.progress(ref, { rate: 13, tell: true });
    assert.deepEqual(
      (await events()).map(({ type, data }) => [type, data.batchId]),
      [['batch.progress', ref.id]],
    );
    await batches.pause(ref);
    assert.equal((await batches.progress(ref, { rate: 0, tell: true })).outcome, 'refused');
  });

  /** What the random walks did, all together: ids and timing are not seeded, so a single walk may miss a rare step. */
  const walked = new Map<string, number>();
  for (const seed of [1, 2]) {
    test(`whatever many processes do in whatever order, counters equal rows (seed ${seed})`, {
      timeout: 120_000,
    }, async (t) => {
      const random = randomFrom(seed);
      const pick = <T>(from: readonly T[]): T => from[Math.floor(random() * from.length)]!;
      const tally: Record<string, number> = {};
      const refs: BatchRef[] = [];
      const tenants = [tenant, 'other'];
      const isWalked = (ref: BatchRef) => ref.id.endsWith('0') || ref.id.endsWith('1');

      async function create(): Promise<void> {
        const of = pick(tenants);
        const walked = random() < 0.3;
        const batch = draft({
          tenant: of,
          id: `${randomUUIDv7().slice(0, -1)}${walked ? '0' : 'f'}`,
          state: walked ? 'running' : 'receiving',
          origin: walked ? { kind: 'prefix', bucket: 'b', prefix: '' } : { kind: 'manifest' },
        });
        await batches.create(batch);
        refs.push({ tenant: of, id: batch.id });
      }

      /** What a process believes may be old: it remembers batches as it read them some steps ago. */
      const memory = new Map<string, BatchRecord>();
      async function believed(ref: BatchRef): Promise<BatchRecord | undefined> {
        const known = memory.get(ref.id);
        if (known && random() < 0.3) return known;
        const fresh = await batches.get(ref);
        if (fresh) memory.set(ref.id, fresh);
        return fresh;
      }

      async function step(): Promise<void> {
        const ref = pick(refs);
        const batch = await believed(ref);
        if (batch === undefined || (isEnded(batch.state) && random() < 0.5)) return;
        const { openChunks } = batch;
        const chunk = random() < 0.9 && openChunks.length > 0 ? pick(openChunks) : Math.floor(random() * 5);
        const states = (await batches.rowStates(ref, chunk)) ?? '';
        /** Mostly a row for which it is time. */
        const rowAs = (byte: string) =>
          random() < 0.9 && states.includes(byte) ? states.indexOf(byte) : Math.floor(random() * small);
        const round = random() < 0.95 ? batch.round : Math.floor(random() * 3);
        const unfed = rowAs('.');
        const job = rowOf(ref, chunk, rowAs('o'), round);
        const record = random() < 0.9 ? await records.get(ref.tenant, job.jobId) : undefined;
        if (record) job.generation = record.generation;
        const from = anyOpenState;
        const broken = random() < 0.5 && isWalked(ref) ? { error: { code: 'c', message: 'm' } } : {};
        const reused = random() < 0.5;
        const ops = {
          append: () => batches.append(ref, { chunk: batch.chunks, rows: small, bad: 1 }),
          appendAny: () => batches.append(ref, { chunk: Math.floor(random() * 5), rows: small, bad: 1 }),
          last: () => batches.append(ref, { chunk: batch.chunks, rows: 2, bad: 0, last: true }),
          seal: () => batches.seal(ref, { bad: 1, ...broken }),
          open: () => batches.open(ref, { chunk: batch.opened }),
          openAny: () => batches.open(ref, { chunk }),
          feed: () => feed(ref, chunk, unfed, round),
          known: () => feed(ref, chunk, unfed, round, { state: 'completed', reused }),
          wrong: () => feed(ref, chunk, unfed, round, { state: 'failed', error }),
          begin: () => records.commit(job, { from: ['queued', 'decoding'], to: 'decoding' }),
          complete: () => records.commit(job, { from, to: 'completed' }),
          fail: () => records.commit(job, { from, to: 'failed', set: { error } }),
          stop: () => records.commit(job, { from, to: 'cancelled' }),
          raise: () => records.commit(job, { from, to: 'queued', raiseGeneration: true }),
          restart: () => records.commit(job, { from: ['failed'], to: 'queued', raiseGeneration: true }),
          close: () => close(ref, chunk),
          cancelRows: () => batches.cancelRows(ref, { chunk }),
          reopen: async () => {
            const next = batch.retryNext ?? chunk;
            return parts.has(`${ref.id}/${next}`) ? reopen(ref, next) : { outcome: 'none' };
          },
          pause: () => batches.pause(ref),
          resume: () => batches.resume(ref),
          cancel: () => batches.cancel(ref),
          retry: () => batches.retry(ref, batch.revision + 1),
          progress: () => batches.progress(ref, { rate: 1, tell: true }),
          saved: () => batches.saved(ref, { endedAt: batch.endedAt ?? 1 }),
          remove: () => batches.remove(ref, 1),
        };
        const rowSteps = [
          'feed',
          'feed',
          'known',
          'wrong',
          'complete',
          'complete',
          'fail',
          'raise',
          'close',
          'stop',
        ] as const;
        const sensible: Record<BatchRecord['state'], readonly (keyof typeof ops)[]> = {
          receiving: ['append', 'append', 'last', 'seal'],
          running: [
            ...rowSteps,
            'open',
            'open',
            'reopen',
            ...(batch.sealed ? [] : (['append', 'last', 'seal'] as const)),
          ],
          paused: ['resume', 'complete', 'close'],
          cancelling: ['cancelRows', 'stop', 'complete', 'close'],
          completed: ['retry', 'retry', 'saved'],
          failed: ['retry', 'retry', 'saved'],
          cancelled: ['saved'],
        };
        const everything = Object.keys(ops) as (keyof typeof ops)[];
        const rare = ['cancel', 'remove'];
        const name =
          random() < 0.8
            ? pick(sensible[batch.state])
            : pick(everything.filter((one) => !rare.includes(one) || random() < 0.4));
        const { outcome } = await ops[name]().catch((error: Error) => {
          if (/every chunk but the last is full/.test(error.message)) return { outcome: 'mistake' };
          throw error;
        });
        tally[`${name} ${outcome}`] = (tally[`${name} ${outcome}`] ?? 0) + 1;
      }

      for (let n = 0; n < 2_000; n += 1) {
        if (refs.length < 3) await create();
        const [oldest] = refs;
        if (random() < 0.05 && (await batches.remove(oldest!, 1)).outcome === 'done') refs.shift();
        // Alone, or several at once.
        await Promise.all(Array.from({ length: random() < 0.5 ? 1 : 1 + Math.floor(random() * 5) }, step));
        for (const of of tenants) await check(of);
      }
      t.diagnostic(
        Object.entries(tally)
          .sort()
          .map(([what, count]) => `${what}: ${count}`)
          .join(', '),
      );
      for (const [what, count] of Object.entries(tally)) walked.set(what, (walked.get(what) ?? 0) + count);

      // Then all of them come to their end, and leave nothing.
      for (const of of tenants) {
        for (const id of await batches.active(of)) {
          const ref = { tenant: of, id };
          await batches.cancel(ref);
          for (const chunk of await batches.openChunks(ref)) {
            await batches.cancelRows(ref, { chunk });
            const states = (await batches.rowStates(ref, chunk))!;
            for (const [row, byte] of [...states].entries()) {
              if (byte !== 'o') continue;
              const record = (await records.get(of, rowOf(ref, chunk, row).jobId))!;
              await records.commit(
                { ...rowOf(ref, chunk, row), generation: record.generation },
                { from: anyOpenState, to: 'cancelled' },
              );
            }
            await close(ref, chunk);
          }
        }
        for (const { id, endedAt, state } of await check(of)) {
          assert.ok(isEnded(state), state);
          await batches.saved({ tenant: of, id }, { endedAt: endedAt! });
          await batches.remove({ tenant: of, id }, 1);
        }
        const left = (await redis.keys(`as:{${of}}:*`)).filter((key) => !key.includes(':deleted-batch:'));
        assert.deepEqual(left, [keys.events(of)]);
      }
    });
  }

  test('the random walks came to every step', () => {
    for (const what of ['open', 'append', 'close', 'reopen', 'retry', 'cancel', 'cancelRows', 'pause'])
      assert.ok(walked.has(`${what} done`), what);
    for (const what of ['feed', 'known', 'wrong', 'complete', 'fail', 'stop', 'raise'])
      assert.ok(walked.has(`${what} committed`), what);
  });
});

/** Mulberry32. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}
