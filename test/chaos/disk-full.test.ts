/** Promise: on a full disk nothing is lost; when there is room again, what waited goes on by itself. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { openStorage } from '../../packages/shared/src/open-storage.ts';
import { isOver } from './catalogue.ts';
import { openStorm, shortTracks, until } from './storm.ts';

/** A file system of its own, in memory. @returns undefined when this user may not mount. */
function mountSmall(size: string): { directory: string; unmount(): void } | undefined {
  const parent = mkdtempSync(path.join(tmpdir(), 'as-disk-'));
  const directory = path.join(parent, 'mounted');
  mkdirSync(directory);
  const { status } = spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${size}`, 'tmpfs', directory], {
    stdio: 'ignore',
  });
  if (status !== 0) {
    rmSync(parent, { recursive: true });
    return undefined;
  }
  return {
    directory,
    unmount() {
      execFileSync('umount', ['-l', directory]);
      rmSync(parent, { recursive: true, force: true });
    },
  };
}

/** So many, one at a time, that most of them still wait when the disk is full. */
const many = { tracks: shortTracks(60), env: { DECODE_CONCURRENCY: '1' } };

const tried = mountSmall('1m');
tried?.unmount();

describe('a batch survives a full disk', { skip: tried === undefined && 'only root may mount' }, () => {
  let disk: NonNullable<typeof tried>;
  before(() => {
    disk = mountSmall('60m')!;
  });
  after(() => disk?.unmount());

  test('of the storage', async () => {
    const storageUrl = pathToFileURL(path.join(disk.directory, 'objects')).href;
    await using storm = await openStorm({
      storageUrl,
      storage: () => openStorage(storageUrl),
      ...many,
    });
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    await until('some rows are answered', async () => (await caller.read(id)).counts.completed > 3);
    const ballast = path.join(disk.directory, 'ballast');
    await writeFile(ballast, Buffer.alloc(100 << 20)).catch((error) => assert.equal(error.code, 'ENOSPC'));
    await sleep(5_000);
    assert.ok(!isOver(await caller.read(id)), 'nobody could write its results');
    await rm(ballast);
    await storm.assertUnharmed(caller, id);
  });

  test("of the decoder's scratch files", async () => {
    const scratch = path.join(disk.directory, 'scratch');
    await using storm = await openStorm({ env: { SCRATCH_DIR: scratch, ...many.env }, tracks: many.tracks });
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    await until('some rows are answered', async () => (await caller.read(id)).counts.completed > 3);
    const ballast = path.join(disk.directory, 'ballast');
    await writeFile(ballast, Buffer.alloc(100 << 20)).catch((error) => assert.equal(error.code, 'ENOSPC'));
    await sleep(5_000);
    assert.ok(!isOver(await caller.read(id)), 'nobody could decode its files');
    await rm(ballast);
    await storm.assertUnharmed(caller, id);
  });
});
