/**
 * What can be done with a job: accept, read, cancel, wait. The recipe of `accept` is the first stage of the
 * pipeline: audio to storage, record, queue, answer.
 */
import { randomBytes, randomUUIDv7 } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { type JobRecord, type Timeline, timelineSchema } from '@acousticsense/shared/job';
import { anyOpenState, type JobRecords, refOf } from '@acousticsense/shared/job-records';
import { audioKey, jobPrefix, timelineKey } from '@acousticsense/shared/object-keys';
import { isFinished, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues } from '@acousticsense/shared/queues';
import { knownModel, liveWorkers, type ModelDescription } from '@acousticsense/shared/serving';
import { deletePrefix, ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { z } from 'zod';
import type { Changes } from './changes.ts';
import { type Bind, fingerprintOf } from './idempotency.ts';
import type { Limits } from './limits.ts';
import { hasTimeline, presentJob } from './presentation.ts';
import { type JobResource, jobOptionsSchema } from './schemas.ts';
import { formOverhead, receiveUpload } from './upload.ts';

export interface JobsDeps {
  readonly redis: Redis;
  readonly storage: Storage;
  readonly records: JobRecords;
  readonly queues: Queues;
  readonly changes: Changes;
  readonly log: Logger;
  readonly limits: Limits;
  readonly maxUploadBytes: number;
}

export interface ServedModel {
  readonly description: ModelDescription;
  readonly provider: string;
}

export type Jobs = ReturnType<typeof createJobs>;

export function createJobs(deps: JobsDeps) {
  const { redis, storage, records, queues, changes, log, limits } = deps;

  /**
   * The model that a new job is pinned to: of those that inference and decoder workers serve now, the newest.
   * @param digest the model that is wished for (its first 16 digits suffice), on trial or not.
   * @throws {ProblemError} model_not_served
   */
  async function servedModel(digest?: string): Promise<ServedModel> {
    const workers = await liveWorkers(redis);
    const decoded = new Set(
      workers.filter(({ kind }) => kind === 'decoder').map(({ profileHash }) => profileHash),
    );
    const serving = workers
      .filter(({ kind, profileHash }) => kind === 'inference' && decoded.has(profileHash))
      .filter(({ modelDigest, candidate }) =>
        digest === undefined ? !candidate : digest.length >= 16 && modelDigest.startsWith(digest),
      )
      .sort((a, b) => b.since - a.since)[0];
    const description = serving && (await knownModel(redis, serving.modelDigest));
    if (!description) {
      throw new ProblemError(
        'model_not_served',
        digest === undefined
          ? 'No worker is ready to take jobs at present; try again in a moment.'
          : `No worker serves a model with the digest ${digest.slice(0, 64)}; /v1/model names the one that is served.`,
        { retryAfter: 5 },
      );
    }
    return { description, provider: serving.provider ?? 'unknown' };
  }

  /** @param bind ties the request's Idempotency-Key to the job. @throws {ProblemError} also what `bind` rejects with */
  async function accept(
    request: IncomingMessage,
    tenant: string,
    field: string,
    bind: Bind = async () => {},
  ): Promise<JobRecord> {
    const { description } = await servedModel();
    await limits.refuseWhenFull(tenant);
    const expected = Number(request.headers['content-length'] ?? 0) - formOverhead;
    await limits.foresee(tenant, { rows: 1, bytes: Math.max(0, expected) });
    const id = randomUUIDv7();
    const key = audioKey({ tenant, id });
    const from = performance.now();
    const upload = await receiveUpload(request, { storage, key, field, maxBytes: deps.maxUploadBytes });
    const uploadMs = Math.round(performance.now() - from);
    let creating = false;
    try {
      const options = parseOptions(jobOptionsSchema, upload.fields);
      const { start, duration, topK, explain, vectors } = options;
      refuseWhatModelCannot(options, description);
      const record = {
        id,
        tenant,
        generation: 1,
        createdAt: Date.now(),
        traceparent: traceparentFrom(request),
        modelDigest: description.digest,
        modelName: description.name,
        modelVersion: description.version,
        profileHash: description.profileHash,
        audio: { key, size: upload.size, sha256: upload.sha256, filename: upload.filename },
        selection: {
          windows: options.windows ?? description.windows,
          start,
          ...(duration === undefined ? {} : { duration }),
        },
        presentation: { topK, threshold: options.threshold ?? description.threshold },
        ...(explain || vectors ? { extras: { explain, vectors } } : {}),
        timings: { upload: uploadMs },
      };
      await bind(fingerprintOf({ url: request.url, ...upload }), id);
      await limits.charge(tenant, { rows: 1, bytes: upload.size });
      creating = true;
      await records.create(record);
      // From here on the job is accepted: the reconciler adds what this add could not.
      await soon(queues.add('decode', record)).catch((error) =>
        log.warn({ err: error, jobId: id }, 'not queued yet'),
      );
      log.info(
        { jobId: id, traceId: record.traceparent.split('-')[1], bytes: upload.size, uploadMs },
        'accepted',
      );
      return { ...record, state: 'queued', version: 1, updatedAt: record.createdAt };
    } catch (error) {
      // A Redis that went silent may have made the record: then there is a job, and it needs its audio. The reconciler
      // deletes what belongs to none.
      if (!(creating && error instanceof InfrastructureFault)) await storage.delete(key).catch(() => {});
      throw error;
    }
  }

  /** Reads a request that was answered before, and keeps nothing of it. */
  async function fingerprint(request: IncomingMessage, field: string): Promise<string> {
    const upload = await receiveUpload(request, {
      storage: nowhere,
      key: '',
      field,
      maxBytes: deps.maxUploadBytes,
    });
    return fingerprintOf({ url: request.url, ...upload });
  }

  async function find(tenant: string, id: string): Promise<JobRecord | undefined> {
    return isJobId(id) ? records.get(tenant, id) : undefined;
  }

  /** @throws {ProblemError} job_not_found */
  async function get(tenant: string, id: string): Promise<JobRecord> {
    const record = await find(tenant, id);
    if (!record)
      throw new ProblemError(
        'job_not_found',
        'There is no job with this id; results are deleted after their retention.',
      );
    return record;
  }

  async function present(record: JobRecord): Promise<JobResource> {
    // Only a result needs the model: a job that was just accepted is told even if Redis was lost since.
    const model = record.outcome && (await knownModel(redis, record.modelDigest));
    return presentJob(record, model, hasTimeline(record) ? await readTimeline(record) : undefined);
  }

  /** @returns undefined when it is no longer stored: the answer for the whole is worth telling without it. */
  async function readTimeline(record: JobRecord): Promise<Timeline | undefined> {
    try {
      return timelineSchema.parse(JSON.parse((await storage.read(timelineKey(record))).toString('utf8')));
    } catch (error) {
      if (error instanceof ObjectNotFound) return undefined;
      throw error;
    }
  }

  /**
   * An unfinished job is cancelled and its record stays to say so; a finished one is deleted with all that it
   * left. @returns the cancelled job, or undefined when the job was deleted.
   */
  async function cancelOrDelete(tenant: string, id: string): Promise<JobRecord | undefined> {
    for (;;) {
      const record = await get(tenant, id);
      if (isFinished(record.state)) {
        await deleteObjects(record);
        await records.remove(tenant, id);
        log.info({ jobId: id }, 'deleted');
        return undefined;
      }
      const { outcome } = await records.commit(refOf(record), {
        from: anyOpenState,
        to: 'cancelled',
        events: [{ type: 'job.cancelled' }],
      });
      // It finished, or went back to decode, between the read and the commit: look again.
      if (outcome === 'refused' || outcome === 'missing') continue;
      log.info({ jobId: id, was: record.state }, 'cancelled');
      const stage = stageOf(record.state);
      if (stage) await soon(queues.withdraw(stage, record)).catch(() => {});
      await deleteObjects(record);
      return get(tenant, id);
    }
  }

  /** What a running stage writes after this, it deletes itself when its commit is refused. */
  async function deleteObjects(record: JobRecord): Promise<void> {
    await deletePrefix(storage, jobPrefix(record));
    if (!record.decoded) return;
    // A cache entry that another job on the same audio may want: that one goes back to decode.
    await storage.delete(`${record.decoded.tensorKey}.json`);
    await storage.delete(`${record.decoded.tensorKey}.npy`);
  }

  /** @throws {ProblemError} result_timeout */
  async function waitForEnd(
    tenant: string,
    id: string,
    timeoutMs: number,
    signal: AbortSignal,
  ): Promise<JobRecord> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(timeoutMs)]);
    for await (const record of changes.follow(tenant, id, limit)) {
      if (record !== 'heartbeat' && 'state' in record && isFinished(record.state)) return get(tenant, id);
    }
    throw new ProblemError(
      'result_timeout',
      `The result was not ready within ${Math.round(timeoutMs / 1_000)} s; it will be at /v1/jobs/${id}.`,
      {
        retryAfter: 5,
      },
    );
  }

  return { accept, fingerprint, find, get, present, cancelOrDelete, waitForEnd, servedModel };
}

