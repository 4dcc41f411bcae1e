import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { gzipSync } from 'node:zlib';
import type { Redis } from 'ioredis';
import { startRedis } from '../../../test/redis.ts';
import { startS3 } from '../../../test/s3.ts';
import type { ArchiveOptions } from './archived-log.ts';
import { InfrastructureFault } from './errors.ts';
import { createDeliveryLog, createEventLog, type Delivery, type EventLog } from './event-log.ts';
import { eventsChannel, type StoredEvent } from './events.ts';
import { logSegmentKey } from './object-keys.ts';
import { openStorage } from './open-storage.ts';
import { connectRedis } from './redis.ts';
import { deletePrefix, type Storage } from './storage.ts';

const server = await startRedis();
const redis = connectRedis(server.url);
await once(redis, 'ready');
after(async () => {
  redis.disconnect();
  await server[Symbol.asyncDispose]();
});

const timestamp = '2026-11-22T10:00:00.000Z';
const eventOf = (n: number): StoredEvent => ({
  type: 'endpoint.disabled',
  timestamp,
  data: { endpointId: `ep_${n}`, url: 'https://example.com/', reason: 'failing', failingSince: null },
});
const entryOf = (n: number) => ({ id: `evt_${n}`, event: eventOf(n) });
const numberOf = ({ id }: { id: string }) => Number(id.slice('evt_'.length));
const upTo = (count: number, from = 0) => Array.from({ length: count }, (_, n) => from + n);

const day = 86_400_000;
const midnight = Math.floor(Date.now() / day) * day;

/** Adds events as if they had happened then: `from`, `from + stepMs`, ... */
async function addPast(tenant: string, numbers: readonly number[], from: number, stepMs: number) {
  const cursors: string[] = [];
  for (let n = 0; n < numbers.length; n += 1_000) {
    const pipeline = redis.pipeline();
    for (const [index, number] of numbers.slice(n, n + 1_000).entries()) {
      const cursor = `${from + (n + index) * stepMs}-0`;
      cursors.push(cursor);
      pipeline.xadd(
        `as:{${tenant}}:events`,
        cursor,
        'id',
        `evt_${number}`,
        'event',
        JSON.stringify(eventOf(number)),
      );
    }
    for (const [error] of (await pipeline.exec())!) if (error) throw error;
  }
  return cursors;
}

/** Page by page to the end. */
async function readAll(log: EventLog, tenant: string, limit = 700, from?: string): Promise<number[]> {
  const numbers: number[] = [];
  for (let cursor = from; ; ) {
    const page = await log.read(tenant, cursor, limit);
    numbers.push(...page.events.map(numberOf));
    if (!page.more) return numbers;
    assert.equal(page.events.length, limit);
    cursor = page.cursor;
  }
}

async function keysUnder(storage: Storage, prefix: string): Promise<string[]> {
  return (await Array.fromAsync(storage.list(prefix))).map(({ key }) => key).sort();
}

/** What an archiver meets that is held up, or killed, after its segment is written. */
function heldAfterPut(storage: Storage) {
  const written = Promise.withResolvers<string>();
  const released = Promise.withResolvers<void>();
  return {
    written: written.promise,
    release: () => released.resolve(),
    storage: {
      ...storage,
      put: async (...args: Parameters<Storage['put']>) => {
        const etag = await storage.put(...args);
        written.resolve(args[0]);
        await released.promise;
        return etag;
      },
    },
  };
}

const drivers = [
  {
    name: 'a directory',
    async open() {
      const directory = await mkdtemp(path.join(tmpdir(), 'as-log-'));
      return {
        url: pathToFileURL(directory).href,
        close: () => rm(directory, { recursive: true, force: true }),
      };
    },
  },
  {
    name: 's3rver',
    async open() {
      const s3 = await startS3();
      return { url: s3.url, close: async () => s3[Symbol.asyncDispose]() };
    },
  },
];

