/** A job that was just accepted, for tests of what happens to records. */
import { randomUUIDv7 } from 'node:crypto';
import type { JobRecord } from '../packages/shared/src/job.ts';

export type AcceptedJob = Omit<JobRecord, 'version' | 'updatedAt' | 'state'>;

export function acceptedJob(overrides: Partial<AcceptedJob> & Pick<AcceptedJob, 'tenant'>): AcceptedJob {
  return {
    id: randomUUIDv7(),
    generation: 1,
    createdAt: Date.now(),
    traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`,
    modelDigest: 'd'.repeat(64),
    modelName: 'm',
    modelVersion: '1',
    profileHash: 'p'.repeat(16),
    audio: { key: 'k', size: 1, sha256: 's', filename: 'f' },
    selection: { windows: 'middle', start: 0 },
    presentation: { topK: 5, threshold: 0.5 },
    ...overrides,
  };
}
