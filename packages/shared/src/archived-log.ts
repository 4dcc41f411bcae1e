/**
 * A tenant's log of what happened: the recent part is a Redis stream, the old one lies in object storage as segments
 * (gzip, a JSON line an entry), and both are read as one, in order and without a gap.
 *
 * What makes it so:
 * - Stream ids are the cursors. Redis gives them in order whatever its clock does, and an entry never changes.
 * - Entries leave the stream only at its old end, and only such as lie in a segment that was written completely before.
 *   So with the first id of the stream, read together with what follows it, everything before it is in storage.
 * - Archiving needs no lock. A second archiver, or one that was killed before it could say how far it had come, writes
 *   segments that overlap others; readers merge segments by cursor and tell an entry once.
 * - A segment holds entries of one day (UTC): the day of a cursor says where it can be.
 */
import { promisify } from 'node:util';
import { gunzip as gunzipCallback, gzip as gzipCallback } from 'node:zlib';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import { InfrastructureFault } from './errors.ts';
import { type LogName, logDayPrefix, logPrefix, logSegmentKey, parseLogSegmentKey } from './object-keys.ts';
import { withRedis } from './redis.ts';
import { ObjectNotFound, type Storage } from './storage.ts';

const gzip = promisify(gzipCallback);
const gunzip = promisify(gunzipCallback);

export type Logged<T> = T & {
  /** `<epoch ms>-<number>`: entries of a tenant in order. */
  readonly cursor: string;
};

export interface Page<T> {
  readonly entries: Logged<T>[];
  /** Of the last entry that was looked at, from which the next page is read; undefined: there never was one. */
  readonly cursor: string | undefined;
  /** Whether there was more at that moment. */
  readonly more: boolean;
  /** Whether entries behind `after` were deleted since: this page begins with the oldest that is left. */
  readonly expired: boolean;
}

export interface ArchivedLog<T> {
  /** @returns its cursor. */
  append(tenant: string, entry: T): Promise<string>;
  /**
   * A page in order: as many as `limit`, fewer at the end, and where what follows cannot be read at present.
   * @param after exclusive; undefined: from the oldest.
   * @throws {InfrastructureFault} Redis or storage is away, or a segment is damaged: none is passed over in silence.
   */
  page(tenant: string, after: string | undefined, limit: number, signal?: AbortSignal): Promise<Page<T>>;
  /** The first that fits, of those behind `after`: reads all of them if need be. */
  search(
    tenant: string,
    after: string | undefined,
    fits: (entry: Logged<T>) => boolean,
    signal?: AbortSignal,
  ): Promise<Logged<T> | undefined>;
  /** Cursor of the newest entry there ever was. */
  last(tenant: string): Promise<string | undefined>;
  /** Cursor of the oldest entry that is still there. */
  oldest(tenant: string): Promise<string | undefined>;
  /** How many entries lie in Redis. */
  length(tenant: string): Promise<number>;
  /**
   * Writes segments of what is not archived, as far as it is enough or old enough, and trims the stream down to
   * `kept` entries (nodes of the stream go as a whole: about). What is not archived stays, however much it is.
   * Meant for one process at a time; more do work twice and no harm.
   */
  archive(tenant: string): Promise<{ archived: number; trimmed: number }>;
  /** Deletes the days (UTC) that ended before `before`, in storage and in Redis. @returns how many segments. */
  sweep(tenant: string, before: Date): Promise<number>;
}

export interface ArchiveOptions {
  readonly redis: Redis;
  readonly storage: Pick<Storage, 'put' | 'read' | 'list' | 'delete'>;
  readonly log?: Pick<Logger, 'warn' | 'error'> | undefined;
  /** Entries that may stay in Redis once they are archived. */
  readonly kept?: number;
  /** So many make a segment, ... */
  readonly segmentEvents?: number;
  /** ... and fewer as soon as the oldest is of this age. */
  readonly segmentAgeMs?: number;
  /** Bytes of segments that are kept in memory, as text: readers of one log often read the same ones. */
  readonly cacheBytes?: number;
}

/** How the entries of a log are written. */
export interface EntryFormat<T> {
  readonly name: LogName;
  /** Channel on which the tenant's name is published after each append: a hint. */
  readonly channel?: string;
  /** Fields of the stream's entry: names and values in turn. */
  toFields(entry: T): string[];
  /** @returns undefined for what is no entry, as those of versions before this log: it is passed over. */
  fromFields(fields: ReadonlyMap<string, string>): T | undefined;
}

