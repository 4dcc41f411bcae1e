/**
 * What can be done with a batch: accept a manifest, a prefix or a repetition; read, pause, resume, cancel, try again,
 * delete. The rows themselves are the feeder's.
 */
import { createHash, randomBytes, randomUUIDv7 } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { PassThrough, Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGunzip } from 'node:zlib';
import type { AnswerIndex } from '@acousticsense/shared/answer-index';
import { type BatchOrigin, type BatchRecord, isEnded } from '@acousticsense/shared/batch';
import type { BatchRecords, BatchResult, NewBatch } from '@acousticsense/shared/batch-records';
import { ProblemError } from '@acousticsense/shared/errors';
import { type BadRow, chunkRows, encodeChunk, type ManifestRow } from '@acousticsense/shared/manifest';
import { badRowsKey, batchPrefix, chunkKey, mappingKey } from '@acousticsense/shared/object-keys';
import type { SourceMatcher, Sources } from '@acousticsense/shared/sources';
import { deletePrefix, ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Logger } from 'pino';
import type { z } from 'zod';
import type { CallbackFor } from './callbacks.ts';
import type { Bind } from './idempotency.ts';
import type { Jobs } from './jobs.ts';
import type { Limits } from './limits.ts';
import { type ManifestNote, readManifest } from './manifest-reader.ts';
import type { Mappings } from './mappings.ts';
import type { BatchResource, batchOptionsSchema } from './schemas.ts';
import type { StoredBatches } from './stored-batches.ts';

export interface BatchesDeps {
  readonly storage: Storage;
  readonly batches: BatchRecords;
  readonly stored: StoredBatches;
  readonly sources: Pick<Sources, 'matcher'>;
  readonly mappings: Mappings;
  readonly jobs: Pick<Jobs, 'servedModel'>;
  readonly limits: Limits;
  readonly callbackFor: CallbackFor;
  readonly index: Pick<AnswerIndex, 'writeTombstone'>;
  readonly log: Logger;
  readonly maxRows: number;
  readonly maxActive: number;
}

export type BatchOptions = z.infer<typeof batchOptionsSchema>;

export interface AcceptedBatch {
  readonly batch: BatchRecord;
  readonly notes: ManifestNote[];
}

const maxLineBytes = 64 * 1024;
/** Told with the batch itself; all of them lie in `bad-rows.jsonl`. */
const firstBadRows = 20;

export type Batches = ReturnType<typeof createBatches>;

