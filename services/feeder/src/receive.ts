/**
 * Batches whose rows nobody sends: a prefix of a source bucket is walked, the manifest of a repeated run is copied.
 * Both go on where a killed process left off, since each chunk is appended in one step with how far it goes.
 */
import type { BatchRecord } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { ProblemError } from '@acousticsense/shared/errors';
import { chunkRows, decodeChunk, encodeChunk, type ManifestRow } from '@acousticsense/shared/manifest';
import { chunkKey } from '@acousticsense/shared/object-keys';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { Sources } from '@acousticsense/shared/sources';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { readStoredBatch } from './stored-batch.ts';

export interface ReceiveDeps {
  readonly storage: Storage;
  readonly batches: BatchRecords;
  readonly sources: Pick<Sources, 'sourceFor'>;
  readonly reader: Pick<SourceReader, 'list'>;
  /** Of a batch; rounded up to whole chunks. */
  readonly maxRows: number;
}

/** What is taken for audio in a bucket that also holds covers and lists; the decoder looks at the bytes. */
const audioName = /\.(mp3|wav|wave|flac|ogg|oga|opus|m4a|mp4|aac|aif|aiff)$/i;

export function createReceiver({ storage, batches, sources, reader, maxRows }: ReceiveDeps) {
  /**
   * Goes on until the manifest is complete, the batch takes no more, or another process is at it too.
   * @param batch as it was; it may have changed since.
   * @throws what may pass: then it is called again later.
   */
  async function receive({ tenant, id }: BatchRecord, signal: AbortSignal): Promise<void> {
    const batch = await batches.get({ tenant, id });
    if (batch === undefined || batch.sealed) return;
    try {
      if (batch.origin.kind === 'prefix') await walk(batch, batch.origin, signal);
      if (batch.origin.kind === 'rerun') await copy(batch, batch.origin.of, signal);
    } catch (error) {
      if (!(error instanceof ProblemError) || error.retryable) throw error;
      const { code, message } = error;
      await batches.seal(batch, { bad: 0, error: { code, message } });
    }
  }

  /** @returns false when this is not the process that goes on: what lies there is not to be written over. */
  async function append(
    batch: BatchRecord,
    bytes: Buffer,
    step: Parameters<BatchRecords['append']>[1],
    signal: AbortSignal,
  ): Promise<boolean> {
    if ((await batches.get(batch))?.chunks !== step.chunk) return false;
    await storage.put(chunkKey(batch.tenant, batch.id, step.chunk), bytes, signal);
    return (await batches.append(batch, step)).outcome === 'done';
  }

  async function walk(
    batch: BatchRecord,
    { bucket, prefix }: { bucket: string; prefix: string },
    signal: AbortSignal,
  ): Promise<void> {
    const source = await sources.sourceFor(batch.tenant, bucket, prefix);
    if (source === undefined) {
      throw new ProblemError(
        'source_not_allowed',
        `No registered source holds s3://${bucket}/${prefix}: register its bucket at /v1/sources.`,
      );
    }
    let { chunks: chunk, rows: line } = batch;
    let rows: ManifestRow[] = [];
    for await (const page of reader.list(source, prefix, batch.walked, signal)) {
      for (const { key, etag, size } of page) {
        if (size === 0 || !audioName.test(key)) continue;
        // Only now is it known that the chunk is not the last one, which alone may be short.
        if (rows.length === chunkRows) {
          if (!(await append(batch, encodeChunk(rows), stepOf(chunk, rows, false), signal))) return;
          chunk += 1;
          rows = [];
        }
        if (rows.length === 0 && line >= maxRows) throw tooMany(bucket, prefix, maxRows);
        line += 1;
        rows.push({ line, ref: key, audio: { s3: { bucket, key, etag, size } } });
      }
    }
    if (rows.length > 0) await append(batch, encodeChunk(rows), stepOf(chunk, rows, true), signal);
    else await batches.seal(batch, { bad: 0 });
  }

  /** @param of the run that is repeated; its manifest is complete. */
  async function copy(batch: BatchRecord, of: string, signal: AbortSignal): Promise<void> {
    const { tenant } = batch;
    const old = (await batches.get({ tenant, id: of })) ?? (await readStoredBatch(storage, tenant, of));
    if (old === undefined) throw manifestGone();
    for (let { chunks: chunk } = batch; chunk < old.chunks; chunk += 1) {
      const bytes = await storage.read(chunkKey(tenant, of, chunk), signal).catch((error) => {
        throw error instanceof ObjectNotFound ? manifestGone() : error;
      });
      const rows = decodeChunk(bytes).length;
      if (!(await append(batch, bytes, { chunk, rows, bad: 0 }, signal))) return;
    }
    await batches.seal(batch, { bad: 0 });
  }

  return { receive };
}

const stepOf = (chunk: number, rows: readonly ManifestRow[], last: boolean) => ({
  chunk,
  rows: rows.length,
  bad: 0,
  walked: rows.at(-1)!.ref!,
  last,
});

const tooMany = (bucket: string, prefix: string, maxRows: number) =>
  new ProblemError(
    'manifest_too_large',
    `There are more than ${maxRows} audio files at s3://${bucket}/${prefix}: the first of them have run; walk longer prefixes for the others.`,
  );

const manifestGone = () =>
  new ProblemError(
    'batch_gone',
    'The manifest of the run that was to be repeated is no longer stored: send it again.',
  );