const maxSegmentEvents = 5_000;
/** Of JSON lines: readers hold several segments. */
const maxSegmentBytes = 4 * 1024 * 1024;
const pageEntries = 500;
const searchEntries = 1_000;
/**
 * Read ahead of the one that is needed: of a quiet tenant each segment holds few entries. Full ones are not: as text they
 * are many times as large, and would push one another out of the cache, to be read again for the next page.
 */
const aheadSegments = 16;
const aheadBytes = 64 * 1024;
const rememberedDays = 2_000;
/** What a line takes in memory besides its text. */
const lineBytes = 150;
/** A sweep that goes on at the same time removes what was listed: then all is looked up again. */
const maxAttempts = 5;

const less = `
local function less(a, b)
  local am, as = string.match(a, '^(%d+)-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)-(%d+)$')
  am, as, bm, bs = tonumber(am), tonumber(as), tonumber(bm), tonumber(bs)
  return am < bm or (am == bm and as < bs)
end
`;

/**
 * KEYS stream, state; ARGV: from which id ('' from the oldest), '(' when without it, count.
 * Entries only where the stream holds everything from there on.
 */
const lookScript = `${less}
local state = redis.call('HMGET', KEYS[2], 'to', 'trimmed', 'from', 'swept')
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
first = first and first[1] or false
local at = ARGV[1]
if state[2] and (at == '' or not first or less(at, first)) then return { state, first, 0, {} } end
local from = '-'
if at ~= '' then from = ARGV[2] .. at end
return { state, first, 1, redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[3]) }
`;

/**
 * KEYS stream, state; ARGV: archived up to, entries to keep, day of the oldest segment if there is none yet.
 * MINID spares everything that is not archived, LIMIT what is to be kept.
 */
const settleScript = `${less}
local to = redis.call('HGET', KEYS[2], 'to')
if not to or less(to, ARGV[1]) then
  to = ARGV[1]
  redis.call('HSET', KEYS[2], 'to', to)
end
redis.call('HSETNX', KEYS[2], 'from', ARGV[3])
local excess = redis.call('XLEN', KEYS[1]) - tonumber(ARGV[2])
if excess < 1 then return 0 end
local trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', to, 'LIMIT', excess)
if trimmed > 0 then redis.call('HSET', KEYS[2], 'trimmed', to) end
return trimmed
`;

/** KEYS stream, state; ARGV: last cursor that storage holds, day of the oldest segment. For a Redis that has lost it. */
const recoverScript = `${less}
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local to = ARGV[1]
if first and not less(to, first[1]) then to = '0-0' end
redis.call('HSET', KEYS[2], 'to', to, 'trimmed', ARGV[1], 'from', ARGV[2])
return 1
`;

/** KEYS stream, state; ARGV: last cursor that goes, first id that may stay, day of the oldest segment that stays. */
const sweptScript = `${less}
local swept = redis.call('HGET', KEYS[2], 'swept')
if not swept or less(swept, ARGV[1]) then redis.call('HSET', KEYS[2], 'swept', ARGV[1]) end
local from = redis.call('HGET', KEYS[2], 'from')
if not from or from < ARGV[3] then redis.call('HSET', KEYS[2], 'from', ARGV[3]) end
local to = redis.call('HGET', KEYS[2], 'to')
if not to then return 0 end
local bound = ARGV[2]
if less(to, bound) then bound = to end
local trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '=', bound)
if trimmed > 0 then redis.call('HSET', KEYS[2], 'trimmed', to) end
return trimmed
`;

type StreamEntry = [id: string, fields: string[]];
type Look = [
  state: [to: string | null, trimmed: string | null, from: string | null, swept: string | null],
  first: string | null,
  reaches: 0 | 1,
  entries: StreamEntry[],
];

interface Snapshot {
  /** Archived up to here. */
  readonly to: string;
  /** Nothing behind this was ever trimmed. */
  readonly trimmed: string;
  /** Day of the oldest segment. */
  readonly fromDay: string;
  /** The first that the stream holds. */
  readonly first: string | undefined;
}

interface Position {
  readonly at: string;
  readonly inclusive: boolean;
}

interface SegmentName {
  readonly key: string;
  readonly size: number;
  readonly first: string;
  readonly last: string;
}

/** Lines are parsed when they are told: a page is a small part of a segment. */
interface Segment {
  readonly key: string;
  readonly cursors: readonly string[];
  readonly lines: readonly string[];
  readonly bytes: number;
}

