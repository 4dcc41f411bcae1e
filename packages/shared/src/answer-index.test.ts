/** On both storage drivers; the copies are real SQLite files, and who is killed is a real process. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, open, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { Readable } from 'node:stream';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import pino from 'pino';
import { startS3 } from '../../../test/s3.ts';
import { type AnswerEntry, type AnswerIndex, createAnswerIndex, type Segment } from './answer-index.ts';
import { hash128 } from './answer-key.ts';
import { InfrastructureFault } from './errors.ts';
import { openStorage } from './open-storage.ts';
import type { Storage } from './storage.ts';

const hour = 3_600_000;
const day = 24 * hour;
const noon = Date.parse('2026-11-24T12:30:00Z');

const drivers = [
  {
    name: 'a directory',
    async open() {
      const directory = await mkdtemp(path.join(tmpdir(), 'as-index-objects-'));
      return {
        url: pathToFileURL(directory).href,
        [Symbol.asyncDispose]: () => rm(directory, { recursive: true }),
      };
    },
    histories: 25,
  },
  { name: 'S3', open: () => startS3(), histories: 4 },
];

for (const driver of drivers) {
  describe(`the index of known answers, with objects in ${driver.name}`, () => {
    let opened: Awaited<ReturnType<(typeof drivers)[number]['open']>>;
    let storage: Storage;
    let scratch: string;
    let tenant: string;
    let count = 0;
    let clock: number;
    const logged: { level: number; msg: string }[] = [];
    const log = pino({ level: 'info' }, { write: (line: string) => void logged.push(JSON.parse(line)) });
    const running: AnswerIndex[] = [];

    before(async () => {
      opened = await driver.open();
      storage = openStorage(opened.url);
      scratch = await mkdtemp(path.join(tmpdir(), 'as index ü-'));
    });
    beforeEach(async () => {
      await Promise.all(running.splice(0).map((index) => index.close()));
      count += 1;
      tenant = `tenant-${count}`;
      clock = noon;
      logged.length = 0;
    });
    after(async () => {
      await Promise.all(running.map((index) => index.close()));
      storage.close();
      await opened[Symbol.asyncDispose]();
      await rm(scratch, { recursive: true });
    });

    /** @param directory the copies' own; the name of a shared one. */
    function start(
      directory: string = `copy-${count}-${running.length}`,
      on: Storage = storage,
    ): AnswerIndex {
      const index = createAnswerIndex({
        storage: on,
        directory: path.join(scratch, directory),
        log,
        now: () => clock,
      });
      running.push(index);
      return index;
    }
    const entry = (fields: Partial<AnswerEntry> = {}): AnswerEntry => ({
      row: 0,
      revision: 1,
      finishedAt: noon,
      keys: [],
      ...fields,
    });
    const segment = (batchId: string, entries: AnswerEntry[], fields: Partial<Segment> = {}): Segment => ({
      tenant,
      batchId,
      chunk: 0,
      round: 0,
      entries,
      ...fields,
    });
    const names = async (of = tenant) => {
      const prefix = `index/${of}/`;
      const listed = await Array.fromAsync(storage.list(prefix));
      return listed.map(({ key }) => key.slice(prefix.length)).sort();
    };
    const k = (name: string | number) => hash128(`key ${name}`);

    test('what one process wrote, another finds by its key and by its ref', async () => {
      const feeder = start();
      const api = start();
      const entries = [
        entry({ row: 3, keys: [k(1), k(2)], ref: 'track ü/1' }),
        entry({ row: 4, ref: 'bad' }),
      ];
      await feeder.writeSegment(segment('b-1', entries, { chunk: 7 }));
      assert.deepEqual(api.find(tenant, [k(1)]), [undefined]);
      await api.refresh(tenant);
      const result = { batchId: 'b-1', chunk: 7, row: 3, revision: 1 };
      assert.deepEqual(api.find(tenant, [k(2), k(3), k(1)]), [result, undefined, result]);
      assert.deepEqual(api.findRef(tenant, 'track ü/1'), result);
      assert.deepEqual(api.findRef(tenant, 'bad'), { ...result, row: 4 });
      assert.equal(api.findRef(tenant, 'never heard of'), undefined);
    });

    test('what the index keeps in storage does not tell the refs', async () => {
      await start().writeSegment(segment('b', [entry({ ref: 'my secret release' })]));
      const [name] = await names();
      assert.doesNotMatch((await storage.read(`index/${tenant}/${name}`)).toString(), /secret/);
    });

    test('of several results the higher revision is found, of equal ones the later, whatever came first', async () => {
      const ref = 'r';
      const three = [
        segment('a', [entry({ revision: 2, finishedAt: noon, keys: [k(1)], ref })]),
        segment('b', [entry({ revision: 2, finishedAt: noon + 1, keys: [k(1)], ref })]),
        segment('c', [entry({ revision: 1, finishedAt: noon + 2, keys: [k(1)], ref })]),
      ];
      const index = start();
      for (const one of three) {
        await index.writeSegment(one);
        await index.refresh(tenant);
      }
      const backwards = start();
      tenant += '-backwards';
      for (const one of three.toReversed()) {
        await backwards.writeSegment({ ...one, tenant });
        await backwards.refresh(tenant);
      }
      for (const [reader, of] of [
        [index, `tenant-${count}`],
        [backwards, tenant],
      ] as const) {
        assert.equal(reader.find(of, [k(1)])[0]?.batchId, 'b');
        assert.equal((reader.findRef(of, ref) as { batchId: string }).batchId, 'b');
      }
    });

    test('a deleted batch is not found, and its refs tell the date, also when segments come after the tombstone', async () => {
      const index = start();
      await index.writeTombstone(tenant, 'late', noon - 5);
      await index.refresh(tenant);
      await index.writeSegment(segment('late', [entry({ keys: [k(1)], ref: 'late' })]));
      await index.writeSegment(segment('early', [entry({ keys: [k(2)], ref: 'early' })]));
      await index.refresh(tenant);
      await index.writeTombstone(tenant, 'early', noon - 4);
      await index.refresh(tenant);
      const rebuilt = start();
      await rebuilt.refresh(tenant);
      for (const reader of [index, rebuilt]) {
        assert.deepEqual(reader.find(tenant, [k(1), k(2)]), [undefined, undefined]);
        assert.deepEqual(reader.findRef(tenant, 'late'), { deletedAt: noon - 5 });
        assert.deepEqual(reader.findRef(tenant, 'early'), { deletedAt: noon - 4 });
      }
    });

    test('while an older result of a ref is kept, it is the answer; the date is that of the last deletion', async () => {
      const index = start();
      await index.writeSegment(segment('old', [entry({ revision: 1, keys: [k(1)], ref: 'r' })]));
      await index.writeSegment(segment('new', [entry({ revision: 2, keys: [k(1)], ref: 'r' })]));
      await index.writeTombstone(tenant, 'new', noon);
      await index.refresh(tenant);
      assert.equal((index.findRef(tenant, 'r') as { batchId: string }).batchId, 'old');
      assert.equal(index.find(tenant, [k(1)])[0]?.batchId, 'old');
      await index.writeTombstone(tenant, 'old', noon + 1);
      await index.refresh(tenant);
      assert.deepEqual(index.findRef(tenant, 'r'), { deletedAt: noon + 1 });
    });

    test('a chunk that was closed again counts with its later results', async () => {
      const index = start();
      await index.writeSegment(segment('b', [entry({ ref: 'r' })]));
      await index.writeSegment(segment('b', [entry({ ref: 'r', revision: 2, keys: [k(1)] })], { round: 1 }));
      await index.refresh(tenant);
      assert.equal(index.find(tenant, [k(1)])[0]?.revision, 2);
      assert.equal((index.findRef(tenant, 'r') as { revision: number }).revision, 2);
    });

    /** All entries and tombstones of a history, and what they mean, told by the definition. */
    function history(seed: number) {
      const random = randomFrom(seed);
      const pick = (n: number) => Math.floor(random() * n);
      const batches = ['a', 'b', 'c', 'd'];
      const segments = batches.flatMap((batchId) =>
        Array.from({ length: 3 }, (_, n) => ({
          ...segment(
            batchId,
            Array.from({ length: 1 + pick(6) }, (_, row) =>
              entry({
                row,
                revision: 1 + pick(2),
                finishedAt: noon + pick(2),
                ...(pick(4) ? { ref: `ref ${pick(5)}` } : {}),
                keys: Array.from({ length: pick(3) }, () => k(pick(6))),
              }),
            ),
            { chunk: pick(2), round: n },
          ),
        })),
      );
      const deleted = new Map(
        batches.filter(() => pick(3) === 0).map((batchId) => [batchId, noon + pick(100)]),
      );
      const all = segments.flatMap(({ batchId, chunk, entries }) =>
        entries.map((one) => ({ ...one, batchId, chunk })),
      );
      const winner = (candidates: typeof all) => {
        const found = candidates
          .filter(({ batchId }) => !deleted.has(batchId))
          .sort(
            (a, b) =>
              b.revision - a.revision ||
              b.finishedAt - a.finishedAt ||
              (a.batchId < b.batchId ? 1 : a.batchId > b.batchId ? -1 : b.chunk - a.chunk || b.row - a.row),
          )[0];
        return (
          found && { batchId: found.batchId, chunk: found.chunk, row: found.row, revision: found.revision }
        );
      };
      const byRef = (ref: string) => {
        const candidates = all.filter((one) => one.ref === ref);
        const dates = candidates.map(({ batchId }) => deleted.get(batchId)!);
        return winner(candidates) ?? (candidates.length ? { deletedAt: Math.max(...dates) } : undefined);
      };
      const keys = Array.from({ length: 7 }, (_, n) => k(n));
      const refs = Array.from({ length: 6 }, (_, n) => `ref ${n}`);
      return {
        writes: [
          ...segments.map((one) => (index: AnswerIndex) => index.writeSegment(one)),
          ...[...deleted].map(
            ([batchId, at]) =>
              (index: AnswerIndex) =>
                index.writeTombstone(tenant, batchId, at),
          ),
        ],
        keys,
        check(index: AnswerIndex, when: string) {
          const expected = keys.map((key) => winner(all.filter((one) => one.keys.includes(key))));
          assert.deepEqual(index.find(tenant, keys), expected, `${when}: keys of history ${seed}`);
          for (const ref of refs)
            assert.deepEqual(index.findRef(tenant, ref), byRef(ref), `${when}: ${ref} of history ${seed}`);
        },
      };
    }

    test('the order in which segments and tombstones come makes no difference, nor does coming twice', async () => {
      for (let seed = 1; seed <= driver.histories; seed += 1) {
        tenant = `tenant-${count}-${seed}`;
        clock = noon;
        const random = randomFrom(seed * 7_919);
        const { writes, check } = history(seed);
        const again = writes.filter(() => random() < 0.2);
        const shuffled = [...writes, ...again]
          .map((write) => ({ write, at: random() }))
          .sort((a, b) => a.at - b.at);
        const writer = start(`writer-${count}`);
        const often = start(`often-${count}`);
        for (const { write } of shuffled) {
          clock += Math.floor(random() * 20 * 60_000);
          await write(writer);
          if (random() < 0.5) await often.refresh(tenant);
        }
        await often.refresh(tenant);
        check(often, 'refreshed in between');
        const fresh = start(`fresh-${count}`);
        await fresh.refresh(tenant);
        check(fresh, 'built from nothing');
        // With everything merged and housekeeping done, it is still the same.
        clock += 5 * day;
        const { written } = await writer.compact(tenant);
        assert.equal(written, new Set((await names()).filter((name) => name.includes('merged'))).size);
        assert.ok(written > 0);
        await often.refresh(tenant);
        check(often, 'compacted');
        const merged = start(`merged-${count}`);
        await merged.refresh(tenant);
        check(merged, 'built from merged objects');
        await Promise.all(running.splice(0).map((index) => index.close()));
      }
    });

    test('a segment that comes late into an earlier hour is seen at the next refresh', async () => {
      const writer = start();
      const reader = start();
      await reader.refresh(tenant);
      clock = noon - 40 * 60_000;
      await writer.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      clock = noon;
      assert.match((await names())[0]!, /^2026-11-24T11/);
      await reader.refresh(tenant);
      assert.equal(reader.find(tenant, [k(1)])[0]?.batchId, 'b');
    });

    test('so is one of a writer whose clock is ahead', async () => {
      const writer = start();
      const reader = start();
      clock = Date.parse('2026-11-24T12:58:00Z');
      await reader.refresh(tenant);
      clock += 5 * 60_000;
      await writer.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      clock -= 5 * 60_000;
      assert.match((await names())[0]!, /^2026-11-24T13/);
      await reader.refresh(tenant);
      assert.equal(reader.find(tenant, [k(1)])[0]?.batchId, 'b');
    });

    test('one that comes later than that is seen within a day', async () => {
      const writer = start();
      const reader = start();
      await reader.refresh(tenant);
      clock = noon - 3 * day;
      await writer.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      clock = noon + 20 * hour;
      await reader.refresh(tenant);
      assert.deepEqual(reader.find(tenant, [k(1)]), [undefined]);
      clock = noon + 25 * hour;
      await reader.refresh(tenant);
      assert.equal(reader.find(tenant, [k(1)])[0]?.batchId, 'b');
    });

    for (const jump of [20 * hour, 400 * day, -20 * hour, -2 * day]) {
      test(`a reader whose clock was wrong by ${jump / hour} hours for a while misses nothing`, async () => {
        const writer = start();
        const reader = start();
        await reader.refresh(tenant);
        clock = noon + jump;
        await reader.refresh(tenant);
        clock = noon;
        await writer.writeSegment(segment('now', [entry({ keys: [k(1)] })]));
        await reader.refresh(tenant);
        assert.equal(reader.find(tenant, [k(1)])[0]?.batchId, 'now');
        clock = noon - 3 * day;
        await writer.writeSegment(segment('late', [entry({ keys: [k(2)] })]));
        clock = noon + 25 * hour;
        await reader.refresh(tenant);
        assert.equal(reader.find(tenant, [k(2)])[0]?.batchId, 'late');
      });
    }

    test('a refresh that is fresh enough does nothing, and own writes end that', async () => {
      const index = start();
      const other = start();
      await index.refresh(tenant);
      await other.writeSegment(segment('a', [entry({ keys: [k(1)] })]));
      await index.refresh(tenant, { maxAgeMs: 60_000 });
      assert.deepEqual(index.find(tenant, [k(1)]), [undefined]);
      await index.writeSegment(segment('b', [entry({ keys: [k(2)] })]));
      await index.refresh(tenant, { maxAgeMs: 60_000 });
      assert.deepEqual(
        index.find(tenant, [k(1), k(2)]).map((found) => found?.batchId),
        ['a', 'b'],
      );
    });

    test('a refresh that is asked for while another is under way sees what was written before', async () => {
      const writer = start();
      const listed = Promise.withResolvers<void>();
      const goOn = Promise.withResolvers<void>();
      const slow: Storage = {
        ...storage,
        async *list(prefix) {
          yield* storage.list(prefix);
          listed.resolve();
          await goOn.promise;
        },
      };
      const reader = start('slow', slow);
      const first = reader.refresh(tenant);
      await listed.promise;
      await writer.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      const many = Array.from({ length: 5 }, async () => {
        await reader.refresh(tenant);
        assert.equal(reader.find(tenant, [k(1)])[0]?.batchId, 'b');
      });
      goOn.resolve();
      await Promise.all([first, ...many]);
    });

    test('a restarted process goes on with its copy, one with an empty directory builds it anew', async () => {
      const index = start('same');
      await index.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      await index.refresh(tenant);
      await index.close();
      assert.equal(start('same').find(tenant, [k(1)])[0]?.batchId, 'b');
      await rm(path.join(scratch, 'same'), { recursive: true });
      const anew = start('same');
      assert.deepEqual(anew.find(tenant, [k(1)]), [undefined]);
      await anew.refresh(tenant);
      assert.equal(anew.find(tenant, [k(1)])[0]?.batchId, 'b');
    });

    test('tenants see nothing of each other, even where an object lies in the wrong place', async () => {
      const index = start();
      await index.writeSegment(segment('mine', [entry({ keys: [k(1)], ref: 'r' })]));
      const other = `${tenant}-2`;
      await index.refresh(other);
      assert.deepEqual(index.find(other, [k(1)]), [undefined]);
      assert.equal(index.findRef(other, 'r'), undefined);
      const [name] = await names();
      await storage.put(`index/${other}/${name}`, await storage.read(`index/${tenant}/${name}`));
      await index.refresh(other);
      assert.deepEqual(index.find(other, [k(1)]), [undefined]);
      assert.match(logged.at(-1)!.msg, /cannot be read/);
    });

    test('a name that is no tenant touches neither storage nor disk', async () => {
      const index = start('odd/one');
      for (const odd of [
        '',
        '.',
        '..',
        '../other',
        'a/b',
        'a\0',
        'Ä',
        'UPPER',
        'a'.repeat(64),
        'x%2f..',
        '-a',
      ]) {
        await assert.rejects(index.refresh(odd), TypeError, odd);
        assert.throws(() => index.find(odd, [k(1)]), TypeError, odd);
        assert.throws(() => index.findRef(odd, 'r'), TypeError, odd);
        await assert.rejects(async () => index.writeSegment({ ...segment('b', []), tenant: odd }), odd);
        await assert.rejects(async () => index.writeTombstone(odd, 'b', noon), odd);
        await assert.rejects(async () => index.compact(odd), TypeError, odd);
      }
      await assert.rejects(async () => index.writeSegment(segment('../b', [])));
      await assert.rejects(async () => index.writeTombstone(tenant, '../b', noon));
      assert.ok(!(await readdir(scratch)).includes('odd'));
      assert.deepEqual(await names(), []);
    });

    test('an object that cannot be read keeps no other from being applied, and is tried again', async () => {
      const index = start();
      await index.writeSegment(segment('good', [entry({ keys: [k(1)] })]));
      await index.writeSegment(segment('cut', [entry({ keys: [k(2)] }), entry({ row: 1, keys: [k(3)] })]));
      const cut = `index/${tenant}/${(await names()).find((name) => name.includes('cut'))}`;
      const whole = await storage.read(cut);
      await storage.put(cut, whole.subarray(0, whole.lastIndexOf('\n', whole.length - 2) + 1));
      await storage.put(`index/${tenant}/2026-11-24T12/what is this`, Buffer.from('?'));
      await storage.put(`index/${tenant}/2026-11-24T12/b-00000-0.jsonl`, Buffer.from('{"v":2}\n[]\n'));
      await index.refresh(tenant);
      assert.deepEqual(
        index.find(tenant, [k(1), k(2)]).map((found) => found?.batchId),
        ['good', undefined],
      );
      assert.equal(logged.filter(({ level }) => level === 50).length, 2);
      await storage.put(cut, whole);
      await index.refresh(tenant);
      assert.equal(index.find(tenant, [k(3)])[0]?.row, 1);
    });

    test('a key that a million rows of a batch share costs one row', async () => {
      const index = start('shared-key');
      for (let chunk = 0; chunk < 3; chunk += 1) {
        const entries = Array.from({ length: 1_000 }, (_, row) => entry({ row, keys: [k(1)], ref: 'same' }));
        await index.writeSegment(segment('b', entries, { chunk }));
      }
      await index.refresh(tenant);
      assert.deepEqual(index.find(tenant, [k(1)]), [{ batchId: 'b', chunk: 2, row: 999, revision: 1 }]);
      const [file] = await readdir(path.join(scratch, 'shared-key'));
      using database = new DatabaseSync(path.join(scratch, 'shared-key', file!));
      assert.equal(database.prepare('SELECT count(*) AS n FROM answers').get()!['n'], 1);
      assert.equal(database.prepare('SELECT count(*) AS n FROM refs').get()!['n'], 1);
    });

    /** A few chunks of a thousand rows, and the check that all of them are found. */
    async function bulk(segments: number, batchId = 'bulk') {
      const writer = start();
      const key = (chunk: number, row: number) => k(`${batchId} ${chunk} ${row}`);
      await Promise.all(
        Array.from({ length: segments }, (_, chunk) =>
          writer.writeSegment(
            segment(
              batchId,
              Array.from({ length: 1_000 }, (_, row) =>
                entry({ row, keys: [key(chunk, row)], ref: `${batchId} ${chunk} ${row}` }),
              ),
              { chunk },
            ),
          ),
        ),
      );
      return (index: AnswerIndex) => {
        for (let chunk = 0; chunk < segments; chunk += 1) {
          const found = index.find(
            tenant,
            Array.from({ length: 1_000 }, (_, row) => key(chunk, row)),
          );
          found.forEach((locator, row) => {
            assert.deepEqual(locator, { batchId, chunk, row, revision: 1 });
          });
          assert.ok(index.findRef(tenant, `${batchId} ${chunk} 999`));
        }
      };
    }

    /** Another process that refreshes the copies in `directory`, by the machine's clock. */
    function refreshing(directory: string, fileSizeBlocks = 'unlimited') {
      const script = path.join(import.meta.dirname, 'testing/answer-refresh.ts');
      const child = spawn(
        '/bin/sh',
        ['-c', `ulimit -f ${fileSizeBlocks}; exec "$0" "$1"`, process.execPath, script],
        {
          env: {
            ...process.env,
            STORAGE: opened.url,
            INDEX_DIR: path.join(scratch, directory),
            TENANT: tenant,
          },
          stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
        },
      );
      const messages: unknown[] = [];
      child.on('message', (message) => void messages.push(message));
      const ended = once(child, 'exit');
      return { child, messages, ended, begun: async () => void (await once(child, 'message')) };
    }
    const integrity = (directory: string) => {
      const file = path.join(scratch, directory, `${tenant}.v1.0.sqlite`);
      using database = new DatabaseSync(file);
      return database.prepare('PRAGMA integrity_check').get()!['integrity_check'];
    };

    test('a process that is killed at any moment of a refresh leaves a copy that comes right', async () => {
      clock = Date.now();
      const check = await bulk(30);
      const whole = refreshing('whole');
      await whole.begun();
      const from = performance.now();
      await whole.ended;
      const wholeMs = performance.now() - from;
      assert.equal(whole.messages.at(-1), 'done');

      let early = 0;
      for (const share of [0.15, 0.3, 0.45, 0.6, 0.75, 0.9]) {
        const { child, messages, ended, begun } = refreshing('killed');
        await begun();
        await sleep(wholeMs * share);
        child.kill('SIGKILL');
        await ended;
        if (!messages.includes('done')) early += 1;
      }
      assert.ok(early >= 3, `only ${early} of 6 were killed before they were done`);
      const index = start('killed');
      await index.refresh(tenant);
      check(index);
      assert.equal(integrity('killed'), 'ok');
    });

    test('two processes on one directory at the same time do each other no harm', async () => {
      clock = Date.now();
      const check = await bulk(15);
      const two = [refreshing('both'), refreshing('both')];
      await Promise.all(two.map(({ begun }) => begun()));
      const checkSecond = await bulk(5, 'second');
      await Promise.all(two.map(({ ended }) => ended));
      for (const { messages } of two) assert.equal(messages.at(-1), 'done');
      const index = start('both');
      await index.refresh(tenant);
      check(index);
      checkSecond(index);
      assert.equal(integrity('both'), 'ok');
    });

    test('a damaged copy is thrown away and made anew; who has it open comes to no harm', async () => {
      const check = await bulk(5);
      const index = start('damaged');
      await index.refresh(tenant);
      await index.close();
      const file = path.join(scratch, 'damaged', `${tenant}.v1.0.sqlite`);
      // A header that is none: found when it is opened.
      await writeFile(file, 'This is no database. '.repeat(1_000));
      const second = start('damaged');
      await second.refresh(tenant);
      check(second);

      // Pages overwritten under a process that has the file open and goes on with what it has read.
      await second.close();
      const third = start('damaged');
      check(third);
      const handle = await open(path.join(scratch, 'damaged', `${tenant}.v1.1.sqlite`), 'r+');
      const { size } = await handle.stat();
      await handle.write(Buffer.alloc(size - 8_192, 0xaa), 0, undefined, 8_192);
      await handle.close();
      const fourth = start('damaged');
      assert.deepEqual(fourth.find(tenant, [k('bulk 0 0')]), [undefined]);
      await fourth.refresh(tenant);
      check(fourth);
      await third.refresh(tenant);
      await third.close();
      check(fourth);
      const fifth = start('damaged');
      check(fifth);
      assert.deepEqual(
        (await readdir(path.join(scratch, 'damaged'))).filter((name) => name.endsWith('.sqlite')),
        [`${tenant}.v1.2.sqlite`],
      );
    });

    test('a copy that a look-up finds damaged in the midst of a refresh is complete after it', async () => {
      const check = await bulk(5);
      const index = start('midst');
      await index.refresh(tenant);
      await index.close();
      const handle = await open(path.join(scratch, 'midst', `${tenant}.v1.0.sqlite`), 'r+');
      const { size } = await handle.stat();
      await handle.write(Buffer.alloc(size / 2, 0xaa), 0, undefined, size / 2);
      await handle.close();
      const checkSecond = await bulk(3, 'second');
      let lost = false;
      const meddled: Storage = {
        ...storage,
        read(...given) {
          const keys = Array.from({ length: 1_000 }, (_, row) => k(`bulk 0 ${row}`));
          if (!lost) assert.ok(again.find(tenant, keys).every((found) => found === undefined));
          lost = true;
          return storage.read(...given);
        },
      };
      const again = start('midst', meddled);
      await again.refresh(tenant);
      assert.ok(lost);
      check(again);
      checkSecond(again);
    });

    test('on a full disk nothing is known, refresh says so, and with room again all is well', async () => {
      clock = Date.now();
      const check = await bulk(5);
      // In blocks of 512 bytes: files end at 200 kB, SQLite's log too.
      const { messages, ended } = refreshing('full', '400');
      await ended;
      const { name, part, found } = messages.at(-1) as Record<string, unknown>;
      assert.deepEqual([name, part, found], ['InfrastructureFault', 'index', [null]]);
      const index = start('full');
      await index.refresh(tenant);
      check(index);
    });

    test('without a directory that can be written, keys are unknown and refs are an infrastructure fault', async () => {
      await writeFile(path.join(scratch, 'a file'), '');
      const index = start('a file/index');
      const isFault = (error: unknown) => error instanceof InfrastructureFault && error.part === 'index';
      await index.writeSegment(segment('b', [entry({ keys: [k(1)], ref: 'r' })]));
      await assert.rejects(index.refresh(tenant), isFault);
      assert.deepEqual(index.find(tenant, [k(1)]), [undefined]);
      assert.throws(() => index.findRef(tenant, 'r'), isFault);
    });

    test('without its storage a copy still answers what it knows', async () => {
      const index = start('away');
      await index.writeSegment(segment('b', [entry({ keys: [k(1)] })]));
      await index.refresh(tenant);
      await index.close();
      const away = openStorage('s3://music?endpoint=http://127.0.0.1:9&region=us-east-1');
      const cut = start('away', away);
      await assert.rejects(cut.refresh(tenant), { name: 'InfrastructureFault', part: 'storage' });
      assert.equal(cut.find(tenant, [k(1)])[0]?.batchId, 'b');
      away.close();
    });

    test('a day that is two days old becomes one object, and nothing else is touched', async () => {
      const index = start();
      clock = noon - 5 * day;
      for (const batchId of ['a', 'b', 'c']) {
        await index.writeSegment(segment(batchId, [entry({ keys: [k(batchId)] })]));
        clock += 2 * hour;
      }
      await index.writeTombstone(tenant, 'c', clock);
      clock = noon - 4 * day;
      await index.writeSegment(segment('alone', [entry({ keys: [k('alone')] })]));
      clock = noon - 2 * day;
      for (const batchId of ['d', 'e']) await index.writeSegment(segment(batchId, []));
      clock = noon;
      const before = await names();
      assert.deepEqual(await index.compact(tenant), { written: 1, removed: 3 });
      const left = await names();
      assert.match(left[0]!, /^2026-11-19\/merged-[0-9a-f]{32}\.jsonl$/);
      assert.deepEqual(left.slice(1), before.slice(3));
      assert.deepEqual(await index.compact(tenant), { written: 0, removed: 0 });
      const reader = start();
      await reader.refresh(tenant);
      assert.deepEqual(
        reader.find(tenant, ['a', 'b', 'c', 'alone'].map(k)).map((found) => found?.batchId),
        ['a', 'b', undefined, 'alone'],
      );
    });

    test('a segment that comes after its day was merged is merged too', async () => {
      const index = start();
      for (const batchId of ['a', 'b', 'c']) {
        clock = noon - 5 * day;
        await index.writeSegment(segment(batchId, [entry({ keys: [k(batchId)] })]));
        clock = noon;
        if (batchId !== 'a') assert.equal((await index.compact(tenant)).written, 1);
      }
      assert.equal((await names()).length, 2);
      const reader = start();
      await reader.refresh(tenant);
      assert.ok(reader.find(tenant, ['a', 'b', 'c'].map(k)).every(Boolean));
    });

    test('a merged object that cannot be read keeps no other from being applied, and is kept', async () => {
      const index = start();
      for (const [at, batches] of [
        [noon - 6 * day, ['a', 'b']],
        [noon - 5 * day, ['c', 'd']],
      ] as const) {
        clock = at;
        for (const batchId of batches)
          await index.writeSegment(segment(batchId, [entry({ keys: [k(batchId)] })]));
      }
      clock = noon;
      await index.compact(tenant);
      const [first, second] = (await names()).map((name) => `index/${tenant}/${name}`);
      const whole = await storage.read(first!);
      const lines = whole.toString().split('\n');
      const foundBy = async (reader: AnswerIndex) => {
        await reader.refresh(tenant);
        return reader.find(tenant, ['a', 'b', 'c', 'd'].map(k)).map((found) => found?.batchId);
      };
      await storage.put(first!, Buffer.from(lines.slice(0, 4).join('\n')));
      assert.deepEqual(await foundBy(start()), ['a', undefined, 'c', 'd'], 'cut between two segments');
      await storage.put(first!, Buffer.from('{"v":2}\n'));
      const reader = start();
      assert.deepEqual(await foundBy(reader), [undefined, undefined, 'c', 'd'], 'of another version');
      assert.equal(logged.length, 2);

      clock = noon - 6 * day;
      await index.writeSegment(segment('e', []));
      clock = noon;
      await index.compact(tenant);
      clock += 400 * day;
      await index.compact(tenant);
      assert.ok((await storage.stat(first!)) && (await storage.stat(second!)));
      await storage.put(first!, whole);
      assert.deepEqual(await foundBy(reader), ['a', 'b', 'c', 'd']);
    });

    test('a compaction that dies before it has removed the segments is finished by the next', async () => {
      clock = noon - 5 * day;
      let deletions = 0;
      const dying: Storage = {
        ...storage,
        delete: async (key) => {
          deletions += 1;
          if (deletions > 2) throw new Error('killed');
          await storage.delete(key);
        },
      };
      const index = start();
      for (let n = 0; n < 5; n += 1) await index.writeSegment(segment(`b-${n}`, [entry({ keys: [k(n)] })]));
      clock = noon;
      await assert.rejects(start('dying', dying).compact(tenant), /killed/);
      assert.equal((await names()).length, 4, 'the merged object and three of five segments');
      const reader = start();
      await reader.refresh(tenant);
      assert.ok(reader.find(tenant, [0, 1, 2, 3, 4].map(k)).every(Boolean));
      assert.deepEqual(await index.compact(tenant), { written: 0, removed: 3 });
      await reader.refresh(tenant);
      assert.ok(reader.find(tenant, [0, 1, 2, 3, 4].map(k)).every(Boolean));
    });

    test('segments that are merged while a reader is about to read them are found in the merged object', async () => {
      clock = noon - 5 * day;
      const index = start();
      for (let n = 0; n < 3; n += 1) await index.writeSegment(segment(`b-${n}`, [entry({ keys: [k(n)] })]));
      clock = noon;
      let isFirst = true;
      const slow: Storage = {
        ...storage,
        async read(...given) {
          if (isFirst) await index.compact(tenant);
          isFirst = false;
          return storage.read(...given);
        },
      };
      const reader = start('slow', slow);
      await reader.refresh(tenant);
      assert.ok(reader.find(tenant, [0, 1, 2].map(k)).every(Boolean));
    });

    test('a merged object of known segments is not read beyond its first line', async () => {
      clock = noon - 5 * day;
      const index = start();
      for (let n = 0; n < 2; n += 1) {
        const entries = Array.from({ length: 1_000 }, (_, row) => entry({ row, keys: [k(`${n} ${row}`)] }));
        await index.writeSegment(segment(`b-${n}`, entries));
      }
      let bytes = 0;
      const counting: Storage = {
        ...storage,
        async get(...given) {
          const stream = await storage.get(...given);
          const counted = (async function* () {
            for await (const chunk of stream) {
              bytes += (chunk as Buffer).length;
              yield chunk;
            }
          })();
          return Readable.from(counted, { objectMode: false, highWaterMark: 1 });
        },
        read() {
          throw new Error('no segment is read again');
        },
      };
      clock = noon;
      const reader = start('reader');
      await reader.refresh(tenant);
      await reader.close();
      await index.compact(tenant);
      clock += 2 * day;
      const again = start('reader', counting);
      await again.refresh(tenant);
      assert.ok(again.find(tenant, [k('1 999')])[0]);
      assert.ok(bytes > 0 && bytes <= 65_536, `${bytes} bytes were read`);
    });

    test('a year after the deletion nothing is left: not the date, not an object', async () => {
      const index = start();
      await index.writeSegment(segment('a', [entry({ keys: [k(1)], ref: 'a' })]));
      await index.writeSegment(segment('b', [entry({ keys: [k(2)], ref: 'b' })]));
      clock += 3 * day;
      await index.compact(tenant);
      clock = noon + 30 * day;
      await index.writeTombstone(tenant, 'a', clock);
      await index.writeTombstone(tenant, 'b', clock);
      clock += 364 * day;
      assert.deepEqual(await index.compact(tenant), { written: 0, removed: 0 });
      await index.refresh(tenant);
      assert.deepEqual(index.findRef(tenant, 'a'), { deletedAt: noon + 30 * day });
      clock += 2 * day;
      await index.refresh(tenant);
      assert.equal(index.findRef(tenant, 'a'), undefined);
      assert.deepEqual(await index.compact(tenant), { written: 0, removed: 3 });
      assert.deepEqual(await names(), []);
      const anew = start();
      await anew.refresh(tenant);
      assert.deepEqual(anew.find(tenant, [k(1)]), [undefined]);
    });

    test('an object stays as long as one batch in it does, and so do the tombstones of the others', async () => {
      const index = start();
      for (const batchId of ['kept', 'deleted'])
        await index.writeSegment(segment(batchId, [entry({ keys: [k(batchId)], ref: batchId })]));
      await index.writeTombstone(tenant, 'deleted', clock);
      clock += 500 * day;
      await index.compact(tenant);
      assert.equal((await names()).length, 2);
      const anew = start();
      await anew.refresh(tenant);
      assert.deepEqual(
        anew.find(tenant, [k('kept'), k('deleted')]).map((found) => found?.batchId),
        ['kept', undefined],
      );
    });

    test('closing ends a refresh that is under way', async () => {
      await bulk(10);
      const index = start();
      const refreshed = index.refresh(tenant);
      await sleep(20);
      await index.close();
      await assert.rejects(refreshed, { name: 'AbortError' });
      await assert.rejects(index.refresh(tenant), { name: 'AbortError' });
    });

    test('more tenants than copies are kept open are served alike', async () => {
      const index = start('many');
      const many = Array.from({ length: 40 }, (_, n) => `${tenant}-${n}`);
      for (const one of many) {
        await index.writeSegment({ ...segment(one, [entry({ keys: [k(1)] })]), tenant: one });
        await index.refresh(one);
      }
      for (const one of many) assert.equal(index.find(one, [k(1)])[0]?.batchId, one);
    });
  });
}

/** Mulberry32: the same numbers for the same seed. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}