for (const driver of drivers) {
  describe(`the event log with segments in ${driver.name}`, () => {
    let storage: Storage;
    let close: () => Promise<void>;
    before(async () => {
      const opened = await driver.open();
      storage = openStorage(opened.url);
      close = opened.close;
    });
    after(async () => {
      storage.close();
      await close();
    });
    beforeEach(async () => {
      await redis.flushall();
      for (const prefix of ['events/', 'deliveries/']) await deletePrefix(storage, prefix);
    });
    const open = (options: Partial<ArchiveOptions> = {}, on: Redis = redis) =>
      createEventLog({ redis: on, storage, kept: 0, segmentEvents: 1_000, segmentAgeMs: 0, ...options });

    test('20,000 events over three days are read in order, once each, from storage and Redis alike', async (t) => {
      const cursors = await addPast('acme', upTo(20_000), midnight - 3 * day, Math.floor((3 * day) / 20_000));
      const log = open({ kept: 500 });
      const from = performance.now();
      const { archived, trimmed } = await log.archive('acme');
      const archiveMs = performance.now() - from;
      assert.equal(archived, 20_000);
      const left = await log.length('acme');
      assert.ok(left >= 500 && left <= 600, `${left} are left`);
      assert.equal(trimmed, 20_000 - left);
      const keys = await keysUnder(storage, 'events/');
      const days = new Set(keys.map((key) => key.split('/')[2]));
      assert.equal(days.size, 3);
      for (const key of keys) assert.match(key, /^events\/acme\/[\d-]{10}\/\d\d-\d+-\d+_\d+-\d+\.jsonl\.gz$/);

      const reader = open();
      const readFrom = performance.now();
      assert.deepEqual(await readAll(reader, 'acme'), upTo(20_000));
      const readMs = performance.now() - readFrom;
      t.diagnostic(
        `archived ${Math.round(20_000 / (archiveMs / 1_000))}/s, read ${Math.round(20_000 / (readMs / 1_000))}/s`,
      );
      for (const n of [0, 1, 4_999, 5_000, 6_666, 13_333, 19_400, 19_998]) {
        const page = await reader.read('acme', cursors[n], 3);
        assert.deepEqual(page.events.map(numberOf), upTo(3, n + 1).slice(0, 19_999 - n));
        assert.equal(page.events[0]!.cursor, cursors[n + 1]);
        assert.equal(page.more, n < 19_996);
      }
      const end = await reader.read('acme', cursors.at(-1), 10);
      assert.deepEqual(end, { events: [], cursor: cursors.at(-1), more: false, expired: false });
      assert.equal(await reader.oldest('acme'), cursors[0]);
      assert.equal(await reader.last('acme'), cursors.at(-1));
    });

    test('a cursor between two entries is as good as one of them', async () => {
      await addPast('acme', upTo(50), midnight - 2 * day, 1_000);
      const log = open({ segmentEvents: 10 });
      await log.archive('acme');
      const page = await log.read('acme', `${midnight - 2 * day + 4_500}-7`, 2);
      assert.deepEqual(page.events.map(numberOf), [5, 6]);
      assert.deepEqual((await log.read('acme', '0-0', 1)).events.map(numberOf), [0]);
      assert.deepEqual((await log.read('acme', '999999999999999-0', 5)).events, []);
    });

    test('an archiver that is killed between writing a segment and telling loses nothing and doubles nothing', async () => {
      await addPast('acme', upTo(2_000), midnight - day, 1_000);
      const held = heldAfterPut(storage);
      void createEventLog({ redis, storage: held.storage, kept: 0, segmentAgeMs: 0 }).archive('acme');
      await held.written;
      await addPast('acme', upTo(700, 2_000), midnight - day + 2_000_000, 1_000);
      const log = open();
      assert.deepEqual(await readAll(log, 'acme'), upTo(2_700));
      assert.equal((await log.archive('acme')).archived, 2_700);
      assert.ok((await log.length('acme')) < 110);
      assert.deepEqual(await readAll(open(), 'acme'), upTo(2_700));
      const keys = await keysUnder(storage, 'events/');
      assert.equal(keys.length, 2, 'the segments overlap');
    });

    test('an archiver that goes on after its lease is lost destroys nothing and does not turn the log back', async () => {
      const start = midnight - 2 * day;
      await addPast('acme', upTo(1_500), start, 10_000);
      const held = heldAfterPut(storage);
      const slow = createEventLog({ redis, storage: held.storage, kept: 0, segmentAgeMs: 0 }).archive('acme');
      await held.written;
      await addPast('acme', upTo(1_500, 1_500), start + 15_000_000, 10_000);
      const other = open({ kept: 100 });
      await other.archive('acme');
      await addPast('acme', upTo(300, 3_000), start + 30_000_000, 10_000);
      held.release();
      await slow;
      await other.archive('acme');
      for (const reader of [other, open()]) assert.deepEqual(await readAll(reader, 'acme'), upTo(3_300));
    });

    test('two archivers at once, a writer and a reader that follows: everything is told once and in order', async () => {
      const count = 6_000;
      const connections = await Promise.all(
        upTo(3).map(async () => {
          const connection = connectRedis(server.url);
          await once(connection, 'ready');
          return connection;
        }),
      );
      let written = false;
      const writing = (async () => {
        for (let n = 0; n < count; n += 50) {
          const pipeline = redis.pipeline();
          for (const number of upTo(50, n))
            pipeline.xadd(
              'as:{acme}:events',
              '*',
              'id',
              `evt_${number}`,
              'event',
              JSON.stringify(eventOf(number)),
            );
          await pipeline.exec();
          await sleep(1);
        }
        written = true;
      })();
      const archiving = connections.slice(0, 2).map(async (connection, index) => {
        const log = open({ segmentEvents: 37 + 50 * index }, connection);
        while (!written) await log.archive('acme');
        await log.archive('acme');
      });
      const reader = open({}, connections[2]!);
      const told: number[] = [];
      for (let cursor: string | undefined; told.length < count; ) {
        const page = await reader.read('acme', cursor, 80);
        told.push(...page.events.map(numberOf));
        cursor = page.cursor;
      }
      await Promise.all([writing, ...archiving]);
      assert.deepEqual(told, upTo(count));
      assert.deepEqual(await readAll(open(), 'acme'), upTo(count));
      assert.ok((await reader.length('acme')) <= 100, 'and what is archived has left Redis');
      for (const connection of connections) connection.disconnect();
    });

    test('a stream that is trimmed between the look at it and the look into storage leaves no gap', async () => {
      await addPast('acme', upTo(3_000), midnight - day, 1_000);
      const archiver = open({ kept: 2_000 });
      await archiver.archive('acme');
      let trims = 0;
      const reader = createEventLog({
        redis,
        storage: {
          ...storage,
          async *list(prefix) {
            if (trims === 0) {
              trims += (await open({ kept: 0 }).archive('acme')).trimmed;
              await redis.xadd(
                'as:{acme}:events',
                '*',
                'id',
                'evt_3000',
                'event',
                JSON.stringify(eventOf(3_000)),
              );
              trims += (await open({ kept: 0 }).archive('acme')).trimmed;
            }
            yield* storage.list(prefix);
          },
        },
      });
      assert.deepEqual((await reader.read('acme', undefined, 10_000)).events.map(numberOf), upTo(3_001));
      assert.ok(trims > 1_500, `only ${trims} were trimmed`);
    });

    test('few events wait in Redis until they are enough or old enough', async () => {
      const log = open({ segmentEvents: 10, segmentAgeMs: 3_600_000 });
      for (const n of upTo(9)) await log.append('acme', entryOf(n));
      for (const _ of upTo(3)) assert.deepEqual(await log.archive('acme'), { archived: 0, trimmed: 0 });
      await log.append('acme', entryOf(9));
      assert.equal((await log.archive('acme')).archived, 10);
      await addPast('old', upTo(2), Date.now() - 3_700_000, 1_000);
      assert.equal((await log.archive('old')).archived, 2);
      const impatient = open({ segmentEvents: 10, segmentAgeMs: 50 });
      await impatient.append('acme', entryOf(10));
      while ((await impatient.archive('acme')).archived === 0) await sleep(10);
      assert.deepEqual(await readAll(log, 'acme'), upTo(11));
    });

    test('of what is not archived nothing goes, however little is kept', async () => {
      const log = open({ kept: 3, segmentEvents: 100, segmentAgeMs: 3_600_000 });
      for (const n of upTo(100)) await log.append('acme', entryOf(n));
      assert.equal((await log.archive('acme')).archived, 100);
      for (const n of upTo(50, 100)) await log.append('acme', entryOf(n));
      assert.deepEqual(await log.archive('acme'), { archived: 0, trimmed: 0 });
      assert.ok((await log.length('acme')) >= 50);
      await open({ segmentEvents: 50, segmentAgeMs: day }).archive('acme');
      for (const n of upTo(99, 150)) await log.append('acme', entryOf(n));
      assert.deepEqual(await open({ kept: 0, segmentEvents: 100, segmentAgeMs: day }).archive('acme'), {
        archived: 0,
        trimmed: 0,
      });
      assert.ok((await log.length('acme')) >= 99);
      assert.deepEqual(await readAll(log, 'acme'), upTo(249));
    });

    test('a clock that is set back loses nothing and holds nothing up', async () => {
      const log = open({ segmentEvents: 100, segmentAgeMs: 60 });
      await addPast('acme', upTo(2), Date.now() + day, 1_000);
      for (const n of upTo(3, 2)) await log.append('acme', entryOf(n));
      let archived = 0;
      while (archived < 5) {
        archived += (await log.archive('acme')).archived;
        await sleep(10);
      }
      await log.append('acme', entryOf(5));
      assert.deepEqual(await readAll(log, 'acme'), upTo(6));
    });

    test('a damaged segment is told as such to the reader and the log, and passed over by nobody', async () => {
      const cursors = await addPast('acme', upTo(3_000), midnight - day, 1_000);
      await addPast('other', upTo(10), midnight - day, 1_000);
      await redis.del('as:{acme}:events:archived');
      const maker = open({ segmentEvents: 1_000 });
      // Three segments of 1,000.
      await redis.del('as:{acme}:events');
      for (const n of upTo(3)) {
        await addPast('acme', upTo(1_000, n * 1_000), midnight - day + n * 1_000_000, 1_000);
        await maker.archive('acme');
      }
      await maker.archive('other');
      const keys = await keysUnder(storage, 'events/acme/');
      assert.equal(keys.length, 3);
      const whole = await storage.read(keys[1]!);
      const first = await storage.read(keys[0]!);
      for (const broken of [
        whole.subarray(0, whole.length >> 1),
        Buffer.from('no gzip'),
        Buffer.alloc(0),
        first,
        gzipSync(`{"cursor":"${cursors[1_000]}","id":\n{"cursor":"${cursors[1_999]}",\n`),
        gzipSync(`{"cursor":"${cursors[1_000]}","id":"evt_1"}`),
      ]) {
        await storage.put(keys[1]!, broken);
        const said: unknown[] = [];
        const log = open({ log: { error: (about: unknown) => said.push(about), warn() {} } as never });
        assert.equal((await log.read('acme', undefined, 1_000)).events.length, 1_000);
        await assert.rejects(
          log.read('acme', cursors[999], 1_000),
          (error: unknown) =>
            error instanceof InfrastructureFault && error.part === 'storage' && /damaged/.test(error.message),
        );
        assert.equal((said[0] as { key: string }).key, keys[1]);
        const upToIt = await log.read('acme', cursors[899], 1_000);
        assert.deepEqual([upToIt.events.length, upToIt.more], [100, true], 'what lies before it is told');
        const behind = await log.read('acme', cursors[1_999], 10);
        assert.deepEqual(behind.events.map(numberOf), upTo(10, 2_000));
        assert.deepEqual(await readAll(log, 'other'), upTo(10));
        await storage.put(keys[1]!, whole);
        assert.deepEqual(await readAll(log, 'acme'), upTo(3_000), 'mended, it is read');
      }
    });

    test('segments that interleave are told in order', async () => {
      const start = midnight - day;
      const segment = (...numbers: number[]) =>
        storage.put(
          logSegmentKey('events', 'acme', `${start + numbers[0]!}-0`, `${start + numbers.at(-1)!}-0`),
          gzipSync(
            numbers.map((n) => `${JSON.stringify({ cursor: `${start + n}-0`, ...entryOf(n) })}\n`).join(''),
          ),
        );
      await segment(1, 2, 5, 9);
      await segment(2, 3, 6);
      await segment(4, 7);
      await segment(4, 5, 6, 7, 8);
      await segment(20);
      const log = open();
      await log.archive('acme');
      assert.deepEqual(await readAll(log, 'acme', 2), [1, 2, 3, 4, 5, 6, 7, 8, 9, 20].slice(0, 10));
      assert.deepEqual(await readAll(log, 'acme', 3, `${start + 4}-0`), [5, 6, 7, 8, 9, 20]);
    });

    test('a Redis that has lost everything finds the segments again, and goes on', async () => {
      await addPast('acme', upTo(30), midnight - 3 * day, 1_000);
      await open().archive('acme');
      await redis.flushall();
      const log = open();
      await log.append('acme', entryOf(30));
      await log.archive('acme');
      for (const reader of [log, open()]) assert.deepEqual(await readAll(reader, 'acme'), upTo(31));
      await redis.flushall();
      await log.append('acme', entryOf(31));
      await log.archive('acme');
      for (const reader of [log, open()])
        assert.deepEqual(await readAll(reader, 'acme'), upTo(32), 'however often, to the same processes');
    });

    test('days beyond the retention go, and whoever stood before their end is told', async () => {
      const old = await addPast('acme', upTo(48), midnight - 2 * day, day / 24);
      const log = open({ kept: 1_000 });
      await log.append('acme', entryOf(48));
      await log.archive('acme');
      const reader = open();
      assert.deepEqual(await readAll(reader, 'acme'), upTo(49));
      assert.equal(await log.sweep('acme', new Date(midnight - 2 * day)), 0);
      assert.ok((await log.sweep('acme', new Date(midnight - day + 1_000))) > 0);
      assert.deepEqual(await readAll(log, 'acme'), upTo(25, 24));
      assert.deepEqual(await readAll(reader, 'acme'), upTo(25, 24), 'whoever had listed it too');
      const behind = await reader.read('acme', old[3], 2);
      assert.deepEqual([behind.events.map(numberOf), behind.expired], [[24, 25], true]);
      assert.equal((await reader.read('acme', old[22], 2)).expired, true);
      assert.equal((await reader.read('acme', old[23], 2)).expired, false);
      assert.equal((await reader.read('acme', undefined, 2)).expired, false);
      assert.equal(await reader.oldest('acme'), old[24]);
      const keys = await keysUnder(storage, 'events/acme/');
      assert.ok(
        keys.every((key) => key >= `events/acme/${new Date(midnight - day).toISOString().slice(0, 10)}`),
      );
      assert.ok((await log.length('acme')) <= 25, 'nor does Redis keep them');
    });

    test('a reader that listed segments which a sweep then removed goes on behind them', async () => {
      await addPast('acme', upTo(40), midnight - 2 * day, day / 20);
      const log = open({ segmentEvents: 10 });
      await log.archive('acme');
      const reader = open({ cacheBytes: 0 });
      assert.deepEqual((await reader.read('acme', undefined, 1)).events.map(numberOf), [0]);
      await log.sweep('acme', new Date(midnight - day));
      const page = await reader.read('acme', undefined, 5);
      assert.deepEqual(page.events.map(numberOf), upTo(5, 20));
    });

    test('who stands still in front of many full segments reads none of them twice', async () => {
      const log = open();
      for (let n = 0; n < 20; n += 1) {
        const pipeline = redis.pipeline();
        for (let of = 0; of < 1_000; of += 1) {
          const url = `https://example.com/${randomBytes(50).toString('hex')}`;
          const event = { ...eventOf(of), data: { ...eventOf(of).data, url } };
          pipeline.xadd('as:{acme}:events', '*', 'id', `evt_${of}`, 'event', JSON.stringify(event));
        }
        await pipeline.exec();
        await log.archive('acme');
      }
      const reads: string[] = [];
      const counting = {
        ...storage,
        read: (...args: Parameters<Storage['read']>) => {
          reads.push(args[0]);
          return storage.read(...args);
        },
      };
      const reader = open({ storage: counting, cacheBytes: 2 * 1024 * 1024 });
      for (let n = 0; n < 5; n += 1) {
        assert.equal((await reader.read('acme', undefined, 1)).events.length, 1);
        await sleep(100);
      }
      assert.deepEqual(reads, [...new Set(reads)]);
    });

    test('a tenant sees its own events only, also where a name begins like another', async () => {
      const tenants = ['acme', 'acme-2', 'acm', 'events'];
      const log = open();
      for (const [n, tenant] of tenants.entries()) {
        await log.append(tenant, entryOf(n));
        await log.archive(tenant);
        await log.append(tenant, entryOf(n + 10));
      }
      for (const [n, tenant] of tenants.entries()) {
        assert.deepEqual(await readAll(log, tenant), [n, n + 10]);
        assert.equal((await log.find(tenant, `evt_${n}`))?.id, `evt_${n}`);
        assert.equal(await log.find(tenant, `evt_${n + 1}`), undefined);
      }
      await log.sweep('acme', new Date(midnight + 2 * day));
      for (const [n, tenant] of tenants.entries())
        if (tenant !== 'acme') assert.deepEqual(await readAll(open(), tenant), [n, n + 10]);
    });

    test('an event is found by its id, wherever it lies, from when its job was made', async () => {
      const made = midnight - day + 3_600_000;
      const hex = made.toString(16).padStart(12, '0');
      const jobId = `${hex.slice(0, 8)}-${hex.slice(8)}-7000-8000-000000000001`;
      await addPast('acme', upTo(100), midnight - 2 * day, day / 50);
      const log = open({ segmentEvents: 10 });
      await log.archive('acme');
      const id = `evt_${jobId}_0_completed`;
      await log.append('acme', {
        id,
        event: eventOf(1),
        callback: { endpointId: 'ep_1', url: 'https://x/' },
      });
      const inRedis = await log.find('acme', id);
      assert.deepEqual(inRedis?.callback, { endpointId: 'ep_1', url: 'https://x/' });
      await log.archive('acme');
      await log.append('acme', entryOf(7_000));
      await log.archive('acme');
      assert.deepEqual(await open().find('acme', id), inRedis);
      assert.equal(await log.find('acme', `evt_${jobId}_1_completed`), undefined);
      assert.equal((await log.find('acme', 'evt_77'))?.id, 'evt_77');
    });

    test('entries of versions before this log are passed over, and do not hold up the others', async () => {
      const said: unknown[] = [];
      const log = open({ log: { warn: (about: unknown) => said.push(about), error() {} } as never });
      await redis.xadd('as:{acme}:events', '*', 'event', '{"type":"job.completed"}');
      await redis.xadd('as:{acme}:events', '*', 'id', 'x', 'event', '{"type":');
      assert.equal((await log.archive('acme')).archived, 0);
      await redis.xadd('as:{acme}:events', '*', 'event', '{}');
      await log.append('acme', entryOf(0));
      assert.equal((await log.archive('acme')).archived, 1);
      assert.deepEqual(await readAll(open(), 'acme'), [0]);
      assert.equal(said.length, 3);
    });

    test('attempts are a log of their own beside the events', async () => {
      const deliveries = createDeliveryLog({ redis, storage, kept: 0, segmentAgeMs: 0 });
      const delivery = (n: number): Delivery => ({
        at: midnight + n,
        eventId: `evt_${n}`,
        endpointId: 'ep_1',
        type: 'job.completed',
        attempt: 1,
        outcome: n % 2 ? 'failed' : 'delivered',
        status: 200,
        ms: 12.5,
        excerpt: 'Grüße, 你好 \n"',
      });
      for (const n of upTo(20)) await deliveries.append('acme', delivery(n));
      await deliveries.archive('acme');
      for (const n of upTo(5, 20)) await deliveries.append('acme', delivery(n));
      const { entries } = await deliveries.page('acme', undefined, 100);
      assert.deepEqual(
        entries.map(({ cursor: _, ...rest }) => rest),
        upTo(25).map(delivery),
      );
      assert.deepEqual(await readAll(open(), 'acme'), []);
      assert.equal((await keysUnder(storage, 'deliveries/acme/')).length, 1);
    });
  });
}

