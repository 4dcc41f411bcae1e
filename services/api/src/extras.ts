/** What the inference stage stores beside a result when the job asks for it. */
import { ProblemError } from '@acousticsense/shared/errors';
import type { JobRecord } from '@acousticsense/shared/job';
import { explanationKey, type JobPlace, vectorsKey } from '@acousticsense/shared/object-keys';
import { isFinished } from '@acousticsense/shared/pipeline';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';

/** Names of links and of addresses under a job. */
export const extras = ['explanation', 'vectors'] as const;
export type Extra = (typeof extras)[number];

const kinds = {
  explanation: { option: 'explain', keyOf: explanationKey, code: 'no_explanation' },
  vectors: { option: 'vectors', keyOf: vectorsKey, code: 'no_vectors' },
} as const;

export function isAskedFor(record: Pick<JobRecord, 'extras'>, extra: Extra): boolean {
  return record.extras?.[kinds[extra].option] ?? false;
}

/**
 * @returns JSON as stored: `explanationSchema` or `vectorsSchema`.
 * @throws {ProblemError} job_not_finished, no_explanation, no_vectors
 */
export async function readExtra(
  storage: Pick<Storage, 'read'>,
  record: JobPlace & Pick<JobRecord, 'state' | 'extras'>,
  extra: Extra,
): Promise<Buffer> {
  const { option, keyOf, code } = kinds[extra];
  if (!isAskedFor(record, extra)) {
    throw new ProblemError(
      code,
      `This job was sent without ${option}=true, so it has no ${extra}: send the song again with it.`,
    );
  }
  if (!isFinished(record.state)) {
    throw new ProblemError(
      'job_not_finished',
      `The job is ${record.state}; its ${extra} can be had from the state "completed" on.`,
      { retryAfter: 1 },
    );
  }
  if (record.state !== 'completed')
    throw new ProblemError(code, `The job ended as ${record.state}, so it has no ${extra}.`);
  return storage.read(keyOf(record)).catch((error) => {
    throw error instanceof ObjectNotFound
      ? new ProblemError(
          code,
          `There is no ${extra} of this job: the storage no longer holds it, or the model could not give it.`,
        )
      : error;
  });
}
