import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { type AddressInfo, connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { openStorage } from '@acousticsense/shared/open-storage';
import type { Storage } from '@acousticsense/shared/storage';
import { displayName, receiveUpload, type Upload } from './upload.ts';

test('a file name is shown without path and control characters, and never empty', () => {
  for (const [given, shown] of [
    ['song.mp3', 'song.mp3'],
    ['../../etc/passwd', 'passwd'],
    ['C:\\Users\\me\\song.mp3', 'song.mp3'],
    ['a\u0000b\u001b[31m.mp3', 'a b [31m.mp3'],
    ['left\u202eright.mp3', 'left right.mp3'],
    ['🎷.mp3', '🎷.mp3'],
    [`${'😀'.repeat(300)}`, '😀'.repeat(255)],
    ['', 'unnamed'],
    ['/', 'unnamed'],
    ['..', 'unnamed'],
    ['half\ud800.mp3', 'half\ufffd.mp3'],
    [undefined, 'unnamed'],
  ] as const) {
    assert.equal(displayName(given), shown);
  }
});

describe('an upload', () => {
  let server: Server;
  let directory: string;
  let storage: Storage;
  /** How long a request waits before its body is read: as one does that asks Redis first. */
  let hesitateMs = 0;
  let received: Promise<Upload>[] = [];

  before(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'as-upload-'));
    storage = openStorage(pathToFileURL(directory).href);
    server = createServer(async (request, response) => {
      if (hesitateMs > 0) await sleep(hesitateMs);
      const upload = receiveUpload(request, { storage, key: 'audio', field: 'file', maxBytes: 1 << 20 });
      received.push(upload);
      await upload.catch(() => {});
      response.end();
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
  });
  beforeEach(() => {
    hesitateMs = 0;
    received = [];
  });
  after(async () => {
    server.closeAllConnections();
    server.close();
    await rm(directory, { recursive: true });
  });

  const part = (disposition: string, body: string) =>
    `--b\r\nContent-Disposition: form-data; ${disposition}\r\n\r\n${body}\r\n`;
  const file = part('name="file"; filename="a.mp3"', 'abc');

  /** Sends a request as it is; `missing` bytes are announced and never come. */
  function send(body: string, { contentType = 'multipart/form-data; boundary=b', missing = 0 } = {}): Socket {
    const { port } = server.address() as AddressInfo;
    const socket = connect(port, '127.0.0.1');
    const length = Buffer.byteLength(body) + missing;
    socket.write(
      `POST / HTTP/1.1\r\nHost: x\r\nContent-Type: ${contentType}\r\nContent-Length: ${length}\r\n\r\n${body}`,
    );
    return socket;
  }
  async function outcomeOf(socket: Socket): Promise<Upload | { code: string; message: string }> {
    for (let n = 0; n < 200 && received.length === 0; n += 1) await sleep(10);
    const outcome = received[0]!.catch((error) => ({ code: error.code, message: error.message }));
    const late = sleep(2_000, undefined, { ref: false }).then(() => ({ code: 'no end', message: '' }));
    return Promise.race([outcome, late]).finally(() => socket.destroy());
  }
  async function assertCode(socket: Socket, code: string, message = /./): Promise<void> {
    const outcome = await outcomeOf(socket);
    assert.ok('code' in outcome, JSON.stringify(outcome));
    assert.equal(outcome.code, code);
    assert.match(outcome.message, message);
    assert.deepEqual(await Array.fromAsync(storage.list('')), []);
  }

  test('whose caller went away before its body was read ends as upload_cut', async () => {
    hesitateMs = 200;
    const socket = send(file, { missing: 1_000 });
    await sleep(50);
    socket.destroy();
    await assertCode(socket, 'upload_cut');
  });

  test('that is cut in the middle of the file is upload_cut', async () => {
    const socket = send(file.slice(0, -2), { missing: 1_000 });
    await sleep(100);
    socket.destroy();
    await assertCode(socket, 'upload_cut');
  });

  test('in a part without a name is told that the name is missing', async () => {
    await assertCode(send(`${part('filename="a.mp3"', 'abc')}--b--\r\n`), 'no_file', /"file"/);
  });

  test('with a content type whose boundary cannot be found is wrong_content_type', async () => {
    await assertCode(
      send(file, { contentType: 'multipart/form-data; x=boundary=b' }),
      'wrong_content_type',
      /oundary/,
    );
  });

  test('with more fields than any form of ours is refused, not read in part', async () => {
    const fields = Array.from({ length: 21 }, (_, n) => part(`name="f${n}"`, '1')).join('');
    await assertCode(send(`${fields}${file}--b--\r\n`), 'bad_request', /fields/);
  });

  test('hands on every field under its own name, __proto__ too', async () => {
    const outcome = await outcomeOf(send(`${part('name="__proto__"', '1')}${file}--b--\r\n`));
    assert.ok('fields' in outcome);
    assert.deepEqual(Object.entries(outcome.fields), [['__proto__', '1']]);
    await storage.delete('audio');
  });
});
