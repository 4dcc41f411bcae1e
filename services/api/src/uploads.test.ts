/** Real HTTP, real Redis, both storages: a directory, and a server that speaks S3's protocol. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, request as httpRequest } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { ProblemError } from '@acousticsense/shared/errors';
import { timeOf, uploadKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedis } from '@acousticsense/shared/redis';
import { ObjectChanged, type Storage } from '@acousticsense/shared/storage';
import { findUpload, readUploadRecord, writeUpload } from '@acousticsense/shared/uploads';
import express from 'express';
import type { Redis } from 'ioredis';
import { pino } from 'pino';
import { startRedis, type TestRedis } from '../../../test/redis.ts';
import { startS3, type TestS3 } from '../../../test/s3.ts';
import { answerProblem } from './app.ts';
import type { UploadPart, UploadResource } from './schemas.ts';
import { createUploadRoutes } from './upload-routes.ts';
import { createUploads, type Uploads } from './uploads.ts';

const mebibyte = 1 << 20;
const hour = 3_600_000;
const log = pino({ level: 'silent' });

let redisServer: TestRedis;
let redis: Redis;
before(async () => {
  redisServer = await startRedis();
  redis = connectRedis(redisServer.url);
  await once(redis, 'ready');
});
after(async () => {
  redis.disconnect();
  await redisServer[Symbol.asyncDispose]();
});

interface Api extends AsyncDisposable {
  readonly url: string;
  readonly uploads: Uploads;
}

/** An API process's part of it; several share a storage. The header `x-tenant` says who calls. */
async function serve(
  storage: Storage,
  options: Partial<Parameters<typeof createUploads>[0]> = {},
): Promise<Api> {
  const uploads = createUploads({
    redis,
    storage,
    log,
    maxUploadBytes: 4_096 * mebibyte,
    uploadExpiryMs: hour,
    audioRetentionMs: hour,
    uploadUrlMs: 60_000,
    charge: async () => {},
    ...options,
  });
  const app = express();
  app.use((request, response, next) => {
    response.locals['tenant'] = request.headers['x-tenant'] ?? 'acme';
    next();
  });
  app.use(createUploadRoutes(uploads, (response) => response.locals['tenant']));
  app.use(answerProblem({ log }));
  const server = createServer(app);
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    uploads,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      server.close();
    },
  };
}

const tus = { 'tus-resumable': '1.0.0' };
const octets = { ...tus, 'content-type': 'application/offset+octet-stream' };

async function create(
  { url }: Api,
  size: number,
  { headers = {} as Record<string, string>, body = undefined as Uint8Array<ArrayBuffer> | undefined } = {},
) {
  return fetch(`${url}/v1/uploads/tus`, {
    method: 'POST',
    headers: { ...tus, 'upload-length': String(size), ...headers },
    ...(body ? { body } : {}),
  });
}

async function begin(api: Api, size: number): Promise<string> {
  const answer = await create(api, size, {
    headers: { 'upload-metadata': `filename ${Buffer.from('dir/Ünder.mp3').toString('base64')}` },
  });
  assert.equal(answer.status, 201, await answer.text());
  const location = answer.headers.get('location')!;
  assert.match(location, /^\/v1\/uploads\/tus\/[0-9a-f-]{36}$/);
  return location.split('/').at(-1)!;
}

const patch = ({ url }: Api, id: string, offset: number, body: Uint8Array<ArrayBuffer>, headers = {}) =>
  fetch(`${url}/v1/uploads/tus/${id}`, {
    method: 'PATCH',
    headers: { ...octets, 'upload-offset': String(offset), ...headers },
    body,
  });

async function offsetOf({ url }: Api, id: string): Promise<number> {
  const head = await fetch(`${url}/v1/uploads/tus/${id}`, { method: 'HEAD', headers: tus });
  assert.equal(head.status, 200);
  return Number(head.headers.get('upload-offset'));
}