export function createBatches(deps: BatchesDeps) {
  const { storage, batches, stored, sources, mappings, jobs, limits, index, log } = deps;

  /**
   * Streams a manifest into chunks. Nothing of it runs before all of it has come, and nothing is left of one that
   * breaks off.
   *
   * @param bind ties the request's Idempotency-Key to the batch.
   * @throws {ProblemError} manifest_invalid, manifest_too_large, quota_exceeded, too_busy, upload_cut; what `bind`
   *   rejects with
   */
  async function acceptManifest(
    request: IncomingMessage,
    tenant: string,
    options: BatchOptions,
    bind: Bind,
  ): Promise<AcceptedBatch> {
    const format = formatOf(request);
    const created = await create(tenant, options, { kind: 'manifest' }, 'receiving');
    const ref = { tenant, id: created.id };
    const body = readBody(request);
    const bad = collectBadRows(storage, badRowsKey(tenant, ref.id));
    const notes: ManifestNote[] = [];
    let charged = 0;
    try {
      const matcher = await sources.matcher(tenant);
      let chunk = 0;
      let rows: ManifestRow[] = [];
      let badSince = 0;
      const append = async () => {
        await storage.put(chunkKey(tenant, ref.id, chunk), encodeChunk(rows));
        expect(await batches.append(ref, { chunk, rows: rows.length, bad: badSince }));
        chunk += 1;
        rows = [];
        badSince = 0;
      };
      const manifest = readManifest(body.stream, {
        format,
        maxRows: deps.maxRows,
        maxLineBytes,
        isAllowed: (bucket, key) => matcher(bucket, key) !== undefined,
      });
      for await (const item of manifest) {
        if ('note' in item) notes.push(item.note);
        else if ('bad' in item) {
          badSince += 1;
          await bad.add(item.bad);
        } else {
          rows.push(item.row);
          if (rows.length === chunkRows) await append();
        }
      }
      const total = chunk * chunkRows + rows.length;
      if (rows.length > 0) await append();
      await bad.end();
      await bind(body.fingerprint(request.url ?? ''), ref.id);
      await limits.charge(tenant, { rows: total });
      charged = total;
      expect(await batches.seal(ref, { bad: badSince, firstBad: bad.first }));
      log.info({ batchId: ref.id, rows: total, bad: bad.count }, 'batch accepted');
      return { batch: await stored.read(tenant, ref.id), notes };
    } catch (error) {
      if (charged > 0) await limits.refund(tenant, { rows: charged }).catch(() => {});
      await discard(ref);
      throw request.destroyed && !request.complete ? uploadCut(error) : error;
    }
  }

  /** @throws {ProblemError} source_not_allowed */
  async function acceptPrefix(
    tenant: string,
    url: string,
    options: BatchOptions,
    bind: Bind,
    fingerprint: string,
  ): Promise<AcceptedBatch> {
    const [, bucket, prefix] = /^s3:\/\/([^/]+)\/?(.*)$/s.exec(url) ?? [];
    if (bucket === undefined || prefix === undefined)
      throw new ProblemError('bad_option', '"prefix": must be s3://BUCKET/PREFIX.', { field: 'prefix' });
    const matcher: SourceMatcher = await sources.matcher(tenant);
    if (matcher(bucket, prefix) === undefined) {
      throw new ProblemError(
        'source_not_allowed',
        `No registered source holds s3://${bucket}/${prefix}: register its bucket at /v1/sources.`,
        { field: 'prefix' },
      );
    }
    return acceptReferred(tenant, options, { kind: 'prefix', bucket, prefix }, bind, fingerprint);
  }

  /**
   * The rows of an earlier batch again, by the model that is served now or the one that is named. A model of the same
   * profile reads what was decoded for the earlier one, as far as it is still stored.
   */
  async function acceptRerun(
    tenant: string,
    of: string,
    options: BatchOptions,
    bind: Bind,
    fingerprint: string,
  ): Promise<AcceptedBatch> {
    const old = await stored.read(tenant, of);
    if (!old.sealed) {
      throw new ProblemError('batch_state', `The manifest of the batch ${of} is not complete yet.`, {
        field: 'rerunOf',
      });
    }
    return acceptReferred(tenant, options, { kind: 'rerun', of }, bind, fingerprint, old);
  }

  async function acceptReferred(
    tenant: string,
    options: BatchOptions,
    origin: BatchOrigin,
    bind: Bind,
    fingerprint: string,
    old?: BatchRecord,
  ): Promise<AcceptedBatch> {
    const id = randomUUIDv7();
    await bind(fingerprint, id);
    if (old) await limits.charge(tenant, { rows: old.rows });
    try {
      const batch = await create(tenant, options, origin, 'running', id, old);
      log.info({ batchId: id, origin }, 'batch accepted');
      return { batch, notes: [] };
    } catch (error) {
      // Refused: nothing was made. Of any other failure that is not known.
      if (old && error instanceof ProblemError)
        await limits.refund(tenant, { rows: old.rows }).catch(() => {});
      throw error;
    }
  }

  async function create(
    tenant: string,
    options: BatchOptions,
    origin: BatchOrigin,
    state: 'receiving' | 'running',
    id: string = randomUUIDv7(),
    old?: BatchRecord,
  ): Promise<BatchRecord> {
    const active = await batches.active(tenant);
    if (active.length >= deps.maxActive) {
      throw new ProblemError('too_busy', `${active.length} batches run already; send this one later.`, {
        retryAfter: 60,
      });
    }
    const { description: model } = await jobs.servedModel(options.model);
    if (options.explain && !model.explains) {
      throw new ProblemError(
        'model_cannot_explain',
        `The model ${model.name} ${model.version} cannot show what it looked at: leave "explain" away.`,
        { field: 'explain' },
      );
    }
    const callback =
      options.callbackUrl === undefined ? undefined : await deps.callbackFor(tenant, options.callbackUrl);
    const selection = {
      windows: options.windows ?? old?.selection.windows ?? model.windows,
      start: options.start ?? old?.selection.start ?? 0,
      ...durationOf(options.duration ?? old?.selection.duration),
    };
    const mapping = await mappingOf(tenant, options, model.labels, old);
    if (mapping) await storage.put(mappingKey(tenant, id), Buffer.from(JSON.stringify(mapping)));
    const sameWindows = old && JSON.stringify(old.selection) === JSON.stringify(selection);
    const batch: NewBatch = {
      id,
      tenant,
      name: options.name ?? old?.name,
      state,
      origin,
      class: options.class,
      modelDigest: model.digest,
      modelName: model.name,
      modelVersion: model.version,
      profileHash: model.profileHash,
      selection,
      presentation: {
        topK: options.topK ?? old?.presentation.topK ?? 5,
        threshold: options.threshold ?? model.threshold,
      },
      extras:
        options.explain || options.vectors
          ? { explain: options.explain, vectors: options.vectors }
          : undefined,
      traceparent: `00-${randomBytes(16).toString('hex')}-${randomBytes(8).toString('hex')}-01`,
      tensorsOf: old && sameWindows && old.profileHash === model.profileHash ? old.id : undefined,
      mapped: mapping !== undefined,
      force: options.force,
      // Who repeats a batch looks at the differences; other systems would take it for news.
      notify: options.notify ?? (old && !callback ? 'none' : 'batch'),
      callback,
      revision: await batches.nextRevision(tenant),
    };
    await batches.create(batch);
    const record = await batches.get({ tenant, id });
    if (record === undefined) throw new Error('the batch that was just made is not there');
    return record;
  }

  async function mappingOf(
    tenant: string,
    options: BatchOptions,
    labels: readonly string[],
    old: BatchRecord | undefined,
  ): Promise<unknown> {
    if (options.mapping !== undefined) return mappings.read(tenant, options.mapping, labels);
    if (!old?.mapped || old.modelDigest === undefined) return undefined;
    // The earlier run's own, when it speaks of the same labels.
    const text = await storage.read(mappingKey(tenant, old.id)).catch((error) => {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    });
    if (text === undefined) return undefined;
    const mapping = JSON.parse(text.toString('utf8')) as { labels: string[] };
    return JSON.stringify(mapping.labels) === JSON.stringify(labels) ? mapping : undefined;
  }

  /** Of a manifest that did not come to its end: as if it had never begun. */
  async function discard(ref: { tenant: string; id: string }): Promise<void> {
    try {
      await batches.cancel(ref);
      await batches.forget(ref);
      await deletePrefix(storage, batchPrefix(ref.tenant, ref.id));
    } catch (error) {
      // The feeder ends what stopped coming, and its retention deletes what nobody knows.
      log.warn({ err: error, batchId: ref.id }, 'a broken manifest could not be discarded');
    }
  }

  const steps = {
    cancel: { step: batches.cancel, hint: 'it has ended.' },
    pause: { step: batches.pause, hint: 'only a running batch can be paused.' },
    resume: { step: batches.resume, hint: 'only a paused batch can be resumed.' },
  } as const;

  /** @throws {ProblemError} batch_not_found, batch_gone, batch_state */
  async function change(tenant: string, id: string, what: keyof typeof steps): Promise<BatchRecord> {
    const { step, hint } = steps[what];
    const before = await stored.read(tenant, id);
    const result = await step({ tenant, id });
    if (result.outcome === 'refused' || result.outcome === 'missing') {
      const state = result.state === 'none' ? before.state : result.state;
      throw new ProblemError('batch_state', `The batch is ${state}: ${hint}`);
    }
    return stored.read(tenant, id);
  }

  /** Rows that failed are tried again, and only they. */
  async function retryFailed(tenant: string, id: string): Promise<BatchRecord> {
    const before = await stored.read(tenant, id);
    // A walk or a copy that broke off has failed as a whole.
    if (before.failed === 0 && before.error === undefined && isEnded(before.state)) return before;
    const result = await batches.retry({ tenant, id }, await batches.nextRevision(tenant));
    if (result.outcome === 'missing')
      throw new ProblemError('batch_state', 'The batch ended too long ago: repeat it with "rerunOf".');
    if (result.outcome === 'refused')
      throw new ProblemError(
        'batch_state',
        `The batch is ${result.state}: only what has ended can be tried again.`,
      );
    return stored.read(tenant, id);
  }

  /** Cancels a batch that runs; deletes one that has ended, with its results. @returns undefined when deleted. */
  async function remove(tenant: string, id: string): Promise<BatchRecord | undefined> {
    const batch = await stored.read(tenant, id);
    if (!isEnded(batch.state)) {
      if (batch.state === 'cancelling') return batch;
      return change(tenant, id, 'cancel');
    }
    const now = Date.now();
    // First the step that decides: it may be tried again at this moment. What follows and is cut off, the feeder's
    // retention brings to its end.
    if ((await batches.remove({ tenant, id }, now)).outcome === 'refused') return remove(tenant, id);
    await index.writeTombstone(tenant, id, now);
    await deletePrefix(storage, batchPrefix(tenant, id));
    log.info({ batchId: id }, 'batch deleted');
    return undefined;
  }

  async function list(tenant: string, limit: number, before?: number): Promise<BatchRecord[]> {
    const ids = await batches.list(tenant, limit, before);
    const found = await Promise.all(
      ids.map((id) =>
        stored.read(tenant, id).catch((error) => {
          if (error instanceof ProblemError) return undefined;
          throw error;
        }),
      ),
    );
    return found.filter((batch) => batch !== undefined);
  }

  return { acceptManifest, acceptPrefix, acceptRerun, change, retryFailed, remove, list, read: stored.read };
}

