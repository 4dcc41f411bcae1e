/** Results of a catalogue are read in a memory that does not grow with it: asked of the kernel, of a process of its own. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { link, mkdtemp, readFile, rm } from 'node:fs/promises';
import { request } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { partKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { startRedis } from '../../../test/redis.ts';
import { description, digest, heard, storeBatch } from './testing/catalogue.ts';

const few = 20;
const chunks = 200;

test('200,000 rows are told to a slow reader in the memory that 20,000 take', async (t) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-results-memory-'));
  const objects = path.join(directory, 'objects');
  const storage = openStorage(pathToFileURL(objects).href);
  await using server = await startRedis();
  const redis = connectRedisForWorker(server.url);
  t.after(async () => {
    redis.disconnect();
    await rm(directory, { recursive: true });
  });
  await redis.set(`as:model:${digest}`, JSON.stringify(description));
  const id = await storeBatch(storage, chunks * 1_000, (row) => ({ outcome: heard('Rap', 0.9), row }), 1);
  for (let chunk = 1; chunk < chunks; chunk += 1)
    await link(path.join(objects, partKey('acme', id, 0)), path.join(objects, partKey('acme', id, chunk)));

  const program = new URL('testing/results-server.ts', import.meta.url).pathname;
  const child = spawn(
    process.execPath,
    [
      '--max-old-space-size=128',
      program,
      server.url,
      pathToFileURL(objects).href,
      path.join(directory, 'index'),
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  t.after(() => child.kill());
  const [line] = (await once(child.stdout, 'data')) as [Buffer];
  const at = `${line.toString().trim()}/v1/batches/${id}`;
  const figure = async (file: string, pattern: RegExp) =>
    Number(pattern.exec(await readFile(`/proc/${child.pid}/${file}`, 'utf8'))![1]);
  const peakMiB = async () => (await figure('status', /VmHWM:\s+(\d+)/)) / 1_024;

  /** Until the process has read nothing for a second: who does not wait for the reader has then read everything. */
  async function rest(): Promise<void> {
    for (let [seen, now] = [-1, 0]; seen !== now; ) {
      await sleep(1_000);
      [seen, now] = [now, await figure('io', /rchar: (\d+)/)];
    }
  }

  async function read(what: string): Promise<{ rows: number; bytes: number }> {
    const [incoming] = await once(request(`${at}/${what}`).end(), 'response');
    await once(incoming, 'readable');
    await rest();
    let [rows, bytes] = [0, 0];
    for await (const chunk of incoming as AsyncIterable<Buffer>) {
      bytes += chunk.length;
      for (const byte of chunk) if (byte === 10) rows += 1;
    }
    return { rows, bytes };
  }

  assert.equal((await read(`results.jsonl?to=${few * 1_000}`)).rows, few * 1_000);
  const before = await peakMiB();
  const { rows, bytes } = await read('results.jsonl');
  assert.equal(rows, chunks * 1_000);
  assert.ok(bytes > 200e6, `${bytes} bytes`);
  assert.equal((await (await fetch(`${at}/audit`)).json()).rows, chunks * 1_000);
  const grown = (await peakMiB()) - before;
  assert.ok(grown < 100, `grew by ${Math.round(grown)} MiB over ${Math.round(before)} MiB`);
  t.diagnostic(`peak ${Math.round(before)} MiB, then ${Math.round(before + grown)} MiB`);
});
