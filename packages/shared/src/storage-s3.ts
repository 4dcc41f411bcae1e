/** Object storage in an S3 bucket, or anything that speaks its protocol. */
import { Readable } from 'node:stream';
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  HeadBucketCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  type ListMultipartUploadsCommandInput,
  type ListMultipartUploadsCommandOutput,
  ListObjectsV2Command,
  type ListObjectsV2CommandOutput,
  ListPartsCommand,
  type ListPartsCommandOutput,
  PutObjectCommand,
  S3Client,
  type S3ClientConfig,
  S3ServiceException,
  UploadPartCommand,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { getSignedUrl } from '@aws-sdk/s3-request-presigner';
import { InfrastructureFault, StartupError } from './errors.ts';
import {
  checkRange,
  ObjectChanged,
  ObjectNotFound,
  type PresignedUploads,
  probeKey,
  type ReadOptions,
  type Storage,
  type StoredObject,
} from './storage.ts';

const bucketTrustMs = 10_000;

/**
 * `s3://bucket/prefix?endpoint=http://host:port&region=eu-central-1&pathStyle=true`, and `publicEndpoint=` where
 * callers reach the server under another address than the services do: presigned URLs name that one.
 */
export function createS3Storage(url: URL): Storage {
  const bucket = url.host;
  if (bucket === '') throw new StartupError('STORAGE_URL needs a bucket: s3://bucket/prefix.');
  const folder = url.pathname.replace(/^\/+|\/+$/g, '');
  const root = folder === '' ? '' : `${decodeURIComponent(folder)}/`;
  const endpoint = url.searchParams.get('endpoint');
  const config: S3ClientConfig = {
    maxAttempts: 3,
    // Other makers' servers do not all know the SDK's newer default checksums.
    requestChecksumCalculation: 'WHEN_REQUIRED',
    responseChecksumValidation: 'WHEN_REQUIRED',
    ...(url.searchParams.get('region') ? { region: url.searchParams.get('region')! } : {}),
    ...(endpoint ? { endpoint, forcePathStyle: url.searchParams.get('pathStyle') !== 'false' } : {}),
  };
  const client = new S3Client(config);
  const publicEndpoint = url.searchParams.get('publicEndpoint');
  const signer = publicEndpoint ? new S3Client({ ...config, endpoint: publicEndpoint }) : client;

  let bucketSeenAt = -Infinity;

  async function call<T>(key: string, operation: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    try {
      return await operation();
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      throw normalise(error, key);
    }
  }

  const at = (key: string) => ({ Bucket: bucket, Key: root + key });
  const abortable = (signal?: AbortSignal) => (signal ? { abortSignal: signal } : {});

  async function put(key: string, body: Readable | Uint8Array, signal?: AbortSignal): Promise<string> {
    signal?.throwIfAborted();
    let sourceError: Error | undefined;
    const upload = new Upload({
      client,
      params: { ...at(key), Body: body },
      queueSize: 2,
      leavePartsOnError: false,
    });
    const stop = () => void upload.abort();
    signal?.addEventListener('abort', stop, { once: true });
    if (body instanceof Readable) {
      body.once('error', (error) => {
        sourceError = error;
      });
      if (signal) signal.addEventListener('abort', () => body.destroy(), { once: true });
    }
    try {
      return etagOf(await upload.done(), key);
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      throw sourceError ?? normalise(error, key);
    } finally {
      signal?.removeEventListener('abort', stop);
    }
  }

  async function get(key: string, signal?: AbortSignal, options: ReadOptions = {}): Promise<Readable> {
    checkRange(options);
    const { ifMatch, start = 0, end } = options;
    const ranged = start > 0 || end !== undefined;
    const output = await call(
      key,
      () =>
        client.send(
          new GetObjectCommand({
            ...at(key),
            ...(ifMatch === undefined ? {} : { IfMatch: ifMatch }),
            ...(ranged ? { Range: `bytes=${start}-${end === undefined ? '' : end - 1}` } : {}),
          }),
          abortable(signal),
        ),
      signal,
    ).catch(async (error) => {
      if (!(error instanceof InfrastructureFault && isBehindTheEnd(error.cause))) throw error;
      const found = await describe(key);
      if (!found) throw new ObjectNotFound(key);
      return { Body: Readable.from([]), ETag: found.etag };
    });
    const body = output.Body as Readable;
    // Not every server knows If-Match on reads; each says what it serves.
    if (ifMatch !== undefined && output.ETag !== ifMatch) {
      body.destroy();
      throw new ObjectChanged(key);
    }
    return body;
  }

  async function describe(key: string): Promise<StoredObject | undefined> {
    try {
      const head = await call(key, () => client.send(new HeadObjectCommand(at(key))));
      return {
        key,
        size: head.ContentLength ?? 0,
        lastModified: head.LastModified ?? new Date(0),
        etag: etagOf(head, key),
      };
    } catch (error) {
      if (!(error instanceof ObjectNotFound)) throw error;
      await checkBucket();
      return undefined;
    }
  }

  /**
   * Of what HEAD does not find: its answer has no body, so it says the same of a bucket that is not there, and some
   * servers of an access key that they do not know. Every object would seem to be deleted.
   */
  async function checkBucket(): Promise<void> {
    if (performance.now() - bucketSeenAt < bucketTrustMs) return;
    try {
      await client.send(new HeadBucketCommand({ Bucket: bucket }));
    } catch (error) {
      if (!(error instanceof S3ServiceException)) throw normalise(error, '');
      if (error.$metadata.httpStatusCode === 404)
        throw new InfrastructureFault(
          'storage',
          'Object storage knows no such bucket, or not these credentials: put STORAGE_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right.',
          error,
        );
      // Whoever may not look at the bucket (403) hears at least that it is there.
    }
    bucketSeenAt = performance.now();
  }

  async function remove(key: string): Promise<void> {
    await call(key, () => client.send(new DeleteObjectCommand(at(key)))).catch((error) => {
      if (!(error instanceof ObjectNotFound)) throw error;
    });
  }

  async function* list(prefix: string): AsyncIterable<StoredObject> {
    let continuation: string | undefined;
    do {
      const page: ListObjectsV2CommandOutput = await call(prefix, () =>
        client.send(
          new ListObjectsV2Command({
            Bucket: bucket,
            Prefix: root + prefix,
            ...(continuation ? { ContinuationToken: continuation } : {}),
          }),
        ),
      );
      for (const { Key, Size, LastModified, ETag } of page.Contents ?? []) {
        yield {
          key: Key!.slice(root.length),
          size: Size ?? 0,
          lastModified: LastModified ?? new Date(0),
          etag: etagOf({ ETag }, Key!),
        };
      }
      continuation = page.IsTruncated ? page.NextContinuationToken : undefined;
    } while (continuation !== undefined);
  }

  async function abandonParts(prefix: string, before: Date): Promise<number> {
    let ended = 0;
    let marker: Pick<ListMultipartUploadsCommandInput, 'KeyMarker' | 'UploadIdMarker'> | undefined = {};
    while (marker !== undefined) {
      const page = await listUnfinished(prefix, marker);
      for (const { Key, UploadId, Initiated } of page?.Uploads ?? []) {
        if (!Key || !UploadId || !Initiated || Initiated >= before) continue;
        await presigned.endParts(Key.slice(root.length), UploadId);
        ended += 1;
      }
      marker = page?.IsTruncated
        ? { KeyMarker: page.NextKeyMarker, UploadIdMarker: page.NextUploadIdMarker }
        : undefined;
    }
    return ended;
  }

  /** @returns undefined where the server does not list them, or the role may not: a rule of the bucket has to end them. */
  async function listUnfinished(
    prefix: string,
    marker: Pick<ListMultipartUploadsCommandInput, 'KeyMarker' | 'UploadIdMarker'>,
  ): Promise<ListMultipartUploadsCommandOutput | undefined> {
    const list = new ListMultipartUploadsCommand({ Bucket: bucket, Prefix: root + prefix, ...marker });
    try {
      return await call(prefix, () => client.send(list));
    } catch (error) {
      if (error instanceof InfrastructureFault && isRefusal(error.cause)) return undefined;
      throw error;
    }
  }

  const presigned: PresignedUploads = {
    // The length belongs to what is signed: a header that differs is another request.
    putUrl: (key, size, expiresIn) =>
      call(key, () =>
        getSignedUrl(signer, new PutObjectCommand({ ...at(key), ContentLength: size }), { expiresIn }),
      ),
    async beginParts(key) {
      const begun = await call(key, () => client.send(new CreateMultipartUploadCommand(at(key))));
      return begun.UploadId!;
    },
    partUrl(key, UploadId, PartNumber, ContentLength, expiresIn) {
      const part = new UploadPartCommand({ ...at(key), UploadId, PartNumber, ContentLength });
      return call(key, () => getSignedUrl(signer, part, { expiresIn }));
    },
    async *listParts(key, UploadId, after = 0) {
      let marker: string | undefined = String(after);
      while (marker !== undefined) {
        const page: ListPartsCommandOutput = await call(key, () =>
          client.send(new ListPartsCommand({ ...at(key), UploadId, PartNumberMarker: marker })),
        );
        for (const { PartNumber, ETag, Size } of page.Parts ?? [])
          yield { number: PartNumber!, etag: etagOf({ ETag }, key), size: Size ?? 0 };
        marker = page.IsTruncated ? page.NextPartNumberMarker : undefined;
      }
    },
    async completeParts(key, UploadId, parts) {
      const Parts = parts.map(({ number, etag }) => ({ PartNumber: number, ETag: etag }));
      const complete = new CompleteMultipartUploadCommand({
        ...at(key),
        UploadId,
        MultipartUpload: { Parts },
      });
      return etagOf(await call(key, () => client.send(complete)), key);
    },
    async endParts(key, UploadId) {
      await call(key, () => client.send(new AbortMultipartUploadCommand({ ...at(key), UploadId }))).catch(
        (error) => {
          if (!(error instanceof ObjectNotFound)) throw error;
        },
      );
    },
  };

  return {
    description: `bucket ${bucket}/${root}${endpoint ? ` at ${new URL(endpoint).host}` : ''}`,
    put,
    get,
    async read(key, signal, options) {
      const stream = await get(key, signal, options);
      return call(key, async () => Buffer.concat(await stream.toArray()), signal);
    },
    stat: describe,
    delete: remove,
    list,
    async probe() {
      await put(probeKey, Buffer.from('probe'));
      await remove(probeKey);
    },
    close() {
      client.destroy();
      if (signer !== client) signer.destroy();
    },
    abandonParts,
    presigned,
    backing: { kind: 'bucket', bucket, root, client: config },
  };
}