export function createArchivedLog<T extends object>(
  format: EntryFormat<T>,
  {
    redis,
    storage,
    log,
    kept = 10_000,
    segmentEvents = 1_000,
    segmentAgeMs = 600_000,
    cacheBytes = 32 * 1024 * 1024,
  }: ArchiveOptions,
): ArchivedLog<T> {
  const { name } = format;
  const streamKey = (tenant: string) => `as:{${tenant}}:${name}`;
  const stateKey = (tenant: string) => `as:{${tenant}}:${name}:archived`;
  const run = (script: string, tenant: string, ...args: (string | number)[]) =>
    withRedis(() => redis.eval(script, 2, streamKey(tenant), stateKey(tenant), ...args));

  const days = new Map<string, { to: string; segments: SegmentName[] }>();
  const segments = new Map<string, Promise<Segment>>();
  const loaded = new Map<string, number>();
  let loadedBytes = 0;
  const examined = new Set<string>();
  const waiting = new Map<
    string,
    { to: string; oldest: string; since: number; count: number; length: number }
  >();

  function decode(tenant: string, [cursor, fields]: StreamEntry): Logged<T> | undefined {
    const byName = new Map<string, string>();
    for (let n = 0; n + 1 < fields.length; n += 2) byName.set(fields[n]!, fields[n + 1]!);
    const entry = format.fromFields(byName);
    if (entry === undefined) log?.warn({ tenant, log: name, cursor }, 'an entry of the log cannot be read');
    return entry && { cursor, ...entry };
  }

  function decodeAll(tenant: string, entries: readonly StreamEntry[]): Logged<T>[] {
    return entries.flatMap((entry) => decode(tenant, entry) ?? []);
  }

  async function readOnce(
    tenant: string,
    after: string | undefined,
    limit: number,
    signal: AbortSignal | undefined,
  ): Promise<Page<T>> {
    const found: Logged<T>[] = [];
    let from: Position = { at: after ?? '', inclusive: false };
    let gone: string | undefined;
    for (let round = 0; ; round += 1) {
      signal?.throwIfAborted();
      const count = limit - found.length;
      // One more than asked for tells whether there is more.
      const look = await run(lookScript, tenant, from.at, from.inclusive ? '' : '(', count + 1);
      const [[to, trimmed, fromDay, swept], first, reaches, entries] = look as Look;
      if (round === 0) gone = swept ?? undefined;
      const expired = after !== undefined && gone !== undefined && isBefore(after, gone);
      const cursor = () => found.at(-1)?.cursor ?? (expired ? gone : (after ?? gone));
      if (reaches === 1) {
        const taken = entries.slice(0, count);
        found.push(...decodeAll(tenant, taken));
        return {
          entries: found,
          cursor: taken.at(-1)?.[0] ?? cursor(),
          more: entries.length > count,
          expired,
        };
      }
      const snapshot = { to: to!, trimmed: trimmed!, fromDay: fromDay!, first: first ?? undefined };
      const { part, ended } = await readSegments(tenant, from, snapshot, count, signal);
      found.push(...part);
      if (!ended || first === null) return { entries: found, cursor: cursor(), more: !ended, expired };
      // Everything before it is read. If more was trimmed meanwhile, the next round finds it in storage.
      from = { at: first, inclusive: true };
    }
  }

  /** What lies in storage from `from` on and before the first of the stream. */
  async function readSegments(
    tenant: string,
    from: Position,
    snapshot: Snapshot,
    limit: number,
    signal: AbortSignal | undefined,
  ): Promise<{ part: Logged<T>[]; ended: boolean }> {
    const { first, to, trimmed, fromDay } = snapshot;
    const part: Logged<T>[] = [];
    const end = first ?? successor(later(to, trimmed));
    const lastDay = dayOf(end);
    const startDay = from.at !== '' && dayOf(from.at) > fromDay ? dayOf(from.at) : fromDay;
    for (let day = startDay; day <= lastDay; day = dayAfter(day)) {
      signal?.throwIfAborted();
      const names = (await listDay(tenant, day, snapshot)).filter(
        (one) => isFrom(one.last, from) && isBefore(one.first, end),
      );
      try {
        for await (const { segment, line } of merge(names, from)) {
          signal?.throwIfAborted();
          if (!isBefore(segment.cursors[line]!, end)) break;
          part.push(parseLine(segment, line));
          if (part.length === limit) return { part, ended: false };
        }
      } catch (error) {
        // What lies before it is told first; the next page fails.
        if (error instanceof InfrastructureFault && part.length > 0) return { part, ended: false };
        throw error;
      }
    }
    return { part, ended: true };
  }

  /**
   * The lines of overlapping segments in order, each cursor once. They are merged, not read one behind the other: after
   * a Redis that has lost its newest entries two segments can interleave.
   */
  async function* merge(
    names: readonly SegmentName[],
    from: Position,
  ): AsyncGenerator<{ segment: Segment; line: number }> {
    const open: { segment: Segment; line: number }[] = [];
    for (let next = 0; ; ) {
      let head: { segment: Segment; line: number } | undefined;
      for (const one of open) if (!head || isBefore(cursorOf(one), cursorOf(head))) head = one;
      const upcoming = names[next];
      if (upcoming && (!head || !isBefore(cursorOf(head), upcoming.first))) {
        readAhead(names, next);
        const segment = await load(upcoming);
        const line = firstFrom(segment.cursors, from);
        if (line < segment.cursors.length) open.push({ segment, line });
        next += 1;
        continue;
      }
      if (!head) return;
      const told = cursorOf(head);
      yield { segment: head.segment, line: head.line };
      for (let n = open.length - 1; n >= 0; n -= 1) {
        const one = open[n]!;
        if (cursorOf(one) === told) one.line += 1;
        if (one.line === one.segment.cursors.length) open.splice(n, 1);
      }
    }
  }

  function readAhead(names: readonly SegmentName[], from: number): void {
    let bytes = 0;
    for (const one of names.slice(from, from + aheadSegments)) {
      bytes += one.size;
      if (bytes > aheadBytes) return;
      // Whoever needs it finds the failure.
      load(one).catch(() => {});
    }
  }

  /** In memory for as long as there is room; the one that was not used for longest goes first. */
  function load(of: SegmentName): Promise<Segment> {
    const { key } = of;
    const known = segments.get(key);
    if (known) {
      segments.delete(key);
      segments.set(key, known);
      return known;
    }
    const fresh = readSegment(of);
    segments.set(key, fresh);
    fresh.then(
      ({ bytes }) => {
        if (segments.get(key) !== fresh) return;
        loaded.set(key, bytes);
        loadedBytes += bytes;
        for (const other of segments.keys()) {
          if (loadedBytes <= cacheBytes) break;
          if (loaded.has(other)) forget(other);
        }
      },
      () => segments.get(key) === fresh && forget(key),
    );
    return fresh;
  }

  function forget(key: string): void {
    loadedBytes -= loaded.get(key) ?? 0;
    loaded.delete(key);
    segments.delete(key);
  }

  /** @throws {ObjectNotFound | InfrastructureFault} */
  async function readSegment({ key, first, last }: SegmentName): Promise<Segment> {
    const packed = await storage.read(key);
    let text: string;
    try {
      text = (await gunzip(packed)).toString('utf8');
    } catch (cause) {
      throw damaged(key, (cause as Error).message, cause);
    }
    const lines = text.split('\n');
    if (lines.pop() !== '') throw damaged(key, 'its last line is cut');
    const cursors = lines.map((line) => /^\{"cursor":"(\d+-\d+)",/.exec(line)?.[1] ?? '');
    if (cursors[0] !== first || cursors.at(-1) !== last)
      throw damaged(key, 'it holds not what its name says');
    if (cursors.some((cursor, n) => n > 0 && !(cursor && isBefore(cursors[n - 1]!, cursor))))
      throw damaged(key, 'its lines are not in order');
    return { key, cursors, lines, bytes: text.length + lines.length * lineBytes };
  }

  function parseLine({ key, lines }: Segment, line: number): Logged<T> {
    try {
      return JSON.parse(lines[line]!) as Logged<T>;
    } catch (cause) {
      throw damaged(key, (cause as Error).message, cause);
    }
  }

  /** The names that storage holds of a day, in order. Complete as far as the stream was trimmed. */
  async function listDay(tenant: string, day: string, { to, trimmed }: Snapshot): Promise<SegmentName[]> {
    const prefix = logDayPrefix(name, tenant, day);
    const known = days.get(prefix);
    // A later day needs no look at this one, unless a segment of it was written since: all up to `to` were before.
    if (known && (!isBefore(known.to, trimmed) || dayOf(known.to) > day)) return known.segments;
    const found = await list(prefix);
    if (days.size >= rememberedDays) days.clear();
    days.set(prefix, { to, segments: found });
    return found;
  }

  async function list(prefix: string): Promise<SegmentName[]> {
    const found: SegmentName[] = [];
    for await (const { key, size } of storage.list(prefix)) {
      const parsed = parseLogSegmentKey(key);
      if (parsed) found.push({ key, size, first: parsed.first, last: parsed.last });
    }
    return found.sort((a, b) => compareCursors(a.first, b.first));
  }

  function forgetDays(tenant: string): void {
    const prefix = logPrefix(name, tenant);
    for (const key of days.keys()) if (key.startsWith(prefix)) days.delete(key);
  }

  function damaged(key: string, what: string, cause?: unknown): InfrastructureFault {
    // It may be mended.
    forget(key);
    log?.error({ key, err: cause }, `a segment of the log is damaged: ${what}`);
    return new InfrastructureFault('storage', `The segment ${key} is damaged: ${what}.`, cause);
  }

  async function page(
    tenant: string,
    after: string | undefined,
    limit: number,
    signal?: AbortSignal,
  ): Promise<Page<T>> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await readOnce(tenant, after, limit, signal);
      } catch (error) {
        if (!(error instanceof ObjectNotFound)) throw error;
        if (attempt === maxAttempts)
          throw new InfrastructureFault(
            'storage',
            `The segment ${error.key} is listed and not there.`,
            error,
          );
        forgetDays(tenant);
      }
    }
  }

  /** Not archived, of one day, as many as go into a segment. `full`: what follows belongs into another one. */
  async function pendingOf(tenant: string, to: string): Promise<{ pending: StreamEntry[]; full: boolean }> {
    const pending: StreamEntry[] = [];
    let bytes = 0;
    for (;;) {
      const after = pending.at(-1)?.[0] ?? to;
      const some = (await withRedis(() =>
        redis.xrange(streamKey(tenant), `(${after}`, '+', 'COUNT', pageEntries),
      )) as StreamEntry[];
      for (const entry of some) {
        bytes += entry[1].reduce((sum, field) => sum + field.length, 0);
        const isOther = pending.length > 0 && dayOf(entry[0]) !== dayOf(pending[0]![0]);
        if (isOther || pending.length === maxSegmentEvents || (bytes > maxSegmentBytes && pending.length > 0))
          return { pending, full: true };
        pending.push(entry);
      }
      if (some.length < pageEntries) return { pending, full: false };
    }
  }

  /** How old the oldest is by the clock, or has been here: a clock that was set back puts nothing off for long. */
  function ageOf(oldest: string, since: number): number {
    return Math.max(Date.now() - Number.parseInt(oldest, 10), performance.now() - since);
  }

  async function recover(tenant: string): Promise<void> {
    if (examined.has(tenant)) return;
    const found = await list(logPrefix(name, tenant));
    const [oldest] = found;
    if (oldest) {
      const last = found.reduce((latest, one) => later(latest, one.last), oldest.last);
      const recovered = await run(recoverScript, tenant, last, dayOf(oldest.first));
      if (recovered === 1)
        log?.warn({ tenant, log: name, last }, 'Redis knew nothing of the segments in storage');
    }
    examined.add(tenant);
  }

  /** @returns how many entries were archived and trimmed; undefined: it is not time yet. */
  async function archiveOnce(tenant: string): Promise<{ archived: number; trimmed: number } | undefined> {
    const [known, length] = await withRedis(() =>
      Promise.all([redis.hget(stateKey(tenant), 'to'), redis.xlen(streamKey(tenant))]),
    );
    if (known === null && !examined.has(tenant)) {
      await recover(tenant);
      return { archived: 0, trimmed: 0 };
    }
    if (known !== null) examined.delete(tenant);
    const to = known ?? '0-0';
    const before = waiting.get(tenant);
    if (before?.to === to) {
      // Only what is added changes its length, until something is archived.
      const few = before.count + (length - before.length) < segmentEvents;
      if (few && ageOf(before.oldest, before.since) < segmentAgeMs) return undefined;
    }
    const { pending, full } = await pendingOf(tenant, to);
    const [oldest, newest] = [pending[0]?.[0], pending.at(-1)?.[0]];
    if (oldest === undefined || newest === undefined) {
      waiting.delete(tenant);
      return undefined;
    }
    const since = before?.oldest === oldest ? before.since : performance.now();
    if (!full && pending.length < segmentEvents && ageOf(oldest, since) < segmentAgeMs) {
      waiting.set(tenant, { to, oldest, since, count: pending.length, length });
      return undefined;
    }
    waiting.delete(tenant);
    const entries = decodeAll(tenant, pending);
    if (entries.length > 0) {
      const text = entries.map((entry) => `${JSON.stringify(entry)}\n`).join('');
      const key = logSegmentKey(name, tenant, entries[0]!.cursor, entries.at(-1)!.cursor);
      await storage.put(key, await gzip(text));
    }
    const trimmed = await run(settleScript, tenant, newest, kept, dayOf(oldest));
    return { archived: entries.length, trimmed: trimmed as number };
  }

  return {
    async append(tenant, entry) {
      const cursor = await withRedis(() => redis.xadd(streamKey(tenant), '*', ...format.toFields(entry)));
      const { channel } = format;
      if (channel !== undefined) await withRedis(() => redis.publish(channel, tenant));
      return cursor!;
    },

    page,

    async search(tenant, after, fits, signal) {
      for (let from = after; ; ) {
        const { entries, cursor, more } = await page(tenant, from, searchEntries, signal);
        const found = entries.find(fits);
        if (found || !more) return found;
        from = cursor;
      }
    },

    async last(tenant) {
      const newest = await withRedis(() => redis.xrevrange(streamKey(tenant), '+', '-', 'COUNT', 1));
      const to = newest[0]?.[0] ?? (await withRedis(() => redis.hget(stateKey(tenant), 'to')));
      return to === null || to === '0-0' ? undefined : to;
    },

    oldest: async (tenant) => (await page(tenant, undefined, 1)).entries[0]?.cursor,

    length: (tenant) => withRedis(() => redis.xlen(streamKey(tenant))),

    async archive(tenant) {
      const done = { archived: 0, trimmed: 0 };
      for (;;) {
        const some = await archiveOnce(tenant);
        if (!some) return done;
        done.archived += some.archived;
        done.trimmed += some.trimmed;
      }
    },

    async sweep(tenant, before) {
      const firstDay = before.toISOString().slice(0, 10);
      const gone = (await list(logPrefix(name, tenant))).filter(({ first }) => dayOf(first) < firstDay);
      if (gone.length === 0) return 0;
      const last = gone.reduce((latest, one) => later(latest, one.last), '0-0');
      // First, so that no reader takes what is left for all there was.
      await run(sweptScript, tenant, last, `${Date.parse(firstDay)}-0`, firstDay);
      for (const { key } of gone) {
        await storage.delete(key);
        forget(key);
      }
      forgetDays(tenant);
      return gone.length;
    },
  };
}

