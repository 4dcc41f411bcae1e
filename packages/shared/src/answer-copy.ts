/**
 * One process's copy of a tenant's index of known answers, in SQLite on a local disk. A cache: everything in it can be
 * had again from the segments, and whatever is wrong with it, it is thrown away.
 *
 * What is applied is a set of entries and a set of tombstones; every table is a function of the two sets, so the order
 * in which they come, and how often, makes no difference:
 *
 *   answers, refs   of each key and ref, and each batch, the entry that wins within the batch (revision, then time,
 *                   then place). Which batch wins is decided on reading, among those that are not deleted.
 *   gone            of each ref of deleted batches, when the last of them was deleted
 *
 * Entries come out of order of their keys, and each would dirty a page of its own: for 1,000 entries, 12 MB of log.
 * So they are gathered in memory and go into the file sorted, many at once, a range of keys at a time: a range is one
 * transaction of some milliseconds, between which the process does other things. Only after the last range is an
 * object marked as applied: who is killed before that, applies it again.
 */
import { setImmediate as turn } from 'node:timers/promises';
import { hash128 } from './answer-key.ts';
import type { EntryLine } from './answer-segment.ts';
import { createThrowawayDatabase, DatabaseLost } from './throwaway-database.ts';

/** Where a result lies. */
export interface Locator {
  readonly batchId: string;
  readonly chunk: number;
  /** Index within the chunk. */
  readonly row: number;
  readonly revision: number;
}

export type AnswerCopy = ReturnType<typeof createAnswerCopy>;

/** In the file's name, so that two versions of the service in one directory have a file each. */
const schemaVersion = 1;
const schema = `
  CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS batches (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, deleted_at INTEGER);
  CREATE TABLE IF NOT EXISTS gone (key BLOB PRIMARY KEY, deleted_at INTEGER NOT NULL) WITHOUT ROWID`;
const entryTables = ['answers', 'refs'] as const;
const entryTable = (name: string) => `
  CREATE TABLE IF NOT EXISTS ${name} (
    key BLOB, batch INTEGER, chunk INTEGER, row INTEGER, revision INTEGER, finished_at INTEGER,
    PRIMARY KEY (key, batch)
  ) WITHOUT ROWID`;
const unlessLater = `
  ON CONFLICT DO UPDATE SET chunk = excluded.chunk, row = excluded.row,
    revision = excluded.revision, finished_at = excluded.finished_at
  WHERE (excluded.revision, excluded.finished_at, excluded.chunk, excluded.row)
      > (revision, finished_at, chunk, row)`;
const dead = '(SELECT n FROM batches WHERE deleted_at IS NOT NULL)';

/** What one transaction moves or looks through: some 10 ms. */
const rowsATurn = 5_000;
const pagesATurn = 400;
const cacheBytes = 16 << 20;

