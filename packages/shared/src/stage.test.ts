import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { acceptedJob } from '../../../test/job.ts';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { type Backends, openBackends } from './backends.ts';
import type { JobRecord } from './job.ts';
import { anyOpenState, changesChannel } from './job-records.ts';
import { queuePrefix } from './queues.ts';
import type { Service } from './service.ts';
import { runStage, type StageJob } from './stage.ts';

const tenant = 'acme';
const route = { profileHash: 'p', modelDigest: 'd'.repeat(64) };

describe('a stage', () => {
  let server: TestRedis;
  let directory: string;
  let backends: Backends;
  let run: (job: StageJob, signal: AbortSignal) => Promise<void>;
  const closers: (() => unknown)[] = [];

  before(async () => {
    server = await startRedis({ appendOnly: true, args: ['--appendfsync', 'always'] });
    directory = await mkdtemp(path.join(tmpdir(), 'as-stage-'));
    const checks: (() => Promise<void>)[] = [];
    const service = {
      log: pino({ level: 'silent' }),
      registry: new Registry(),
      closing: new AbortController().signal,
      onClose: (_what: string, close: () => unknown) => closers.push(close),
      addCheck: (_part: string, check: () => Promise<void>) => checks.push(check),
      notReady: async () =>
        Object.fromEntries(
          (await Promise.allSettled(checks.map((check) => check())))
            .filter(({ status }) => status === 'rejected')
            .map((_, index) => [index, 'away']),
        ),
      distrust: () => {},
    } as unknown as Service;
    backends = openBackends(service, {
      redisUrl: server.url,
      storageUrl: pathToFileURL(directory).href,
      retention: { resultSeconds: 60 },
    });
    await once(backends.redis, 'ready');
    const stage = {
      run: (job: StageJob, signal: AbortSignal) => run(job, signal),
      handOn: async () => {},
    };
    runStage({ service, name: 'decode', route, stage, concurrency: 1, backends });
  });
  beforeEach(() => {
    run = async () => {};
  });
  after(async () => {
    for (const close of closers.reverse()) await close();
    await server[Symbol.asyncDispose]();
    await rm(directory, { recursive: true });
  });

  async function accepted(): Promise<JobRecord> {
    const record = acceptedJob({ tenant, ...route });
    await backends.records.create(record);
    const stored = (await backends.records.get(tenant, record.id))!;
    // Last: from here on the stage runs, which may be what ends Redis.
    await backends.queues.add('decode', record);
    return stored;
  }
  async function until(what: string, holds: () => Promise<boolean>): Promise<void> {
    for (let n = 0; n < 400; n += 1) {
      if (await holds().catch(() => false)) return;
      await sleep(50);
    }
    assert.fail(`never: ${what}`);
  }
  const queueState = (job: JobRecord) => backends.queues.state('decode', job);

  test('whose job loses Redis in the middle gives it back without spending one of its attempts', async () => {
    let runs = 0;
    run = async (stageJob) => {
      runs += 1;
      if (runs === 1) await server.stop('SIGKILL');
      await stageJob.commit('decoded', {});
    };
    const job = await accepted();
    await until('given up while Redis is away', async () => runs === 1);
    await sleep(500);
    await server.start();
    await until('completed', async () => (await queueState(job)) === 'completed');
    assert.equal(runs, 2);
    const key = `${queuePrefix('decode-p')}:decode-p:${job.id}.1`;
    // BullMQ counts the attempt that succeeds, too.
    assert.equal(await backends.redis.hget(key, 'atm'), '1');
  });

  test('hears of a cancel after a message on the channel that is none of ours', async (t) => {
    // Thrown in a listener of the connection, it would end a service.
    const thrown: unknown[] = [];
    const note = (error: unknown) => thrown.push(error);
    process.on('uncaughtException', note);
    t.after(() => process.off('uncaughtException', note));
    const reason = new Promise<unknown>((resolve) => {
      run = async (_job, signal) => {
        await new Promise((gone) => signal.addEventListener('abort', gone, { once: true }));
        resolve(signal.reason);
        signal.throwIfAborted();
      };
    });
    const job = await accepted();
    await until('decoding', async () => (await backends.records.get(tenant, job.id))?.state === 'decoding');
    for (const message of ['not JSON', 'null', '7', '{}'])
      await backends.redis.publish(changesChannel, message);
    await backends.records.commit(
      { tenant, jobId: job.id, generation: 1 },
      { from: anyOpenState, to: 'cancelled' },
    );
    assert.equal(String(await reason), 'Symbol(cancelled)');
    assert.deepEqual(thrown, []);
    await until('completed', async () => (await queueState(job)) === 'completed');
  });
});