/** Announces a whole body, sends a part of it, and then leaves the connection as it is. */
function patchPartly({ url }: Api, id: string, offset: number, body: Uint8Array, announced: number) {
  const request = httpRequest(`${url}/v1/uploads/tus/${id}`, {
    method: 'PATCH',
    headers: { ...octets, 'upload-offset': String(offset), 'content-length': announced },
  });
  request.on('error', () => {});
  request.write(body);
  return request;
}

async function problem(answer: Response, status: number, code: string): Promise<string> {
  const body = (await answer.json()) as { code: string; detail: string };
  assert.deepEqual([answer.status, body.code], [status, code], body.detail);
  return body.detail;
}

async function keysOf(storage: Storage): Promise<string[]> {
  return (await Array.fromAsync(storage.list('uploads/'))).map(({ key }) => key).sort();
}

async function clear(storage: Storage): Promise<void> {
  for (const key of await keysOf(storage)) await storage.delete(key);
}

const external = process.env['S3_TEST_URL'];
for (const kind of ['a directory', 'a bucket', ...(external ? ['the bucket of S3_TEST_URL'] : [])]) {
  describe(`an upload by tus into ${kind}`, () => {
    let storage: Storage;
    let api: Api;
    let s3: TestS3 | undefined;
    let directory: string | undefined;
    let storageUrl: string;
    before(async () => {
      if (kind === 'a bucket') s3 = await startS3();
      if (kind === 'a directory') directory = await mkdtemp(path.join(tmpdir(), 'as-uploads-'));
      storageUrl = s3?.url ?? (directory ? pathToFileURL(directory).href : external!);
      storage = openStorage(storageUrl);
      api = await serve(storage);
    });
    after(async () => {
      await api[Symbol.asyncDispose]();
      storage.close();
      await s3?.[Symbol.asyncDispose]();
      if (directory) await rm(directory, { recursive: true });
    });

    test('that comes in pieces is whole, has a record, and can be found by its tenant', async () => {
      const bytes = randomBytes(13 * mebibyte);
      const id = await begin(api, bytes.length);
      const pieces = [0, 3 * mebibyte, 3 * mebibyte + 10, 9 * mebibyte, bytes.length];
      for (const [index, from] of pieces.slice(0, -1).entries()) {
        const to = pieces[index + 1]!;
        await assert.rejects(findUpload(storage, 'acme', id), { code: 'upload_unfinished' });
        const answer = await patch(api, id, from, bytes.subarray(from, to));
        assert.equal(answer.status, 204, await answer.text());
        assert.equal(answer.headers.get('upload-offset'), String(to));
        assert.equal(await offsetOf(api, id), to);
      }
      const found = await findUpload(storage, 'acme', id);
      assert.equal(found.size, bytes.length);
      assert.equal(found.filename, 'Ünder.mp3');
      const read = await storage.read(found.key, undefined, { ifMatch: found.etag });
      assert.ok(read.equals(bytes));
      const shown = (await (await fetch(`${api.url}/v1/uploads/${id}`)).json()) as UploadResource;
      assert.deepEqual(
        [shown.state, shown.size, shown.etag, shown.by],
        ['finished', bytes.length, found.etag, 'tus'],
      );
    });

    test('may come with its creation', async () => {
      const bytes = randomBytes(1_000);
      const answer = await create(api, bytes.length, { headers: octets, body: bytes });
      assert.equal(answer.status, 201, await answer.text());
      assert.equal(answer.headers.get('upload-offset'), '1000');
      const id = answer.headers.get('location')!.split('/').at(-1)!;
      assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
    });

    test('whose connection is cut goes on where the store is', async () => {
      const bytes = randomBytes(24 * mebibyte);
      const id = await begin(api, bytes.length);
      const cut = patchPartly(api, id, 0, bytes.subarray(0, 14 * mebibyte), bytes.length);
      await sleep(1_000);
      cut.destroy();
      await sleep(300);
      const offset = await offsetOf(api, id);
      assert.ok(offset > 0 && offset <= 14 * mebibyte, `${offset} bytes were kept`);
      const shown = (await (await fetch(`${api.url}/v1/uploads/${id}`)).json()) as UploadResource;
      assert.deepEqual([shown.state, shown.received], ['open', offset]);
      const answer = await patch(api, id, offset, bytes.subarray(offset));
      assert.equal(answer.status, 204, await answer.text());
      assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
    });

    test('whose client comes back through another process, while the old connection is still open, goes on there', async () => {
      await using other = await serve(openStorage(storageUrl));
      const bytes = randomBytes(12 * mebibyte);
      const id = await begin(api, bytes.length);
      const hanging = patchPartly(api, id, 0, bytes.subarray(0, 7 * mebibyte), bytes.length);
      await sleep(500);
      const offset = await offsetOf(other, id);
      assert.ok(offset > 0, 'nothing was kept');
      const answer = await patch(other, id, offset, bytes.subarray(offset));
      assert.equal(answer.status, 204, await answer.text());
      assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
      hanging.destroy();
    });

    test('is complete for whoever is told so, even if the process died before it wrote that down', async () => {
      const bytes = randomBytes(2_000);
      const id = await begin(api, bytes.length);
      const before = await readUploadRecord(storage, 'acme', id);
      assert.equal((await patch(api, id, 0, bytes)).status, 204);
      await writeUpload(storage, 'acme', id, before!);
      await assert.rejects(findUpload(storage, 'acme', id), { code: 'upload_unfinished' });
      assert.equal(await offsetOf(api, id), 2_000);
      assert.equal((await findUpload(storage, 'acme', id)).size, 2_000);
      await writeUpload(storage, 'acme', id, before!);
      assert.equal((await api.uploads.find('acme', id)).size, 2_000);
    });

    test('of another tenant does not exist, whatever is asked of it', async () => {
      const id = await begin(api, 10);
      const asOther = { ...octets, 'x-tenant': 'other' };
      for (const method of ['HEAD', 'DELETE']) {
        const answer = await fetch(`${api.url}/v1/uploads/tus/${id}`, { method, headers: asOther });
        assert.equal(answer.status, 404, method);
      }
      assert.equal((await patch(api, id, 0, randomBytes(10), { 'x-tenant': 'other' })).status, 404);
      for (const method of ['GET', 'DELETE'])
        await problem(
          await fetch(`${api.url}/v1/uploads/${id}`, { method, headers: asOther }),
          404,
          'upload_not_found',
        );
      await assert.rejects(findUpload(storage, 'other', id), { code: 'upload_not_found' });
      assert.equal(await offsetOf(api, id), 0);
    });

    test("is refused in the protocol's own words", async () => {
      const status = async (answer: Promise<Response>) => (await answer).status;
      assert.equal(await status(create(api, 5_000 * mebibyte)), 413);
      assert.equal(await status(create(api, 0)), 400);
      const deferred = { ...tus, 'upload-defer-length': '1' };
      const at = `${api.url}/v1/uploads/tus`;
      assert.equal(await status(fetch(at, { method: 'POST', headers: deferred })), 501);
      assert.equal(await status(fetch(at, { method: 'POST', headers: { 'upload-length': '5' } })), 412);
      const id = await begin(api, 100);
      assert.equal(await status(patch(api, id, 5, randomBytes(10))), 409);
      assert.equal(await status(patch(api, id, 0, randomBytes(101))), 413);
      assert.equal(await offsetOf(api, id), 0);
      for (const unknown of [crypto.randomUUID(), 'x', '..%2f..%2fx', id.replace(/.$/, 'g')])
        assert.equal(await status(fetch(`${at}/${unknown}`, { method: 'HEAD', headers: tus })), 404);
      await problem(await fetch(`${at}/${id}`), 405, 'method_not_allowed');
      const options = await fetch(at, { method: 'OPTIONS' });
      assert.equal(
        options.headers.get('tus-extension'),
        'creation,creation-with-upload,termination,expiration',
      );
      assert.equal(options.headers.get('tus-max-size'), String(4_096 * mebibyte));
      assert.equal(options.headers.get('access-control-allow-origin'), null);
    });

    test('that the quota has no room for is refused before its first byte', async () => {
      await using full = await serve(storage, {
        async charge() {
          throw new ProblemError('quota_exceeded', 'No more today.');
        },
      });
      const before = await keysOf(storage);
      const answer = await create(full, 10);
      assert.equal(answer.status, 429);
      assert.equal(await answer.text(), 'No more today.\n');
      assert.deepEqual(await keysOf(storage), before);
    });

    test('that is deleted leaves nothing, finished or not', async () => {
      await clear(storage);
      for (const how of [`/v1/uploads/tus/`, `/v1/uploads/`]) {
        const open = await begin(api, 8 * mebibyte);
        await patch(api, open, 0, randomBytes(7 * mebibyte));
        const finished = await begin(api, 10);
        await patch(api, finished, 0, randomBytes(10));
        for (const id of [open, finished]) {
          const answer = await fetch(`${api.url}${how}${id}`, { method: 'DELETE', headers: tus });
          assert.equal(answer.status, 204, await answer.text());
          const head = await fetch(`${api.url}/v1/uploads/tus/${id}`, { method: 'HEAD', headers: tus });
          assert.equal(head.status, 404);
        }
      }
      assert.deepEqual(await keysOf(storage), []);
      assert.equal((await s3?.unfinishedParts()) ?? 0, 0);
    });

    test('expires: unfinished after its time, finished after its retention; the sweep leaves nothing of either', async () => {
      await clear(storage);
      await using brief = await serve(storage, { uploadExpiryMs: 1_000, audioRetentionMs: 2_500 });
      const open = await begin(brief, 8 * mebibyte);
      const partly = await patch(brief, open, 0, randomBytes(7 * mebibyte));
      assert.ok(Date.parse(partly.headers.get('upload-expires')!) > Date.now() - 1_000);
      const finished = await begin(brief, 10);
      await patch(brief, finished, 0, randomBytes(10));
      const orphan = uploadKey(
        'acme',
        open.replace(/.$/, (c) => (c === '0' ? '1' : '0')),
      );
      await storage.put(orphan, Buffer.from('left by a signed URL'));
      await sleep(1_500);
      const head = (id: string) =>
        fetch(`${brief.url}/v1/uploads/tus/${id}`, { method: 'HEAD', headers: tus });
      assert.equal((await head(open)).status, 404);
      assert.equal((await patch(brief, open, 7 * mebibyte, randomBytes(10))).status, 404);
      assert.equal((await findUpload(storage, 'acme', finished)).size, 10);

      const time = Math.floor(Date.now() / hour) * hour;
      await brief.uploads.sweepHour(time, Date.now());
      assert.ok((await keysOf(storage)).every((key) => key.includes(finished)));
      assert.equal((await findUpload(storage, 'acme', finished)).size, 10);
      assert.equal(await storage.stat(orphan), undefined);
      await sleep(1_500);
      await assert.rejects(findUpload(storage, 'acme', finished), { code: 'upload_not_found' });
      assert.equal((await brief.uploads.sweepHour(time, Date.now())).again, undefined);
      assert.deepEqual(await keysOf(storage), []);
      await brief.uploads.sweepHour(time, time + hour + 1_000_000);
      assert.equal((await s3?.unfinishedParts()) ?? 0, 0);
    });

    test('that stays when its hour is looked through says when to come back, damaged too', async () => {
      await clear(storage);
      const time = Math.floor(Date.now() / hour) * hour;
      assert.equal((await api.uploads.sweepHour(time, time + 2 * hour)).again, undefined);
      const id = await begin(api, 10);
      await patch(api, id, 0, randomBytes(10));
      const { expiresAt } = (await readUploadRecord(storage, 'acme', id))!;
      assert.equal((await api.uploads.sweepHour(time, expiresAt - 1)).again, expiresAt);
      await storage.put(`${uploadKey('acme', id)}.json`, Buffer.from('{'));
      const { again } = await api.uploads.sweepHour(time, time + hour);
      assert.equal(again, timeOf(id).getTime() + 2 * hour);
      await api.uploads.sweepHour(time, again!);
      assert.deepEqual(await keysOf(storage), []);
    });

    test('leaves no lock behind', async () => {
      assert.deepEqual(await redis.keys('as:*upload-lock*'), []);
    });

    if (kind === 'a bucket') {
      test('whose parts all came, and were not put together before a death, is complete for whoever asks', async () => {
        const bytes = randomBytes(9 * mebibyte);
        const id = await begin(api, bytes.length);
        s3!.fails = (request) => /^POST .*uploadId=/.test(request);
        assert.equal((await patch(api, id, 0, bytes)).status, 503);
        s3!.fails = () => false;
        await assert.rejects(findUpload(storage, 'acme', id), { code: 'upload_unfinished' });
        assert.equal(await offsetOf(api, id), bytes.length);
        assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
      });

      test('loses nothing that it was told has come, however small the pieces and however they are cut', async () => {
        const bytes = randomBytes(12 * mebibyte);
        const id = await begin(api, bytes.length);
        let offset = 0;
        for (const piece of [1_000, 2 * mebibyte, 3 * mebibyte]) {
          assert.equal((await patch(api, id, offset, bytes.subarray(offset, offset + piece))).status, 204);
          offset += piece;
          const cut = patchPartly(api, id, offset, bytes.subarray(offset, offset + 500_000), 6 * mebibyte);
          await sleep(300);
          cut.destroy();
          await sleep(100);
          const kept = await offsetOf(api, id);
          assert.ok(kept > offset && kept <= offset + 500_000, `${kept} of ${offset + 500_000} were kept`);
          offset = kept;
        }
        // As a death leaves it after a part is sent and before what it replaces is deleted.
        await storage.put(`${uploadKey('acme', id)}.0.part`, randomBytes(1_000));
        assert.equal(await offsetOf(api, id), offset);
        // A part that cannot be sent takes nothing with it.
        s3!.fails = (request) => /^PUT .*partNumber=/.test(request);
        assert.ok((await patch(api, id, offset, bytes.subarray(offset))).status >= 500);
        s3!.fails = () => false;
        assert.equal(await offsetOf(api, id), offset);
        assert.equal((await patch(api, id, offset, bytes.subarray(offset))).status, 204);
        assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
      });

      test('whose storage is away for a while is not called unknown', async () => {
        const id = await begin(api, 10);
        s3!.fails = (request) => request.includes(`${id}.info`);
        const head = await fetch(`${api.url}/v1/uploads/tus/${id}`, { method: 'HEAD', headers: tus });
        assert.equal(head.status, 503);
        s3!.fails = () => false;
        assert.equal(await offsetOf(api, id), 0);
      });

      test('of which one part fails while later bytes are there already has no gap', async () => {
        const bytes = randomBytes(30 * mebibyte);
        const id = await begin(api, bytes.length);
        s3!.fails = (request) => /^PUT .*partNumber=2&/.test(request);
        assert.ok((await patch(api, id, 0, bytes)).status >= 500);
        s3!.fails = () => false;
        const offset = await offsetOf(api, id);
        assert.equal(offset, 5 * mebibyte);
        assert.equal((await patch(api, id, offset, bytes.subarray(offset))).status, 204);
        assert.ok((await storage.read((await findUpload(storage, 'acme', id)).key)).equals(bytes));
      });
    }
  });
}

