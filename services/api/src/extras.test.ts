import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { ProblemError } from '@acousticsense/shared/errors';
import type { JobRecord } from '@acousticsense/shared/job';
import { explanationKey, vectorsKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { acceptedJob } from '../../../test/job.ts';
import { extras, readExtra } from './extras.ts';

const record = (state: JobRecord['state'], asked = true): JobRecord => ({
  ...acceptedJob({ tenant: 'acme', ...(asked ? { extras: { explain: true, vectors: true } } : {}) }),
  state,
  version: 1,
  updatedAt: Date.now(),
});

test('explanation and vectors come as stored; why there are none is told apart', async (t) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-extras-'));
  t.after(() => rm(directory, { recursive: true }));
  const storage = openStorage(pathToFileURL(directory).href);
  const refusal = async (job: JobRecord, extra: (typeof extras)[number]) => {
    const error = await readExtra(storage, job, extra).then(
      () => undefined,
      (thrown) => thrown,
    );
    assert.ok(error instanceof ProblemError, String(error));
    return error;
  };

  for (const extra of extras) {
    const code = `no_${extra}`;
    const field = extra === 'explanation' ? 'explain' : 'vectors';
    const done = record('completed');
    const gone = await refusal(done, extra);
    await storage.put(
      (extra === 'vectors' ? vectorsKey : explanationKey)({ tenant: 'acme', id: done.id }),
      Buffer.from(extra),
    );
    assert.equal((await readExtra(storage, done, extra)).toString(), extra);

    const notAsked = await refusal(record('completed', false), extra);
    assert.match(notAsked.message, new RegExp(`${field}=true`));
    const failed = await refusal(record('failed'), extra);
    assert.match(failed.message, /ended as failed/);
    const none = [gone, notAsked, failed];
    assert.deepEqual(
      none.map((error) => [error.code, error.status]),
      none.map(() => [code, 404]),
    );
    assert.equal(new Set(none.map(({ message }) => message)).size, 3);

    for (const state of ['queued', 'decoding', 'decoded', 'classifying'] as const) {
      const early = await refusal(record(state), extra);
      assert.deepEqual([early.code, early.status, early.details.retryAfter], ['job_not_finished', 409, 1]);
    }
    // Waiting would never help.
    assert.equal((await refusal(record('queued', false), extra)).code, code);
  }
});