/** Whatever it does may throw an {@link InfrastructureFault} `index` or a `DatabaseLost`. */
export function createAnswerCopy(directory: string, tenant: string) {
  const database = createThrowawayDatabase({
    directory,
    name: `${tenant}.v${schemaVersion}`,
    schema: [schema, ...entryTables.map(entryTable)].join(';'),
    part: 'index',
    cacheBytes,
  });
  const { use, transaction, prepared } = database;
  let lossesBefore = 0;
  let gathering = false;
  let gatheredRows = 0;
  let gatheredObjects: string[] = [];

  /** Keys are hashes, so equal ranges hold about equally many. */
  async function* ranges(wanted: number): AsyncGenerator<[Buffer, Buffer]> {
    const count = Math.min(65_536, Math.max(1, Math.ceil(wanted)));
    for (let n = 0; n < count; n += 1) {
      const bound = (part: number) => {
        const bytes = Buffer.alloc(17, part === count ? 0xff : 0);
        if (part < count) bytes.writeUInt16BE(Math.floor((part * 65_536) / count));
        return part === count ? bytes : bytes.subarray(0, 2);
      };
      yield [bound(n), bound(n + 1)];
      await turn();
    }
  }

  const pageCount = () => use(() => prepared('PRAGMA main.page_count').get()!['page_count'] as number);

  function batchNumber(batchId: string): { n: number; deleted_at: number | null } {
    prepared('INSERT INTO batches (id) VALUES (?) ON CONFLICT DO NOTHING').run(batchId);
    return prepared('SELECT n, deleted_at FROM batches WHERE id = ?').get(batchId) as ReturnType<
      typeof batchNumber
    >;
  }

  /** What was applied since `begin` would be missing in a database that another call has found damaged and left. */
  function checkNotLost(): void {
    if (database.losses > lossesBefore)
      throw new DatabaseLost('index', 'The local index of answers was lost while it was caught up.');
  }

  function drop(): void {
    try {
      if (gathering) use((database) => database.exec('DETACH fresh'));
    } catch {
      // It was not in this file any more.
    }
    gathering = false;
    gatheredObjects = [];
    gatheredRows = 0;
  }

  return {
    /** In the order of `keys`. */
    find(keys: readonly string[]): (Locator | undefined)[] {
      return use(() => {
        // One statement for all is twice as fast as one for each. Of several rows of a key the winner comes last.
        const rows = prepared(`
          SELECT wanted.key AS at, batches.id AS batchId, chunk, row, revision
          FROM json_each(?) AS wanted
            CROSS JOIN answers ON answers.key = unhex(wanted.value)
            JOIN batches ON n = batch
          WHERE deleted_at IS NULL
          ORDER BY revision, finished_at, batches.id`);
        const found: (Locator | undefined)[] = keys.map(() => undefined);
        const digits = keys.map((key) => Buffer.from(key, 'base64url').toString('hex'));
        for (const row of rows.iterate(JSON.stringify(digits))) {
          const { at, ...locator } = row as unknown as Locator & { at: number };
          found[at] = locator;
        }
        return found;
      });
    },

    /** @param forgotten epoch ms: of what was deleted before it nothing is known. */
    findRef(ref: string, forgotten: number): Locator | { readonly deletedAt: number } | undefined {
      const key = Buffer.from(hash128(ref), 'base64url');
      return use(() => {
        const winner = prepared(`
          SELECT id AS batchId, chunk, row, revision FROM refs JOIN batches ON n = batch
          WHERE key = ? AND deleted_at IS NULL
          ORDER BY revision DESC, finished_at DESC, id DESC LIMIT 1`).get(key);
        if (winner) return { ...(winner as unknown as Locator) };
        const { deletedAt } = prepared(`
          SELECT max(deleted_at) AS deletedAt FROM (
            SELECT deleted_at FROM gone WHERE key = :key
            UNION ALL SELECT deleted_at FROM refs JOIN batches ON n = batch WHERE key = :key)`).get({
          key,
        }) as { deletedAt: number | null };
        return deletedAt === null || deletedAt < forgotten ? undefined : { deletedAt };
      });
    },

    /** Of these objects, the ones that are not applied. */
    unknown(names: readonly string[]): string[] {
      return use(() => {
        const known = prepared('SELECT 1 FROM objects WHERE name = ?');
        return names.filter((name) => known.get(name) === undefined);
      });
    },

    /** Before a round of the following, each of which throws when the database is lost meanwhile. */
    begin(): void {
      drop();
      lossesBefore = database.losses;
    },

    bury(tombstones: readonly { readonly batchId: string; readonly deletedAt: number }[]): void {
      checkNotLost();
      if (tombstones.length === 0) return;
      transaction(() => {
        const bury = prepared(`
          INSERT INTO batches (id, deleted_at) VALUES (?, ?)
          ON CONFLICT DO UPDATE SET deleted_at = min(excluded.deleted_at, ifnull(deleted_at, excluded.deleted_at))`);
        for (const { batchId, deletedAt } of tombstones) bury.run(batchId, deletedAt);
      });
    },

    /** Takes a segment's lines into memory; `flush` makes them count. @returns how many rows are gathered. */
    gather(name: string, { batchId, chunk }: { batchId: string; chunk: number }, lines: EntryLine[]): number {
      checkNotLost();
      if (!gathering) {
        use((database) => {
          gathering = true;
          database.exec(`
            ATTACH ':memory:' AS fresh;
            ${entryTables.map((table) => entryTable(`fresh.${table}`)).join(';')}`);
        });
      }
      gatheredObjects.push(name);
      transaction(() => {
        const { n, deleted_at } = batchNumber(batchId);
        const [answers, refs] = entryTables.map((table) =>
          prepared(`INSERT INTO fresh.${table} VALUES (?, ?, ?, ?, ?, ?) ${unlessLater}`),
        );
        for (const [row, revision, finishedAt, ref, ...keys] of lines) {
          const rest = [n, chunk, row, revision, finishedAt] as const;
          if (ref !== null) refs!.run(Buffer.from(ref, 'base64url'), ...rest);
          if (deleted_at !== null) continue;
          for (const key of keys) answers!.run(Buffer.from(key, 'base64url'), ...rest);
          gatheredRows += keys.length;
        }
        gatheredRows += lines.length;
      });
      return gatheredRows;
    },

    /** Writes what is gathered, then marks its objects and `also` as applied. */
    async flush(also: readonly string[] = []): Promise<void> {
      if (gatheredRows > 0) {
        // A page that is written costs a good deal more than a row in it.
        const turns = gatheredRows / rowsATurn + Math.min(gatheredRows, pageCount()) / pagesATurn;
        for await (const range of ranges(turns)) {
          checkNotLost();
          transaction(() => {
            for (const table of entryTables) {
              prepared(`
                INSERT INTO main.${table} SELECT * FROM fresh.${table} WHERE key >= ? AND key < ? ORDER BY key, batch
                ${unlessLater}`).run(...range);
            }
          });
        }
      }
      checkNotLost();
      const applied = [...gatheredObjects, ...also];
      if (applied.length === 0) return;
      transaction(() => {
        const mark = prepared('INSERT INTO objects VALUES (?) ON CONFLICT DO NOTHING');
        for (const name of applied) mark.run(name);
      });
      drop();
    },

    /** Forgets what is gathered and not flushed. */
    drop,

    /**
     * Forgets the marks of objects that are not `listed` any more, the entries of deleted batches, and what was
     * deleted before `forgotten` (epoch ms). Changes no answer but those of `findRef` about what is forgotten.
     */
    async tidy(listed: ReadonlySet<string>, marksBefore: string, forgotten: number): Promise<void> {
      const stale = use(() =>
        prepared('SELECT name FROM objects WHERE name < ?')
          .all(marksBefore)
          .map((row) => row['name'] as string)
          .filter((name) => !listed.has(name)),
      );
      transaction(() => {
        for (const name of stale) prepared('DELETE FROM objects WHERE name = ?').run(name);
      });
      const buried = use(() => prepared(`SELECT 1 FROM batches WHERE n IN ${dead} LIMIT 1`).get());
      if (!buried) return;
      for await (const range of ranges(pageCount() / pagesATurn)) {
        transaction(() => {
          prepared(`DELETE FROM answers WHERE key >= ? AND key < ? AND batch IN ${dead}`).run(...range);
          prepared(`
            INSERT INTO gone SELECT key, deleted_at FROM refs JOIN batches ON n = batch
            WHERE key >= ? AND key < ? AND deleted_at IS NOT NULL
            ON CONFLICT DO UPDATE SET deleted_at = max(deleted_at, excluded.deleted_at)`).run(...range);
          prepared(`DELETE FROM refs WHERE key >= ? AND key < ? AND batch IN ${dead}`).run(...range);
          prepared('DELETE FROM gone WHERE key >= ? AND key < ? AND deleted_at < ?').run(...range, forgotten);
        });
      }
    },

    /** A number kept beside the entries; and to set it. */
    get(name: string): number | undefined {
      return use(() => prepared('SELECT value FROM meta WHERE name = ?').get(name))?.['value'] as
        | number
        | undefined;
    },
    set(name: string, value: number): void {
      checkNotLost();
      use(() =>
        prepared('INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value').run(
          name,
          value,
        ),
      );
    },

    close(): void {
      drop();
      database.close();
    },
  };
}