describe('an upload by signed URLs', () => {
  let storage: Storage;
  let api: Api;
  let s3: TestS3;
  before(async () => {
    s3 = await startS3();
    storage = openStorage(s3.url);
    api = await serve(storage);
  });
  after(async () => {
    await api[Symbol.asyncDispose]();
    storage.close();
    await s3[Symbol.asyncDispose]();
  });

  const post = (at: string, body: unknown, headers = {}) =>
    fetch(`${api.url}${at}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers },
      body: JSON.stringify(body),
    });
  async function beginSigned(body: object): Promise<UploadResource & { parts: UploadPart[] }> {
    const answer = await post('/v1/uploads', body);
    const upload = (await answer.json()) as UploadResource & { parts: UploadPart[] };
    assert.equal(answer.status, 201, JSON.stringify(upload));
    assert.equal(answer.headers.get('location'), `/v1/uploads/${upload.id}`);
    return upload;
  }
  async function put({ url }: UploadPart, body: Uint8Array<ArrayBuffer>): Promise<string> {
    const answer = await fetch(url, { method: 'PUT', body });
    assert.equal(answer.status, 200, await answer.text());
    return answer.headers.get('etag')!;
  }
  /** Sends all parts. @returns what to complete with. */
  async function send(parts: UploadPart[], bytes: Buffer<ArrayBuffer>) {
    let from = 0;
    const stated = [];
    for (const part of parts) {
      stated.push({ number: part.number, etag: await put(part, bytes.subarray(from, from + part.size)) });
      from += part.size;
    }
    assert.equal(from, bytes.length);
    return { parts: stated };
  }

  test('is one PUT when it is small', async () => {
    const bytes = randomBytes(1_000);
    const upload = await beginSigned({ size: 1_000, filename: 'a/b.mp3' });
    assert.deepEqual([upload.state, upload.parts.length, upload.filename], ['open', 1, 'b.mp3']);
    await problem(
      await post(upload.links.complete!, { parts: [{ number: 1, etag: 'x' }] }),
      409,
      'upload_unfinished',
    );
    const stated = await send(upload.parts, bytes);
    const answer = await post(upload.links.complete!, stated);
    const finished = (await answer.json()) as UploadResource;
    assert.deepEqual([answer.status, finished.state, finished.size], [200, 'finished', 1_000]);
    const found = await findUpload(storage, 'acme', upload.id);
    assert.equal(found.etag, stated.parts[0]!.etag);
    assert.ok((await storage.read(found.key)).equals(bytes));
    await problem(await fetch(`${api.url}${upload.links.parts}`), 409, 'upload_finished');
  });

  test('is several PUTs when it is large, and completing it again answers the same', async () => {
    const bytes = randomBytes(12 * mebibyte + 5);
    const upload = await beginSigned({ size: bytes.length, parts: 2 });
    assert.deepEqual(
      upload.parts.map(({ size }) => size),
      [6 * mebibyte + 3, 6 * mebibyte + 2],
    );
    const stated = await send(upload.parts, bytes);
    stated.parts.reverse();
    const answers = await Promise.all([
      post(upload.links.complete!, stated),
      post(upload.links.complete!, stated),
    ]);
    const bodies = await Promise.all(answers.map((answer) => answer.json()));
    assert.deepEqual(
      answers.map(({ status }) => status),
      [200, 200],
      JSON.stringify(bodies),
    );
    assert.deepEqual(bodies[0], bodies[1]);
    assert.ok((await storage.read((await findUpload(storage, 'acme', upload.id)).key)).equals(bytes));
  });

  test('that was put together by a process that died before it said so is completed by asking again', async () => {
    const bytes = randomBytes(11 * mebibyte);
    const upload = await beginSigned({ size: bytes.length, parts: 2 });
    const record = await readUploadRecord(storage, 'acme', upload.id);
    const stated = await send(upload.parts, bytes);
    await post(upload.links.complete!, stated);
    await writeUpload(storage, 'acme', upload.id, record!);
    assert.equal((await post(upload.links.complete!, stated)).status, 200);
    assert.equal((await findUpload(storage, 'acme', upload.id)).size, bytes.length);
  });

  test('tells after a cut which parts have come, with new URLs for the others', async () => {
    const upload = await beginSigned({ size: 15 * mebibyte, parts: 3 });
    const etag = await put(upload.parts[1]!, randomBytes(5 * mebibyte));
    const { parts } = (await (await fetch(`${api.url}${upload.links.parts}`)).json()) as {
      parts: UploadPart[];
    };
    assert.deepEqual(
      parts.map((part) => part.etag),
      [undefined, etag, undefined],
    );
    await put(parts[2]!, randomBytes(5 * mebibyte));
    const detail = await problem(
      await post(upload.links.complete!, { parts: [1, 2, 3].map((number) => ({ number, etag: 'x' })) }),
      409,
      'upload_unfinished',
    );
    assert.match(detail, /part 1 /);
  });

  test('gives the URLs of many parts page by page', async () => {
    const upload = await beginSigned({ size: 2_048 * mebibyte, parts: 250 });
    const numbers = upload.parts.map(({ number }) => number);
    let next = upload.links.next;
    while (next !== undefined) {
      const body = (await (await fetch(`${api.url}${next}`)).json()) as {
        parts: UploadPart[];
        links: { next?: string };
      };
      assert.ok(body.parts.length <= 100);
      numbers.push(...body.parts.map(({ number }) => number));
      next = body.links.next;
    }
    assert.deepEqual(
      numbers,
      Array.from({ length: 250 }, (_, n) => n + 1),
    );
  });

  test('with a part that was sent again with other bytes is not completed with the first ETag', async () => {
    const bytes = randomBytes(10 * mebibyte);
    const upload = await beginSigned({ size: bytes.length, parts: 2 });
    const stated = await send(upload.parts, bytes);
    await put(upload.parts[1]!, randomBytes(5 * mebibyte));
    const detail = await problem(await post(upload.links.complete!, stated), 409, 'upload_mismatch');
    assert.match(detail, /Part 2/);
    // What was meant is sent once more.
    stated.parts[1]!.etag = await put(upload.parts[1]!, bytes.subarray(5 * mebibyte));
    assert.equal((await post(upload.links.complete!, stated)).status, 200);
    assert.ok((await storage.read((await findUpload(storage, 'acme', upload.id)).key)).equals(bytes));
  });

  test('as one PUT that was used twice is not completed with the first ETag; used after that, it changes the object', async () => {
    const upload = await beginSigned({ size: 1_000 });
    const first = await put(upload.parts[0]!, randomBytes(1_000));
    const second = await put(upload.parts[0]!, randomBytes(1_000));
    const complete = (etag: string) => post(upload.links.complete!, { parts: [{ number: 1, etag }] });
    await problem(await complete(first), 409, 'upload_mismatch');
    assert.equal((await complete(second.replaceAll('"', ''))).status, 200);
    await put(upload.parts[0]!, randomBytes(1_000));
    const { key, etag } = await findUpload(storage, 'acme', upload.id);
    await assert.rejects(storage.read(key, undefined, { ifMatch: etag }), ObjectChanged);
  });

  test('of another size than announced is refused by the store, and by us should the store take it', async () => {
    const upload = await beginSigned({ size: 1_000 });
    for (const size of [999, 1_001]) {
      const answer = await fetch(upload.parts[0]!.url, { method: 'PUT', body: randomBytes(size) });
      assert.equal(answer.status, 403);
    }
    const etag = await storage.put(uploadKey('acme', upload.id), randomBytes(999));
    const detail = await problem(
      await post(upload.links.complete!, { parts: [{ number: 1, etag }] }),
      409,
      'upload_mismatch',
    );
    assert.match(detail, /1000 bytes were announced and 999/);
  });

  test('by an expired URL is refused; new URLs can be asked for', async () => {
    await using brief = await serve(storage, { uploadUrlMs: 4_000 });
    const answer = await fetch(`${brief.url}/v1/uploads`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ size: 10 }),
    });
    const upload = (await answer.json()) as UploadResource & { parts: UploadPart[] };
    await sleep(5_100);
    const late = await fetch(upload.parts[0]!.url, { method: 'PUT', body: randomBytes(10) });
    assert.equal(late.status, 403);
    const again = await fetch(`${brief.url}${upload.links.parts}`);
    const { parts } = (await again.json()) as { parts: UploadPart[] };
    await put(parts[0]!, randomBytes(10));
  });

  test('of another tenant, of no tenant, or after its time does not exist', async () => {
    const upload = await beginSigned({ size: 10 });
    const asOther = { 'x-tenant': 'other' };
    const stated = { parts: [{ number: 1, etag: 'x' }] };
    await problem(await post(upload.links.complete!, stated, asOther), 404, 'upload_not_found');
    await problem(
      await fetch(`${api.url}${upload.links.parts}`, { headers: asOther }),
      404,
      'upload_not_found',
    );
    await problem(await post(`/v1/uploads/${crypto.randomUUID()}/complete`, stated), 404, 'upload_not_found');
    const record = await readUploadRecord(storage, 'acme', upload.id);
    await writeUpload(storage, 'acme', upload.id, { ...record!, expiresAt: Date.now() });
    await problem(await post(upload.links.complete!, stated), 404, 'upload_not_found');
  });

  test('is refused with the field that is wrong', async () => {
    for (const body of [{ size: 0 }, { size: 1.5 }, { size: 6 * mebibyte, parts: 2 }, { size: 1, x: 1 }, {}])
      await problem(await post('/v1/uploads', body), 400, 'bad_option');
    await problem(await post('/v1/uploads', { size: 5_000 * mebibyte }), 413, 'file_too_large');
    const form = await fetch(`${api.url}/v1/uploads`, { method: 'POST', body: 'size=1' });
    await problem(form, 415, 'wrong_content_type');
    const broken = { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{' };
    await problem(await fetch(`${api.url}/v1/uploads`, broken), 400, 'bad_request');
    const upload = await beginSigned({ size: 10 * mebibyte, parts: 2 });
    for (const numbers of [[1], [1, 1], [1, 3], [1, 2, 3]]) {
      const parts = numbers.map((number) => ({ number, etag: 'x' }));
      await problem(await post(upload.links.complete!, { parts }), 400, 'bad_option');
    }
    const byTus = await begin(api, 10);
    await problem(
      await post(`/v1/uploads/${byTus}/complete`, { parts: [{ number: 1, etag: 'x' }] }),
      400,
      'bad_request',
    );
  });

  test('that is deleted leaves no parts', async () => {
    const upload = await beginSigned({ size: 10 * mebibyte, parts: 2 });
    await put(upload.parts[0]!, randomBytes(5 * mebibyte));
    const before = await s3.unfinishedParts();
    const answer = await fetch(`${api.url}${upload.links.self}`, { method: 'DELETE' });
    assert.equal(answer.status, 204);
    assert.equal(before - (await s3.unfinishedParts()), 5 * mebibyte);
    await problem(await fetch(`${api.url}${upload.links.self}`), 404, 'upload_not_found');
  });

  test('into a directory is refused with the way that works there', async () => {
    const directory = await mkdtemp(path.join(tmpdir(), 'as-uploads-'));
    await using other = await serve(openStorage(pathToFileURL(directory).href));
    const answer = await fetch(`${other.url}/v1/uploads`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ size: 10 }),
    });
    assert.match(await problem(answer, 400, 'presigned_not_served'), /\/v1\/uploads\/tus/);
    await rm(directory, { recursive: true });
  });
});
