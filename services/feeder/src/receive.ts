/**
 * Batches whose rows nobody sends: a prefix of a source bucket is walked, the manifest of a repeated run is copied.
 * Both go on where a killed process left off, since each chunk is appended in one step with how far it goes.
 */
import type { BatchRecord } from '@acousticsense/shared/batch';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { ProblemError } from '@acousticsense/shared/errors';
import { chunkRows, encodeChunk, type ManifestRow } from '@acousticsense/shared/manifest';
import { chunkKey } from '@acousticsense/shared/object-keys';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { Sources } from '@acousticsense/shared/sources';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';

export interface ReceiveDeps {
  readonly storage: Storage;
  readonly batches: BatchRecords;
  readonly sources: Pick<Sources, 'sourceFor'>;
  readonly reader: Pick<SourceReader, 'list'>;
}

/** What is taken for audio in a bucket that also holds covers and lists; the decoder looks at the bytes. */
const audioName = /\.(mp3|wav|wave|flac|ogg|oga|opus|m4a|mp4|aac|aif|aiff)$/i;

export function createReceiver({ storage, batches, sources, reader }: ReceiveDeps) {
  /** Goes on until the manifest is complete. @throws what may pass: then it is called again later. */
  async function receive(batch: BatchRecord, signal: AbortSignal): Promise<void> {
    try {
      if (batch.origin.kind === 'prefix') await walk(batch, batch.origin, signal);
      if (batch.origin.kind === 'rerun') await copy(batch, batch.origin.of, signal);
    } catch (error) {
      if (!(error instanceof ProblemError) || error.retryable) throw error;
      const { code, message } = error;
      await batches.seal(batch, { bad: 0, error: { code, message } });
    }
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
    let last = batch.walked;
    const append = async (isLast: boolean) => {
      await storage.put(chunkKey(batch.tenant, batch.id, chunk), encodeChunk(rows), signal);
      const step = {
        chunk,
        rows: rows.length,
        bad: 0,
        ...(last === undefined ? {} : { walked: last }),
        last: isLast,
      };
      await batches.append(batch, step);
      chunk += 1;
      rows = [];
    };
    for await (const page of reader.list(source, prefix, batch.walked, signal)) {
      for (const { key, etag, size } of page) {
        if (size === 0 || !audioName.test(key)) continue;
        // Only now is it known that the chunk is not the last one, which alone may be short.
        if (rows.length === chunkRows) await append(false);
        line += 1;
        last = key;
        rows.push({ line, ref: key, audio: { s3: { bucket, key, etag, size } } });
      }
    }
    if (rows.length > 0) await append(true);
    else await batches.seal(batch, { bad: 0 });
  }

  async function copy(batch: BatchRecord, of: string, signal: AbortSignal): Promise<void> {
    const { tenant, id } = batch;
    const old = await batches.get({ tenant, id: of });
    for (let { chunks: chunk } = batch; ; chunk += 1) {
      if (old !== undefined && chunk >= old.chunks) break;
      try {
        const rows = await storage.read(chunkKey(tenant, of, chunk), signal);
        await storage.put(chunkKey(tenant, id, chunk), rows, signal);
        const count = rows.toString('latin1').split('\n').length - 2;
        await batches.append(batch, { chunk, rows: count, bad: 0 });
      } catch (error) {
        if (!(error instanceof ObjectNotFound)) throw error;
        if (old === undefined) break;
        throw new ProblemError(
          'batch_gone',
          'The manifest of the run that was to be repeated is no longer stored.',
        );
      }
    }
    await batches.seal(batch, { bad: 0 });
  }

  return { receive };
}
