/**
 * A URL -> an object in storage. Bytes pass through as they came: not decompressed, never whole in memory or on
 * disk. What a caller names may be hostile in every part (address, redirect, size, pace, body), so each has a
 * limit, and the addresses are the guard's matter: it judges inside each connection's own look-up.
 */
import { createHash } from 'node:crypto';
import { Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { type EgressGuard, EgressRefused } from '@acousticsense/egress/guard';
import { ProblemError } from '@acousticsense/shared/errors';
import type { Storage } from '@acousticsense/shared/storage';
import { type Dispatcher, request } from 'undici';
import { createPatience, type Patience, type PatienceLimits } from './patience.ts';
import type { Places } from './places.ts';

export interface DownloadLimits extends PatienceLimits {
  readonly maxBytes: number;
  /** Before a cut download is taken up again, doubled with each cut. */
  readonly pauseMs: number;
}

export interface DownloadDeps {
  readonly storage: Pick<Storage, 'put'>;
  readonly guard: Pick<EgressGuard, 'dispatcher' | 'opens' | 'refusalOf'>;
  readonly places: Places;
  readonly limits: DownloadLimits;
}

export interface Downloaded {
  readonly size: number;
  readonly sha256: string;
  /** Of the stored object. */
  readonly etag: string;
}

/**
 * Stores what is at `url` under `key`, all of it or nothing.
 * @param onProgress told 0..1 with each part, when the server declared a size.
 * @throws {ProblemError} `url_not_allowed`, `url_not_found`, `url_forbidden`, `too_many_redirects`, `file_too_large`,
 *   `empty_file`, `source_changed`; to be tried again: `fetch_failed`, `fetch_timeout`.
 * @throws {InfrastructureFault} when the storage is away. @throws the signal's reason or an AbortError.
 */
export type Download = (
  url: string,
  key: string,
  signal: AbortSignal,
  onProgress?: (fraction: number) => void,
) => Promise<Downloaded>;

const maxRedirects = 5;
const redirects = [301, 302, 303, 307, 308];
const redirectBodyBytes = 16_384;
/** How often one download is taken up again where it was cut. */
const maxResumes = 8;
const longestPauseMs = 2_000;

/** The part of a response that a download goes on with. */
interface Opened extends Disposable {
  readonly body: Dispatcher.ResponseData['body'];
  readonly connection: AbortController;
  /** Bytes of the whole object, where the server says so. */
  readonly total: number | undefined;
  /** Strong: the same one means the same bytes. */
  readonly etag: string | undefined;
}

/** Where a cut download stands. */
interface Mark {
  readonly at: number;
  readonly etag: string;
  readonly total: number | undefined;
}

export function createDownload({ storage, guard, places, limits }: DownloadDeps): Download {
  return async (url, key, signal, onProgress) => {
    const hash = createHash('sha256');
    let size = 0;
    // Aborted when the storage ends first: a stream that nobody reads must not hold its connection.
    const ended = new AbortController();
    const either = AbortSignal.any([signal, ended.signal]);

    async function* bytes(): AsyncGenerator<Buffer> {
      for await (const { chunk, total } of read(url, either)) {
        size += chunk.length;
        hash.update(chunk);
        if (total) onProgress?.(size / total);
        yield chunk;
      }
      if (size === 0) throw new ProblemError('empty_file', 'There are no bytes at this URL.');
    }

    const body = Readable.from(bytes(), { objectMode: false });
    try {
      const etag = await storage.put(key, body, signal);
      return { size, sha256: hash.digest('hex'), etag };
    } finally {
      ended.abort();
      body.destroy();
    }
  };

  /** The bytes at `url` in order, across cuts. */
  async function* read(
    url: string,
    signal: AbortSignal,
  ): AsyncGenerator<{ chunk: Buffer; total: number | undefined }> {
    const patience = createPatience(limits);
    let at = 0;
    let mark: Mark | undefined;
    for (let resumes = 0; ; resumes += 1) {
      try {
        using opened = await open(url, patience, signal, mark);
        const { total, etag } = opened;
        const parts = opened.body[Symbol.asyncIterator]();
        for (;;) {
          const { done, value: chunk } = (await patience.wait(
            parts.next(),
            opened.connection,
          )) as IteratorResult<Buffer>;
          if (done) break;
          at += chunk.length;
          if (at > limits.maxBytes) throw tooLarge();
          patience.received(chunk.length);
          mark = etag === undefined ? undefined : { at, etag, total };
          yield { chunk, total };
        }
        if (total !== undefined && at !== total) throw failed(`sent ${at} of ${total} bytes`);
        return;
      } catch (error) {
        signal.throwIfAborted();
        const problem = toProblem(error);
        const hopeless = !problem.retryable || error instanceof CannotResume || patience.isOver;
        if (hopeless || mark === undefined || resumes >= maxResumes) throw problem;
        const pause = Math.min(limits.pauseMs * 2 ** resumes, longestPauseMs);
        await sleep(pause * (0.5 + Math.random() / 2), undefined, { signal });
      }
    }
  }

  /** Asks for the object, or for what follows a mark, through every redirect. */
  async function open(start: string, patience: Patience, signal: AbortSignal, mark?: Mark): Promise<Opened> {
    let url = checked(start, undefined);
    for (let hops = 0; ; hops += 1) {
      const { place, response, connection, ending } = await ask(url, patience, signal, mark);
      const close = () => {
        response.body.on('error', () => {}).destroy();
        place[Symbol.dispose]();
      };
      try {
        const location = redirects.includes(response.statusCode) ? header(response, 'location') : undefined;
        if (location === undefined) {
          const facts = mark === undefined ? whole(response, url) : rest(response, url, mark);
          return { ...facts, body: response.body, connection, [Symbol.dispose]: close };
        }
        if (hops === maxRedirects) {
          throw new ProblemError(
            'too_many_redirects',
            `This URL was redirected more than ${maxRedirects} times: give the one that it leads to.`,
          );
        }
        url = checked(location, url);
        // Read to its end, the connection serves the next row of the same catalogue.
        await patience.wait(response.body.dump({ limit: redirectBodyBytes, signal: ending }), connection);
      } catch (error) {
        close();
        throw error;
      }
      close();
    }
  }

  async function ask(url: URL, patience: Patience, signal: AbortSignal, mark: Mark | undefined) {
    const place = await places.take(url.hostname, signal);
    try {
      const connection = new AbortController();
      const ending = AbortSignal.any([signal, connection.signal]);
      const asked = request(url, {
        dispatcher: guard.dispatcher,
        signal: ending,
        headers: {
          'user-agent': 'AcousticSense',
          accept: '*/*',
          'accept-encoding': 'identity',
          ...(mark === undefined ? {} : { range: `bytes=${mark.at}-`, 'if-range': mark.etag }),
        },
        // Patience has the clock.
        headersTimeout: 0,
        bodyTimeout: 0,
      });
      const response = await patience.wait(orAborted(asked, ending), connection);
      return { place, response, connection, ending };
    } catch (error) {
      place[Symbol.dispose]();
      throw error;
    }
  }

  /** @throws {ProblemError} `url_not_allowed` */
  function checked(text: string, from: URL | undefined): URL {
    const refuse = (why: string, cause?: unknown) => {
      const subject = from === undefined ? 'This URL' : 'What this URL redirects to';
      return new ProblemError('url_not_allowed', `${subject} ${why}.`, {}, cause);
    };
    const url = URL.parse(text, from?.href);
    if (url === null) throw refuse('is no URL');
    const isOpened = guard.opens(url.hostname, Number(url.port) || 80);
    if (url.protocol === 'http:' ? !isOpened : url.protocol !== 'https:') {
      throw refuse('does not begin with https://');
    }
    if (from?.protocol === 'https:' && url.protocol === 'http:')
      throw refuse('goes from https:// to http://');
    if (url.username !== '' || url.password !== '') throw refuse('has a user or a password in it');
    const refusal = guard.refusalOf(url.hostname, portOf(url));
    if (refusal) throw notPublic(refusal);
    url.hash = '';
    return url;
  }

  function whole(response: Dispatcher.ResponseData, url: URL): Pick<Opened, 'total' | 'etag'> {
    if (response.statusCode !== 200 && response.statusCode !== 204) throw answered(response, url);
    const declared = header(response, 'content-length');
    const total = declared === undefined ? undefined : Number(declared);
    if (total !== undefined && total > limits.maxBytes) throw tooLarge();
    const etag = header(response, 'etag');
    return { total, etag: etag?.startsWith('"') ? etag : undefined };
  }

  function rest(response: Dispatcher.ResponseData, url: URL, mark: Mark): Pick<Opened, 'total' | 'etag'> {
    const { statusCode } = response;
    const etag = header(response, 'etag');
    if ((statusCode === 200 && etag !== undefined && etag !== mark.etag) || statusCode === 416)
      throw changed();
    // A server that knows no ranges: from the beginning, under the next attempt.
    if (statusCode === 200) throw new CannotResume();
    if (statusCode !== 206) throw answered(response, url);
    if (etag !== undefined && etag !== mark.etag) throw changed();
    const range = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(header(response, 'content-range') ?? '');
    if (range === null || Number(range[1]) !== mark.at) throw new CannotResume();
    const total = range[2] === '*' ? mark.total : Number(range[2]);
    if (mark.total !== undefined && total !== mark.total) throw changed();
    if (total !== undefined && total > limits.maxBytes) throw tooLarge();
    return { total, etag: mark.etag };
  }

  /** What a status that brings no bytes says. */
  function answered(response: Dispatcher.ResponseData, url: URL): ProblemError {
    const { statusCode } = response;
    if (statusCode === 404 || statusCode === 410) {
      return new ProblemError('url_not_found', `The server of this URL answered ${statusCode}.`);
    }
    if ([408, 425, 429].includes(statusCode) || statusCode >= 500) {
      const wait = retryAfterMs(header(response, 'retry-after'));
      if (wait !== undefined) places.rest(url.hostname, wait);
      return failed(`answered ${statusCode}`);
    }
    if (statusCode >= 400) {
      return new ProblemError(
        'url_forbidden',
        `The server of this URL answered ${statusCode}: it may need a signature, or its signature has expired.`,
      );
    }
    return failed(`answered ${statusCode}, which brings no file`);
  }

  function tooLarge(): ProblemError {
    return new ProblemError('file_too_large', `The file at this URL has more than ${limits.maxBytes} bytes.`);
  }
}

/** The server begins at the beginning again; nothing of what came may be kept. */
class CannotResume extends Error {
  override readonly name = 'CannotResume';
}

/** The message names no address: where a name leads inside the operator's network is not the tenant's to know. */
function notPublic(refusal: EgressRefused): ProblemError {
  return new ProblemError(
    'url_not_allowed',
    'The host of this URL, or of one that it redirects to, is not on the public internet.',
    {},
    refusal,
  );
}

function failed(what: string, cause?: unknown): ProblemError {
  return new ProblemError('fetch_failed', `The server of this URL ${what}.`, {}, cause);
}

function changed(): ProblemError {
  return new ProblemError('source_changed', 'The file at this URL was replaced while it was read.');
}

/** Whatever a connection ends with; never an error with a code that is taken for Redis's absence. */
function toProblem(error: unknown): ProblemError {
  if (error instanceof ProblemError) return error;
  if (error instanceof EgressRefused) return notPublic(error);
  if (error instanceof CannotResume) return failed('cut the connection and cannot go on where it stopped');
  const { code, message } = error as NodeJS.ErrnoException;
  const aggregate = error instanceof AggregateError ? (error.errors[0] as NodeJS.ErrnoException) : undefined;
  return failed(`could not be read (${code ?? aggregate?.code ?? message})`, error);
}

function header({ headers }: Dispatcher.ResponseData, name: string): string | undefined {
  const value = headers[name];
  return Array.isArray(value) ? value[0] : value;
}

const portOf = (url: URL) => Number(url.port) || (url.protocol === 'https:' ? 443 : 80);

/** RFC 9110: seconds, or a date. */
function retryAfterMs(value: string | undefined): number | undefined {
  if (value === undefined) return undefined;
  const milliseconds = /^\d+$/.test(value) ? Number(value) * 1_000 : Date.parse(value) - Date.now();
  return milliseconds > 0 ? milliseconds : undefined;
}

/** undici lets a connection attempt run its course; whoever waits need not. */
async function orAborted(
  asked: Promise<Dispatcher.ResponseData>,
  signal: AbortSignal,
): Promise<Dispatcher.ResponseData> {
  const { promise, reject } = Promise.withResolvers<never>();
  const abort = () => reject(signal.reason);
  signal.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([asked, promise]);
  } catch (error) {
    asked.then(
      ({ body }) => body.on('error', () => {}).destroy(),
      () => {},
    );
    throw error;
  } finally {
    signal.removeEventListener('abort', abort);
  }
}
