/** Compares logits of the pipeline with the numbers of the owner's own script, window by window. */
import { readCsv } from './csv.ts';
import { Failure } from './failure.ts';

/** Of one file: logits in the bundle's label order, by window. */
export type Windows = ReadonlyMap<number, readonly number[]>;

export interface Reference {
  readonly files: ReadonlyMap<string, Windows>;
  /** How columns were taken for labels, as a sentence. */
  readonly columns: string;
}

export interface Parity {
  files: number;
  windows: number;
  values: number;
  /** Of the logits, absolute. Null when nothing could be compared; so are the others. */
  maxError: number | null;
  meanError: number | null;
  /** Standard deviation of all reference logits; the errors as shares of it. */
  referenceStd: number | null;
  maxErrorShare: number | null;
  meanErrorShare: number | null;
  /** Share of the windows with the same best label. */
  top1Agreement: number | null;
  worst: { file: string; window: number; label: string; reference: number; ours: number } | null;
  /** Files and windows that are not on both sides, in words. */
  mismatches: string[];
}

const number = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/**
 * `file,window,<one column per label>`, windows counted from 0. Columns are named after the labels, or stand in
 * the bundle's order under names of their own (0, 1, 2, ...).
 *
 * @throws {Failure} naming the column or the line.
 */
export async function readReference(
  csv: string,
  { labels, match }: { labels: readonly string[]; match: (label: string) => number | undefined },
): Promise<Reference> {
  const { columns, rows } = await readCsv(csv);
  if (columns[0] !== 'file' || columns[1] !== 'window') {
    throw new Failure(
      `${csv}: the first two columns must be file and window, then one for each label; they are ${columns.slice(0, 2).join(' and ')}.`,
    );
  }
  const names = columns.slice(2);
  if (names.length !== labels.length) {
    throw new Failure(
      `${csv} has ${names.length} columns of logits, the bundle ${labels.length} labels (${labels.join(', ')}).`,
    );
  }
  const matched = names.map(match);
  const strangers = names.filter((_, index) => matched[index] === undefined);
  const byName = strangers.length === 0;
  if (!byName && strangers.length < names.length) {
    throw new Failure(
      `${csv}: the bundle has no label ${strangers.join(', ')}. Name every column after a label, or none: then the bundle's order is taken.`,
    );
  }
  if (byName && new Set(matched).size < names.length)
    throw new Failure(`${csv}: two columns are of the same label.`);

  const files = new Map<string, Map<number, number[]>>();
  for (const { line, cells } of rows) {
    const [file, window, ...values] = cells as [string, string, ...string[]];
    const index = Number(window);
    if (!/^\d+$/.test(window)) {
      throw new Failure(`${csv}, line ${line}: the window is "${window}"; windows are counted 0, 1, 2.`);
    }
    const wrong = values.find((value) => !number.test(value) || !Number.isFinite(Number(value)));
    if (wrong !== undefined) throw new Failure(`${csv}, line ${line}: "${wrong}" is no number.`);
    const windows = files.get(file) ?? new Map<number, number[]>();
    if (windows.has(index))
      throw new Failure(`${csv}, line ${line}: window ${index} of ${file} is there twice.`);
    const logits = labels.map(() => 0);
    for (const [column, value] of values.entries())
      logits[byName ? matched[column]! : column] = Number(value);
    windows.set(index, logits);
    files.set(file, windows);
  }
  if (files.size === 0) throw new Failure(`${csv} holds no logits: there is nothing under its first line.`);
  return {
    files,
    columns: byName
      ? 'Columns are matched to labels by name.'
      : `No column is named after a label: they are taken in the bundle's order (${labels[0]} first).`,
  };
}

/**
 * @param ours per file its windows' logits, null for a silent one; a text says why there are none.
 */
export function compareLogits(
  reference: ReadonlyMap<string, Windows>,
  ours: ReadonlyMap<string, readonly (readonly number[] | null)[] | string>,
  labels: readonly string[],
): Parity {
  const mismatches: string[] = [];
  const pairs: { file: string; window: number; theirs: readonly number[]; own: readonly number[] }[] = [];
  for (const [file, windows] of reference) {
    const own = ours.get(file);
    if (own === undefined || typeof own === 'string') {
      mismatches.push(`${file}: ${own ?? 'no such audio'}`);
      continue;
    }
    if (windows.size !== own.length)
      mismatches.push(`${file}: ${windows.size} windows in the reference, ${own.length} here`);
    for (const [window, theirs] of windows) {
      const logits = own[window];
      if (logits) pairs.push({ file, window, theirs, own: logits });
      else if (logits === null) mismatches.push(`${file}: window ${window} is silent here`);
      else if (windows.size === own.length) mismatches.push(`${file}: there is no window ${window} here`);
    }
  }
  const errors = pairs.flatMap(({ file, window, theirs, own }) =>
    theirs.map((value, label) => ({
      file,
      window,
      label: labels[label]!,
      reference: value,
      ours: own[label]!,
      error: Math.abs(value - own[label]!),
    })),
  );
  const compared = { files: new Set(pairs.map(({ file }) => file)).size, windows: pairs.length };
  if (errors.length === 0) {
    return {
      ...compared,
      values: 0,
      maxError: null,
      meanError: null,
      referenceStd: null,
      maxErrorShare: null,
      meanErrorShare: null,
      top1Agreement: null,
      worst: null,
      mismatches,
    };
  }
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  const values = errors.map(({ reference: value }) => value);
  const centre = mean(values);
  const referenceStd = Math.sqrt(mean(values.map((value) => (value - centre) ** 2)));
  const { error: maxError, ...worst } = errors.reduce((a, b) => (b.error > a.error ? b : a));
  const meanError = mean(errors.map(({ error }) => error));
  return {
    ...compared,
    values: errors.length,
    maxError,
    meanError,
    referenceStd,
    maxErrorShare: maxError / referenceStd,
    meanErrorShare: meanError / referenceStd,
    top1Agreement: mean(pairs.map(({ theirs, own }) => (bestOf(theirs) === bestOf(own) ? 1 : 0))),
    worst,
    mismatches,
  };
}

const bestOf = (logits: readonly number[]) => logits.indexOf(Math.max(...logits));
