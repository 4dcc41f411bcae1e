/** The fetch stage: a URL -> an audio object in storage -> the job record. The decoder goes on from there. */
import { EgressRefused } from '@acousticsense/egress/guard';
import { audioKey } from '@acousticsense/shared/object-keys';
import type { Queues } from '@acousticsense/shared/queues';
import type { Stage, StageJob } from '@acousticsense/shared/stage';
import type { Counter } from 'prom-client';
import type { Download } from './download.ts';

export interface FetchStageDeps {
  readonly download: Download;
  readonly queues: Pick<Queues, 'add'>;
  readonly fetchedBytes: Pick<Counter, 'inc'>;
}

export function createFetchStage({ download, queues, fetchedBytes }: FetchStageDeps): Stage {
  return {
    async run(job, signal) {
      const { record, log } = job;
      const { audio } = record;
      const begunAt = Date.now();
      const begun = performance.now();
      const fetchWait = Math.max(0, begunAt - record.createdAt);
      // Audio that is stored already needs no fetching.
      if (!('url' in audio)) await job.commit('queued', { timings: { fetchWait } });
      else {
        const key = audioKey(record);
        const { size, sha256, etag } = await download(audio.url, key, signal, throttled(job)).catch(
          (error) => {
            logRefusal(error, log);
            throw error;
          },
        );
        fetchedBytes.inc(size);
        const timings = { fetchWait, fetch: Math.round(performance.now() - begun) };
        log.info({ host: new URL(audio.url).host, size, ms: timings.fetch }, 'fetched');
        await job.commit('queued', { audio: { key, size, sha256, etag, filename: audio.filename }, timings });
      }
      await queues.add('decode', record);
    },

    async handOn({ record }) {
      await queues.add('decode', record);
    },
  };
}

/** Where a name leads inside the operator's network is for the operator alone. */
function logRefusal(error: Error, log: StageJob['log']): void {
  if (!(error.cause instanceof EgressRefused)) return;
  const { host, address, reason } = error.cause;
  log.warn({ host, address, reason }, 'connection refused: EGRESS_ALLOW does not open it');
}

/** At most two signs of progress a second: each is a message to every API process. */
function throttled(job: StageJob): (fraction: number) => void {
  let last = performance.now();
  return (fraction) => {
    if (performance.now() - last < 500) return;
    last = performance.now();
    job.progress(fraction);
  };
}