test('an appended event is announced on the channel', async () => {
  const subscriber = connectRedis(server.url);
  await once(subscriber, 'ready');
  await subscriber.subscribe(eventsChannel);
  const heard = once(subscriber, 'message');
  const nowhere = { put: assert.fail, read: assert.fail, list: assert.fail, delete: assert.fail };
  const log = createEventLog({ redis, storage: nowhere as never });
  const cursor = await log.append('loud', entryOf(1));
  assert.deepEqual(await heard, [eventsChannel, 'loud']);
  assert.equal(await log.last('loud'), cursor);
  subscriber.disconnect();
});

test('an empty log is an empty page; aborted reading ends; a Redis that is away is a fault', async () => {
  const nowhere = { put: assert.fail, read: assert.fail, list: assert.fail, delete: assert.fail };
  const log = createEventLog({ redis, storage: nowhere as never });
  assert.deepEqual(await log.read('nobody', undefined, 10), {
    events: [],
    cursor: undefined,
    more: false,
    expired: false,
  });
  assert.equal(await log.last('nobody'), undefined);
  assert.equal(await log.oldest('nobody'), undefined);
  await assert.rejects(log.read('nobody', undefined, 10, AbortSignal.abort()), { name: 'AbortError' });
  const away = connectRedis('unix:///nowhere/redis.sock');
  await assert.rejects(
    createEventLog({ redis: away, storage: nowhere as never }).read('x', undefined, 1),
    InfrastructureFault,
  );
  away.disconnect();
});
