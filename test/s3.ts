/**
 * An S3 server for tests: s3rver with what it lacks of the protocol and real servers have. Without these a test
 * would pass on what no server does: signatures of presigned URLs, If-Match on reads, the list of a multipart
 * upload's parts, ending one, parts that must be the stated ones, a cut body that leaves nothing, lists of more than
 * a page, ranges of what is empty.
 */
import { createHash, createHmac, randomUUID, timingSafeEqual } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdtemp, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import type { IncomingMessage } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import S3rver from 's3rver';

/** The part of a Koa context that is used here. */
interface Context {
  readonly req: IncomingMessage;
  readonly method: string;
  readonly path: string;
  readonly querystring: string;
  readonly query: Record<string, string | undefined>;
  status: number;
  type: string;
  body: unknown;
  set(header: string, value: string): void;
  get(header: string): string;
}

export interface TestS3 extends AsyncDisposable {
  /** Of a storage in it: `s3://music/some/prefix?endpoint=...` */
  readonly url: string;
  readonly endpoint: string;
  /** Bytes of parts that lie in multipart uploads which are not complete. */
  unfinishedParts(): Promise<number>;
  /** Every request so far, as `GET /music/some/prefix/key?query`. */
  readonly requests: string[];
  /** Requests for which it says so are answered 503 (the SDK tries three times). */
  fails: (request: string) => boolean;
}

export const testCredentials = { accessKeyId: 'S3RVER', secretAccessKey: 'S3RVER' };
/** All but the last part, as everywhere. */
const minPartBytes = 5 * 1024 * 1024;

class Refusal extends Error {
  readonly status: number;
  readonly code: string;
  constructor(status: number, code: string) {
    super(code);
    this.status = status;
    this.code = code;
  }
}

