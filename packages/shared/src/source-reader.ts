/**
 * Reads objects of registered sources where they lie. Everything on the other side is a tenant's: endpoints may be
 * dead, slow, lying or aimed at this network. So every connection goes through the egress guard, every answer is
 * bounded in bytes and in time, and a fault is the problem of the job that asked, never one of the service's own
 * infrastructure: a dead bucket stops nobody else's work.
 */
import { createHash } from 'node:crypto';
import { open } from 'node:fs/promises';
import type { Agent as HttpAgent } from 'node:http';
import type { Agent as HttpsAgent } from 'node:https';
import { pipeline, type Readable, Transform } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  GetObjectCommand,
  type GetObjectCommandOutput,
  HeadObjectCommand,
  ListObjectsV2Command,
  S3Client,
  type S3ClientConfig,
} from '@aws-sdk/client-s3';
import { fromTemporaryCredentials } from '@aws-sdk/credential-providers';
import { NodeHttpHandler } from '@smithy/node-http-handler';
import { Counter, type Registry } from 'prom-client';
import { ProblemError } from './errors.ts';
import type { SourceObject } from './job.ts';
import { type Secrets, SecretUnreadable } from './secrets.ts';
import { credentialsPlace, type Source, type SourceCredentials } from './sources.ts';

export interface ObjectFacts {
  /** Without quotes. */
  readonly etag: string;
  /** Bytes. */
  readonly size: number;
  readonly versionId?: string;
}

export interface ListedObject {
  readonly key: string;
  /** Without quotes. */
  readonly etag: string;
  readonly size: number;
  readonly lastModified: Date;
}

export interface DownloadOptions {
  readonly signal: AbortSignal;
  /** A larger object is `file_too_large`, before a byte of it is read. */
  readonly maxBytes: number;
  /** Told how many bytes have arrived so far, and of how many. */
  readonly onBytes?: (bytes: number, size: number) => void;
}

/**
 * Every function throws {@link ProblemError}: source_not_found, source_forbidden, source_changed,
 * source_not_allowed (a key outside of the prefix, an endpoint at a private address), source_unavailable (after
 * some tries; retryable); or the reason of an aborted signal.
 */
export interface SourceReader {
  head(source: Source, key: string, versionId?: string, signal?: AbortSignal): Promise<ObjectFacts>;
  /** Up to 1,000 objects a page in the order of their keys (UTF-8); goes on behind `startAfter`. */
  list(
    source: Source,
    prefix: string,
    startAfter?: string,
    signal?: AbortSignal,
  ): AsyncIterable<ListedObject[]>;
  /** Lists one object of the source. @returns its key, or undefined when there is none. */
  check(source: Source, signal?: AbortSignal): Promise<string | undefined>;
  /**
   * Streams an object into a local file, in ranges that are each of the same content (If-Match). A range that
   * breaks goes on where it broke.
   * @throws also file_too_large, empty_file; after a failure the file holds a part.
   */
  download(
    source: Source,
    object: Omit<SourceObject, 'bucket'>,
    file: string,
    options: DownloadOptions,
  ): Promise<ObjectFacts & { readonly sha256: string }>;
}

export interface SourceReaderOptions {
  /** The egress guard: what a tenant's endpoint may not reach, its agents refuse to connect to. */
  readonly guard: {
    readonly httpAgent: HttpAgent;
    readonly httpsAgent: HttpsAgent;
    /** Whether the operator has opened this host: there, plain http may be spoken. */
    opens(host: string, port: number): boolean;
  };
  readonly secrets: Pick<Secrets, 'open'>;
  readonly registry: Registry;
  readonly limits?: Partial<SourceLimits>;
}

export interface SourceLimits {
  /** Bytes asked for at a time. */
  readonly rangeBytes: number;
  /** How often a request is tried, a range included. */
  readonly tries: number;
  /** Before the second try; doubled for each further one, with jitter. */
  readonly backoffMs: number;
  /** Without any byte. */
  readonly stallMs: number;
  /** One request, or one range, from beginning to end: an endpoint that drips holds a worker no longer. */
  readonly requestMs: number;
  /** How long a source that gave no answer at all is not asked again. */
  readonly restMs: number;
}

