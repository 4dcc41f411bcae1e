/** Pages of a tenant's log as callers ask for them: some of its entries, and how far the looking has come. */
import type { Page } from '@acousticsense/shared/archived-log';
import { ProblemError } from '@acousticsense/shared/errors';

/** A log with entries of one kind. */
export interface PagedLog<T> {
  read(after: string | undefined, limit: number): Promise<Page<T>>;
  oldest(): Promise<string | undefined>;
}

/** Entries that are passed over for a filter before the caller hears how far it is. */
const mostPassedOver = 20_000;
const scanPage = 1_000;

/** Where the first page of a log begins. */
export const beginning = '0-0';

/**
 * From `after` until `limit` entries fit, to the end, or for as long as is bearable.
 * @param fits undefined: all do.
 * @param what the entries are called in sentences.
 * @returns `next` moves on over entries that do not fit; undefined: there never was one.
 * @throws {ProblemError} cursor_expired
 */
export async function pageOf<T>(
  log: PagedLog<T>,
  { after, limit }: { readonly after?: string | undefined; readonly limit: number },
  what: string,
  fits?: (entry: T) => boolean,
) {
  const found: Page<T>['entries'] = [];
  let next = after;
  for (let seen = 0; ; ) {
    const page = await log.read(next, fits ? scanPage : limit);
    if (page.expired) throw expiredAt(await log.oldest(), what);
    for (const [index, entry] of page.entries.entries()) {
      next = entry.cursor;
      if (fits && !fits(entry)) continue;
      found.push(entry);
      if (found.length === limit) return { found, next, more: page.more || index + 1 < page.entries.length };
    }
    next = page.cursor;
    seen += page.entries.length;
    if (!fits || !page.more || seen >= mostPassedOver) return { found, next, more: page.more };
  }
}

function expiredAt(oldest: string | undefined, what: string): ProblemError {
  const left = oldest === undefined ? 'none is left' : `the oldest that is left has the cursor ${oldest}`;
  return new ProblemError(
    'cursor_expired',
    `${what} behind this cursor were deleted when their retention ended; ${left}. Leave "after" away to begin there.`,
    { field: 'after' },
  );
}