/** A step that must have been done: nobody else writes this batch. */
function expect({ outcome, state }: BatchResult): void {
  if (outcome === 'done') return;
  throw new ProblemError(
    'batch_state',
    `The batch is ${state}: it was cancelled while its manifest came in.`,
  );
}

const durationOf = (duration: number | undefined) => (duration === undefined ? {} : { duration });

const formats: Readonly<Record<string, 'jsonl' | 'csv'>> = {
  'application/x-ndjson': 'jsonl',
  'application/ndjson': 'jsonl',
  'application/jsonl': 'jsonl',
  'application/x-jsonlines': 'jsonl',
  'text/csv': 'csv',
};

/** @throws {ProblemError} wrong_content_type */
export function formatOf({ headers }: IncomingMessage): 'jsonl' | 'csv' {
  const type = (headers['content-type'] ?? '').split(';')[0]!.trim().toLowerCase();
  const format = formats[type];
  if (format) return format;
  throw new ProblemError(
    'wrong_content_type',
    `Send the manifest as application/x-ndjson or text/csv, or JSON with "prefix" or "rerunOf"; this is "${type.slice(0, 100)}".`,
  );
}

/** The body as it is meant, and its SHA-256 as it came. */
export function readBody(request: IncomingMessage): {
  stream: AsyncIterable<Uint8Array>;
  fingerprint(url: string): string;
} {
  const hash = createHash('sha256');
  const counted = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      hash.update(chunk);
      done(null, chunk);
    },
  });
  const encoding = (request.headers['content-encoding'] ?? 'identity').toLowerCase();
  if (!['identity', 'gzip', 'x-gzip'].includes(encoding)) {
    throw new ProblemError(
      'wrong_content_type',
      `The encoding "${encoding.slice(0, 50)}" is not taken; gzip is.`,
    );
  }
  const out = encoding === 'identity' ? new PassThrough() : createGunzip();
  pipeline(request, counted, out).catch((error) => out.destroy(error));
  return { stream: out, fingerprint: (url) => `${url} ${hash.copy().digest('hex')}` };
}