const defaults: SourceLimits = {
  rangeBytes: 8 << 20,
  tries: 5,
  backoffMs: 250,
  stallMs: 20_000,
  requestMs: 120_000,
  restMs: 30_000,
};
const connectMs = 10_000;
/** A page of 1,000 keys of 1,024 bytes, percent-encoded, with room. */
const maxAnswerBytes = 8 << 20;
const maxLines = 100;
/** A source that never answered this often is asked less: its jobs must not hold the places of others' in vain. */
const maxSilences = 2;
const pageSize = 1_000;

export function createSourceReader({ guard, secrets, registry, limits }: SourceReaderOptions): SourceReader {
  const { rangeBytes, tries, backoffMs, stallMs, requestMs, restMs } = { ...defaults, ...limits };
  const reads = new Counter({
    name: 'acousticsense_source_reads_total',
    help: 'Requests to source buckets: GET (one a range), HEAD, LIST; retries included.',
    labelNames: ['operation'],
    registers: [registry],
  });
  // From the first scrape on: "no read at all" is something to be seen.
  for (const operation of ['GET', 'HEAD', 'LIST']) reads.inc({ operation }, 0);

  const { httpAgent, httpsAgent } = guard;
  const http = new NodeHttpHandler({ httpAgent, httpsAgent, connectionTimeout: connectMs });

  /** Least recently used first. A line holds no connections: those are the guard's. */
  const lines = new Map<string, Line>();

  function lineOf(source: Source): Line {
    const key = `${source.tenant}/${source.name}/${source.revision}`;
    const line = lines.get(key) ?? openLine(source);
    lines.delete(key);
    lines.set(key, line);
    if (lines.size > maxLines) lines.delete(lines.keys().next().value!);
    return line;
  }

  /** @throws {ProblemError} source_not_allowed: elsewhere anybody on the way could read and change what comes. */
  function checkScheme({ name, endpoint = 'https://aws' }: Source): void {
    const { protocol, hostname, port } = new URL(endpoint);
    if (protocol === 'https:' || guard.opens(hostname, Number(port) || 80)) return;
    throw new ProblemError(
      'source_not_allowed',
      `This service does not connect to the endpoint of the source "${name}" over plain http: it takes https://, except for hosts that its operator has opened.`,
    );
  }

  function openLine(source: Source): Line {
    checkScheme(source);
    const handler = boundedHandler(http, {
      asked: (operation) => reads.inc({ operation }),
      answered() {
        line.silences = 0;
      },
    });
    const line: Line = { client: new S3Client(configOf(source, handler)), silences: 0, silentUntil: 0 };
    return line;
  }

  function configOf(source: Source, requestHandler: Handler): S3ClientConfig {
    return {
      ...accessOf(source),
      // Always given: the variables that lead the service to its own storage must not lead a tenant there.
      endpoint: source.endpoint ?? awsEndpoint(source.region),
      forcePathStyle: source.pathStyle,
      region: source.region,
      requestHandler,
      // A retry of the SDK's knows nothing of bodies: all retries are made here.
      maxAttempts: 1,
      retryMode: 'standard',
      requestChecksumCalculation: 'WHEN_REQUIRED',
      responseChecksumValidation: 'WHEN_REQUIRED',
      useFipsEndpoint: false,
      useDualstackEndpoint: false,
      useArnRegion: false,
      disableMultiregionAccessPoints: true,
      disableS3ExpressSessionAuth: true,
    };
  }

  function accessOf(source: Source): Pick<S3ClientConfig, 'credentials' | 'signer'> {
    const credentials = credentialsOf(source);
    if (source.roleArn !== undefined) return { credentials: roleProvider(source, credentials) };
    if (credentials) return { credentials };
    return {
      // Given, so that the SDK does not look for the service's own; the signer leaves them unused.
      credentials: { accessKeyId: 'anonymous', secretAccessKey: 'anonymous' },
      signer: { sign: async (request) => request },
    };
  }

  function credentialsOf(source: Source) {
    if (source.sealed === undefined) return undefined;
    try {
      const opened = JSON.parse(secrets.open(source.sealed, credentialsPlace(source))) as SourceCredentials;
      const { accessKeyId, secretAccessKey, sessionToken } = opened;
      return { accessKeyId, secretAccessKey, ...(sessionToken === undefined ? {} : { sessionToken }) };
    } catch (error) {
      if (!(error instanceof SecretUnreadable)) throw error;
      throw new ProblemError(
        'source_unavailable',
        `The credentials of the source "${source.name}" cannot be opened with this service's SECRETS_KEY; register them again, or tell its operator.`,
        {},
        error,
      );
    }
  }

  function roleProvider(source: Source, masterCredentials: ReturnType<typeof credentialsOf>) {
    const assume = fromTemporaryCredentials({
      ...(masterCredentials ? { masterCredentials } : {}),
      params: {
        RoleArn: source.roleArn!,
        RoleSessionName: `acousticsense-${source.tenant}`.slice(0, 64),
        ...(source.externalId === undefined ? {} : { ExternalId: source.externalId }),
      },
      clientConfig: { region: source.region, requestHandler: boundedHandler(http), maxAttempts: 2 },
    });
    return async (properties?: Parameters<typeof assume>[0]) => {
      try {
        return await assume(properties);
      } catch (cause) {
        throw new RoleNotAssumed(cause);
      }
    };
  }

  /**
   * Tries until it succeeds, fails for good, or has failed `tries` times.
   * @param operation is aborted when it neither ends nor restarts its watch in time.
   */
  async function persistently<T>(
    source: Source,
    what: string,
    signal: AbortSignal | undefined,
    operation: (client: S3Client, watch: Watch) => Promise<T>,
  ): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      signal?.throwIfAborted();
      const line = callable(source, what);
      using watch = startWatch(stallMs, requestMs, signal);
      try {
        return await operation(line.client, watch);
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        if (error instanceof LocalFault) throw error.cause;
        const problem = toProblem(watch.abortSignal.aborted ? watch.abortSignal.reason : error, source, what);
        if (problem.code !== 'source_unavailable') throw problem;
        if (attempt >= tries || line.silences >= maxSilences) {
          noteSilence(line);
          throw problem;
        }
      }
      const delay = backoffMs * 2 ** (attempt - 1) * (0.5 + Math.random());
      await sleep(delay, undefined, signal ? { signal } : {}).catch(() => signal?.throwIfAborted());
    }
  }

  /** @throws {ProblemError} source_unavailable, at once: the source gave no answer a moment ago. */
  function callable(source: Source, what: string): Line {
    const line = lineOf(source);
    const restSeconds = Math.ceil((line.silentUntil - performance.now()) / 1_000);
    if (line.silences < maxSilences || restSeconds <= 0) return line;
    throw unavailable(source, `${what}: it has not answered for some time`, undefined, restSeconds);
  }

  /** Of a source that answers anything the silences are reset, so this counts those that said nothing at all. */
  function noteSilence(line: Line): void {
    line.silences += 1;
    line.silentUntil = performance.now() + restMs;
  }

  async function head(
    source: Source,
    key: string,
    versionId?: string,
    signal?: AbortSignal,
  ): Promise<ObjectFacts> {
    checkInside(source, key);
    const input = { Bucket: source.bucket, Key: key, ...(versionId ? { VersionId: versionId } : {}) };
    const what = uri(source, key);
    const found = await persistently(source, what, signal, (client, { abortSignal }) =>
      client.send(new HeadObjectCommand(input), { abortSignal }),
    );
    return factsOf(found, found.ContentLength, source, what);
  }

  async function listPage(
    source: Source,
    prefix: string,
    startAfter: string,
    maxKeys: number,
    signal?: AbortSignal,
  ): Promise<{ objects: ListedObject[]; more: boolean }> {
    const found = await persistently(source, uri(source, prefix), signal, (client, { abortSignal }) =>
      client.send(
        new ListObjectsV2Command({
          Bucket: source.bucket,
          Prefix: prefix,
          MaxKeys: maxKeys,
          // Keys may hold characters that XML cannot.
          EncodingType: 'url',
          ...(startAfter === '' ? {} : { StartAfter: startAfter }),
        }),
        { abortSignal },
      ),
    );
    const plain = (key: string) => (found.EncodingType === 'url' ? decodeKey(key) : key);
    const objects = (found.Contents ?? []).map(({ Key = '', ETag = '', Size = 0, LastModified }) => ({
      key: plain(Key),
      etag: unquoted(ETag),
      size: Size,
      lastModified: LastModified ?? new Date(0),
    }));
    return { objects, more: found.IsTruncated === true };
  }

  async function* list(
    source: Source,
    prefix: string,
    startAfter = '',
    signal?: AbortSignal,
  ): AsyncIterable<ListedObject[]> {
    checkInside(source, prefix);
    for (let last = startAfter; ; ) {
      const { objects, more } = await listPage(source, prefix, last, pageSize, signal);
      const next = objects.at(-1)?.key;
      // A server that ignores `start-after` would be listed for ever.
      if (next !== undefined && Buffer.compare(Buffer.from(next), Buffer.from(last)) <= 0) {
        throw unavailable(source, `${uri(source, prefix)} is not listed in the order of its keys`);
      }
      if (objects.length > 0) yield objects;
      if (!more || next === undefined) return;
      last = next;
    }
  }

  async function check(source: Source, signal?: AbortSignal): Promise<string | undefined> {
    const { objects } = await listPage(source, source.prefix, '', 1, signal);
    return objects[0]?.key;
  }

  async function download(
    source: Source,
    { key, etag: expectedEtag, versionId, size: expectedSize }: Omit<SourceObject, 'bucket'>,
    file: string,
    { signal, maxBytes, onBytes }: DownloadOptions,
  ): Promise<ObjectFacts & { sha256: string }> {
    checkInside(source, key);
    const what = uri(source, key);
    if ((expectedSize ?? 0) > maxBytes) throw tooLarge(what, expectedSize!, maxBytes);
    const hash = createHash('sha256');
    let facts: ObjectFacts | undefined;
    let at = 0;
    await using handle = await open(file, 'w');

    /** From `at` to the end of the range that begins at `from`; a further try goes on at `at`. */
    async function readRange(from: number): Promise<void> {
      await persistently(source, what, signal, async (client, watch) => {
        const size = facts?.size ?? expectedSize;
        // Of what should be empty, a range is asked for too: it may not be.
        const end = Math.min(from + rangeBytes, size || Number.POSITIVE_INFINITY);
        const etag = facts?.etag ?? (expectedEtag && unquoted(expectedEtag));
        const answer = await client.send(
          new GetObjectCommand({
            Bucket: source.bucket,
            Key: key,
            Range: `bytes=${at}-${end - 1}`,
            ...(etag === undefined ? {} : { IfMatch: `"${etag}"` }),
            ...(versionId === undefined ? {} : { VersionId: versionId }),
          }),
          { abortSignal: watch.abortSignal },
        );
        const body = answer.Body as Readable;
        try {
          const found = factsOf(answer, totalOf(answer, at, end), source, what);
          // Not every server knows If-Match on reads; each says what it serves.
          if (etag !== undefined && found.etag !== etag) throw changed(what);
          if (size !== undefined && found.size !== size) throw changed(what);
          if (found.size > maxBytes) throw tooLarge(what, found.size, maxBytes);
          facts = found;
          const until = Math.min(end, found.size);
          for await (const chunk of body as AsyncIterable<Buffer>) {
            watch.restart();
            if (at + chunk.length > until) throw new Error('more bytes came than were asked for');
            await write(handle, chunk, at);
            hash.update(chunk);
            at += chunk.length;
            onBytes?.(at, found.size);
          }
          if (at < until) throw new Error('the connection ended within a range');
        } catch (error) {
          body.destroy();
          throw error;
        }
      });
    }

    try {
      do await readRange(at);
      while (at < facts!.size);
    } catch (error) {
      if (!(error instanceof ProblemError && error.cause instanceof RangeNotThere)) throw error;
      // Nothing to be read at 0: the object is empty. Behind that: it has become shorter.
      if (at > 0 || (expectedSize ?? 0) > 0) throw changed(what);
      throw new ProblemError('empty_file', `${what} is empty: it holds no bytes.`, {}, error);
    }
    return { ...facts!, sha256: hash.digest('hex') };
  }

  return { head, list, check, download };
}

