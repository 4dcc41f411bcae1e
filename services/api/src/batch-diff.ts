/**
 * Two runs compared, row by row. Runs that repeat one another have the same rows at the same places; of any other two,
 * rows of one ref are one track. Then the answers of one run are kept in a database on disk while the other one goes
 * by, because their orders may differ: memory stays as it is, however long the manifests are.
 */
import { DatabaseSync } from 'node:sqlite';
import type { BatchRecord, PartRow } from '@acousticsense/shared/batch';
import { ProblemError } from '@acousticsense/shared/errors';
import { createBoundedCounts } from './bounded-counts.ts';
import type { DiffRow, DiffSummary } from './result-schemas.ts';
import { audioName, modelOf, type OpenBatch, type Results } from './results.ts';
import type { StoredBatches } from './stored-batches.ts';

export interface DiffDeps {
  readonly results: Pick<Results, 'ended'>;
  readonly stored: StoredBatches;
}

type Side = DiffRow['from'];

/** A row of the first run that has ended, beside what the other one says of the same track. */
interface Pair {
  readonly row: PartRow;
  readonly from: Side;
  /** Absent: there is no such row, or it has not ended. */
  readonly to: Side | undefined;
}

export type Diff = ReturnType<typeof createDiff>;

const mostChanges = 10_000;
/** Repetitions of repetitions that are looked through for what they began with. */
const longestChain = 100;

export function createDiff({ results, stored }: DiffDeps) {
  /** The rows that differ, some at a time. @throws {ProblemError} batch_gone */
  async function* changes(from: OpenBatch, to: OpenBatch, signal: AbortSignal): AsyncGenerator<DiffRow[]> {
    const comparison = await compare(from, to, signal);
    for await (const pairs of comparison.pairs) {
      const differing = pairs.flatMap(({ row, from, to }): DiffRow[] => {
        const changed = to ? changesOf(from, to) : [];
        if (!to || changed.length === 0) return [];
        const { ref } = row;
        return [{ ...(ref === undefined ? {} : { ref }), audio: audioName(row.audio), changed, from, to }];
      });
      if (differing.length > 0) yield differing;
    }
  }

  /** @throws {ProblemError} batch_gone */
  async function summary(from: OpenBatch, to: OpenBatch, signal: AbortSignal): Promise<DiffSummary> {
    const comparison = await compare(from, to, signal);
    const counts = { compared: 0, changed: 0, onlyInFrom: 0, uncertainInEither: 0 };
    const kinds = { state: 0, label: 0, house: 0 };
    const labels = createBoundedCounts<Change>(mostChanges);
    const houses = createBoundedCounts<Change>(mostChanges);
    let [answeredInBoth, difference] = [0, 0];
    for await (const pairs of comparison.pairs) {
      for (const { from, to } of pairs) {
        if (!to) {
          counts.onlyInFrom += 1;
          continue;
        }
        const changed = changesOf(from, to);
        counts.compared += 1;
        if (changed.length > 0) counts.changed += 1;
        for (const kind of changed) kinds[kind] += 1;
        if (from.uncertain || to.uncertain) counts.uncertainInEither += 1;
        if (from.state !== 'completed' || to.state !== 'completed') continue;
        countChange(labels, from.label, to.label);
        if (comparison.mapped) countChange(houses, from.house ?? null, to.house ?? null);
        if (from.confidence === null || to.confidence === null) continue;
        answeredInBoth += 1;
        difference += Math.abs(from.confidence - to.confidence);
      }
    }
    return {
      from: runOf(from),
      to: runOf(to),
      alignedBy: comparison.alignedBy,
      compared: counts.compared,
      same: counts.compared - counts.changed,
      changed: counts.changed,
      changes: kinds,
      onlyInFrom: counts.onlyInFrom,
      onlyInTo: comparison.rowsOfTo() - counts.compared,
      uncertainInEither: counts.uncertainInEither,
      meanConfidenceDifference:
        answeredInBoth === 0 ? null : Math.round((difference / answeredInBoth) * 1e6) / 1e6,
      labels: sorted(labels.values),
      ...(comparison.mapped ? { houses: sorted(houses.values) } : {}),
      otherChanges: labels.others + houses.others,
    };
  }

  async function compare(from: OpenBatch, to: OpenBatch, signal: AbortSignal) {
    const mapped = from.batch.mapped && to.batch.mapped;
    const alignedBy = (await origin(from.batch)) === (await origin(to.batch)) ? 'row' : 'ref';
    let rowsOfTo = 0;
    const count = () => {
      rowsOfTo += 1;
    };
    const align = alignedBy === 'row' ? byRow : byRef;
    const pairs = align(from, to, mapped, count, signal);
    return { alignedBy, mapped, pairs, rowsOfTo: () => rowsOfTo } as const;
  }

  async function* byRow(
    from: OpenBatch,
    to: OpenBatch,
    mapped: boolean,
    countTo: () => void,
    signal: AbortSignal,
  ): AsyncGenerator<Pair[]> {
    const others = results.ended(to, {}, signal);
    try {
      /** Of the other run, as far as it was read: rows that this one has not reached. */
      let waiting: Side[] = [];
      let more = true;
      for await (const slice of results.ended(from, {}, signal)) {
        const [first, last] = [slice[0]!.row, slice.at(-1)!.row];
        let read = waiting.at(-1)?.row ?? -1;
        while (more && read < last) {
          const { value, done } = await others.next();
          more = !done;
          read = value?.at(-1)?.row ?? read;
          for (const row of value ?? []) {
            countTo();
            if (row.row >= first) waiting.push(sideOf(to, row, mapped));
          }
        }
        const byPlace = new Map(waiting.map((side) => [side.row, side]));
        yield slice.map((row) => ({ row, from: sideOf(from, row, mapped), to: byPlace.get(row.row) }));
        waiting = waiting.filter(({ row }) => row > last);
      }
      for await (const slice of others) slice.forEach(countTo);
    } finally {
      await others.return(undefined);
    }
  }

  async function* byRef(
    from: OpenBatch,
    to: OpenBatch,
    mapped: boolean,
    countTo: () => void,
    signal: AbortSignal,
  ): AsyncGenerator<Pair[]> {
    const answers = createAnswersOnDisk();
    try {
      for await (const slice of results.ended(to, {}, signal)) {
        slice.forEach(countTo);
        const named = slice.filter(({ ref }) => ref !== undefined);
        answers.add(named.map((row) => [row.ref!, sideOf(to, row, mapped)]));
      }
      for await (const slice of results.ended(from, {}, signal)) {
        yield slice.map((row) => ({
          row,
          from: sideOf(from, row, mapped),
          to: row.ref === undefined ? undefined : answers.get(row.ref),
        }));
      }
    } finally {
      answers.close();
    }
  }

  /** Which manifest it is: that of the batch which the first of its repetitions repeats. */
  async function origin(batch: BatchRecord): Promise<string> {
    let { id, origin } = batch;
    for (let link = 0; origin.kind === 'rerun' && link < longestChain; link += 1) {
      id = origin.of;
      try {
        ({ origin } = await stored.read(batch.tenant, id));
      } catch (error) {
        // Deleted: another repetition of it is known by the same id.
        if (error instanceof ProblemError) return id;
        throw error;
      }
    }
    return id;
  }

  return { changes, summary };
}

