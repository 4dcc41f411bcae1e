import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import { type AcceptedJob, acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { InfrastructureFault } from './errors.ts';
import { eventSchema, eventsChannel, jobData } from './events.ts';
import type { Decoded, JobRecord, Outcome } from './job.ts';
import { anyOpenState, changesChannel, createJobRecords, type JobRecords } from './job-records.ts';
import { type JobState, jobStates } from './pipeline.ts';
import { connectRedis, connectRedisForWorker } from './redis.ts';

const tenant = 'acme';

const draft = (overrides: Partial<AcceptedJob> = {}) =>
  acceptedJob({
    tenant,
    audio: { key: 'k', size: 1, sha256: 's', filename: 'Ünïcode "quoted"\n😀.mp3' },
    ...overrides,
  });

const decoded: Decoded = {
  contentId: 's',
  tensorKey: 'tensors/x',
  windows: [{ start: 0, end: 30, validFrames: 128, dbAt0: -70, dbAt255: 0, peakDbfs: -1, silent: false }],
  input: {
    container: 'mp3',
    codec: 'mp3',
    sampleRate: 44_100,
    channels: 2,
    duration: 30,
    analysedStart: 0,
    analysedEnd: 30,
    bandwidth: 11_025,
  },
  warnings: [],
};
const outcome: Outcome = { probabilities: [0.25, 0.75], windows: [[0.25, 0.75]], provider: 'cpu' };

describe('the job record', () => {
  let server: TestRedis;
  let redis: Redis;
  let records: JobRecords;

  before(async () => {
    server = await startRedis();
    redis = connectRedisForWorker(server.url);
    records = createJobRecords(redis, { resultSeconds: 3_600 });
  });
  after(async () => {
    redis.disconnect();
    await server[Symbol.asyncDispose]();
  });

  const refOf = ({ id, generation }: { id: string; generation: number }) => ({
    tenant,
    jobId: id,
    generation,
  });
  const events = async () =>
    (await redis.xrange(`as:{${tenant}}:events`, '-', '+')).map(([, [, , , json]]) => JSON.parse(json!));
  async function jobIn(state: JobState): Promise<JobRecord> {
    const job = draft();
    await records.create(job);
    if (state !== 'queued') await records.commit(refOf(job), { from: ['queued'], to: state });
    return (await records.get(tenant, job.id))!;
  }

  test('a created record reads back as it was written, queued, at version 1', async () => {
    const job = draft();
    assert.deepEqual(await records.create(job), {
      outcome: 'committed',
      state: 'queued',
      generation: 1,
      version: 1,
    });
    const { updatedAt, ...read } = (await records.get(tenant, job.id))!;
    assert.deepEqual(read, { ...job, state: 'queued', version: 1 });
    assert.ok(Math.abs(updatedAt - Date.now()) < 5_000);
    assert.deepEqual(await records.tenants(), [tenant]);
  });

  test('a record of a newer version is read without the fields that are not known here', async () => {
    const job = await jobIn('decoding');
    await redis.hset(`as:{${tenant}}:job:${job.id}`, 'mood', 'blue');
    assert.deepEqual(await records.get(tenant, job.id), job);
  });

  test('creating the same job twice changes nothing, in whatever state it is', async () => {
    for (const state of jobStates) {
      const job = await jobIn(state);
      assert.equal((await records.create(job)).outcome, 'already', state);
      assert.equal((await records.get(tenant, job.id))?.state, state);
    }
  });

  test('a job goes forward through every state, each commit raising the version', async () => {
    const job = draft();
    const ref = refOf(job);
    await records.create(job);
    await records.commit(ref, { from: ['queued', 'decoding'], to: 'decoding', add: { decodeStarts: 1 } });
    await records.commit(ref, { from: ['decoding'], to: 'decoded', set: { decoded } });
    await records.commit(ref, {
      from: ['decoded', 'classifying'],
      to: 'classifying',
      add: { inferenceStarts: 1 },
    });
    const last = await records.commit(ref, { from: ['classifying'], to: 'completed', set: { outcome } });
    assert.deepEqual(last, { outcome: 'committed', state: 'completed', generation: 1, version: 5 });
    const record = await records.get(tenant, job.id);
    assert.deepEqual(record?.decoded, decoded);
    assert.deepEqual(record?.outcome, outcome);
    assert.equal(record?.decodeStarts, 1);
  });

  test('a stage that begins again after its worker died counts the start', async () => {
    const job = await jobIn('decoding');
    const again = { from: ['queued', 'decoding'], to: 'decoding', add: { decodeStarts: 1 } } as const;
    assert.equal((await records.commit(refOf(job), again)).outcome, 'committed');
    assert.equal((await records.commit(refOf(job), again)).outcome, 'committed');
    assert.equal((await records.get(tenant, job.id))?.decodeStarts, 2);
  });

  test('a step that was committed before answers already, and writes nothing a second time', async () => {
    const job = await jobIn('decoding');
    const step = { from: ['decoding'], to: 'decoded', set: { decoded } } as const;
    const first = await records.commit(refOf(job), step);
    const second = await records.commit(refOf(job), {
      ...step,
      set: { decoded: { ...decoded, contentId: 'other' } },
    });
    assert.equal(second.outcome, 'already');
    assert.equal(second.version, first.version);
    assert.equal((await records.get(tenant, job.id))?.decoded?.contentId, 's');
  });

  test('a step that lies behind the record answers already: a late delivery only hands on', async () => {
    const job = await jobIn('completed');
    assert.equal(
      (await records.commit(refOf(job), { from: ['queued', 'decoding'], to: 'decoding' })).outcome,
      'already',
    );
    assert.equal((await records.get(tenant, job.id))?.state, 'completed');
  });

  test('of many workers that commit the same result at once exactly one is committed, with one event', async () => {
    const job = await jobIn('classifying');
    const before = (await events()).length;
    const step = {
      from: ['classifying'],
      to: 'completed',
      set: { outcome },
      events: [{ type: 'job.completed', data: jobData(job, 'completed') }],
    } as const;
    const all = await Promise.all(Array.from({ length: 50 }, () => records.commit(refOf(job), step)));
    assert.equal(all.filter((one) => one.outcome === 'committed').length, 1);
    assert.equal(all.filter((one) => one.outcome === 'already').length, 49);
    const mine = (await events()).slice(before);
    assert.deepEqual(
      mine.map(({ type, data }) => [type, data.jobId]),
      [['job.completed', job.id]],
    );
  });

  test('completion and cancellation that race leave exactly one ending', async () => {
    for (let round = 0; round < 40; round += 1) {
      const job = await jobIn('classifying');
      const finish = () =>
        records.commit(refOf(job), { from: ['classifying'], to: 'completed', set: { outcome } });
      const cancel = () => records.commit(refOf(job), { from: anyOpenState, to: 'cancelled' });
      const [a, b] = await Promise.all(round % 2 ? [finish(), cancel()] : [cancel(), finish()]);
      assert.equal([a, b].filter((one) => one.outcome === 'committed').length, 1);
      const record = await records.get(tenant, job.id);
      assert.equal(record?.outcome !== undefined, record?.state === 'completed');
    }
  });

  test('nothing can be committed after a cancel, and the caller is told so', async () => {
    const job = await jobIn('decoding');
    await records.commit(refOf(job), { from: anyOpenState, to: 'cancelled' });
    for (const to of ['decoding', 'decoded', 'completed', 'failed'] as const) {
      const result = await records.commit(refOf(job), { from: anyOpenState, to, set: { decoded } });
      assert.deepEqual([result.outcome, result.state], ['cancelled', 'cancelled'], to);
    }
    assert.equal((await records.get(tenant, job.id))?.decoded, undefined);
  });

  test('a finished job keeps its ending', async () => {
    for (const [ending, other] of [
      ['completed', 'failed'],
      ['completed', 'cancelled'],
      ['failed', 'completed'],
      ['failed', 'cancelled'],
    ] as const) {
      const job = await jobIn(ending);
      const result = await records.commit(refOf(job), { from: anyOpenState, to: other });
      assert.deepEqual([result.outcome, result.state], ['refused', ending], `${ending} -> ${other}`);
    }
  });

  test('a failed job is not mistaken for one that has gone on', async () => {
    const job = await jobIn('failed');
    assert.equal(
      (await records.commit(refOf(job), { from: ['decoding'], to: 'decoded' })).outcome,
      'refused',
    );
  });

  test('under a raised generation every worker of the old one is refused', async () => {
    const job = await jobIn('classifying');
    const raised = await records.commit(refOf(job), {
      from: ['classifying'],
      to: 'queued',
      raiseGeneration: true,
      clear: ['decoded'],
      add: { redecodes: 1 },
    });
    assert.deepEqual([raised.outcome, raised.generation], ['committed', 2]);
    const late = await records.commit(refOf(job), {
      from: ['classifying'],
      to: 'completed',
      set: { outcome },
    });
    assert.deepEqual([late.outcome, late.state, late.generation], ['refused', 'queued', 2]);
    const next = await records.commit({ ...refOf(job), generation: 2 }, { from: ['queued'], to: 'decoding' });
    assert.equal(next.outcome, 'committed');
    const record = await records.get(tenant, job.id);
    assert.deepEqual([record?.outcome, record?.decoded, record?.redecodes], [undefined, undefined, 1]);
  });

  test('a raise that is repeated is refused: the generation rises once', async () => {
    const job = await jobIn('classifying');
    const raise = { from: ['classifying'], to: 'queued', raiseGeneration: true } as const;
    const all = await Promise.all([records.commit(refOf(job), raise), records.commit(refOf(job), raise)]);
    assert.deepEqual(all.map((one) => one.outcome).sort(), ['committed', 'refused']);
    assert.equal((await records.get(tenant, job.id))?.generation, 2);
  });

  test('a commit on a record that does not exist is missing, and creates nothing', async () => {
    const ref = { tenant, jobId: randomUUIDv7(), generation: 1 };
    assert.equal((await records.commit(ref, { from: ['decoding'], to: 'decoded' })).outcome, 'missing');
    assert.equal(await records.exists(tenant, ref.jobId), false);
  });

  test('the same job id under another tenant is another job', async () => {
    const job = draft();
    await records.create(job);
    const result = await records.commit(
      { tenant: 'other', jobId: job.id, generation: 1 },
      { from: ['queued'], to: 'decoding' },
    );
    assert.equal(result.outcome, 'missing');
  });

  test('open jobs are found by the age of their last change, finished ones are not', async () => {
    const open = await jobIn('decoding');
    const finished = await jobIn('completed');
    await sleep(5);
    const found = await records.openSince(tenant, Date.now(), 10_000);
    assert.ok(found.includes(open.id));
    assert.ok(!found.includes(finished.id));
    assert.ok(!(await records.openSince(tenant, open.updatedAt - 1, 10_000)).includes(open.id));
  });

  test('only a finished record expires, and a job that starts over no longer does', async () => {
    const job = await jobIn('decoding');
    const key = `as:{${tenant}}:job:${job.id}`;
    assert.equal(await redis.ttl(key), -1);
    await records.commit(refOf(job), { from: ['decoding'], to: 'failed' });
    const ttl = await redis.ttl(key);
    assert.ok(ttl > 3_500 && ttl <= 3_600, `${ttl}`);
    await records.commit(refOf(job), { from: ['failed'], to: 'queued', raiseGeneration: true });
    assert.equal(await redis.ttl(key), -1);
  });

  test('every commit is told to subscribers, a refused one is not', async () => {
    const subscriber = connectRedisForWorker(server.url);
    const heard: Record<string, unknown>[] = [];
    await subscriber.subscribe(changesChannel);
    subscriber.on('message', (_channel, message) => heard.push(JSON.parse(message)));
    const job = draft();
    await records.create(job);
    await records.commit(refOf(job), { from: ['decoding'], to: 'decoded' });
    await records.commit(refOf(job), { from: ['queued'], to: 'decoding' });
    await records.progress(refOf(job), 'decoding', 2, 0.5);
    while (heard.length < 3) await sleep(5);
    subscriber.disconnect();
    const common = { tenant, jobId: job.id, generation: 1 };
    assert.deepEqual(heard, [
      { ...common, state: 'queued', version: 1 },
      { ...common, state: 'decoding', version: 2 },
      { ...common, state: 'decoding', version: 2, fraction: 0.5 },
    ]);
  });

  test('an ending is told under an id that is the same whoever works it out, with where its caller wants to hear of it', async () => {
    const callback = { endpointId: 'ep_1', url: 'https://receiver.example/hooks/1' };
    const job = acceptedJob({ tenant: 'told', ref: 'ISRC1', revision: 7, callback });
    const other = connectRedisForWorker(server.url);
    const heard: string[] = [];
    await other.subscribe(eventsChannel);
    other.on('message', (_channel, message) => heard.push(message));
    await records.create(job);
    const data = jobData({ ...job, outcome, error: undefined }, 'completed', { labels: ['jazz', 'blues'] });
    const events = [{ type: 'job.completed' as const, data }];
    const mine = { tenant: 'told', jobId: job.id, generation: 1 };
    await records.commit(mine, { from: ['queued'], to: 'completed', set: { outcome }, events });
    const told = await redis.xrange('as:{told}:events', '-', '+');
    assert.equal(told.length, 1);
    const [, [, id, , json, , to]] = told[0]!;
    assert.equal(id, `evt_${job.id}_1_completed`);
    assert.deepEqual(JSON.parse(to!), callback);
    const event = JSON.parse(json!);
    event.data.resultUrl = 'https://acousticsense.example/v1/jobs/1';
    const parsed = eventSchema.parse(event);
    assert.equal(parsed.type, 'job.completed');
    assert.deepEqual([event.data.ref, event.data.revision, event.data.genres.length], ['ISRC1', 7, 2]);
    while (heard.length === 0) await sleep(5);
    other.disconnect();
    assert.deepEqual(heard, ['told']);
  });

  test('events are kept until somebody has put them away, however many there are', async () => {
    for (let n = 0; n < 300; n += 1) {
      const job = draft({ tenant: 'busy' });
      await records.create(job);
      await records.commit(
        { tenant: 'busy', jobId: job.id, generation: 1 },
        {
          from: ['queued'],
          to: 'failed',
          events: [{ type: 'job.failed', data: jobData(job, 'failed') }],
        },
      );
    }
    assert.equal(await redis.xlen('as:{busy}:events'), 300);
  });

  test('while Redis is away a commit fails within a second as an infrastructure fault, and works again afterwards', async () => {
    await using other = await startRedis({ appendOnly: true, args: ['--appendfsync', 'always'] });
    const client = connectRedis(other.url);
    await new Promise((resolve) => client.once('ready', resolve));
    const mine = createJobRecords(client, { resultSeconds: 60 });
    const job = draft();
    await mine.create(job);
    await other.stop('SIGKILL');
    const from = performance.now();
    await assert.rejects(mine.commit(refOf(job), { from: ['queued'], to: 'decoding' }), InfrastructureFault);
    assert.ok(performance.now() - from < 1_000);
    await other.start();
    while (client.status !== 'ready') await sleep(20);
    assert.equal((await mine.commit(refOf(job), { from: ['queued'], to: 'decoding' })).outcome, 'committed');
    client.disconnect();
  });
});