/** Sets the environment's credentials when there are none. */
export async function startS3(bucket = 'music'): Promise<TestS3> {
  process.env['AWS_ACCESS_KEY_ID'] ??= testCredentials.accessKeyId;
  process.env['AWS_SECRET_ACCESS_KEY'] ??= testCredentials.secretAccessKey;
  const directory = await mkdtemp(path.join(tmpdir(), 'as-s3-'));
  const requests: string[] = [];
  const server = new S3rver({
    port: 0,
    address: '127.0.0.1',
    silent: true,
    directory,
    configureBuckets: [{ name: bucket, configs: [] }],
  });
  // Its own also removes the folder, at times while another request is about to write into it: that ends the process.
  server.store.deleteObject = async (name, key) => {
    for (const resource of ['object', 'object.md5', 'metadata.json'])
      await rm(server.store.getResourcePath(name, key, resource), { force: true });
  };
  server.middleware.unshift(async (context: Context, next: () => Promise<void>) => {
    const line = `${context.method} ${context.path}${context.querystring && `?${context.querystring}`}`;
    requests.push(line);
    try {
      if (self.fails(line)) throw new Refusal(503, 'ServiceUnavailable');
      if (context.query['X-Amz-Signature'] !== undefined) checkSignature(context);
      await answer(context, next);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      context.status = error.status;
      context.type = 'application/xml';
      context.body = `<?xml version="1.0"?><Error><Code>${error.code}</Code><Message>${error.code}</Message></Error>`;
    }
  });

  async function answer(context: Context, next: () => Promise<void>): Promise<void> {
    const { method, query } = context;
    const [, name = '', ...rest] = context.path.split('/').map(decodeURIComponent);
    const key = rest.join('/');
    const { uploadId } = query;
    if (method === 'GET' && key === '' && 'uploads' in query)
      return listUploads(context, name, query['prefix']);
    if (uploadId !== undefined && (await keyOf(name, uploadId)) !== key)
      throw new Refusal(404, 'NoSuchUpload');
    if (uploadId !== undefined && method === 'GET') return listParts(context, name, uploadId);
    if (uploadId !== undefined && method === 'DELETE') {
      await rm(uploadDirectory(name, uploadId), { recursive: true, force: true });
      context.status = 204;
      return;
    }
    if (uploadId !== undefined && method === 'PUT') return putPart(context, name, uploadId);
    if (uploadId !== undefined && method === 'POST') return complete(context, name, uploadId);
    const ifMatch = context.get('if-match');
    if (ifMatch !== '' && (method === 'GET' || method === 'HEAD')) {
      const metadata = await server.store.getMetadata(name, key).catch(() => undefined);
      if (metadata !== undefined && metadata['etag'] !== ifMatch)
        throw new Refusal(412, 'PreconditionFailed');
    }
    if (method === 'GET' && key === '' && query['list-type'] === '2') return listObjects(context, name);
    const from = /^bytes=(\d+)-/.exec(context.get('range'))?.[1];
    if (from !== undefined && method === 'GET') {
      const metadata = await server.store.getMetadata(name, key).catch(() => undefined);
      if (metadata !== undefined && Number(from) >= Number(metadata['content-length']))
        throw new Refusal(416, 'InvalidRange');
    }
    await next();
  }

  const uploadsDirectory = (name: string) => server.store.getResourcePath(name, undefined, 'uploads');
  const uploadDirectory = (name: string, uploadId: string) =>
    path.join(uploadsDirectory(name), path.basename(uploadId));
  const keyOf = (name: string, uploadId: string) =>
    readFile(path.join(uploadDirectory(name, uploadId), 'key'), 'utf8').catch(() => undefined);

  async function partsOf(name: string, uploadId: string) {
    const folder = uploadDirectory(name, uploadId);
    const numbers = (await readdir(folder)).filter((file) => /^\d+$/.test(file)).map(Number);
    return Promise.all(
      numbers
        .sort((a, b) => a - b)
        .map(async (number) => ({
          number,
          size: (await stat(path.join(folder, String(number)))).size,
          etag: `"${await readFile(path.join(folder, `${number}.md5`), 'utf8')}"`,
        })),
    );
  }

  async function listParts(context: Context, name: string, uploadId: string): Promise<void> {
    const after = Number(context.query['part-number-marker'] ?? 0);
    const limit = Number(context.query['max-parts'] ?? 1_000);
    const parts = (await partsOf(name, uploadId)).filter(({ number }) => number > after);
    const page = parts.slice(0, limit);
    context.type = 'application/xml';
    context.body = `<?xml version="1.0"?><ListPartsResult><IsTruncated>${parts.length > limit}</IsTruncated>
      <NextPartNumberMarker>${page.at(-1)?.number ?? 0}</NextPartNumberMarker>${page
        .map(
          ({ number, size, etag }) =>
            `<Part><PartNumber>${number}</PartNumber><Size>${size}</Size><ETag>${etag}</ETag></Part>`,
        )
        .join('')}</ListPartsResult>`;
  }

  /** Its own needs a cipher that OpenSSL no longer has as soon as there is a further page. */
  async function listObjects(context: Context, name: string): Promise<void> {
    // What s3rver checks of a signature in a header, before which this stands.
    const caller = /Credential=([^/]+)/.exec(context.get('authorization'))?.[1];
    if (caller !== undefined && caller !== testCredentials.accessKeyId)
      throw new Refusal(403, 'InvalidAccessKeyId');
    if (!(await server.store.getBucket(name))) throw new Refusal(404, 'NoSuchBucket');
    const { query } = context;
    const token = query['continuation-token'];
    const { objects, isTruncated } = await server.store.listObjects(name, {
      prefix: query['prefix'] ?? '',
      startAfter: token === undefined ? query['start-after'] : Buffer.from(token, 'base64').toString(),
      maxKeys: Math.min(1_000, Number(query['max-keys'] ?? 1_000)),
    });
    const encoded = query['encoding-type'] === 'url';
    const keyAs = (key: string) => (encoded ? encode(key).replaceAll('%20', '+') : escapeXml(key));
    const next = isTruncated
      ? `<NextContinuationToken>${Buffer.from(objects.at(-1)!.key).toString('base64')}</NextContinuationToken>`
      : '';
    context.type = 'application/xml';
    context.body = `<?xml version="1.0"?><ListBucketResult><IsTruncated>${isTruncated}</IsTruncated>${next}
      ${encoded ? '<EncodingType>url</EncodingType>' : ''}${objects
        .map(
          ({ key, size, metadata, lastModifiedDate }) =>
            `<Contents><Key>${keyAs(key)}</Key><LastModified>${lastModifiedDate.toISOString()}</LastModified><ETag>${escapeXml(metadata['etag']!)}</ETag><Size>${size}</Size></Contents>`,
        )
        .join('')}</ListBucketResult>`;
  }

  async function listUploads(context: Context, name: string, prefix = ''): Promise<void> {
    const ids = await readdir(uploadsDirectory(name)).catch(() => []);
    const uploads = await Promise.all(
      ids.map(async (id) => ({
        id,
        key: (await keyOf(name, id)) ?? '',
        begun: (await stat(path.join(uploadDirectory(name, id), 'key')).catch(() => undefined))?.mtime,
      })),
    );
    context.type = 'application/xml';
    context.body = `<?xml version="1.0"?><ListMultipartUploadsResult><IsTruncated>false</IsTruncated>${uploads
      .filter(({ key, begun }) => begun !== undefined && key.startsWith(prefix))
      .map(
        ({ id, key, begun }) =>
          `<Upload><Key>${escapeXml(key)}</Key><UploadId>${id}</UploadId><Initiated>${begun!.toISOString()}</Initiated></Upload>`,
      )
      .join('')}</ListMultipartUploadsResult>`;
  }

  async function putPart(context: Context, name: string, uploadId: string): Promise<void> {
    const number = Number(context.query['partNumber']);
    const folder = uploadDirectory(name, uploadId);
    const file = path.join(folder, `.${randomUUID()}`);
    try {
      // A cut body ends with an error here.
      await pipeline(context.req, createWriteStream(file));
      const md5 = createHash('md5');
      await pipeline(createReadStream(file), md5);
      const etag = md5.digest('hex');
      await rename(file, path.join(folder, String(number)));
      await writeFile(path.join(folder, `${number}.md5`), etag);
      context.set('etag', `"${etag}"`);
      context.status = 200;
      context.body = '';
    } finally {
      await rm(file, { force: true });
    }
  }

  async function complete(context: Context, name: string, uploadId: string): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of context.req) chunks.push(chunk as Buffer);
    const xml = Buffer.concat(chunks).toString('utf8');
    const stated = [...xml.matchAll(/<Part>(.*?)<\/Part>/gs)].map(([, part = '']) => ({
      number: Number(/<PartNumber>(\d+)</.exec(part)?.[1]),
      etag: (/<ETag>(.*?)</.exec(part)?.[1] ?? '').replaceAll(/&quot;|"/g, ''),
    }));
    const arrived = new Map((await partsOf(name, uploadId)).map((part) => [part.number, part]));
    for (const [index, { number, etag }] of stated.entries()) {
      const part = arrived.get(number);
      if (part?.etag.replaceAll('"', '') !== etag) throw new Refusal(400, 'InvalidPart');
      if (part.size < minPartBytes && index < stated.length - 1) throw new Refusal(400, 'EntityTooSmall');
    }
    const { md5 } = await server.store.putObjectMultipart(name, uploadId, stated);
    context.type = 'application/xml';
    context.body = `<?xml version="1.0"?><CompleteMultipartUploadResult><ETag>"${md5}"</ETag></CompleteMultipartUploadResult>`;
  }

  const { port } = await server.run();
  const endpoint = `http://127.0.0.1:${port}`;
  const self: TestS3 = {
    url: `s3://${bucket}/some/prefix?endpoint=${endpoint}&region=us-east-1`,
    endpoint,
    requests,
    async unfinishedParts() {
      const ids = await readdir(uploadsDirectory(bucket)).catch(() => []);
      const parts = await Promise.all(ids.map((id) => partsOf(bucket, id)));
      return parts.flat().reduce((sum, { size }) => sum + size, 0);
    },
    async [Symbol.asyncDispose]() {
      server.httpServer.closeAllConnections();
      await server.close();
      await rm(directory, { recursive: true, force: true });
    },
    fails: () => false,
  };
  return self;
}

