/**
 * Following jobs as they change: one Redis subscriber for the whole process, any number of followers.
 *
 * A published change is only a hint to read the record. So nothing is lost when a hint is: after a reconnect,
 * and at every heartbeat, each follower reads its record again.
 */
import type { JobRecord } from '@acousticsense/shared/job';
import { changesChannel, type JobRecords, parseJobChange } from '@acousticsense/shared/job-records';
import { isFinished, type JobState } from '@acousticsense/shared/pipeline';
import type { Redis } from 'ioredis';

export interface Progress {
  readonly stage: JobState;
  readonly fraction: number;
}

export interface Changes {
  /**
   * The record now, then at every change (some may be skipped, the last one never), until it is finished, gone,
   * or the signal is aborted. Signs of progress and heartbeats come in between.
   */
  follow(
    tenant: string,
    jobId: string,
    signal: AbortSignal,
  ): AsyncGenerator<JobRecord | Progress | 'heartbeat'>;
  readonly followers: number;
}

interface Follower {
  wake(): void;
  progress: Progress | undefined;
  stale: boolean;
}

export function createChanges(subscriber: Redis, records: JobRecords, heartbeatMs = 15_000): Changes {
  const followers = new Map<string, Set<Follower>>();
  const idOf = (tenant: string, jobId: string) => `${tenant}/${jobId}`;

  subscriber.on('message', (_channel, message) => {
    const change = parseJobChange(message);
    if (change === undefined) return;
    for (const follower of followers.get(idOf(change.tenant, change.jobId)) ?? []) {
      if (change.fraction === undefined) follower.stale = true;
      else follower.progress = { stage: change.state, fraction: change.fraction };
      follower.wake();
    }
  });
  const refreshAll = () => {
    for (const set of followers.values()) {
      for (const follower of set) {
        follower.stale = true;
        follower.wake();
      }
    }
  };
  subscriber.on('ready', refreshAll);
  void subscriber.subscribe(changesChannel).catch(() => {});

  async function* follow(
    tenant: string,
    jobId: string,
    signal: AbortSignal,
  ): AsyncGenerator<JobRecord | Progress | 'heartbeat'> {
    const id = idOf(tenant, jobId);
    let resolveWake = () => {};
    // Registered before the first read, so that no change falls between the two.
    const follower: Follower = { wake: () => resolveWake(), progress: undefined, stale: true };
    const set = followers.get(id) ?? new Set();
    followers.set(id, set.add(follower));
    let lastVersion = 0;
    const onAbort = () => resolveWake();
    signal.addEventListener('abort', onAbort, { once: true });
    try {
      while (!signal.aborted) {
        const woken = new Promise<void>((resolve) => {
          resolveWake = resolve;
        });
        if (follower.stale) {
          follower.stale = false;
          const record = await records.get(tenant, jobId);
          if (record === undefined) return;
          if (record.version > lastVersion) {
            lastVersion = record.version;
            yield record;
          }
          if (isFinished(record.state)) return;
        }
        if (follower.progress) {
          const { progress } = follower;
          follower.progress = undefined;
          yield progress;
        }
        if (follower.stale || follower.progress || signal.aborted) continue;
        // Told by the timer itself: a clock that is set back, or a timer that is early by a fraction of a
        // millisecond, would put off the reading by a whole heartbeat.
        let silent = false;
        const beat = setTimeout(() => {
          silent = true;
          resolveWake();
        }, heartbeatMs);
        await woken;
        clearTimeout(beat);
        if (silent && !signal.aborted) {
          follower.stale = true;
          yield 'heartbeat';
        }
      }
    } finally {
      signal.removeEventListener('abort', onAbort);
      set.delete(follower);
      if (set.size === 0) followers.delete(id);
    }
  }

  return {
    follow,
    get followers() {
      return [...followers.values()].reduce((sum, set) => sum + set.size, 0);
    },
  };
}