/** What is known of a source while it is used. */
interface Line {
  readonly client: S3Client;
  /** Calls in a row that were given up without any answer. */
  silences: number;
  /** Epoch milliseconds. */
  silentUntil: number;
}

type Handler = ReturnType<typeof boundedHandler>;

/** Tells of requests and answers, and cuts every answer but an object's bytes: a tenant's server could send for ever. */
function boundedHandler(
  inner: NodeHttpHandler,
  tell?: { asked: (operation: string) => void; answered: () => void },
) {
  const handle: NodeHttpHandler['handle'] = async (request, options) => {
    const operation = 'list-type' in request.query ? 'LIST' : request.method;
    tell?.asked(operation);
    const { response } = await inner.handle(request, options);
    tell?.answered();
    if (operation === 'GET' && response.statusCode < 300) return { response };
    let bytes = 0;
    const bound = new Transform({
      transform(chunk: Buffer, _encoding, done) {
        bytes += chunk.length;
        done(bytes > maxAnswerBytes ? new Error('the answer does not end') : null, chunk);
      },
    });
    // Its error is told by `bound` to whoever reads it.
    pipeline(response.body as Readable, bound, () => {});
    response.body = bound;
    return { response };
  };
  return {
    metadata: inner.metadata,
    handle,
    // The handler inside serves all clients: none of them may end or change it.
    destroy() {},
    updateHttpClientConfig() {},
    httpHandlerConfigs: () => inner.httpHandlerConfigs(),
  };
}

