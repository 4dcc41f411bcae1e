/** Chooses the storage driver by URL. */
import { StartupError } from './errors.ts';
import type { Storage } from './storage.ts';
import { createFileStorage } from './storage-file.ts';
import { createS3Storage } from './storage-s3.ts';

/**
 * @param url `file:///absolute/dir`, or `s3://bucket/prefix?endpoint=http://host:port&region=...` with
 *   credentials from the SDK's usual chain (AWS_ACCESS_KEY_ID, ... or the instance's role).
 */
export function openStorage(url: string): Storage {
  let parsed: URL;
  try {
    parsed = new URL(url);
  } catch (cause) {
    throw new StartupError(`STORAGE_URL is not a URL: use file:///dir or s3://bucket/prefix.`, { cause });
  }
  if (parsed.protocol === 'file:') return createFileStorage(parsed);
  if (parsed.protocol === 's3:') return createS3Storage(parsed);
  throw new StartupError(`STORAGE_URL begins with ${parsed.protocol}: use file: or s3:.`);
}
