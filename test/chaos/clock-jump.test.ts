/**
 * Promise: a clock that jumps, forwards or back, loses nothing. Of the services: libfaketime moves their wall clock (and
 * that of their children) as NTP or a person would; the monotonic one goes on as ever. Redis keeps its own time.
 */
import { globSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { openStorm, until } from './storm.ts';

const library = globSync('/usr/lib/{*/,}faketime/libfaketime.so.1')[0];

test('a batch survives a clock that jumps two hours ahead, and back again', {
  skip: library === undefined && "Debian's package faketime is not there",
}, async () => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-clock-'));
  const clock = path.join(directory, 'clock');
  await writeFile(clock, '+0');
  try {
    await using storm = await openStorm({
      env: {
        LD_PRELOAD: library!,
        FAKETIME_TIMESTAMP_FILE: clock,
        FAKETIME_NO_CACHE: '1',
        DONT_FAKE_MONOTONIC: '1',
      },
    });
    for (const jump of ['+7200', '-7200']) {
      const caller = await storm.newCaller();
      const { id } = await caller.submit();
      const answered = async (rows: number) =>
        until(`${rows} rows are answered`, async () => (await caller.read(id)).counts.completed >= rows);
      await answered(4);
      await writeFile(clock, jump);
      await answered(16);
      await sleep(1_000);
      await writeFile(clock, '+0');
      await storm.assertUnharmed(caller, id);
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
});
