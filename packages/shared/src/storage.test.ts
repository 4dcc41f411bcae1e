/**
 * One contract, every driver. S3 runs against a real server that speaks the protocol: s3rver by default, and
 * whatever S3_TEST_URL names (s3://bucket?endpoint=..., credentials in the usual variables) in addition.
 */
import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { chmod, mkdir, mkdtemp, readdir, rename, rm, rmdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { PassThrough, Readable } from 'node:stream';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { startS3 } from '../../../test/s3.ts';
import { InfrastructureFault, StartupError } from './errors.ts';
import { openStorage } from './open-storage.ts';
import {
  deletePrefix,
  ObjectChanged,
  ObjectNotFound,
  type PresignedUploads,
  type Storage,
  toScratch,
} from './storage.ts';

interface Driver {
  name: string;
  /** @returns the storage's URL, how many unfinished writes lie about, and how to end it. */
  open(): Promise<{ url: string; leftovers?: () => Promise<number>; close(): Promise<void> }>;
}

const drivers: Driver[] = [
  {
    name: 'a directory',
    async open() {
      const directory = await mkdtemp(path.join(tmpdir(), 'as storage ü-'));
      const leftovers = async () => (await readdir(path.join(directory, '.parts')).catch(() => [])).length;
      return {
        url: pathToFileURL(directory).href,
        leftovers,
        close: () => rm(directory, { recursive: true }),
      };
    },
  },
  {
    name: 's3rver',
    async open() {
      const server = await startS3();
      return {
        url: server.url,
        leftovers: server.unfinishedParts,
        close: async () => server[Symbol.asyncDispose](),
      };
    },
  },
];
const external = process.env['S3_TEST_URL'];
if (external)
  drivers.push({
    name: `the server of S3_TEST_URL`,
    open: async () => ({ url: external, close: async () => {} }),
  });

for (const driver of drivers) {
  describe(`storage in ${driver.name}`, () => {
    let storage: Storage;
    let opened: Awaited<ReturnType<Driver['open']>>;
    const root = `contract-${randomUUID()}/`;
    before(async () => {
      opened = await driver.open();
      storage = openStorage(opened.url);
    });
    after(async () => {
      await deletePrefix(storage, root);
      storage.close();
      await opened.close();
    });
    const keysUnder = async (prefix: string) => {
      const keys = [];
      for await (const { key } of storage.list(root + prefix)) keys.push(key.slice(root.length));
      return keys.sort();
    };

    test('what was put is read back, as bytes and as a stream, with its size', async () => {
      const bytes = randomBytes(100_000);
      await storage.put(`${root}a/b`, bytes);
      assert.ok((await storage.read(`${root}a/b`)).equals(bytes));
      assert.ok(Buffer.concat(await (await storage.get(`${root}a/b`)).toArray()).equals(bytes));
      const stat = await storage.stat(`${root}a/b`);
      assert.equal(stat?.size, 100_000);
      assert.ok(Math.abs(stat!.lastModified.getTime() - Date.now()) < 60_000);
    });

    test('a stream of unknown length, larger than one multipart part, arrives whole', async () => {
      const chunk = randomBytes(1 << 20);
      await storage.put(`${root}big`, Readable.from(Array.from({ length: 13 }, () => chunk)));
      assert.equal((await storage.stat(`${root}big`))?.size, 13 << 20);
      assert.ok((await storage.read(`${root}big`)).subarray(12 << 20).equals(chunk));
    });

    test('an empty object is an object', async () => {
      await storage.put(`${root}empty`, Readable.from([]));
      assert.equal((await storage.stat(`${root}empty`))?.size, 0);
      assert.equal((await storage.read(`${root}empty`)).length, 0);
    });

    test('a second put replaces the object', async () => {
      await storage.put(`${root}twice`, Buffer.from('first, and longer'));
      await storage.put(`${root}twice`, Buffer.from('second'));
      assert.equal((await storage.read(`${root}twice`)).toString(), 'second');
    });

    test('the etag of put, stat and list is the same, and another after every put', async () => {
      const seen = new Set<string>();
      for (const content of ['one', 'two', 'one']) {
        const etag = await storage.put(`${root}etag/x`, Buffer.from(content));
        assert.equal((await storage.stat(`${root}etag/x`))?.etag, etag);
        const [listed] = await Array.fromAsync(storage.list(`${root}etag/`));
        assert.equal(listed?.etag, etag);
        seen.add(etag);
      }
      // S3's is made of the content: the same bytes may have the same etag.
      assert.ok(seen.size >= 2);
    });

    test('a conditional read gives the content it asks for, and ObjectChanged once it was replaced', async () => {
      const key = `${root}condition`;
      const ifMatch = await storage.put(key, Buffer.from('the first'));
      assert.equal((await storage.read(key, undefined, { ifMatch })).toString(), 'the first');
      const directory = await mkdtemp(path.join(tmpdir(), 'as-scratch-'));
      const copy = () =>
        toScratch(storage, key, path.join(directory, 'audio'), AbortSignal.timeout(5_000), { ifMatch });
      await copy();
      await storage.put(key, Buffer.from('the other'));
      await assert.rejects(storage.get(key, undefined, { ifMatch }), ObjectChanged);
      await assert.rejects(storage.read(key, undefined, { ifMatch, start: 4 }), ObjectChanged);
      await assert.rejects(storage.read(key, undefined, { ifMatch, start: 1_000 }), ObjectChanged);
      await assert.rejects(copy(), ObjectChanged);
      await storage.delete(key);
      await assert.rejects(storage.read(key, undefined, { ifMatch }), ObjectNotFound);
      await assert.rejects(storage.read(key, undefined, { ifMatch, start: 1_000 }), ObjectNotFound);
      await rm(directory, { recursive: true });
    });

    test('a range is read as subarray would cut it; behind the end there is nothing', async () => {
      const key = `${root}range`;
      const bytes = randomBytes(100_000);
      await storage.put(key, bytes);
      for (const [start, end] of [
        [0, 10],
        [99_990, 200_000],
        [50_000, undefined],
        [70_000, 70_001],
        [100_000, undefined],
        [200_000, 200_001],
      ] as const) {
        const options = { start, ...(end === undefined ? {} : { end }) };
        const read = await storage.read(key, undefined, options);
        assert.ok(read.equals(bytes.subarray(start, end)), `${start} to ${end}: ${read.length} bytes`);
        const stream = await storage.get(key, undefined, options);
        assert.ok(Buffer.concat(await stream.toArray()).equals(read));
      }
      await assert.rejects(storage.read(key, undefined, { start: 5, end: 5 }), RangeError);
    });

    test('a reader that has begun reads on in what it began with, whatever is put meanwhile', {
      skip: driver.name === 's3rver' && 's3rver writes over the file that it serves',
    }, async () => {
      const key = `${root}swap`;
      const bytes = randomBytes(4 << 20);
      await storage.put(key, bytes);
      const stream = await storage.get(key);
      const first = stream[Symbol.asyncIterator]();
      const chunks: Buffer[] = [(await first.next()).value];
      await storage.put(key, randomBytes(4 << 20));
      for (;;) {
        const next = await first.next();
        if (next.done) break;
        chunks.push(next.value);
      }
      assert.ok(Buffer.concat(chunks).equals(bytes));
    });

    test('what is not there: get and read say so, stat is undefined, delete is no error', async () => {
      await assert.rejects(storage.get(`${root}none`), ObjectNotFound);
      await assert.rejects(storage.read(`${root}none`), ObjectNotFound);
      assert.equal(await storage.stat(`${root}none`), undefined);
      await storage.delete(`${root}none`);
    });

    test('a deleted object is gone', async () => {
      await storage.put(`${root}gone`, Buffer.from('x'));
      await storage.delete(`${root}gone`);
      assert.equal(await storage.stat(`${root}gone`), undefined);
    });

    test('a source stream that fails leaves no object, and its own error comes out', async () => {
      const broken = Readable.from(
        (async function* () {
          yield randomBytes(6 << 20);
          throw new Error('the line was cut');
        })(),
      );
      await assert.rejects(storage.put(`${root}broken`, broken), /the line was cut/);
      assert.equal(await storage.stat(`${root}broken`), undefined);
      assert.equal((await opened.leftovers?.()) ?? 0, 0);
    });

    test('a source stream that fails at once leaves no object either', async () => {
      const broken = new PassThrough();
      const put = storage.put(`${root}broken`, broken);
      broken.destroy(new Error('cut before it began'));
      await assert.rejects(put, /cut before it began/);
      assert.equal(await storage.stat(`${root}broken`), undefined);
    });

    test('an aborted put leaves no object', async () => {
      const controller = new AbortController();
      const endless = Readable.from(
        (async function* () {
          for (;;) {
            yield randomBytes(1 << 16);
            await sleep(1);
          }
        })(),
      );
      const put = storage.put(`${root}aborted`, endless, controller.signal);
      setTimeout(() => controller.abort(), 100);
      await assert.rejects(put, { name: 'AbortError' });
      assert.equal(await storage.stat(`${root}aborted`), undefined);
      assert.equal((await opened.leftovers?.()) ?? 0, 0);
    });

    test('list finds exactly the keys that begin with the prefix', async () => {
      for (const key of ['l/1', 'l/2', 'l/sub/3', 'l2/4']) await storage.put(root + key, Buffer.from('x'));
      assert.deepEqual(await keysUnder('l/'), ['l/1', 'l/2', 'l/sub/3']);
      assert.deepEqual(await keysUnder('l'), ['l/1', 'l/2', 'l/sub/3', 'l2/4']);
      assert.deepEqual(await keysUnder('l/s'), ['l/sub/3']);
      assert.deepEqual(await keysUnder('nothing/'), []);
    });

    test('deletePrefix removes all under a prefix and nothing beside it', async () => {
      for (const key of ['d/1', 'd/x/2', 'd2/3']) await storage.put(root + key, Buffer.from('x'));
      assert.equal(await deletePrefix(storage, `${root}d/`), 2);
      assert.deepEqual(await keysUnder('d'), ['d2/3']);
    });

    test('many writers and deleters at once in one prefix do not disturb each other', async () => {
      await Promise.all(
        Array.from({ length: 60 }, async (_, n) => {
          await storage.put(`${root}m/${n % 5}/${n}`, Buffer.from(String(n)));
          if (n % 2) await storage.delete(`${root}m/${n % 5}/${n}`);
        }),
      );
      assert.equal((await keysUnder('m/')).length, 30);
    });

    test('toScratch copies an object into a local file', async () => {
      const directory = await mkdtemp(path.join(tmpdir(), 'as-scratch-'));
      await storage.put(`${root}scratch`, Buffer.from('music'));
      await toScratch(storage, `${root}scratch`, path.join(directory, 'audio'), new AbortController().signal);
      assert.deepEqual(await readdir(directory), ['audio']);
      await rm(directory, { recursive: true });
    });

    test('the probe passes and leaves nothing behind', async () => {
      await storage.probe();
      const left = [];
      for await (const { key } of storage.list('probe/')) left.push(key);
      assert.deepEqual(left, []);
    });
  });
}

for (const driver of drivers.slice(1)) {
  describe(`uploads by others into ${driver.name}`, () => {
    let storage: Storage;
    let presigned: PresignedUploads;
    let opened: Awaited<ReturnType<Driver['open']>>;
    const root = `presigned-${randomUUID()}/`;
    const mebibyte = 1 << 20;
    before(async () => {
      opened = await driver.open();
      storage = openStorage(opened.url);
      presigned = storage.presigned!;
    });
    after(async () => {
      await deletePrefix(storage, root);
      storage.close();
      await opened.close();
    });
    const send = (url: string, body: Uint8Array<ArrayBuffer>) => fetch(url, { method: 'PUT', body });

    test('a signed PUT stores the bytes; its etag is that of the object', async () => {
      const key = `${root}a b/ü+`;
      const bytes = randomBytes(1_000);
      const answer = await send(await presigned.putUrl(key, bytes.length, 60), bytes);
      assert.equal(answer.status, 200, await answer.text());
      assert.equal(answer.headers.get('etag'), (await storage.stat(key))?.etag);
      assert.ok((await storage.read(key)).equals(bytes));
    });

    test('a body of another length than the signed one is refused', {
      skip: driver.name !== 's3rver' && 'some servers for tests do not look at signatures',
    }, async () => {
      const key = `${root}length`;
      for (const size of [999, 1_001]) {
        const answer = await send(await presigned.putUrl(key, 1_000, 60), randomBytes(size));
        assert.equal(answer.status, 403);
        assert.match(await answer.text(), /SignatureDoesNotMatch/);
      }
      assert.equal(await storage.stat(key), undefined);
    });

    test('parts become one object: listed as they arrive, named by their etags', async () => {
      const key = `${root}parts`;
      const parts = [randomBytes(5 * mebibyte), randomBytes(5 * mebibyte), randomBytes(10)];
      const id = await presigned.beginParts(key);
      assert.deepEqual(await Array.fromAsync(presigned.listParts(key, id)), []);
      const stated = [];
      for (const [index, part] of parts.entries()) {
        const url = await presigned.partUrl(key, id, index + 1, part.length, 60);
        const answer = await send(url, part);
        assert.equal(answer.status, 200, await answer.text());
        stated.push({ number: index + 1, etag: answer.headers.get('etag')!, size: part.length });
      }
      assert.deepEqual(await Array.fromAsync(presigned.listParts(key, id)), stated);
      assert.deepEqual(await Array.fromAsync(presigned.listParts(key, id, 2)), stated.slice(2));
      const etag = await presigned.completeParts(key, id, stated);
      assert.equal((await storage.stat(key))?.etag, etag);
      assert.ok((await storage.read(key)).equals(Buffer.concat(parts)));
      await assert.rejects(Array.fromAsync(presigned.listParts(key, id)), ObjectNotFound);
      await presigned.endParts(key, id);
    });

    test('a part that was sent again with other bytes is not taken for the stated one', async () => {
      const key = `${root}again`;
      const id = await presigned.beginParts(key);
      const url = await presigned.partUrl(key, id, 1, 1_000, 60);
      const first = await send(url, randomBytes(1_000));
      await send(url, randomBytes(1_000));
      const stated = [{ number: 1, etag: first.headers.get('etag')! }];
      await assert.rejects(presigned.completeParts(key, id, stated), ObjectChanged);
      await presigned.endParts(key, id);
      await presigned.endParts(key, id);
      assert.equal((await send(url, randomBytes(1_000))).status, 404);
    });

    test('what was begun and never completed is ended, by prefix and by age', async () => {
      const [old, other] = [`${root}old/1`, `${root}other/1`];
      const id = await presigned.beginParts(old);
      const otherId = await presigned.beginParts(other);
      await send(await presigned.partUrl(old, id, 1, 1_000, 60), randomBytes(1_000));
      assert.equal(await storage.abandonParts(`${root}old/`, new Date(Date.now() - 60_000)), 0);
      assert.equal(await storage.abandonParts(`${root}old/`, new Date(Date.now() + 60_000)), 1);
      await assert.rejects(Array.fromAsync(presigned.listParts(old, id)), ObjectNotFound);
      assert.deepEqual(await Array.fromAsync(presigned.listParts(other, otherId)), []);
      await presigned.endParts(other, otherId);
    });

    test('an expired URL is refused', {
      skip: driver.name !== 's3rver' && 'some servers for tests do not look at signatures',
    }, async () => {
      const url = await presigned.putUrl(`${root}late`, 10, 1);
      await sleep(2_100);
      const answer = await send(url, randomBytes(10));
      assert.equal(answer.status, 403);
      assert.match(await answer.text(), /AccessDenied/);
    });

    test('URLs name the public endpoint where there is one', async () => {
      const other = openStorage(
        's3://music?endpoint=http://127.0.0.1:9&region=us-east-1&publicEndpoint=https://s3.example.com',
      );
      assert.match(await other.presigned!.putUrl('x', 1, 60), /^https:\/\/s3\.example\.com\/music\/x\?/);
      other.close();
    });
  });
}

describe('storage that is away or wrongly named', () => {
  test('an S3 server that does not answer is an infrastructure fault', async () => {
    const storage = openStorage('s3://music?endpoint=http://127.0.0.1:9&region=us-east-1');
    await assert.rejects(storage.read('x'), InfrastructureFault);
    await assert.rejects(storage.put('x', Buffer.from('x')), InfrastructureFault);
    await assert.rejects(storage.probe(), InfrastructureFault);
    storage.close();
  });

  test('a bucket that does not exist is an infrastructure fault, not a missing object', async () => {
    const { url, close } = await drivers[1]!.open();
    const storage = openStorage(url.replace('music', 'other'));
    await assert.rejects(storage.read('x'), InfrastructureFault);
    storage.close();
    await close();
  });

  test('a directory that may not be written is an infrastructure fault', {
    skip: process.getuid?.() === 0 && 'root may write everywhere',
  }, async () => {
    const directory = await mkdtemp(path.join(tmpdir(), 'as-ro-'));
    await chmod(directory, 0o500);
    await assert.rejects(
      openStorage(pathToFileURL(directory).href).put('x', Buffer.from('x')),
      InfrastructureFault,
    );
    await rm(directory, { recursive: true });
  });

  test('a path that leaves the directory is refused', async () => {
    const storage = openStorage(pathToFileURL(tmpdir()).href);
    for (const key of ['../x', 'a/../../x', '/x', 'a//b', ''])
      await assert.rejects(storage.put(key, Buffer.from('x')), TypeError, key);
  });

  test('another kind of URL is refused with a sentence', () => {
    for (const url of ['ftp://x/y', 'data', 'file://relative/dir', 's3://'])
      assert.throws(() => openStorage(url), StartupError, url);
  });
});

test('a storage directory that vanishes is away: nothing seems deleted, and nothing is written in its place', async () => {
  const parent = await mkdtemp(path.join(tmpdir(), 'as-storage-away-'));
  const directory = path.join(parent, 'objects');
  const storage = openStorage(pathToFileURL(directory).href);
  const isAway = (error: unknown) => error instanceof InfrastructureFault && error.part === 'storage';
  try {
    await storage.put('a/b', Buffer.from('kept'));
    await rename(directory, `${directory}.away`);
    await assert.rejects(storage.read('a/b'), isAway);
    await assert.rejects(storage.stat('a/b'), isAway);
    await assert.rejects(storage.delete('a/b'), isAway);
    await assert.rejects(storage.put('a/c', Buffer.from('lost')), isAway);
    await assert.rejects(storage.probe(), isAway);
    await assert.rejects(storage.list('a/')[Symbol.asyncIterator]().next(), isAway);
    // Where a disk was mounted an empty directory is left.
    await mkdir(directory);
    await assert.rejects(storage.read('a/b'), isAway);
    await assert.rejects(storage.put('a/c', Buffer.from('lost')), isAway);
    assert.deepEqual(await readdir(directory), []);
    await rmdir(directory);
    await rename(`${directory}.away`, directory);
    assert.equal((await storage.read('a/b')).toString(), 'kept');
    await storage.put('a/c', Buffer.from('new'));
    assert.equal(await storage.stat('a/d'), undefined);
  } finally {
    storage.close();
    await rm(parent, { recursive: true, force: true });
  }
});
