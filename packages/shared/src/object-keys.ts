/**
 * Where objects lie.
 *
 * Objects of a job share one prefix that begins with the hour in which the job id was made (ids are UUIDv7),
 * so the reconciler can look for objects without a record an hour at a time and DELETE can remove them all.
 * Tensors are a cache: content-addressed under the tenant, found again by another job on the same audio.
 */
import type { JobRecord } from './job.ts';

/** What places the objects of a job: part of every record. */
export type JobPlace = Pick<JobRecord, 'tenant' | 'id' | 'batch'>;

/** `jobs/2026-11-22T19/<tenant>/<job id>/`; a row's lies under its batch, with which it comes and goes. */
export function jobPrefix({ tenant, id, batch }: JobPlace): string {
  if (batch) return `${rowsPrefix(tenant, batch.id, batch.chunk)}${id}/`;
  return `${hourPrefix(timeOf(id))}${tenant}/${id}/`;
}

/** When a UUIDv7 was made. */
export function timeOf(id: string): Date {
  return new Date(Number.parseInt(id.replaceAll('-', '').slice(0, 12), 16));
}

/** `jobs/2026-11-22T19/`: every job whose id was made in that hour (UTC). */
export function hourPrefix(time: Date): string {
  return `jobs/${time.toISOString().slice(0, 13)}/`;
}

export const audioKey = (job: JobPlace) => `${jobPrefix(job)}audio`;
export const spectrogramKey = (job: JobPlace) => `${jobPrefix(job)}spectrogram.npy`;
export const timelineKey = (job: JobPlace) => `${jobPrefix(job)}timeline.json`;
export const explanationKey = (job: JobPlace) => `${jobPrefix(job)}explanation.json`;
export const vectorsKey = (job: JobPlace) => `${jobPrefix(job)}vectors.json`;

/** `uploads/2026-11-22T19/`: every upload whose id was made in that hour (UTC). */
export function uploadPrefix(time: Date): string {
  return `uploads/${time.toISOString().slice(0, 13)}/`;
}

/** The bytes of an upload; what is known of it lies beside them under the same key with an ending. */
export function uploadKey(tenant: string, id: string): string {
  return `${uploadPrefix(timeOf(id))}${tenant}/${id}`;
}

export const batchesPrefix = 'batches/';
/** `batches/2026-11-22T19/<tenant>/<batch id>/`: manifest chunks, results, what rows leave. */
export function batchPrefix(tenant: string, batchId: string): string {
  return `${batchesPrefix}${timeOf(batchId).toISOString().slice(0, 13)}/${tenant}/${batchId}/`;
}
const number = (n: number) => String(n).padStart(5, '0');
/** 1,000 rows of the manifest. */
export const chunkKey = (tenant: string, batchId: string, chunk: number) =>
  `${batchPrefix(tenant, batchId)}chunks/${number(chunk)}.jsonl`;
/** The results of these rows, under a name that every writer of them finds again. */
export const partKey = (tenant: string, batchId: string, chunk: number) =>
  `${batchPrefix(tenant, batchId)}part-${number(chunk)}.jsonl`;
/** The batch itself, once it has ended. */
export const batchKey = (tenant: string, batchId: string) => `${batchPrefix(tenant, batchId)}batch.json`;
/** What the model of a batch that has ended says of itself: results are told in its labels. */
export const modelKey = (tenant: string, batchId: string) => `${batchPrefix(tenant, batchId)}model.json`;
/** House genres that the batch's results speak in. */
export const mappingKey = (tenant: string, batchId: string) => `${batchPrefix(tenant, batchId)}mapping.json`;
export const badRowsKey = (tenant: string, batchId: string) =>
  `${batchPrefix(tenant, batchId)}bad-rows.jsonl`;
export const rowsPrefix = (tenant: string, batchId: string, chunk: number) =>
  `${batchPrefix(tenant, batchId)}rows/${number(chunk)}/`;

export const tensorPrefix = 'tensors/';

/** Without its ending: `.npy` is the array, `.json` the sidecar, written last. */
export function tensorKey(of: {
  tenant: string;
  contentId: string;
  profileHash: string;
  selectionHash: string;
  frontEnd: string;
}): string {
  return `${tensorPrefix}${of.tenant}/${of.contentId}/${of.profileHash}/${of.selectionHash}.${of.frontEnd}`;
}

/** Logs of which the old part lies in segments. */
export type LogName = 'events' | 'deliveries';
/** `events/<tenant>/`, and in it a folder for each day: names alone tell which segment holds a moment. */
export const logPrefix = (log: LogName, tenant: string) => `${log}/${tenant}/`;
/** @param day `2026-11-22` (UTC). */
export const logDayPrefix = (log: LogName, tenant: string, day: string) => `${logPrefix(log, tenant)}${day}/`;
/**
 * `2026-11-22/19-<first>_<last>.jsonl.gz`: day and hour (UTC) of the first entry. Both cursors are in the name, so that
 * two writers of overlapping segments never replace one by the other.
 * @param first cursor `<epoch ms>-<number>`.
 */
export function logSegmentKey(log: LogName, tenant: string, first: string, last: string): string {
  const time = new Date(Number.parseInt(first, 10)).toISOString();
  return `${logDayPrefix(log, tenant, time.slice(0, 10))}${time.slice(11, 13)}-${first}_${last}.jsonl.gz`;
}
/** @returns undefined for what is no segment. */
export function parseLogSegmentKey(key: string): { day: string; first: string; last: string } | undefined {
  const [, day, first, last] = /\/(\d{4}-\d\d-\d\d)\/\d\d-(\d+-\d+)_(\d+-\d+)\.jsonl\.gz$/.exec(key) ?? [];
  return day && first && last ? { day, first, last } : undefined;
}

/**
 * `dead-letters/<tenant>/<endpoint id>/2026-11-22/`: what an endpoint was not told, by the day (UTC) on which it was
 * given up; all of them without a day, and those of all endpoints without an id.
 * @param day `YYYY-MM-DD`
 */
export function deadLetterPrefix(tenant: string, endpointId?: string, day?: string): string {
  return `${['dead-letters', tenant, endpointId, day].filter(Boolean).join('/')}/`;
}

export function deadLetterKey(tenant: string, endpointId: string, deadAt: Date, eventId: string): string {
  return `${deadLetterPrefix(tenant, endpointId, deadAt.toISOString().slice(0, 10))}${eventId}.json`;
}
