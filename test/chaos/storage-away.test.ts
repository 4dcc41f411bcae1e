/** Promise: while the object storage is away nothing is lost or answered wrongly; what waits goes on after it. */
import assert from 'node:assert/strict';
import { rename } from 'node:fs/promises';
import { createServer, type Server, type Socket, connect as tcpConnect } from 'node:net';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { openStorage } from '../../packages/shared/src/open-storage.ts';
import { startS3 } from '../s3.ts';
import { isOver } from './catalogue.ts';
import { openStorm, until } from './storm.ts';

/** In front of a server: a port that can be shut, and opened again. */
async function openDoor(target: number) {
  const sockets = new Set<Socket>();
  let server: Server | undefined;
  let port = 0;
  async function open(): Promise<void> {
    server = createServer((socket) => {
      const inner = tcpConnect(target, '127.0.0.1');
      for (const one of [socket, inner]) {
        sockets.add(one);
        one.on('error', () => {});
        one.on('close', () => sockets.delete(one));
      }
      socket.pipe(inner).pipe(socket);
    });
    await new Promise<void>((resolve) => server!.listen(port, '127.0.0.1', resolve));
    port = (server.address() as { port: number }).port;
  }
  async function shut(): Promise<void> {
    const closed = new Promise((resolve) => server?.close(resolve));
    for (const socket of sockets) socket.destroy();
    await closed;
  }
  await open();
  return { open, shut, endpoint: () => `http://127.0.0.1:${port}` };
}

test('a batch survives a bucket that answers 503, and then cannot be reached at all', async () => {
  await using s3 = await startS3('own');
  const door = await openDoor(Number(new URL(s3.endpoint).port));
  const url = (endpoint: string) => `s3://own/some/prefix?endpoint=${endpoint}&region=us-east-1`;
  {
    await using storm = await openStorm({
      storageUrl: url(door.endpoint()),
      storage: () => openStorage(url(s3.endpoint)),
    });
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    await until('some rows are answered', async () => (await caller.read(id)).counts.completed > 3);
    s3.fails = (request) => !request.includes('looks-from-outside');
    await sleep(3_000);
    await door.shut();
    s3.fails = () => false;
    await sleep(5_000);
    const batch = await caller.read(id);
    assert.ok(!isOver(batch), 'nobody could write its results');
    await door.open();
    await storm.assertUnharmed(caller, id);
  }
  await door.shut();
});

test('a batch survives a storage directory that is not there for a while', async () => {
  await using storm = await openStorm();
  const { system } = storm;
  const caller = await storm.newCaller();
  const { id } = await caller.submit();
  await until('some rows are answered', async () => (await caller.read(id)).counts.completed > 3);
  const objects = path.join(system.directory, 'objects');
  await rename(objects, `${objects}.away`);
  await sleep(5_000);
  await rename(`${objects}.away`, objects);
  await storm.assertUnharmed(caller, id);
});
