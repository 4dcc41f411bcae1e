import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { createServer, request as httpRequest, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { after, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  CreateBucketCommand,
  DeleteObjectCommand,
  PutBucketVersioningCommand,
  PutObjectCommand,
  S3Client,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { Registry } from 'prom-client';
import { startS3, testCredentials } from '../../../test/s3.ts';
import { createEgressGuard } from '../../egress/src/guard.ts';
import { ProblemError } from './errors.ts';
import { createSecrets } from './secrets.ts';
import { createSourceReader, type SourceLimits } from './source-reader.ts';
import { createSources, type Source, type SourceDefinition, sourceDefinitionSchema } from './sources.ts';

const secrets = createSecrets(randomBytes(32).toString('base64'));
const sources = createSources({ redis: undefined as never, secrets, storageUrl: 'file:///objects' });
const scratch = await mkdtemp(path.join(tmpdir(), 'as-source-'));
const file = path.join(scratch, 'audio');
const s3 = await startS3();
const proxy = await startProxy(s3.endpoint);
const loopback = createEgressGuard({ allow: '127.0.0.0/8' });
const seed = new S3Client({
  endpoint: s3.endpoint,
  region: 'us-east-1',
  forcePathStyle: true,
  // A copy: the SDK writes into it.
  credentials: { ...testCredentials },
});
after(async () => {
  seed.destroy();
  await loopback.close();
  await proxy.close();
  await s3[Symbol.asyncDispose]();
  await rm(scratch, { recursive: true });
});
beforeEach(() => proxy.reset());

interface Seen {
  method: string;
  url: string;
  headers: IncomingMessage['headers'];
}

/** In front of a real server: sees every request, and can answer in its place or spoil an answer. */
async function startProxy(target: string) {
  const seen: Seen[] = [];
  type Intervene = (request: IncomingMessage, response: ServerResponse, n: number) => boolean | 'cut';
  let intervene: Intervene = () => false;
  const server = createServer((request, response) => {
    seen.push({ method: request.method!, url: request.url!, headers: request.headers });
    const what = intervene(request, response, seen.length);
    if (what === true) return;
    const { method, url, headers } = request;
    const inner = httpRequest(target + url, { method: method!, headers }, (answer) => {
      response.writeHead(answer.statusCode!, answer.headers);
      if (what !== 'cut') return void answer.pipe(response);
      answer.once('data', (chunk: Buffer) => {
        answer.pause();
        response.write(chunk, () => response.destroy());
      });
    });
    inner.on('error', () => response.destroy());
    request.pipe(inner);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    endpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    seen,
    set intervene(next: Intervene) {
      intervene = next;
    },
    reset() {
      seen.length = 0;
      intervene = () => false;
    },
    async close() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

const quick: Partial<SourceLimits> = { backoffMs: 5, stallMs: 500 };

function openReader({ guard = loopback, limits = quick, opens = secrets } = {}) {
  const registry = new Registry();
  const reader = createSourceReader({ guard, secrets: opens, registry, limits });
  const counted = async () => {
    const metric = await registry.getSingleMetric('acousticsense_source_reads_total')!.get();
    return Object.fromEntries(metric.values.map(({ labels, value }) => [labels['operation'], value]));
  };
  return { reader, counted };
}

async function source(definition: Partial<SourceDefinition> = {}): Promise<Source> {
  return sources.prepare(
    'acme',
    'catalogue',
    sourceDefinitionSchema.parse({
      bucket: 'music',
      endpoint: proxy.endpoint,
      credentials: testCredentials,
      ...definition,
    }),
  );
}

async function put(key: string, body: Buffer): Promise<string> {
  const { ETag } = await seed.send(new PutObjectCommand({ Bucket: 'music', Key: key, Body: body }));
  return ETag!;
}

const options = { signal: AbortSignal.timeout(60_000), maxBytes: 1 << 30 };
const sha256 = (bytes: Buffer) => createHash('sha256').update(bytes).digest('hex');
const problem =
  (code: string, words = /./) =>
  (error: unknown) =>
    error instanceof ProblemError && error.code === code && words.test(error.message);

describe('downloads', () => {
  const mebibyte = 1 << 20;
  const ranged = { limits: { ...quick, rangeBytes: mebibyte } };

  test('an object arrives whole, with its SHA-256, size and ETag, by as many ranges as it needs', async () => {
    const bytes = randomBytes(2.5 * mebibyte);
    const etag = await put('albums/ü 1+1 %41.mp3', bytes);
    const { reader, counted } = openReader(ranged);
    const told: number[] = [];
    const got = await reader.download(await source(), { key: 'albums/ü 1+1 %41.mp3' }, file, {
      ...options,
      onBytes: (done) => told.push(done),
    });
    assert.deepEqual(got, { sha256: sha256(bytes), size: bytes.length, etag: etag.replaceAll('"', '') });
    assert.ok((await readFile(file)).equals(bytes));
    assert.deepEqual(
      proxy.seen.map(({ headers }) => [headers.range, headers['if-match']]),
      [
        ['bytes=0-1048575', undefined],
        ['bytes=1048576-2097151', etag],
        ['bytes=2097152-2621439', etag],
      ],
    );
    assert.deepEqual(await counted(), { GET: 3, HEAD: 0, LIST: 0 });
    assert.equal(told.at(-1), bytes.length);
    assert.ok(told.every((n, index) => n > (told[index - 1] ?? 0)));
  });

  test('an object of exactly one range is read with one request, on the ETag that the caller knows', async () => {
    const bytes = randomBytes(mebibyte);
    const etag = await put('one', bytes);
    const { reader, counted } = openReader(ranged);
    const known = { key: 'one', etag: etag.replaceAll('"', ''), size: bytes.length };
    assert.equal((await reader.download(await source(), known, file, options)).sha256, sha256(bytes));
    assert.deepEqual([proxy.seen.length, proxy.seen[0]!.headers['if-match']], [1, etag]);
    assert.equal((await counted())['GET'], 1);
  });

  test('a range that is cut goes on where it broke, and the file is right', async () => {
    const bytes = randomBytes(2 * mebibyte);
    await put('cut', bytes);
    proxy.intervene = (_request, _response, n) => (n === 2 || n === 3 ? 'cut' : false);
    const { reader } = openReader(ranged);
    const { sha256: digest } = await reader.download(await source(), { key: 'cut' }, file, options);
    assert.equal(digest, sha256(bytes));
    assert.ok((await readFile(file)).equals(bytes));
    const starts = proxy.seen.map(({ headers }) => Number(/=(\d+)/.exec(headers.range!)![1]));
    assert.deepEqual([starts.length, starts[0], starts[1]], [4, 0, mebibyte]);
    assert.ok(starts[2]! > starts[1]! && starts[3]! > starts[2]!, `${starts}`);
  });

  test('an endpoint that cuts every range is given up after some tries, and the problem can be retried', async () => {
    await put('always', randomBytes(mebibyte));
    proxy.intervene = () => 'cut';
    const { reader } = openReader({ limits: { ...quick, tries: 3 } });
    await assert.rejects(
      reader.download(await source(), { key: 'always' }, file, options),
      (error) => problem('source_unavailable')(error) && (error as ProblemError).retryable,
    );
    assert.equal(proxy.seen.length, 3);
  });

  test('SlowDown, a server error and silence are waited out', async () => {
    const bytes = randomBytes(1_000);
    await put('slow', bytes);
    proxy.intervene = (_request, response, n) => {
      if (n === 1) response.writeHead(503).end('<Error><Code>SlowDown</Code></Error>');
      if (n === 2) response.writeHead(500).end('not XML');
      if (n === 3) response.socket!.destroy();
      return n <= 4;
    };
    const { reader } = openReader();
    const got = await reader.download(await source(), { key: 'slow' }, file, options);
    assert.equal(got.sha256, sha256(bytes));
    assert.equal(proxy.seen.length, 5);
  });

  test('a body that stops coming is given up', async () => {
    await put('stall', randomBytes(mebibyte));
    proxy.intervene = (request, response) => {
      if (request.method !== 'GET') return false;
      response.writeHead(206, {
        etag: '"x"',
        'content-range': 'bytes 0-99/100',
        'content-length': '100',
      });
      response.write('some');
      return true;
    };
    const { reader } = openReader({ limits: { ...quick, stallMs: 100, tries: 1 } });
    await assert.rejects(
      reader.download(await source(), { key: 'stall' }, file, options),
      problem('source_unavailable', /nothing came/),
    );
  });

  test('a body that drips is given up too', async () => {
    const timers: NodeJS.Timeout[] = [];
    proxy.intervene = (_request, response) => {
      response.writeHead(206, {
        etag: '"x"',
        'content-range': 'bytes 0-9999/10000',
        'content-length': '10000',
      });
      timers.push(setInterval(() => response.write('.'), 20));
      return true;
    };
    const { reader } = openReader({ limits: { ...quick, requestMs: 300, tries: 1 } });
    await assert.rejects(
      reader.download(await source(), { key: 'drip' }, file, options),
      problem('source_unavailable', /went on/),
    );
    timers.forEach(clearInterval);
  });

  test('an object that was replaced before or between its ranges is source_changed', async () => {
    const { reader } = openReader(ranged);
    const old = await put('changing', randomBytes(2 * mebibyte));
    await put('changing', randomBytes(2 * mebibyte));
    await assert.rejects(
      reader.download(await source(), { key: 'changing', etag: old }, file, options),
      problem('source_changed'),
    );
    proxy.reset();
    let replaced: Promise<unknown> | undefined;
    proxy.intervene = (request, response, n) => {
      if (n !== 2) return false;
      replaced = put('changing', randomBytes(2 * mebibyte)).then(() => {
        httpRequest(s3.endpoint + request.url, { headers: request.headers }, (answer) => {
          response.writeHead(answer.statusCode!, answer.headers);
          answer.pipe(response);
        }).end();
      });
      return true;
    };
    await assert.rejects(
      reader.download(await source(), { key: 'changing' }, file, options),
      problem('source_changed'),
    );
    await replaced;
  });

  test('another size than the caller knows is source_changed, even from a server that knows no If-Match', async () => {
    const etag = await put('sized', randomBytes(1_000));
    const { reader } = openReader();
    for (const size of [999, 1_001, 0]) {
      const known = { key: 'sized', etag, size };
      await assert.rejects(
        reader.download(await source(), known, file, options),
        problem('source_changed'),
        `${size}`,
      );
    }
    proxy.intervene = (request) => {
      delete request.headers['if-match'];
      return false;
    };
    await assert.rejects(
      reader.download(await source(), { key: 'sized', etag: 'other' }, file, options),
      problem('source_changed'),
    );
  });

  test('a key that is not there, and a bucket that is not there', async () => {
    const { reader } = openReader();
    await assert.rejects(
      reader.download(await source(), { key: 'none' }, file, options),
      problem('source_not_found', /s3:\/\/music\/none/),
    );
    await assert.rejects(
      reader.download(await source({ bucket: 'nowhere' }), { key: 'x' }, file, options),
      problem('source_not_found', /no bucket nowhere/),
    );
    assert.equal(proxy.seen.length, 2, 'neither is tried again');
  });

  test('a large object is refused by the size that the caller or the server tells, before its bytes', async () => {
    await put('large', randomBytes(mebibyte));
    const { reader } = openReader();
    const small = { ...options, maxBytes: mebibyte - 1 };
    await assert.rejects(
      reader.download(await source(), { key: 'large', size: mebibyte }, file, small),
      problem('file_too_large'),
    );
    assert.equal(proxy.seen.length, 0);
    await assert.rejects(
      reader.download(await source(), { key: 'large' }, file, small),
      problem('file_too_large'),
    );
  });

  test('an empty object is empty_file', async () => {
    await put('empty', Buffer.alloc(0));
    const { reader } = openReader();
    await assert.rejects(
      reader.download(await source(), { key: 'empty' }, file, options),
      problem('empty_file'),
    );
  });

  test('a server that sends more, or other, bytes than were asked for is not believed', async () => {
    const answers: Record<string, string | number>[] = [
      { 'content-range': 'bytes 0-9/10' },
      { 'content-range': 'bytes 5-14/20', 'content-length': 10 },
      { 'content-range': 'bytes 0-9/*', 'content-length': 10 },
      { 'content-range': 'bytes 0-4/10', 'content-length': 5 },
      {},
    ];
    const { reader } = openReader({ limits: { ...quick, tries: 1 } });
    for (const headers of answers) {
      proxy.intervene = (_request, response) => {
        response.writeHead(206, { etag: '"x"', ...headers });
        response.end(Buffer.alloc(Number(headers['content-length'] ?? 20)));
        return true;
      };
      await assert.rejects(
        reader.download(await source(), { key: 'lies' }, file, options),
        problem('source_unavailable', /asked for/),
        JSON.stringify(headers),
      );
    }
  });

  test('an abort ends a download, and its reason comes out', async () => {
    await put('abort', randomBytes(mebibyte));
    const controller = new AbortController();
    proxy.intervene = (_request, response) => {
      response.writeHead(206, { etag: '"x"', 'content-range': 'bytes 0-99/100', 'content-length': '100' });
      response.write('some');
      setTimeout(() => controller.abort(new Error('cancelled')), 50);
      return true;
    };
    const { reader } = openReader();
    await assert.rejects(
      reader.download(await source(), { key: 'abort' }, file, { ...options, signal: controller.signal }),
      /^Error: cancelled$/,
    );
  });

  test('a scratch file that cannot be written is no fault of the source', async () => {
    await put('full', randomBytes(1_000));
    const { reader } = openReader();
    await assert.rejects(reader.download(await source(), { key: 'full' }, '/dev/full', options), {
      code: 'ENOSPC',
    });
    assert.equal(proxy.seen.length, 1);
  });

  test('memory stays flat on an object of 200 MB', async () => {
    const chunk = randomBytes(mebibyte);
    const body = Readable.from(Array.from({ length: 200 }, () => chunk));
    await new Upload({
      client: seed,
      params: { Bucket: 'music', Key: 'huge', Body: body },
      queueSize: 1,
    }).done();
    const { reader } = openReader();
    globalThis.gc?.();
    const before = process.memoryUsage.rss();
    let peak = before;
    const got = await reader.download(await source({ endpoint: s3.endpoint }), { key: 'huge' }, file, {
      ...options,
      onBytes: () => {
        peak = Math.max(peak, process.memoryUsage.rss());
      },
    });
    assert.equal(got.size, 200 * mebibyte);
    const grown = (peak - before) / mebibyte;
    // The server's own buffers are in it: it runs in this process.
    assert.ok(grown < 64, `grew by ${Math.round(grown)} MiB`);
  });
});

describe('listings', () => {
  test('a page tells key, ETag, size and time; the next begins behind the last key', async () => {
    const bytes = randomBytes(10);
    for (const key of ['list/a b.mp3', 'list/c+d.mp3', 'list/é.mp3', 'listed']) await put(key, bytes);
    const { reader, counted } = openReader();
    const from = await source({ prefix: 'list/' });
    const pages = await Array.fromAsync(reader.list(from, 'list/'));
    assert.deepEqual(
      pages.map((page) => page.map(({ key }) => key)),
      [['list/a b.mp3', 'list/c+d.mp3', 'list/é.mp3']],
    );
    const [first] = pages[0]!;
    assert.equal(first!.etag, createHash('md5').update(bytes).digest('hex'));
    assert.equal(first!.size, 10);
    assert.ok(Math.abs(first!.lastModified.getTime() - Date.now()) < 60_000);
    const rest = await Array.fromAsync(reader.list(from, 'list/', 'list/c+d.mp3'));
    assert.deepEqual(
      rest.flat().map(({ key }) => key),
      ['list/é.mp3'],
    );
    assert.deepEqual(await counted(), { GET: 0, HEAD: 0, LIST: 2 });
  });

  test('keys of more than a page come a thousand at a time, in order, whatever is in their names', async () => {
    const keys = Array.from({ length: 1_100 }, (_, n) => `p/${String(n).padStart(5, '0')} +%41&é.mp3`);
    for (let n = 0; n < keys.length; n += 50) {
      await Promise.all(keys.slice(n, n + 50).map((key) => put(key, Buffer.from('x'))));
    }
    const { reader, counted } = openReader();
    const pages = await Array.fromAsync(reader.list(await source(), 'p/'));
    assert.deepEqual(
      pages.map((page) => page.length),
      [1_000, 100],
    );
    assert.deepEqual(
      pages.flat().map(({ key }) => key),
      keys,
    );
    assert.equal((await counted())['LIST'], 2);
  });

  test('keys of a server that does not encode them are taken as they are', async () => {
    proxy.intervene = (_request, response) => {
      response.end(
        '<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a+b%41</Key><ETag>"e"</ETag></Contents></ListBucketResult>',
      );
      return true;
    };
    assert.equal(await openReader().reader.check(await source()), 'a+b%41');
  });

  test('a server that ignores where to begin is not listed for ever', async () => {
    proxy.intervene = (_request, response) => {
      response.end(
        '<ListBucketResult><IsTruncated>true</IsTruncated><Contents><Key>k</Key></Contents></ListBucketResult>',
      );
      return true;
    };
    const pages: number[] = [];
    await assert.rejects(
      async () => {
        for await (const page of openReader().reader.list(await source(), '')) pages.push(page.length);
      },
      problem('source_unavailable', /order/),
    );
    assert.deepEqual(pages, [1]);
  });

  test('an answer without an end, or that is no S3, is given up', async () => {
    const { reader } = openReader({ limits: { ...quick, tries: 1 } });
    const check = async () => reader.check(await source());
    proxy.intervene = (_request, response) => {
      const endless = () => {
        while (response.write('<x>'.repeat(10_000)));
        response.once('drain', endless);
      };
      endless();
      return true;
    };
    await assert.rejects(check, problem('source_unavailable', /does not end/));
    proxy.intervene = (_request, response) => {
      response.end('<html>Welcome');
      return true;
    };
    await assert.rejects(check, problem('source_unavailable'));
  });

  test('a check names one object of the source, and none when there is none', async () => {
    await put('checked/1', randomBytes(1));
    const { reader } = openReader();
    assert.equal(await reader.check(await source({ prefix: 'checked/' })), 'checked/1');
    assert.equal(await reader.check(await source({ prefix: 'unheard/' })), undefined);
  });
});

describe('heads', () => {
  test('ETag and size are told; what is missing or outside the prefix is not', async () => {
    const etag = await put('head/1', randomBytes(77));
    const { reader, counted } = openReader();
    const from = await source({ prefix: 'head/' });
    assert.deepEqual(await reader.head(from, 'head/1'), { etag: etag.replaceAll('"', ''), size: 77 });
    await assert.rejects(reader.head(from, 'head/2'), problem('source_not_found'));
    const asked = (await counted())['HEAD'];
    await assert.rejects(reader.head(from, 'other/1'), problem('source_not_allowed'));
    await assert.rejects(
      reader.download(from, { key: 'other/1' }, file, options),
      problem('source_not_allowed'),
    );
    await assert.rejects(Array.fromAsync(reader.list(from, 'hea')), problem('source_not_allowed'));
    assert.deepEqual([asked, (await counted())['HEAD']], [2, 2]);
  });

  test('a version is asked for by its id and told', async () => {
    proxy.intervene = (_request, response) => {
      response.writeHead(200, { etag: '"v"', 'content-length': '5', 'x-amz-version-id': 'abc' }).end();
      return true;
    };
    const { reader } = openReader();
    assert.deepEqual(await reader.head(await source(), 'x', 'abc'), { etag: 'v', size: 5, versionId: 'abc' });
    assert.match(proxy.seen[0]!.url, /versionId=abc/);
  });
});

describe('who reads', () => {
  test('wrong credentials are source_forbidden in the words of the server, and not tried again', async () => {
    const { reader } = openReader();
    const credentials = { accessKeyId: 'AKIAWRONG', secretAccessKey: 'wrong' };
    await assert.rejects(
      reader.download(await source({ credentials }), { key: 'x' }, file, options),
      problem('source_forbidden', /403.*InvalidAccessKeyId/),
    );
    assert.equal(proxy.seen.length, 1);
  });

  test("a source without credentials is read anonymously, never with the service's own", async () => {
    await put('public', Buffer.from('x'));
    assert.ok(process.env['AWS_ACCESS_KEY_ID'], 'the service has credentials');
    const { reader } = openReader();
    const anonymous = await source({ credentials: undefined });
    await reader.head(anonymous, 'public');
    await reader.check(anonymous);
    for (const { headers, url } of proxy.seen) {
      assert.equal(headers.authorization, undefined);
      assert.ok(!url.includes('Signature') && headers['x-amz-security-token'] === undefined);
    }
  });

  test("the variables that lead to the service's own storage lead no source there", async () => {
    process.env['AWS_ENDPOINT_URL_S3'] = s3.endpoint;
    try {
      const guard = createEgressGuard({
        resolve: async (name) => {
          // The real one would ask the outside.
          throw Object.assign(new Error(name), { code: 'ENOTFOUND' });
        },
      });
      const { reader } = openReader({ guard, limits: { ...quick, tries: 1 } });
      const before = s3.requests.length;
      const atAws = await source({ endpoint: undefined, credentials: undefined, region: 'eu-west-1' });
      await assert.rejects(reader.head(atAws, 'public'), problem('source_unavailable', /ENOTFOUND/));
      assert.equal(s3.requests.length, before);
      await guard.close();
    } finally {
      delete process.env['AWS_ENDPOINT_URL_S3'];
    }
  });

  test('the credentials of one source are never used for another', async () => {
    await put('mine', Buffer.from('x'));
    const { reader } = openReader();
    const one = await source({ credentials: { accessKeyId: 'S3RVER', secretAccessKey: 'one' } });
    const two = await source({ credentials: { accessKeyId: 'AKIATWO', secretAccessKey: 'two' } });
    await reader.head(one, 'mine');
    await assert.rejects(reader.head(two, 'mine'), problem('source_forbidden'));
    await reader.head(one, 'mine');
    const used = proxy.seen.map(({ headers }) => /Credential=(\w+)/.exec(headers.authorization!)![1]);
    assert.deepEqual(used, ['S3RVER', 'AKIATWO', 'S3RVER']);
  });

  test('credentials that this process cannot open are told as such, and can be retried', async () => {
    const { reader } = openReader({ opens: createSecrets(randomBytes(32).toString('base64')) });
    await assert.rejects(reader.head(await source(), 'x'), problem('source_unavailable', /SECRETS_KEY/));
    assert.equal(proxy.seen.length, 0);
  });

  test('an endpoint at a private address, or at the metadata service, is not connected to', async () => {
    const shut = createEgressGuard();
    const { reader, counted } = openReader({ guard: shut });
    const refused = (by: typeof reader, endpoint: string, words: RegExp) => async () =>
      assert.rejects(
        by.head(await source({ endpoint }), 'x'),
        problem('source_not_allowed', words),
        endpoint,
      );
    const inside = ['10.0.0.1:9000', '169.254.169.254', 'localhost:1', new URL(proxy.endpoint).host];
    for (const host of inside) await refused(reader, `https://${host}`, /an address that/)();
    assert.equal((await counted())['HEAD'], 4, 'none is tried again');
    for (const host of inside) await refused(reader, `http://${host}`, /plain http/)();
    assert.equal(proxy.seen.length, 0);
    const wide = createEgressGuard({ allow: '169.254.0.0/16,127.0.0.0/8' });
    const { reader: opened } = openReader({ guard: wide });
    await refused(opened, 'https://169.254.169.254', /an address that/)();
    await refused(opened, 'http://169.254.169.254', /plain http/)();
    await wide.close();
    await shut.close();
  });

  test('a dead endpoint is the problem of its source, told without an address', async () => {
    const { reader } = openReader({ limits: { ...quick, tries: 2 } });
    await assert.rejects(
      reader.head(await source({ endpoint: 'http://127.0.0.1:9' }), 'x'),
      (error) =>
        problem('source_unavailable', /ECONNREFUSED/)(error) && !/127\.0/.test((error as Error).message),
    );
  });
});

describe('a source that does not answer', () => {
  const dead = { ...quick, tries: 3, restMs: 200 };

  test('is not asked for some time, so that its jobs hold no worker in vain', async () => {
    proxy.intervene = (_request, response) => {
      response.socket!.destroy();
      return true;
    };
    const { reader } = openReader({ limits: dead });
    const from = await source();
    const ask = () => assert.rejects(reader.head(from, 'x'), problem('source_unavailable'));
    await ask();
    await ask();
    assert.equal(proxy.seen.length, 6, 'twice with all tries');
    await assert.rejects(
      reader.head(from, 'x'),
      (error) =>
        problem('source_unavailable', /for some time/)(error) &&
        (error as ProblemError).details.retryAfter === 1,
    );
    assert.equal(proxy.seen.length, 6, 'not at all');
    await sleep(250);
    await ask();
    assert.equal(proxy.seen.length, 7, 'once, to see whether it is back');
    await assert.rejects(reader.head(from, 'x'), problem('source_unavailable', /for some time/));
    assert.equal(proxy.seen.length, 7);
  });

  test('is read at once when it is back, and other sources all the while', async () => {
    await put('back', Buffer.from('x'));
    const { reader } = openReader({ limits: dead });
    const gone = await source({ endpoint: 'http://127.0.0.1:9' });
    for (let n = 0; n < 4; n += 1) {
      await assert.rejects(reader.head(gone, 'x'), problem('source_unavailable'));
      assert.equal((await reader.head(await source(), 'back')).size, 1);
    }
    let away = true;
    proxy.intervene = (_request, response) => {
      if (away) response.socket!.destroy();
      return away;
    };
    const from = await source();
    for (let n = 0; n < 2; n += 1)
      await assert.rejects(reader.head(from, 'back'), problem('source_unavailable'));
    away = false;
    await sleep(250);
    assert.equal((await reader.head(from, 'back')).size, 1);
    proxy.reset();
    assert.equal((await reader.head(from, 'back')).size, 1);
  });

  test('is not one that answers with faults: those are waited out every time', async () => {
    proxy.intervene = (_request, response) => {
      response.writeHead(503).end('<Error><Code>SlowDown</Code></Error>');
      return true;
    };
    const { reader } = openReader({ limits: dead });
    const from = await source();
    for (let n = 0; n < 4; n += 1) {
      await assert.rejects(
        reader.download(from, { key: 'x' }, file, options),
        problem('source_unavailable', /SlowDown/),
      );
    }
    assert.equal(proxy.seen.length, 12);
  });
});

describe('roles', () => {
  const roleArn = 'arn:aws:iam::123456789012:role/reader';

  async function withSts(
    answer: (form: URLSearchParams) => [status: number, xml: string],
    use: (asked: { form: URLSearchParams; authorization: string }[]) => Promise<void>,
  ) {
    const asked: { form: URLSearchParams; authorization: string }[] = [];
    const sts = createServer(async (request, response) => {
      const form = new URLSearchParams(Buffer.concat(await request.toArray()).toString());
      asked.push({ form, authorization: request.headers.authorization ?? '' });
      const [status, xml] = answer(form);
      response.writeHead(status, { 'content-type': 'text/xml' }).end(xml);
    });
    await new Promise<void>((resolve) => sts.listen(0, '127.0.0.1', resolve));
    process.env['AWS_ENDPOINT_URL_STS'] = `http://127.0.0.1:${(sts.address() as AddressInfo).port}`;
    try {
      await use(asked);
    } finally {
      delete process.env['AWS_ENDPOINT_URL_STS'];
      sts.closeAllConnections();
      await new Promise((resolve) => sts.close(resolve));
    }
  }

  const granted = () =>
    [
      200,
      `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
        <AccessKeyId>S3RVER</AccessKeyId><SecretAccessKey>temporary</SecretAccessKey><SessionToken>session</SessionToken>
        <Expiration>${new Date(Date.now() + 3_600_000).toISOString()}</Expiration>
      </Credentials></AssumeRoleResult></AssumeRoleResponse>`,
    ] as [number, string];

  test('a role is assumed as the service with the external id of the tenant, once for many reads', async () => {
    await put('role', Buffer.from('x'));
    await withSts(granted, async (asked) => {
      const { reader, counted } = openReader();
      const from = await source({ credentials: undefined, roleArn });
      await reader.head(from, 'role');
      await reader.head(from, 'role');
      assert.equal(asked.length, 1);
      const { form, authorization } = asked[0]!;
      assert.equal(form.get('Action'), 'AssumeRole');
      assert.equal(form.get('RoleArn'), roleArn);
      assert.equal(form.get('ExternalId'), 'acousticsense:acme');
      assert.equal(form.get('RoleSessionName'), 'acousticsense-acme');
      assert.match(authorization, new RegExp(`Credential=${process.env['AWS_ACCESS_KEY_ID']}/`));
      assert.ok(proxy.seen.every(({ headers }) => headers['x-amz-security-token'] === 'session'));
      assert.equal((await counted())['HEAD'], 2, 'the service of roles is no source');
    });
  });

  test("a role with credentials is assumed with them, and the caller's external id", async () => {
    await put('role', Buffer.from('x'));
    await withSts(granted, async (asked) => {
      const credentials = { accessKeyId: 'AKIATENANT', secretAccessKey: 'secret' };
      const from = await source({ credentials, roleArn, externalId: 'mine' });
      await openReader().reader.head(from, 'role');
      assert.match(asked[0]!.authorization, /Credential=AKIATENANT\//);
      assert.equal(asked[0]!.form.get('ExternalId'), 'mine');
    });
  });

  test('a role that may not be assumed is source_forbidden, and no request goes to the bucket', async () => {
    const denied = () =>
      [
        403,
        '<ErrorResponse><Error><Code>AccessDenied</Code><Message>not authorized to perform sts:AssumeRole</Message></Error></ErrorResponse>',
      ] as [number, string];
    await withSts(denied, async (asked) => {
      const from = await source({ credentials: undefined, roleArn });
      await assert.rejects(
        openReader().reader.head(from, 'role'),
        problem('source_forbidden', /cannot be assumed.*AccessDenied.*external id/),
      );
      assert.equal(asked.length, 1);
      assert.equal(proxy.seen.length, 0);
    });
  });

  test('the service of roles is reached through the guard too', async () => {
    await withSts(granted, async (asked) => {
      const guard = createEgressGuard({ allow: `127.0.0.1:${new URL(proxy.endpoint).port}` });
      const from = await source({ credentials: undefined, roleArn });
      await assert.rejects(openReader({ guard }).reader.head(from, 'role'), problem('source_not_allowed'));
      assert.equal(asked.length, 0);
      await guard.close();
    });
  });
});

const external = process.env['S3_TEST_URL'];
test('the server of S3_TEST_URL is read as the others are', {
  skip: !external && 'S3_TEST_URL is not set',
}, async (t) => {
  const url = new URL(external!);
  const endpoint = url.searchParams.get('endpoint')!;
  const credentials = {
    accessKeyId: process.env['AWS_ACCESS_KEY_ID']!,
    secretAccessKey: process.env['AWS_SECRET_ACCESS_KEY']!,
  };
  const region = url.searchParams.get('region') ?? 'us-east-1';
  const client = new S3Client({ endpoint, region, forcePathStyle: true, credentials: { ...credentials } });
  const bucket = `as-sources-${randomBytes(4).toString('hex')}`;
  await client.send(new CreateBucketCommand({ Bucket: bucket }));
  const store = (Key: string, Body: Buffer) =>
    client.send(new PutObjectCommand({ Bucket: bucket, Key, Body }));
  const from = await source({ bucket, endpoint, region, credentials });
  const { reader } = openReader({
    guard: createEgressGuard({ allow: new URL(endpoint).host }),
    limits: { ...quick, rangeBytes: 1_000 },
  });
  const bytes = randomBytes(2_500);
  const { ETag } = await store('a/ü +%.mp3', bytes);
  const got = await reader.download(from, { key: 'a/ü +%.mp3', etag: ETag!, size: 2_500 }, file, options);
  assert.equal(got.sha256, sha256(bytes));
  assert.equal((await reader.head(from, 'a/ü +%.mp3')).etag, ETag!.replaceAll('"', ''));
  await store('a/ü +%.mp3', randomBytes(2_500));
  await assert.rejects(
    reader.download(from, { key: 'a/ü +%.mp3', etag: ETag! }, file, options),
    problem('source_changed'),
  );
  await assert.rejects(reader.head(from, 'none'), problem('source_not_found'));
  await store('empty', Buffer.alloc(0));
  await assert.rejects(reader.download(from, { key: 'empty' }, file, options), problem('empty_file'));
  for (let n = 0; n < 1_200; n += 40) {
    await Promise.all(Array.from({ length: 40 }, (_, m) => store(`many/${n + m} +é`, Buffer.from('x'))));
  }
  const pages = await Array.fromAsync(reader.list(from, 'many/'));
  assert.deepEqual(
    pages.map((page) => page.length),
    [1_000, 200],
  );
  const keys = pages.flat().map(({ key }) => key);
  assert.equal(new Set(keys).size, 1_200);
  assert.ok(keys.every((key) => /^many\/\d+ \+é$/.test(key)));
  const versioned = await client
    .send(new PutBucketVersioningCommand({ Bucket: bucket, VersioningConfiguration: { Status: 'Enabled' } }))
    .then(
      () => true,
      (error) => {
        if (error.name !== 'VersioningNotConfigured') throw error;
        return false;
      },
    );
  if (!versioned) return t.diagnostic('this server keeps no versions');
  const { VersionId: first } = await store('versions', Buffer.from('first'));
  await store('versions', Buffer.from('second'));
  const old = await reader.download(from, { key: 'versions', versionId: first! }, file, options);
  assert.deepEqual([old.sha256, old.versionId], [sha256(Buffer.from('first')), first]);
  const { VersionId: marker } = await client.send(
    new DeleteObjectCommand({ Bucket: bucket, Key: 'versions' }),
  );
  await assert.rejects(reader.head(from, 'versions'), problem('source_not_found'));
  await assert.rejects(
    reader.download(from, { key: 'versions', versionId: marker! }, file, options),
    problem('source_not_found'),
  );
  assert.equal((await reader.head(from, 'versions', first!)).size, 5);
  client.destroy();
});