const nowhere: Pick<Storage, 'put' | 'delete'> = {
  async put(_key, body) {
    for await (const _ of body);
    return '';
  },
  async delete() {},
};

const queuePatienceMs = 1_000;

/** BullMQ waits for a Redis that is away, for as long as that takes; whoever waits for an answer does not. */
async function soon(work: Promise<void>): Promise<void> {
  const stop = new AbortController();
  const late = sleep(queuePatienceMs, undefined, { signal: stop.signal }).then(() => {
    throw new InfrastructureFault('redis', 'the queue did not answer in time');
  });
  try {
    await Promise.race([work, late]);
  } finally {
    stop.abort();
    late.catch(() => {});
  }
}

function isJobId(id: string): boolean {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(id);
}

/** @throws {ProblemError} bad_option, naming the field. */
export function parseOptions<T extends z.ZodType>(schema: T, given: unknown): z.infer<T> {
  const parsed = schema.safeParse(given);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  const field = issue.code === 'unrecognized_keys' ? issue.keys[0]! : String(issue.path[0] ?? '');
  const what = issue.code === 'unrecognized_keys' ? 'is not an option' : issue.message;
  throw new ProblemError('bad_option', `"${field.slice(0, 50)}": ${what}.`, { field: field.slice(0, 50) });
}

/** @throws {ProblemError} model_cannot_explain. Vectors need no such check: every model has logits. */
function refuseWhatModelCannot({ explain }: { explain: boolean }, model: ModelDescription): void {
  if (!explain || model.explains) return;
  throw new ProblemError(
    'model_cannot_explain',
    `The model ${model.name} ${model.version} cannot show what it looked at: send the song without "explain".`,
    { field: 'explain' },
  );
}

/** Goes on with the caller's trace (https://www.w3.org/TR/trace-context/), or begins one. */
function traceparentFrom(request: IncomingMessage): string {
  const given = request.headers['traceparent'];
  const trace =
    typeof given === 'string' ? /^00-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})$/.exec(given) : null;
  return `00-${trace?.[1] ?? randomBytes(16).toString('hex')}-${randomBytes(8).toString('hex')}-${trace?.[2] ?? '01'}`;
}