interface Watch extends Disposable {
  readonly abortSignal: AbortSignal;
  /** Something came. */
  restart(): void;
}

function startWatch(stallMs: number, totalMs: number, signal: AbortSignal | undefined): Watch {
  const controller = new AbortController();
  const stop = (ms: number, what: string) => () => controller.abort(new Error(`${what} for ${ms} ms`));
  const stall = setTimeout(stop(stallMs, 'nothing came'), stallMs);
  const total = setTimeout(stop(totalMs, 'a request went on'), totalMs);
  return {
    abortSignal: signal ? AbortSignal.any([controller.signal, signal]) : controller.signal,
    restart: () => stall.refresh(),
    [Symbol.dispose]() {
      clearTimeout(stall);
      clearTimeout(total);
    },
  };
}

/** The scratch disk, not the source, is at fault: told as it is. */
class LocalFault extends Error {}

async function write(
  handle: Awaited<ReturnType<typeof open>>,
  chunk: Buffer,
  position: number,
): Promise<void> {
  try {
    for (let done = 0; done < chunk.length; ) {
      const { bytesWritten } = await handle.write(chunk, done, chunk.length - done, position + done);
      done += bytesWritten;
    }
  } catch (cause) {
    throw new LocalFault('the file cannot be written', { cause });
  }
}