/** Bad rows on their way into storage; none, no object. */
function collectBadRows(storage: Storage, key: string) {
  const first: BadRow[] = [];
  let count = 0;
  let lines: PassThrough | undefined;
  let written: Promise<unknown> | undefined;
  return {
    first,
    get count() {
      return count;
    },
    async add(row: BadRow): Promise<void> {
      count += 1;
      if (first.length < firstBadRows) first.push(row);
      if (lines === undefined) {
        lines = new PassThrough();
        written = storage.put(key, lines);
        written.catch(() => {});
      }
      if (!lines.write(`${JSON.stringify(row)}\n`))
        await Promise.race([new Promise((resolve) => lines!.once('drain', resolve)), written]);
    },
    async end(): Promise<void> {
      lines?.end();
      await written;
    },
  };
}

function uploadCut(cause: unknown): ProblemError {
  return new ProblemError(
    'upload_cut',
    'The connection ended before the manifest was complete: nothing of it runs; send it again.',
    {},
    cause,
  );
}

/** @param now epoch milliseconds. */
export function presentBatch(
  batch: BatchRecord,
  notes: readonly ManifestNote[] = [],
  now = Date.now(),
): BatchResource {
  const self = `/v1/batches/${batch.id}`;
  const left = batch.waiting + batch.open;
  const running = batch.state === 'running' && batch.sealed;
  const end = running && batch.rate && left > 0 ? now + (left / batch.rate) * 1_000 : undefined;
  const time = (ms: number) => new Date(ms).toISOString();
  return {
    id: batch.id,
    ...(batch.name === undefined ? {} : { name: batch.name }),
    state: batch.state,
    class: batch.class,
    notify: batch.notify,
    createdAt: time(batch.createdAt),
    updatedAt: time(batch.updatedAt),
    ...(batch.endedAt === undefined ? {} : { endedAt: time(batch.endedAt) }),
    origin:
      batch.origin.kind === 'prefix'
        ? { kind: 'prefix', prefix: `s3://${batch.origin.bucket}/${batch.origin.prefix}` }
        : batch.origin.kind === 'rerun'
          ? { kind: 'rerun', of: batch.origin.of }
          : { kind: 'manifest' },
    model: {
      name: batch.modelName,
      version: batch.modelVersion,
      digest: batch.modelDigest,
      profile: batch.profileHash,
    },
    complete: batch.sealed,
    revision: batch.revision,
    counts: {
      rows: batch.rows,
      bad: batch.bad,
      waiting: batch.waiting,
      running: batch.open,
      completed: batch.completed,
      failed: batch.failed,
      cancelled: batch.cancelled,
      reused: batch.reused,
    },
    verdicts: {
      agree: batch.agree,
      disagree: batch.disagree,
      uncertain: batch.uncertain,
      undeclared: batch.undeclared,
      unknown_genre: batch.unknown_genre,
    },
    ...(batch.rate === undefined || isEnded(batch.state) ? {} : { rowsPerSecond: batch.rate }),
    ...(end === undefined ? {} : { estimatedEnd: time(end) }),
    ...(batch.error ? { error: batch.error } : {}),
    firstErrors: { bad: batch.firstBad, failed: batch.faults },
    ...(notes.length > 0 ? { notes: [...notes] } : {}),
    links: {
      self,
      events: `${self}/events`,
      results: `${self}/results.jsonl`,
      csv: `${self}/results.csv`,
      badRows: `${self}/bad-rows.jsonl`,
      audit: `${self}/audit`,
    },
  };
}
