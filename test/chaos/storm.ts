/**
 * A system with a catalogue of short tracks, and what it answers in peace: every test of a promise sends the same
 * manifest as another tenant (who shares no tensor, no answer and no upload), does harm, and compares.
 */
import assert from 'node:assert/strict';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { createBatchRecords } from '../../packages/shared/src/batch-records.ts';
import { openStorage } from '../../packages/shared/src/open-storage.ts';
import type { Storage } from '../../packages/shared/src/storage.ts';
import { sine, song, wav } from '../audio.ts';
import { childrenOf } from '../processes.ts';
import { type ServiceName, type System, type SystemOptions, startSystem } from '../system.ts';
import {
  type Caller,
  type Catalogue,
  isOver,
  openCaller,
  openCatalogue,
  openEgress,
  type Track,
} from './catalogue.ts';
import { answersOf, differences, type Heard, wrongAfter } from './invariants.ts';

export interface Storm extends AsyncDisposable {
  readonly system: System;
  readonly catalogue: Catalogue;
  /** Whose batch ran in peace. */
  readonly calm: Caller;
  /** What was answered in peace, by ref. */
  readonly expected: ReadonlyMap<string, Heard>;
  answersFor(caller: Caller, batchId: string): Promise<Map<string, Heard>>;
  /** A tenant that nobody was before. */
  newCaller(): Promise<Caller>;
  /** Compares with what was answered in peace, by every row, and looks for anything that is left over. */
  assertUnharmed(caller: Caller, batchId: string): Promise<void>;
  /** The invariants alone: of a batch that was cancelled, or answered otherwise on purpose. */
  assertNothingLeft(caller: Caller, ms?: number): Promise<void>;
}

export interface StormOptions extends SystemOptions {
  readonly tracks?: readonly Track[];
  /** Instead of what is read from the objects in a directory. */
  readonly storage?: () => Storage;
  /** Starts what `without` names, before anything is sent. */
  readonly before?: (system: System) => Promise<void>;
}

/** How long locks, the check for stalled jobs and a sweep of the reconciler may take. */
const sweepMs = 30_000;

export async function openStorm({
  tracks = shortTracks(24),
  env,
  storage: openOwn,
  before,
  ...options
}: StormOptions = {}): Promise<Storm> {
  const catalogue = await openCatalogue(tracks);
  const system = await startSystem({
    ...options,
    env: { ...openEgress, RECONCILE_SECONDS: '0.5', RECONCILE_AFTER_SECONDS: '5', ...env },
  }).catch(async (error) => {
    await catalogue[Symbol.asyncDispose]();
    throw error;
  });
  await before?.(system);
  const storage = openOwn?.() ?? openStorage(pathToFileURL(path.join(system.directory, 'objects')).href);
  const callers: Caller[] = [];

  async function newCaller(): Promise<Caller> {
    const caller = await openCaller(system, catalogue, `tenant-${callers.length}`, storage);
    callers.push(caller);
    return caller;
  }

  async function answersFor(caller: Caller, id: string): Promise<Map<string, Heard>> {
    const batches = createBatchRecords(caller.redis, { resultSeconds: 1 });
    return answersOf(storage, (await batches.get({ tenant: caller.tenant, id }))!);
  }

  async function assertNothingLeft(caller: Caller, ms = sweepMs): Promise<void> {
    const wrong = await wrongAfter(
      ms,
      caller,
      callers.map(({ accepted }) => accepted),
    );
    assert.deepEqual(wrong, []);
  }

  const dispose = async () => {
    for (const caller of callers) await caller[Symbol.asyncDispose]();
    storage.close();
    await system.stop();
    await catalogue[Symbol.asyncDispose]();
  };

  try {
    const calm = await newCaller();
    const { id } = await calm.submit();
    await calm.when(id, isOver);
    const expected = await answersFor(calm, id);
    assert.equal(expected.size, tracks.length);
    return {
      system,
      catalogue,
      calm,
      expected,
      answersFor,
      newCaller,
      assertNothingLeft,
      async assertUnharmed(caller, batchId) {
        await caller.when(batchId, isOver);
        await assertNothingLeft(caller);
        assert.deepEqual(differences(expected, await answersFor(caller, batchId)), []);
      },
      [Symbol.asyncDispose]: dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** Every one another sound; the last two are no music that could be decoded. */
export function shortTracks(count: number): Track[] {
  return Array.from({ length: count }, (_, n): Track => {
    const name = `${n}.wav`;
    const way = n % 5 === 1 ? 'http' : n % 5 === 3 ? 'upload' : 's3';
    const genre = n % 6 === 5 ? {} : { declaredGenre: n % 2 === 0 ? 'Rock' : 'Jazz' };
    if (n >= count - 2) return { name, way, ...genre, audio: Buffer.from(`no audio ${n}\n`.repeat(50)) };
    const sampleRate = 8_000;
    const audio = wav([song({ seconds: 3, sampleRate, seed: n + 1 })], { sampleRate });
    return { name, way, ...genre, audio };
  });
}

/** A tone that never changes. */
export const toneOf = (hz: number) =>
  wav([sine({ seconds: 9, hz, sampleRate: 16_000 })], { sampleRate: 16_000 });

export async function modelProcesses(system: System): Promise<number[]> {
  const children = await childrenOf(system.pid('inference'));
  assert.ok(children.length > 0, 'the inference service has a child');
  return children;
}

/** Stops processes (SIGSTOP) for as long as `during` runs; what has died meanwhile is let be. */
export async function held<T>(pids: readonly number[], during: () => Promise<T>): Promise<T> {
  for (const pid of pids) process.kill(pid, 'SIGSTOP');
  try {
    return await during();
  } finally {
    for (const pid of pids) {
      try {
        process.kill(pid, 'SIGCONT');
      } catch {}
    }
  }
}

/** How many queue jobs of this stage a worker holds now. */
export async function atWork(caller: Caller, stage: 'fetch' | 'decode' | 'inference'): Promise<number> {
  let sum = 0;
  for (const key of await caller.redis.keys(`{as-${stage}*}:*:active`)) sum += await caller.redis.llen(key);
  return sum;
}

export async function until(what: string, holds: () => Promise<boolean>, ms = 30_000): Promise<void> {
  for (const end = Date.now() + ms; Date.now() < end; ) {
    if (await holds()) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`it did not come to this in ${ms} ms: ${what}`);
}

export async function killAndStart(system: System, name: ServiceName): Promise<void> {
  await system.kill(name);
  await system.start(name);
}
