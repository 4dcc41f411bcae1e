/**
 * Keeps the objects of an index few: a first start must not read every segment that there ever was, one by one.
 *
 * Nothing is changed, only written anew and then removed, so a reader finds every entry at any moment, and some twice;
 * that does no harm. Nor does a death anywhere: what is merged already is found by the manifest of the merged object.
 */
import { Readable } from 'node:stream';
import type { AnswerObjects } from './answer-objects.ts';
import {
  dayName,
  type IndexObject,
  mergedManifest,
  mergedMark,
  mergedName,
  readName,
  UnreadableObject,
} from './answer-segment.ts';

const day = 24 * 3_600_000;
/** How old a day is when its segments are merged. */
export const compactAfterMs = 2 * day;
/** How long it is known of a ref that its results were deleted. */
export const goneMs = 365 * day;
/** How long after a batch was deleted a segment of it may still come. */
const latestSegmentMs = 30 * day;

/**
 * @param now epoch milliseconds.
 * @returns how many objects were written and removed.
 */
export async function compactAnswers(objects: AnswerObjects, now: number) {
  const before = Map.groupBy(await Array.fromAsync(objects.list()), (object) => object.day);
  let [written, removed] = [0, 0];
  for (const [of, inDay] of before) {
    if (Date.parse(of) + day + compactAfterMs > now) continue;
    const segments = namesOf(inDay, 'segment');
    const merged = namesOf(inDay, 'merged');
    // One by itself is as good as merged.
    if (segments.length === 0 || segments.length + merged.length < 2) continue;
    const manifests = await Promise.all(merged.map((name) => manifestOf(objects, name)));
    const covered = new Set(manifests.flatMap((names) => names ?? []));
    const rest = segments.filter((name) => !covered.has(name)).sort();
    if (rest.length > 0) {
      await objects.put(mergedName(of, rest), Readable.from(merge(objects, rest)));
      written += 1;
    }
    removed += await objects.remove(segments);
  }
  const forgotten = await findForgotten(objects, now);
  // Entries first: without its tombstone one would count again.
  removed += await objects.remove(forgotten.entries);
  removed += await objects.remove(forgotten.tombstones);
  return { written, removed };
}

const namesOf = (objects: readonly IndexObject[], kind: IndexObject['kind']) =>
  objects.filter((object) => object.kind === kind).map(({ name }) => name);

async function* merge(objects: AnswerObjects, segments: readonly string[]): AsyncGenerator<Buffer> {
  yield Buffer.from(mergedManifest(segments));
  for await (const { name, bytes } of objects.read(segments)) {
    if (!bytes) throw new Error(`${name} is gone: another process compacts at the same time`);
    yield Buffer.from(mergedMark(name));
    yield bytes;
  }
}

/** @returns undefined when it cannot be read, or is gone. */
async function manifestOf(objects: AnswerObjects, merged: string): Promise<string[] | undefined> {
  try {
    for await (const part of (await objects.openMerged(merged)) ?? []) if ('names' in part) return part.names;
  } catch (error) {
    if (!(error instanceof UnreadableObject)) throw error;
  }
  return undefined;
}

/**
 * Objects whose batches were all deleted more than a year ago; and the tombstones of that age, but only when no
 * segment is left that one of them could be needed for: a batch has none that is much younger than its tombstone.
 */
async function findForgotten(objects: AnswerObjects, now: number) {
  const all = await Array.fromAsync(objects.list());
  const tombstones = all.filter((object) => object.kind === 'tombstone');
  const since = now - goneMs;
  const old = new Set(tombstones.flatMap(({ batchId, deletedAt }) => (deletedAt < since ? [batchId] : [])));
  const entries: string[] = [];
  let oldestKept = dayName(now);
  for (const object of all) {
    if (object.kind === 'tombstone') continue;
    const mayBeOld = Date.parse(object.day) + day < since;
    if (mayBeOld && (await batchesIn(objects, object))?.every((batchId) => old.has(batchId)))
      entries.push(object.name);
    else if (object.day < oldestKept) oldestKept = object.day;
  }
  const unneeded = tombstones.filter(
    (object) => old.has(object.batchId) && dayName(Date.parse(object.day) + latestSegmentMs) < oldestKept,
  );
  return { entries, tombstones: unneeded.map(({ name }) => name) };
}

async function batchesIn(objects: AnswerObjects, object: IndexObject): Promise<string[] | undefined> {
  if (object.kind !== 'merged') return [object.batchId];
  return (await manifestOf(objects, object.name))?.flatMap((name) => {
    const segment = readName(name);
    return segment?.kind === 'segment' ? [segment.batchId] : [];
  });
}
