/**
 * A SQLite file that holds nothing but what can be had again: a local cache. Several processes may use it at once, any
 * of them may be killed at any moment, and a damaged one is left for an empty one.
 */
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { DatabaseSync, type StatementSync } from 'node:sqlite';
import { InfrastructureFault } from './errors.ts';

/** The database was damaged and is empty now. */
export class DatabaseLost extends InfrastructureFault {}

interface Options {
  /** On a local disk: the log is shared memory. Made when it is missing. */
  readonly directory: string;
  /** Of the file, without ending; with the version of the schema in it. */
  readonly name: string;
  /** Statements that make what is missing. */
  readonly schema: string;
  /** What is away when the file cannot be used: `part` of the {@link InfrastructureFault}. */
  readonly part: string;
  /** Of the file; for the process. */
  readonly cacheBytes: number;
}

/** How long another process's transaction is waited for, with the event loop at rest. */
const busyMs = 5_000;

/** Opened at the first use, and again at the next one after `close`. */
export function createThrowawayDatabase({ directory, name, schema, part, cacheBytes }: Options) {
  let generation = 0;
  let losses = 0;
  let database: DatabaseSync | undefined;
  let statements = new Map<string, StatementSync>();

  const fileOf = (n: number) => path.join(directory, `${name}.${n}.sqlite`);
  const generations = () =>
    readdirSync(directory).flatMap((file) => {
      const n = file.slice(name.length + 1, -'.sqlite'.length);
      return file === `${name}.${n}.sqlite` && /^\d+$/.test(n) ? [Number(n)] : [];
    });

  function open(): DatabaseSync {
    if (database) return database;
    mkdirSync(directory, { recursive: true });
    generation = Math.max(generation, ...generations());
    statements = new Map();
    database = openFile(fileOf(generation), schema, cacheBytes);
    return database;
  }

  function close(): void {
    try {
      database?.close();
    } catch {
      // It may be the damaged one.
    }
    database = undefined;
  }

  /**
   * A damaged file is not replaced: another process may have it open, and when that one closes, it removes the log of
   * whatever has the name by then. So the next number follows, which another process may have begun already.
   */
  function leaveDamaged(cause: unknown): DatabaseLost {
    losses += 1;
    close();
    const damaged = generation;
    generation += 1;
    open();
    for (const n of generations().filter((n) => n <= damaged)) {
      for (const ending of ['', '-wal', '-shm']) rmSync(`${fileOf(n)}${ending}`, { force: true });
    }
    return new DatabaseLost(part, `${fileOf(damaged)} was damaged: ${cause}`, cause);
  }

  function use<T>(operation: (database: DatabaseSync) => T): T {
    try {
      return operation(open());
    } catch (error) {
      if (!isDamage(error)) throw normalise(error);
      try {
        throw leaveDamaged(error);
      } catch (second) {
        throw normalise(second);
      }
    }
  }

  /** SQLite's and the file system's troubles; a mistake in a statement (SQLITE_ERROR) stays one. */
  function normalise(error: unknown): unknown {
    const code = primaryCode(error);
    const isSystem = error instanceof Error && (error as NodeJS.ErrnoException).syscall !== undefined;
    if (error instanceof InfrastructureFault || code === 1 || (code === undefined && !isSystem)) return error;
    return new InfrastructureFault(
      part,
      `${fileOf(generation)} cannot be used: ${(error as Error).message}`,
      error,
    );
  }

  return {
    /**
     * Everything that touches the database happens within it.
     * @throws {InfrastructureFault} the disk is full, the file may not be written, is locked for too long.
     * @throws {DatabaseLost}
     */
    use,

    /** As {@link use}; all or nothing. */
    transaction: <T>(operation: () => T): T =>
      use((database) => {
        database.exec('BEGIN IMMEDIATE');
        try {
          const result = operation();
          database.exec('COMMIT');
          return result;
        } catch (error) {
          // A full disk has rolled back already.
          if (database.isTransaction) database.exec('ROLLBACK');
          throw error;
        }
      }),

    /** Prepared once. Only within `use`. */
    prepared(sql: string): StatementSync {
      const known = statements.get(sql);
      if (known) return known;
      const statement = open().prepare(sql);
      statements.set(sql, statement);
      return statement;
    },

    /** How often this process has lost it: who works in several steps sees by it that the first ones are undone. */
    get losses(): number {
      return losses;
    },

    close,
  };
}

function openFile(file: string, schema: string, cacheBytes: number): DatabaseSync {
  const until = performance.now() + busyMs;
  for (;;) {
    const opened = new DatabaseSync(file, { timeout: busyMs });
    try {
      // NORMAL: a power cut may cost the newest transactions, but damages nothing.
      opened.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;');
      opened.exec(`PRAGMA cache_size = -${cacheBytes / 1_024}; BEGIN IMMEDIATE; ${schema}; COMMIT;`);
      return opened;
    } catch (error) {
      opened.close();
      // For turning the log on SQLite waits for no other process, whatever its timeout.
      if (primaryCode(error) !== 5 || performance.now() > until) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
    }
  }
}

/** https://www.sqlite.org/rescode.html */
function primaryCode(error: unknown): number | undefined {
  const code = error instanceof Error ? (error as { errcode?: unknown }).errcode : undefined;
  return typeof code === 'number' ? code & 0xff : undefined;
}

/** SQLITE_CORRUPT, SQLITE_NOTADB */
const isDamage = (error: unknown) => [11, 26].includes(primaryCode(error) ?? 0);