function etagOf({ ETag }: { ETag?: string | undefined }, key: string): string {
  if (ETag === undefined)
    throw new InfrastructureFault('storage', `Object storage answered without an ETag for ${key}.`);
  return ETag;
}

function isRefusal(error: unknown): boolean {
  return error instanceof S3ServiceException && [403, 405, 501].includes(error.$metadata.httpStatusCode ?? 0);
}

function isBehindTheEnd(error: unknown): boolean {
  return error instanceof S3ServiceException && error.$metadata.httpStatusCode === 416;
}

/** No other code means it: servers also answer 404 for a bucket, or an access key, that they do not know. */
const absences = ['NoSuchKey', 'NotFound', 'NoSuchVersion', 'NoSuchUpload', 'Unknown', 'UnknownError'];

/** The SDK's errors: absence has several names, the rest says that the storage cannot be used now. */
function normalise(error: unknown, key: string): unknown {
  if (error instanceof S3ServiceException) {
    if (absences.includes(error.name)) {
      // Answers without a body have no code: `Unknown`.
      if (!error.name.startsWith('Unknown') || error.$metadata.httpStatusCode === 404)
        return new ObjectNotFound(key);
    }
    if (error.$metadata.httpStatusCode === 412 || ['InvalidPart', 'InvalidPartOrder'].includes(error.name))
      return new ObjectChanged(key);
    return new InfrastructureFault('storage', complaint(error), error);
  }
  if (error instanceof Error && error.name === 'CredentialsProviderError') {
    return new InfrastructureFault(
      'storage',
      'There are no credentials for object storage: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role.',
      error,
    );
  }
  if (error instanceof Error && error.name !== 'AbortError') {
    return new InfrastructureFault('storage', `Object storage cannot be reached: ${error.message}`, error);
  }
  return error;
}

