/**
 * How a row of a batch has ended, as one line of a part: made from its job record, by the feeder when it closes a
 * chunk, and by the API when it reads a chunk that is still open.
 */
import type { BatchRecord, PartRow } from './batch.ts';
import { rowJobId } from './batch-records.ts';
import { outlierOf, reasonToDoubt } from './doubt.ts';
import type { House } from './house-genres.ts';
import type { JobRecord } from './job.ts';
import { firstGeneration } from './job-records.ts';
import type { ManifestRow } from './manifest.ts';

/**
 * @param index within the batch, from 0.
 * @param record of a finished job.
 */
export function answeredRow(
  batch: Pick<BatchRecord, 'revision'>,
  row: ManifestRow,
  index: number,
  record: JobRecord,
): PartRow {
  const { decoded, outcome, error, timings, reused, generation, updatedAt } = record;
  return {
    ...row,
    row: index,
    jobId: record.id,
    state: record.state as PartRow['state'],
    revision: record.revision ?? batch.revision,
    finishedAt: updatedAt,
    generation,
    audio: heardAudio(row, record),
    ...(decoded ? { decoded } : {}),
    ...(outcome ? { outcome } : {}),
    ...(error ? { error } : {}),
    ...(reused ? { reused } : {}),
    ...(timings ? { timings } : {}),
  };
}

/** With the ETag that was found: by it the row is recognised when it comes again. */
function heardAudio(row: ManifestRow, { audio }: JobRecord): PartRow['audio'] {
  return 'source' in audio && 's3' in row.audio ? { s3: audio.source } : row.audio;
}

/**
 * A row without a record.
 * @param cancelled before it became a job; otherwise its record was lost.
 */
export function unfedRow(
  batch: Pick<BatchRecord, 'id' | 'revision' | 'round'>,
  row: ManifestRow,
  index: number,
  cancelled: boolean,
): PartRow {
  const error = {
    code: 'internal_error' as const,
    message: 'The record of this row was lost.',
    retryable: true,
  };
  return {
    ...row,
    row: index,
    jobId: rowJobId(batch.id, index),
    state: cancelled ? 'cancelled' : 'failed',
    revision: batch.revision,
    finishedAt: Date.now(),
    generation: firstGeneration(batch.round),
    ...(cancelled ? {} : { error }),
  };
}

/** How the answer stands to what the catalogue declares; a row without an answer is returned as it is. */
export function judgedRow(
  row: PartRow,
  house: House,
  limits: { threshold: number; outlierThreshold: number | undefined },
): PartRow {
  const { outcome } = row;
  if (row.state !== 'completed' || outcome === undefined) return row;
  const uncertain = reasonToDoubt(outcome.probabilities, outlierOf(outcome), limits) !== undefined;
  const heard = { declared: row.declaredGenre, probabilities: outcome.probabilities, uncertain };
  const { verdict, predicted, confidence } = house.judge(heard);
  // What was judged by another threshold does not stay.
  const { disagreement: _, ...rest } = row;
  return {
    ...rest,
    uncertain,
    verdict,
    ...(predicted ? { predicted: predicted.genre, confidence: predicted.probability } : {}),
    ...(confidence === undefined ? {} : { disagreement: confidence }),
  };
}
