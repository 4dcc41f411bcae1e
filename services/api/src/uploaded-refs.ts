/**
 * Which uploads came under a ref: the rows of batches are found by the index of known answers, uploads by a short list
 * in Redis, which ends with their records.
 */
import { hash128 } from '@acousticsense/shared/answer-key';
import type { BatchRecords } from '@acousticsense/shared/batch-records';
import { withRedis } from '@acousticsense/shared/redis';
import type { Redis } from 'ioredis';

export interface UploadedRefsDeps {
  readonly redis: Redis;
  readonly batches: Pick<BatchRecords, 'nextRevision'>;
  readonly retention: { readonly resultSeconds: number };
}

export interface UploadedRefs {
  /**
   * Before the job is made: a pointer that leads nowhere does no harm.
   * @returns the revision of the job's result.
   */
  claim(tenant: string, ref: string, jobId: string): Promise<number>;
  /** The newest ones, of which some may have no record any more. */
  jobsOf(tenant: string, ref: string): Promise<string[]>;
}

const day = 24 * 3_600;
/** While the newest is under way, the one before it has the latest result. */
const kept = 4;
const keyOf = (tenant: string, ref: string) => `as:{${tenant}}:ref:${hash128(ref)}`;

export function createUploadedRefs({ redis, batches, retention }: UploadedRefsDeps): UploadedRefs {
  return {
    async claim(tenant, ref, jobId) {
      const revision = await batches.nextRevision(tenant);
      const key = keyOf(tenant, ref);
      const steps = redis
        .multi()
        .lpush(key, jobId)
        .ltrim(key, 0, kept - 1)
        // A record's own time begins later, with the end of its job.
        .expire(key, retention.resultSeconds + day);
      await withRedis(() => steps.exec());
      return revision;
    },
    jobsOf: (tenant, ref) => withRedis(() => redis.lrange(keyOf(tenant, ref), 0, -1)),
  };
}