const escapeXml = (text: string) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
const encode = (text: string) =>
  encodeURIComponent(text).replaceAll(/[!'()*]/g, (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`);

/** Signature Version 4 in the query: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html */
function checkSignature({ req, method, path: at, query }: Context): void {
  const { 'X-Amz-Signature': given = '', ...signed } = query as Record<string, string>;
  const begun = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(signed['X-Amz-Date'] ?? '');
  if (!begun) throw new Refusal(400, 'AuthorizationQueryParametersError');
  const [year, month, day, hours, minutes, seconds] = begun.slice(1).map(Number) as [
    number,
    number,
    number,
    number,
    number,
    number,
  ];
  const from = Date.UTC(year, month - 1, day, hours, minutes, seconds);
  if (Date.now() > from + Number(signed['X-Amz-Expires']) * 1_000) throw new Refusal(403, 'AccessDenied');
  const names = (signed['X-Amz-SignedHeaders'] ?? '').split(';');
  const canonical = [
    method,
    at
      .split('/')
      .map((part) => encode(decodeURIComponent(part)))
      .join('/'),
    Object.entries(signed)
      .map(([name, value]) => `${encode(name)}=${encode(value)}`)
      .sort()
      .join('&'),
    ...names.map((name) => `${name}:${String(req.headers[name] ?? '').trim()}`),
    '',
    names.join(';'),
    'UNSIGNED-PAYLOAD',
  ].join('\n');
  const scope = (signed['X-Amz-Credential'] ?? '').split('/').slice(1);
  const hash = createHash('sha256').update(canonical).digest('hex');
  const text = ['AWS4-HMAC-SHA256', signed['X-Amz-Date'], scope.join('/'), hash].join('\n');
  const secret = process.env['AWS_SECRET_ACCESS_KEY'] ?? '';
  const key = scope.reduce<string | Buffer>(
    (last, part) => createHmac('sha256', last).update(part).digest(),
    `AWS4${secret}`,
  );
  const expected = createHmac('sha256', key).update(text).digest('hex');
  if (given.length !== expected.length || !timingSafeEqual(Buffer.from(given), Buffer.from(expected)))
    throw new Refusal(403, 'SignatureDoesNotMatch');
}
