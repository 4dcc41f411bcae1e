/** A job as the decoder leaves it: tensor in storage, record in `decoded`, queue job added. */
import { randomBytes, randomUUIDv7 } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Bundle } from '@acousticsense/shared/bundle';
import type { JobRecord } from '@acousticsense/shared/job';
import type { JobRecords } from '@acousticsense/shared/job-records';
import { isFinished } from '@acousticsense/shared/pipeline';
import type { Queues } from '@acousticsense/shared/queues';
import type { Storage } from '@acousticsense/shared/storage';
import { npyHeader } from '@acousticsense/shared/tensor';

export const tenant = 'acme';

export interface DecodedJob {
  readonly id: string;
  readonly tensorKey: string;
}

/** @param windows `null` stands for a silent window. */
export async function addDecodedJob(
  { records, queues, storage }: { records: JobRecords; queues: Queues; storage: Storage },
  bundle: Bundle,
  windows: readonly (Uint8Array | null)[],
  { withTensor = true, extras }: { withTensor?: boolean; extras?: JobRecord['extras'] } = {},
): Promise<DecodedJob> {
  const { melBands, windowFrames } = bundle.manifest.profile;
  const id = randomUUIDv7();
  const tensorKey = `tensors/${tenant}/${id}`;
  const job = {
    id,
    tenant,
    generation: 1,
    createdAt: Date.now(),
    traceparent: `00-${randomBytes(16).toString('hex')}-${randomBytes(8).toString('hex')}-01`,
    modelDigest: bundle.digest,
    modelName: bundle.manifest.name,
    modelVersion: bundle.manifest.version,
    profileHash: bundle.profileHash,
    audio: { key: 'audio', size: 1, sha256: '', filename: 'song.wav' },
    selection: { windows: 'all' as const, start: 0 },
    presentation: { topK: 5, threshold: 0.5 },
    ...(extras ? { extras } : {}),
  };
  if (withTensor) {
    const silence = new Uint8Array(melBands * windowFrames);
    const header = npyHeader([windows.length, melBands, windowFrames]);
    await storage.put(
      `${tensorKey}.npy`,
      Buffer.concat([header, ...windows.map((window) => window ?? silence)]),
    );
  }
  const ref = { tenant, jobId: id, generation: 1 };
  await records.create(job);
  await records.commit(ref, { from: ['queued'], to: 'decoding' });
  await records.commit(ref, {
    from: ['decoding'],
    to: 'decoded',
    set: {
      timings: { decode: 1 },
      decoded: {
        contentId: 'content',
        tensorKey,
        windows: windows.map((window, i) => ({
          start: i,
          end: i + 1,
          validFrames: windowFrames,
          dbAt0: -70,
          dbAt255: 0,
          peakDbfs: window ? -1 : -80,
          silent: window === null,
        })),
        input: {
          container: 'wav',
          codec: 'pcm_s16le',
          sampleRate: 8_000,
          channels: 1,
          duration: windows.length,
          analysedStart: 0,
          analysedEnd: windows.length,
          bandwidth: 4_000,
        },
        warnings: [],
      },
    },
  });
  await queues.add('inference', job);
  return { id, tensorKey };
}

/** @returns the record once `done` says so of it; by default, once the job is finished. */
export async function settled(
  records: JobRecords,
  { id }: DecodedJob,
  done: (record: JobRecord) => boolean = ({ state }) => isFinished(state),
): Promise<JobRecord> {
  let record: JobRecord | undefined;
  for (const end = Date.now() + 20_000; Date.now() < end; await sleep(20)) {
    record = await records.get(tenant, id);
    if (record && done(record)) return record;
  }
  throw new Error(`the job is still ${record?.state}`);
}
