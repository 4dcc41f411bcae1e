/**
 * Which rows ask the same: what is heard (an identity that is known before any byte is read), by which model, which
 * part of it, and what is wanted besides the result. Rows of one key have one answer.
 */
import { createHash } from 'node:crypto';
import type { JobRecord, Selection, SourceObject } from './job.ts';

export type Reference =
  /** The endpoint is part of it: two servers may both have a bucket `music`. Absent: AWS. */
  | { readonly s3: SourceObject; readonly sourceEndpoint?: string | undefined }
  /** The caller's word that two tracks are one; only ever compared within its tenant. */
  | { readonly contentId: string }
  | { readonly sha256: string };

/**
 * @returns undefined when the reference does not tell one content from another: an object without ETag and version.
 *   Of both the ETag is taken, because every listing tells it; a row known by its version as well has two identities,
 *   and this function is asked twice. The size is no part of it: a manifest may leave out what a listing tells, and
 *   two contents of different size have different ETags.
 */
export function identityOf(reference: Reference): string | undefined {
  if ('contentId' in reference) return JSON.stringify(['content', reference.contentId]);
  if ('sha256' in reference) return JSON.stringify(['sha256', reference.sha256.toLowerCase()]);
  const { bucket, key, etag, versionId } = reference.s3;
  const place = ['s3', reference.sourceEndpoint?.toLowerCase().replace(/\/+$/, '') ?? '', bucket, key];
  if (etag !== undefined) return JSON.stringify([...place, 'etag', etag.replaceAll('"', '')]);
  if (versionId !== undefined) return JSON.stringify([...place, 'version', versionId]);
  return undefined;
}

export interface Question {
  readonly identity: string;
  readonly modelDigest: string;
  readonly selection: Selection;
  readonly extras?: JobRecord['extras'];
}

/** Changed whenever equal keys would no longer mean equal answers. */
const keyVersion = 1;

/** 128 bits of SHA-256, as 22 characters of base64url. What is applied on reading (topK, threshold) is not in it. */
export function answerKey({ identity, modelDigest, selection, extras }: Question): string {
  const wanted = Object.entries(extras ?? {}).flatMap(([name, asked]) => (asked ? [name] : []));
  return hash128(JSON.stringify([keyVersion, identity, modelDigest, sorted(selection), wanted.sort()]));
}

export function hash128(text: string): string {
  return createHash('sha256').update(text).digest().subarray(0, 16).toString('base64url');
}

/** One spelling for equal objects: fields in order, none that is undefined. */
function sorted(fields: object): [string, unknown][] {
  return Object.entries(fields)
    .filter(([, value]) => value !== undefined)
    .sort(([a], [b]) => (a < b ? -1 : 1));
}
