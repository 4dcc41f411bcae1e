/** The two objects that a job can ask for beside its result: what the model looked at, and its own numbers. */
import type { Explanation, Vectors } from '@acousticsense/shared/job';
import type { GraphOutputs } from './model-session.ts';

/** Where a window lies in the audio: seconds. */
interface Span {
  readonly start: number;
  readonly end: number;
}

/** A map is some 200 numbers a window: a long recording is shown by as many windows as a person will look at. */
const mostExplained = 16;

/** At most 16 of them, evenly spaced from the first to the last, in their order. */
export function explainedOf<T>(windows: readonly T[]): T[] {
  if (windows.length <= mostExplained) return [...windows];
  const step = (windows.length - 1) / (mostExplained - 1);
  return Array.from({ length: mostExplained }, (_, i) => windows[Math.round(i * step)]!);
}

/**
 * @param maps per window, each [rows, columns].
 * @returns with 4 significant digits: a share of the attention is no more exact than that, and half as long.
 */
export function explanationOf(
  spans: readonly Span[],
  maps: readonly GraphOutputs['explain'][],
  columns: number,
): Explanation {
  const digits = (share: number) => Number(share.toPrecision(4));
  const rows = (map: Float32Array) =>
    Array.from({ length: map.length / columns }, (_, row) =>
      Array.from(map.subarray(row * columns, (row + 1) * columns), digits),
    );
  return {
    v: 1,
    windows: spans.map(({ start, end }, i) => ({ start, end, attention: rows(maps[i]!.attention) })),
  };
}

/**
 * @param answers per window; `null` for a silent one.
 * @param embeds whether the model has an embedding at all.
 * @returns logits exactly, embeddings of unit length with 6 decimals; the style anchor is their mean, brought back
 *   to unit length, and absent when no window was heard.
 */
export function vectorsOf(
  labels: readonly string[],
  spans: readonly Span[],
  answers: readonly (GraphOutputs['classify'] | null)[],
  embeds: boolean,
): Vectors {
  const unit = answers.map((answer) => (answer?.embedding ? normalised(answer.embedding) : null));
  const anchor = normalised(sum(unit.filter((vector) => vector !== null)));
  return {
    v: 1,
    labels: [...labels],
    ...(anchor ? { embedding: Array.from(anchor, sixDecimals) } : {}),
    windows: spans.map(({ start, end }, i) => ({
      start,
      end,
      logits: answers[i] ? Array.from(answers[i].logits, shortestFloat32) : null,
      ...(embeds ? { embedding: unit[i] ? Array.from(unit[i], sixDecimals) : null } : {}),
    })),
  };
}

function sum(vectors: readonly Float64Array[]): Float64Array {
  const total = new Float64Array(vectors[0]?.length ?? 0);
  return total.map((_, i) => vectors.reduce((all, vector) => all + vector[i]!, 0));
}

/** @returns null for a vector without a direction. */
function normalised(vector: ArrayLike<number>): Float64Array | null {
  const values = Float64Array.from(vector);
  const length = Math.hypot(...values);
  return length > 0 ? values.map((value) => value / length) : null;
}

const sixDecimals = (value: number) => Math.round(value * 1e6) / 1e6;

/**
 * The number with the fewest decimal digits that is this float32 and no other; nine always suffice. With six, what
 * is shorter ends in zeros, which a number does not keep.
 */
export function shortestFloat32(value: number): number {
  for (let digits = 6; digits < 9; digits += 1) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return short;
  }
  return Number(value.toPrecision(9));
}