/** Size of the whole object. @throws when other bytes come than `at` to `end`. */
function totalOf({ ContentRange, ContentLength }: GetObjectCommandOutput, at: number, end: number): number {
  const range = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(ContentRange ?? '');
  if (range) {
    const [first, last, total] = range.slice(1).map(Number) as [number, number, number];
    if (first === at && last + 1 === Math.min(end, total)) return total;
  } else if (ContentRange === undefined && at === 0 && ContentLength !== undefined && ContentLength <= end) {
    // The whole of a small object, from a server that finds a range of it needless.
    return ContentLength;
  }
  throw new Error('other bytes came than were asked for');
}

function factsOf(
  { ETag, VersionId }: { ETag?: string | undefined; VersionId?: string | undefined },
  size: number | undefined,
  source: Source,
  what: string,
): ObjectFacts {
  if (ETag === undefined || size === undefined)
    throw unavailable(source, `${what} came without ETag or size`);
  // 'null' is the version of an object in a bucket that keeps none.
  return {
    etag: unquoted(ETag),
    size,
    ...(VersionId && VersionId !== 'null' ? { versionId: VersionId } : {}),
  };
}

function unquoted(etag: string): string {
  return etag.replace(/^"(.*)"$/, '$1');
}

/** As application/x-www-form-urlencoded, where a space is '+'. */
function decodeKey(key: string): string {
  try {
    return decodeURIComponent(key.replaceAll('+', ' '));
  } catch {
    return key;
  }
}

/** The SDK's own would be `AWS_ENDPOINT_URL_S3` where that is set. */
function awsEndpoint(region: string): string {
  return `https://s3.${region}.amazonaws.com${region.startsWith('cn-') ? '.cn' : ''}`;
}

