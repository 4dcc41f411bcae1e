import assert from 'node:assert/strict';
import { randomUUIDv7 } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { encodePart, type PartRow } from '@acousticsense/shared/batch';
import { openStorage } from '@acousticsense/shared/open-storage';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { readPartRow } from './part-row.ts';

describe('one row of a part', () => {
  let directory: string;
  let storage: Storage;
  let reads: number;
  let bytes: number;
  before(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'as-part-'));
    const real = openStorage(pathToFileURL(directory).href);
    storage = {
      ...real,
      async read(...args) {
        const found = await real.read(...args);
        reads += 1;
        bytes += found.length;
        return found;
      },
    };
  });
  after(() => rm(directory, { recursive: true }));

  function part(lengths: readonly number[], chunk = 3): PartRow[] {
    return lengths.map((length, row) => ({
      line: row + 1,
      ref: 'é'.repeat(length),
      audio: { upload: randomUUIDv7() },
      row: chunk * 1_000 + row,
      jobId: randomUUIDv7(),
      state: 'completed',
      revision: 1,
      finishedAt: 1,
      generation: 1,
    }));
  }
  async function findsAll(rows: readonly PartRow[]): Promise<{ reads: number; bytes: number }> {
    await storage.put('part', encodePart(rows));
    [reads, bytes] = [0, 0];
    for (const [at, row] of rows.entries()) assert.deepEqual(await readPartRow(storage, 'part', at), row);
    return { reads: reads / rows.length, bytes: bytes / rows.length };
  }

  test('is found with a look or two at some kilobytes', async () => {
    const found = await findsAll(part(Array.from({ length: 1_000 }, (_, n) => 400 + ((n * 7_919) % 300))));
    assert.ok(found.reads < 1.8 && found.bytes < 30_000, JSON.stringify(found));
  });

  test('is found in a short part', async () => {
    for (const rows of [1, 2, 3, 17, 250]) await findsAll(part(Array.from({ length: rows }, () => 500)));
  });

  test('is found among rows of all lengths', async () => {
    await findsAll(part(Array.from({ length: 1_000 }, (_, n) => (n < 900 ? 1 : 3_000))));
    await findsAll(part(Array.from({ length: 1_000 }, (_, n) => (n < 100 ? 3_000 : 1))));
    await findsAll(part(Array.from({ length: 60 }, (_, n) => (n % 7 === 0 ? 40_000 : 0))));
    await findsAll(part([100_000]));
    await findsAll(part([100_000, 0, 100_000]));
  });

  test('that is not there is not found', async () => {
    await storage.put('part', encodePart(part([1, 2, 3])));
    for (const row of [3, 4, 999]) assert.equal(await readPartRow(storage, 'part', row), undefined);
    await storage.put('empty', Buffer.alloc(0));
    assert.equal(await readPartRow(storage, 'empty', 0), undefined);
    await assert.rejects(readPartRow(storage, 'none', 0), ObjectNotFound);
  });
});
