/**
 * Where objects lie.
 *
 * Objects of a job share one prefix that begins with the hour in which the job id was made (ids are UUIDv7),
 * so the reconciler can look for objects without a record an hour at a time and DELETE can remove them all.
 * Tensors are a cache: content-addressed under the tenant, found again by another job on the same audio.
 */

/** `jobs/2026-11-22T19/<tenant>/<job id>/` */
export function jobPrefix(tenant: string, jobId: string): string {
  const milliseconds = Number.parseInt(jobId.replaceAll('-', '').slice(0, 12), 16);
  return `${hourPrefix(new Date(milliseconds))}${tenant}/${jobId}/`;
}

/** `jobs/2026-11-22T19/`: every job whose id was made in that hour (UTC). */
export function hourPrefix(time: Date): string {
  return `jobs/${time.toISOString().slice(0, 13)}/`;
}

export const audioKey = (tenant: string, jobId: string) => `${jobPrefix(tenant, jobId)}audio`;
export const spectrogramKey = (tenant: string, jobId: string) => `${jobPrefix(tenant, jobId)}spectrogram.npy`;
export const explanationKey = (tenant: string, jobId: string) =>
  `${jobPrefix(tenant, jobId)}explanation.json`;
export const vectorsKey = (tenant: string, jobId: string) => `${jobPrefix(tenant, jobId)}vectors.json`;

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