/** In a file without a name: SQLite keeps what exceeds its cache on disk, and nothing of it is left, whatever dies. */
function createAnswersOnDisk() {
  const database = new DatabaseSync('');
  database.exec(`
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16384;
    CREATE TABLE answers (ref TEXT PRIMARY KEY, side TEXT NOT NULL) WITHOUT ROWID`);
  const insert = database.prepare('INSERT INTO answers VALUES (?, ?) ON CONFLICT DO NOTHING');
  const select = database.prepare('SELECT side FROM answers WHERE ref = ?');
  return {
    add(entries: readonly (readonly [ref: string, side: Side])[]): void {
      database.exec('BEGIN');
      for (const [ref, side] of entries) insert.run(ref, JSON.stringify(side));
      database.exec('COMMIT');
    },
    get(ref: string): Side | undefined {
      const found = select.get(ref);
      return found && (JSON.parse(found['side'] as string) as Side);
    },
    close: () => database.close(),
  };
}

function sideOf(opened: OpenBatch, row: PartRow, mapped: boolean): Side {
  const { state, outcome, uncertain = false, predicted, error } = row;
  const probabilities = (state === 'completed' && outcome?.probabilities) || undefined;
  const best = probabilities?.indexOf(Math.max(...probabilities));
  return {
    row: row.row,
    state,
    label: best === undefined ? null : (opened.model?.labels[best] ?? null),
    confidence: best === undefined ? null : probabilities![best]!,
    uncertain,
    ...(mapped && predicted !== undefined ? { house: predicted } : {}),
    ...(error ? { error: error.code } : {}),
  };
}

function changesOf(from: Side, to: Side): DiffRow['changed'] {
  if (from.state !== to.state) return ['state'];
  return [
    ...(from.label === to.label ? [] : ['label' as const]),
    ...(from.house === to.house ? [] : ['house' as const]),
  ];
}

type Change = DiffSummary['labels'][number];

function countChange(
  counts: ReturnType<typeof createBoundedCounts<Change>>,
  from: string | null,
  to: string | null,
): void {
  const change = counts.of(JSON.stringify([from, to]), () => ({ from, to, rows: 0 }));
  if (change) change.rows += 1;
}

const sorted = (changes: Iterable<Change>): Change[] => [...changes].sort((a, b) => b.rows - a.rows);

export function runOf({ batch, threshold }: OpenBatch): DiffSummary['from'] {
  const { id, name } = batch;
  return { id, ...(name === undefined ? {} : { name }), model: modelOf(batch), threshold };
}