/** What the servers' codes mean to who runs the services: what is wrong, and what to do. Nothing that was signed is in it. */
function complaint({ name: code, message, $metadata: { httpStatusCode } }: S3ServiceException): string {
  const name = code.startsWith('Unknown') ? String(httpStatusCode) : code;
  switch (name) {
    case 'NoSuchBucket':
      return 'Object storage has no such bucket (NoSuchBucket): create it, or put STORAGE_URL right.';
    case 'InvalidAccessKeyId':
    // versitygw's word for it, with status 404.
    case 'XAdminUserNotFound':
    case 'SignatureDoesNotMatch':
    case 'InvalidToken':
    case 'ExpiredToken':
      return `Object storage refuses the credentials (${name}): put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role, right.`;
    case 'AccessDenied':
    case 'Forbidden':
    case '403':
      return `Object storage does not allow it (${name}): are the credentials right? They must be able to read, write, delete and list in the bucket of STORAGE_URL.`;
    case 'RequestTimeTooSkewed':
      return `Object storage finds this machine's clock wrong (${name}): set the clock.`;
    case 'PermanentRedirect':
    case 'AuthorizationHeaderMalformed':
    case 'IllegalLocationConstraintException':
      return `Object storage has the bucket in another region (${name}): set region= in STORAGE_URL.`;
  }
  const full = httpStatusCode === 507 || /full|quota|insufficient/i.test(name);
  if (full) return `Object storage is full (${name}): make room there.`;
  return `Object storage answered ${name}: ${message}`;
}