function checkInside({ name, prefix }: Source, key: string): void {
  if (key.startsWith(prefix)) return;
  throw new ProblemError(
    'source_not_allowed',
    `${shown(key)} does not begin with "${prefix}", the prefix of the source "${name}".`,
  );
}

class RoleNotAssumed extends Error {
  constructor(cause: unknown) {
    super('the role cannot be assumed', { cause });
  }
}

/** Marks the cause of a problem: the server has no bytes at this place. */
class RangeNotThere extends Error {}

const transientNames =
  /^(SlowDown|RequestTimeout|RequestTimeTooSkewed|RequestExpired|InternalError|Throttl\w*)$/;

/** What the source's answer, or its silence, means to whoever asked for the object. */
function toProblem(error: unknown, source: Source, what: string): ProblemError {
  if (error instanceof ProblemError) return error;
  const refused = causes(error).find((cause) => (cause as { code?: unknown }).code === 'EGRESS_REFUSED');
  if (refused) {
    // Without the address: what a name means inside this network is not for those who ask.
    return new ProblemError(
      'source_not_allowed',
      `The endpoint of the source "${source.name}" lies at an address that this service does not connect to.`,
      {},
      refused,
    );
  }
  const role = error instanceof RoleNotAssumed;
  const answer = (role ? error.cause : error) as {
    name?: string;
    message?: string;
    code?: unknown;
    $metadata?: { httpStatusCode?: number };
  };
  const status = answer.$metadata?.httpStatusCode;
  // A fault of the connection has its code; its message would name addresses.
  const said = shown(
    typeof answer.code === 'string' && status === undefined
      ? answer.code
      : [answer.name, answer.message].filter(Boolean).join(': '),
  );
  const problem = (code: 'source_not_found' | 'source_forbidden' | 'source_changed', sentence: string) =>
    new ProblemError(code, sentence, {}, error);

  if (status === undefined || status < 300 || status === 408 || status === 429 || status >= 500) {
    return unavailable(source, `${what}: ${said}`, error);
  }
  if (transientNames.test(answer.name ?? '')) return unavailable(source, `${what}: ${said}`, error);
  if (role) {
    return problem(
      'source_forbidden',
      `The role of the source "${source.name}" cannot be assumed (${said}): check its trust policy and the external id.`,
    );
  }
  if (status === 412) return changed(what, error);
  if (status === 416) return changed(what, new RangeNotThere(said, { cause: error }));
  if (answer.name === 'NoSuchBucket') {
    return problem('source_not_found', `There is no bucket ${source.bucket} at the source "${source.name}".`);
  }
  // 405: the named version is a delete marker.
  if (status === 404 || status === 405) {
    return problem('source_not_found', `${what} is not there; check bucket, key and version.`);
  }
  return problem('source_forbidden', `${what} may not be read: the source answered ${status} (${said}).`);
}

function unavailable(source: Source, what: string, cause?: unknown, retryAfter = 30): ProblemError {
  return new ProblemError(
    'source_unavailable',
    `The source "${source.name}" cannot be read at present (${what}).`,
    { retryAfter },
    cause,
  );
}

function changed(what: string, cause?: unknown): ProblemError {
  return new ProblemError(
    'source_changed',
    `${what} is not what it was when it was named: its ETag or size is another now.`,
    {},
    cause,
  );
}

function tooLarge(what: string, size: number, maxBytes: number): ProblemError {
  return new ProblemError('file_too_large', `${what} has ${size} bytes; at most ${maxBytes} are taken here.`);
}

function uri({ bucket }: Source, key: string): string {
  return shown(`s3://${bucket}/${key}`);
}

/** Of another's making: one line of a bounded length. */
function shown(text: string): string {
  const line = text
    .toWellFormed()
    .replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, ' ')
    .trim();
  return line.length > 300 ? `${line.slice(0, 299)}…` : line;
}

/** An error and what it came from; AggregateError: several addresses were tried. */
function causes(error: unknown, depth = 0): object[] {
  if (typeof error !== 'object' || error === null || depth > 5) return [];
  const { cause, errors } = error as { cause?: unknown; errors?: unknown[] };
  return [error, ...causes(cause, depth + 1), ...(errors ?? []).flatMap((one) => causes(one, depth + 1))];
}