const cursorPattern = /^\d{1,15}-\d{1,15}$/;

/** Whether it can be a cursor: numbers that Redis and we compare alike. */
export const isCursor = (text: string): boolean => cursorPattern.test(text);

/** As numbers, as Redis does: not as texts. */
export function compareCursors(a: string, b: string): number {
  const [aMs, bMs] = [Number.parseInt(a, 10), Number.parseInt(b, 10)];
  if (aMs !== bMs) return aMs - bMs;
  return Number(a.slice(a.indexOf('-') + 1)) - Number(b.slice(b.indexOf('-') + 1));
}

const isBefore = (a: string, b: string) => compareCursors(a, b) < 0;
const later = (a: string, b: string) => (isBefore(a, b) ? b : a);

function isFrom(cursor: string, { at, inclusive }: Position): boolean {
  if (at === '') return true;
  const order = compareCursors(cursor, at);
  return order > 0 || (inclusive && order === 0);
}

function successor(cursor: string): string {
  const [ms, n] = cursor.split('-');
  return `${ms}-${Number(n) + 1}`;
}

const cursorOf = ({ segment, line }: { segment: Segment; line: number }) => segment.cursors[line]!;

/** Index of the first from there on; the length where there is none. */
function firstFrom(cursors: readonly string[], from: Position): number {
  let [low, high] = [0, cursors.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isFrom(cursors[middle]!, from)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** `2026-11-22` (UTC). A cursor that no clock gives counts as the last day that can be written so. */
function dayOf(cursor: string): string {
  const ms = Math.min(Number.parseInt(cursor, 10), lastMs);
  return new Date(ms).toISOString().slice(0, 10);
}

const lastMs = Date.UTC(9_999, 11, 31);

const dayAfter = (day: string) => new Date(Date.parse(day) + 86_400_000).toISOString().slice(0, 10);
