/** The system that runs on this machine, as it tells others. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { Failure } from './failure.ts';

export interface RunningSystem {
  readonly redisUrl?: string;
  /** Of its API; absent until it is ready. */
  readonly url?: string;
}

/** @returns what `run.json` tells while a system runs on the directory; nothing when none does. */
export function runningSystem(dataDir: string): RunningSystem {
  try {
    return JSON.parse(readFileSync(path.join(dataDir, 'run.json'), 'utf8')) as RunningSystem;
  } catch {
    return {};
  }
}

/** @param otherwise what else the user can give. */
export function noSystem(dataDir: string, otherwise: string): Failure {
  return new Failure(`No AcousticSense runs on ${dataDir}: start it, or ${otherwise}.`);
}
