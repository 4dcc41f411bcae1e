/**
 * From rows of a manifest to jobs: what is known already is taken over, what can never run fails with its reason, the
 * rest says in which stage it begins. Everything slow (requests to source buckets, old parts) happens here, before a
 * row's turn comes, so that one tenant's slow bucket keeps nobody else waiting.
 */
import { randomBytes } from 'node:crypto';
import type { AnswerIndex, Locator } from '@acousticsense/shared/answer-index';
import type { BatchRecord, PartRow } from '@acousticsense/shared/batch';
import { rowJobId } from '@acousticsense/shared/batch-records';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import type { JobRecord } from '@acousticsense/shared/job';
import { firstGeneration, firstState, type NewJobRecord } from '@acousticsense/shared/job-records';
import { type ManifestRow, rowIndex } from '@acousticsense/shared/manifest';
import { batchPrefix, partKey, timelineKey } from '@acousticsense/shared/object-keys';
import type { BatchRow } from '@acousticsense/shared/pipeline';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { SourceMatcher, Sources } from '@acousticsense/shared/sources';
import { ObjectChanged, ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { findUpload } from '@acousticsense/shared/uploads';
import type { Logger } from 'pino';
import { readPartRow } from './part-row.ts';
import { answerKeysOf, endpoints, type Parts, selectionOf } from './parts.ts';

export interface RowsDeps {
  readonly storage: Storage;
  readonly sources: Pick<Sources, 'matcher'>;
  readonly reader: Pick<SourceReader, 'head'>;
  readonly index: Pick<AnswerIndex, 'refresh' | 'find'>;
  readonly parts: Pick<Parts, 'readPart'>;
  readonly log: Logger;
  /** Requests to source buckets at a time, for each tenant: whose bucket hangs keeps nobody else waiting. */
  readonly heads: number;
}

export interface ChunkRow {
  readonly chunk: number;
  /** Within the chunk. */
  readonly row: number;
  readonly manifest: ManifestRow;
}

/** A row of an earlier batch that asked the same. */
interface Answer {
  readonly found: PartRow;
  readonly batch: BatchRow;
}

export type Rows = ReturnType<typeof createRows>;

/** Why a source was not asked successfully just now: the decoder will ask again, with time and tries of its own. */
const laterCodes = new Set(['source_unavailable']);
const indexAgeMs = 5_000;
const readsAtOnce = 32;
/** Of one part, among the rows that are prepared at once: then it is read as a whole. */
const manyOfPart = 10;

export function createRows({ storage, sources, reader, index, parts, log, heads }: RowsDeps) {
  const readPart = rememberLast(parts.readPart, 8);
  const gates = new Map<string, Gate>();

  function gateOf(tenant: string): Gate {
    for (const [other, gate] of gates) if (gate.idle) gates.delete(other);
    const gate = gates.get(tenant) ?? createGate(heads);
    gates.set(tenant, gate);
    return gate;
  }

  /** @returns a job for each row, in their order. */
  async function prepare(
    batch: BatchRecord,
    rows: readonly ChunkRow[],
    signal: AbortSignal,
  ): Promise<NewJobRecord[]> {
    const matcher = await sources.matcher(batch.tenant);
    const gate = gateOf(batch.tenant);
    const located = await Promise.all(rows.map((row) => locate(batch, row, matcher, gate, signal)));
    const known = await knownAnswers(batch, located, matcher);
    return Promise.all(located.map((row, at) => jobOf(batch, row, known[at])));
  }

  interface Located extends ChunkRow {
    readonly audio: JobRecord['audio'];
    readonly problem?: ProblemError;
  }

  async function locate(
    batch: BatchRecord,
    row: ChunkRow,
    matcher: SourceMatcher,
    gate: Gate,
    signal: AbortSignal,
  ): Promise<Located> {
    const { audio } = row.manifest;
    if ('url' in audio) return { ...row, audio: { url: audio.url, filename: lastOf(audio.url) } };
    try {
      if ('upload' in audio) {
        const find = () => findUpload(storage, batch.tenant, audio.upload, signal);
        return { ...row, audio: await gate.pass(find) };
      }
      const { bucket, key, etag, versionId } = audio.s3;
      const place = { source: audio.s3, filename: lastOf(key) };
      const source = matcher(bucket, key);
      if (source === undefined) {
        const problem = new ProblemError(
          'source_not_allowed',
          `No registered source holds s3://${bucket}/${key}: register its bucket at /v1/sources.`,
        );
        return { ...row, audio: place, problem };
      }
      if (etag !== undefined || versionId !== undefined) return { ...row, audio: place };
      const { etag: found, size } = await gate.pass(() => reader.head(source, key, undefined, signal));
      return { ...row, audio: { ...place, source: { bucket, key, etag: found, size } } };
    } catch (error) {
      const place: JobRecord['audio'] =
        's3' in audio
          ? { source: audio.s3, filename: lastOf(audio.s3.key) }
          : { key: '', size: 0, filename: audio.upload };
      if (error instanceof InfrastructureFault || signal.aborted) throw error;
      if (!(error instanceof ProblemError)) {
        // A fault of ours in one row must not keep the batch from its end.
        log.error(
          { err: error, batchId: batch.id, chunk: row.chunk, row: row.row },
          'row cannot be prepared',
        );
        const message = 'The row could not be prepared, by a fault on our side; it can be tried again.';
        return { ...row, audio: place, problem: new ProblemError('internal_error', message, {}, error) };
      }
      return laterCodes.has(error.code) ? { ...row, audio: place } : { ...row, audio: place, problem: error };
    }
  }

  /** Of an earlier row on the same audio, with the same model and selection; or of the run that is repeated. */
  async function knownAnswers(
    batch: BatchRecord,
    rows: readonly Located[],
    matcher: SourceMatcher,
  ): Promise<(Answer | undefined)[]> {
    if (batch.force || batch.extras) return [];
    const endpointOf = endpoints(matcher);
    const keys = rows.map(({ manifest, audio }) =>
      answerKeysOf(batch, { ...manifest, audio: asAsked(manifest.audio, audio) }, endpointOf),
    );
    if (keys.every((some) => some.length === 0)) return [];
    try {
      await index.refresh(batch.tenant, { maxAgeMs: indexAgeMs });
    } catch (error) {
      // Every row is then worked out anew: dearer, and right.
      if (!(error instanceof InfrastructureFault) || error.part !== 'index') throw error;
      log.warn({ err: error }, 'the index of known answers cannot be used');
      return [];
    }
    const flat = keys.flat();
    const found = index.find(batch.tenant, flat);
    const byKey = new Map(flat.map((key, at) => [key, found[at]]));
    const locators = keys.map((some) => some.map((key) => byKey.get(key)).find((l) => l !== undefined));
    return readAnswers(batch.tenant, locators);
  }

  async function readAnswers(
    tenant: string,
    locators: readonly (Locator | undefined)[],
  ): Promise<(Answer | undefined)[]> {
    const partOf = ({ batchId, chunk }: Locator) => `${batchId}/${chunk}`;
    const wanted = new Map<string, number>();
    for (const locator of locators)
      if (locator) wanted.set(partOf(locator), (wanted.get(partOf(locator)) ?? 0) + 1);
    const gate = createGate(readsAtOnce);
    return Promise.all(
      locators.map((locator) => {
        if (locator === undefined) return undefined;
        const many = wanted.get(partOf(locator))! >= manyOfPart;
        return gate.pass(() => readAnswer(tenant, locator, many));
      }),
    );
  }

  async function readAnswer(
    tenant: string,
    { batchId, chunk, row }: Locator,
    many: boolean,
  ): Promise<Answer | undefined> {
    const found = await unlessGone(batchId, chunk, async () =>
      many
        ? (await readPart(tenant, batchId, chunk))[row]
        : readPartRow(storage, partKey(tenant, batchId, chunk), row),
    );
    return found?.state === 'completed' ? { found, batch: { id: batchId, chunk, row } } : undefined;
  }

  /** @returns undefined when a part is not stored any more, or not to be read: then the row is worked out anew. */
  async function unlessGone<T>(
    batchId: string,
    chunk: number,
    read: () => Promise<T>,
  ): Promise<T | undefined> {
    try {
      return await read();
    } catch (error) {
      if (error instanceof InfrastructureFault) throw error;
      if (!(error instanceof ObjectNotFound || error instanceof ObjectChanged))
        log.error({ err: error, batchId, chunk }, 'part cannot be read');
      return undefined;
    }
  }

  async function jobOf(
    batch: BatchRecord,
    located: Located,
    known: Answer | undefined,
  ): Promise<NewJobRecord> {
    const { chunk, row, manifest, audio, problem } = located;
    const { tenant } = batch;
    const place = {
      tenant,
      id: rowJobId(batch.id, rowIndex({ chunk, row })),
      batch: { id: batch.id, chunk, row },
    };
    const base: NewJobRecord = {
      ...place,
      // Of a retry: under another generation its queue jobs have ids of their own.
      generation: firstGeneration(batch.round),
      createdAt: Date.now(),
      traceparent: newTraceparent(),
      modelDigest: batch.modelDigest,
      modelName: batch.modelName,
      modelVersion: batch.modelVersion,
      profileHash: batch.profileHash,
      audio,
      selection: selectionOf(batch, manifest),
      presentation: batch.presentation,
      ...(batch.extras ? { extras: batch.extras } : {}),
      class: batch.class,
      revision: batch.revision,
      ...(manifest.ref === undefined ? {} : { ref: manifest.ref }),
    };
    if (problem) return { ...base, state: 'failed', error: problem.toStored() };
    if (known && (await takeTimeline(base, known))) {
      const { decoded, outcome } = known.found;
      return { ...base, state: 'completed', reused: true, outcome, decoded };
    }
    const tensor = await tensorOf(batch, located);
    if (tensor) return { ...base, state: 'decoded', decoded: tensor };
    return { ...base, state: firstState(audio) };
  }

  /** A long recording's windows lie beside its row. @returns false when they are gone: then it is heard anew. */
  async function takeTimeline(job: NewJobRecord, { found, batch }: Answer): Promise<boolean> {
    if (found.outcome?.windows !== undefined) return true;
    try {
      const old = timelineKey({ tenant: job.tenant, id: found.jobId, batch });
      await storage.put(timelineKey(job), await storage.read(old));
      return true;
    } catch (error) {
      if (error instanceof ObjectNotFound) return false;
      throw error;
    }
  }

  /** What the repeated run decoded, when the new model reads the same tensors. A tensor that is gone is made again. */
  async function tensorOf(batch: BatchRecord, { chunk, row }: ChunkRow): Promise<JobRecord['decoded']> {
    if (batch.tensorsOf === undefined) return undefined;
    const { tenant, tensorsOf } = batch;
    const part = await unlessGone(tensorsOf, chunk, () => readPart(tenant, tensorsOf, chunk));
    return part?.[row]?.decoded;
  }

  return { prepare };
}

/** The place of an object, once its ETag is known. */
function asAsked(asked: ManifestRow['audio'], audio: JobRecord['audio']): ManifestRow['audio'] {
  return 's3' in asked && 'source' in audio ? { s3: audio.source } : asked;
}

const lastOf = (path: string): string => {
  const name = path.split(/[?#]/)[0]!.split('/').at(-1) ?? '';
  return [...name].slice(0, 255).join('') || 'unnamed';
};

function newTraceparent(): string {
  const hex = randomBytes(24).toString('hex');
  return `00-${hex.slice(0, 32)}-${hex.slice(32)}-01`;
}

/** So many at a time; who comes first goes first. */
interface Gate {
  pass<T>(work: () => Promise<T>): Promise<T>;
  readonly idle: boolean;
}

function createGate(most: number): Gate {
  const queue: (() => void)[] = [];
  let inside = 0;
  return {
    async pass(work) {
      if (inside >= most) await new Promise<void>((enter) => queue.push(enter));
      else inside += 1;
      try {
        return await work();
      } finally {
        // Whoever waits takes the place over.
        const next = queue.shift();
        if (next) next();
        else inside -= 1;
      }
    },
    get idle() {
      return inside === 0;
    },
  };
}

/** Rows of one chunk mostly come from one old part: it is read once. */
function rememberLast(
  read: (tenant: string, batchId: string, chunk: number) => Promise<PartRow[]>,
  most: number,
): typeof read {
  const last = new Map<string, Promise<PartRow[]>>();
  return (tenant, batchId, chunk) => {
    const key = `${batchPrefix(tenant, batchId)}${chunk}`;
    const known = last.get(key);
    if (known) return known;
    const reading = read(tenant, batchId, chunk);
    last.set(key, reading);
    reading.catch(() => last.delete(key));
    if (last.size > most) last.delete(last.keys().next().value!);
    return reading;
  };
}
