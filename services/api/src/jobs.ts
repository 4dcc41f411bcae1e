/**
 * What can be done with a job: accept, read, cancel, wait. The recipe of `accept` is the first stage of the
 * pipeline: audio to storage, record, queue, answer.
 */
import { createHash, randomBytes, randomUUIDv7 } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { jobData } from '@acousticsense/shared/events';
import { type JobRecord, type StoredAudio, type Timeline, timelineSchema } from '@acousticsense/shared/job';
import { anyOpenState, type JobRecords, refOf } from '@acousticsense/shared/job-records';
import { audioKey, jobPrefix, timelineKey } from '@acousticsense/shared/object-keys';
import { isFinished, stageOf } from '@acousticsense/shared/pipeline';
import type { Queues } from '@acousticsense/shared/queues';
import { knownModel, liveWorkers, type ModelDescription } from '@acousticsense/shared/serving';
import { deletePrefix, ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import type { Redis } from 'ioredis';
import type { Logger } from 'pino';
import type { z } from 'zod';
import type { CallbackFor } from './callbacks.ts';
import type { Changes } from './changes.ts';
import { type Bind, fingerprintOf } from './idempotency.ts';
import type { Charge, Limits } from './limits.ts';
import { hasTimeline, presentJob } from './presentation.ts';
import { type JobResource, jobOptionsSchema, jobRequestSchema } from './schemas.ts';
import { displayName, formOverhead, receiveUpload } from './upload.ts';
import type { UploadedRefs } from './uploaded-refs.ts';
import type { Uploads } from './uploads.ts';

export interface JobsDeps {
  readonly redis: Redis;
  readonly storage: Storage;
  readonly records: JobRecords;
  readonly queues: Queues;
  readonly changes: Changes;
  readonly log: Logger;
  readonly limits: Limits;
  readonly uploads: Pick<Uploads, 'find'>;
  readonly uploadedRefs: Pick<UploadedRefs, 'claim'>;
  readonly callbackFor: CallbackFor;
  readonly maxUploadBytes: number;
}

/** A request for a job that is let in. */
interface Accepted {
  readonly id: string;
  readonly tenant: string;
  readonly description: ModelDescription;
  readonly bind: Bind;
}

export interface ServedModel {
  readonly description: ModelDescription;
  readonly provider: string;
}

export type Jobs = ReturnType<typeof createJobs>;

export function createJobs(deps: JobsDeps) {
  const { redis, storage, records, queues, changes, log, limits, uploadedRefs } = deps;

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

  /**
   * Makes a job of the audio in a form, or of an upload that the request names in JSON.
   * @param field of the form, that holds the audio.
   * @param bind ties the request's Idempotency-Key to the job.
   * @throws {ProblemError} also what `bind` rejects with
   */
  async function accept(
    request: IncomingMessage,
    tenant: string,
    field: string,
    bind: Bind = async () => {},
  ): Promise<JobRecord> {
    const { description } = await servedModel();
    await limits.refuseWhenFull(tenant);
    const id = randomUUIDv7();
    return isJson(request)
      ? acceptUpload(request, { id, tenant, description, bind })
      : acceptForm(request, field, { id, tenant, description, bind });
  }

  async function acceptForm(request: IncomingMessage, field: string, accepted: Accepted): Promise<JobRecord> {
    const expected = Number(request.headers['content-length'] ?? 0) - formOverhead;
    await limits.foresee(accepted.tenant, { rows: 1, bytes: Math.max(0, expected) });
    const key = audioKey(accepted);
    const from = performance.now();
    const { fields, ...audio } = await receiveUpload(request, {
      ...{ storage, key, field, maxBytes: deps.maxUploadBytes },
    });
    const upload = Math.round(performance.now() - from);
    return make(request, accepted, {
      fingerprint: fingerprintOf({ url: request.url, fields, sha256: audio.sha256 }),
      options: () => parseOptions(jobOptionsSchema, fields),
      audio: { key, ...audio },
      charge: { rows: 1, bytes: audio.size },
      timings: { upload },
      undo: () => storage.delete(key),
    });
  }

  /** The bytes are there, counted when they were announced; they are read where they lie. */
  async function acceptUpload(request: IncomingMessage, accepted: Accepted): Promise<JobRecord> {
    const { value, sha256 } = await readJson(request);
    const { upload, filename, ...options } = parseOptions(jobRequestSchema, value);
    const audio = await deps.uploads.find(accepted.tenant, upload);
    return make(request, accepted, {
      fingerprint: fingerprintOf({ url: request.url, sha256 }),
      options: () => options,
      audio: { ...audio, ...(filename === undefined ? {} : { filename: displayName(filename) }) },
      charge: { rows: 1 },
      timings: {},
      undo: async () => {},
    });
  }

  async function make(
    request: IncomingMessage,
    { id, tenant, description, bind }: Accepted,
    sent: {
      readonly fingerprint: string;
      readonly options: () => z.infer<typeof jobOptionsSchema>;
      readonly audio: StoredAudio;
      readonly charge: Charge;
      readonly timings: NonNullable<JobRecord['timings']>;
      readonly undo: () => Promise<void>;
    },
  ): Promise<JobRecord> {
    let creating = false;
    try {
      const options = sent.options();
      const { start, duration, topK, explain, vectors, ref, callbackUrl } = options;
      refuseWhatModelCannot(options, description);
      const callback = callbackUrl === undefined ? undefined : await deps.callbackFor(tenant, callbackUrl);
      const made = {
        id,
        tenant,
        generation: 1,
        createdAt: Date.now(),
        traceparent: traceparentFrom(request),
        modelDigest: description.digest,
        modelName: description.name,
        modelVersion: description.version,
        profileHash: description.profileHash,
        audio: sent.audio,
        selection: {
          windows: options.windows ?? description.windows,
          start,
          ...(duration === undefined ? {} : { duration }),
        },
        presentation: { topK, threshold: options.threshold ?? description.threshold },
        ...(callback ? { callback } : {}),
        ...(explain || vectors ? { extras: { explain, vectors } } : {}),
        timings: sent.timings,
      };
      await bind(sent.fingerprint, id);
      await limits.charge(tenant, sent.charge);
      const record =
        ref === undefined ? made : { ...made, ref, revision: await uploadedRefs.claim(tenant, ref, id) };
      creating = true;
      await records.create(record);
      // From here on the job is accepted: the reconciler adds what this add could not.
      await soon(queues.add('decode', record)).catch((error) =>
        log.warn({ err: error, jobId: id }, 'not queued yet'),
      );
      log.info(
        {
          ...{ jobId: id, traceId: record.traceparent.split('-')[1] },
          ...{ bytes: sent.audio.size, uploadMs: sent.timings.upload },
        },
        'accepted',
      );
      return { ...record, state: 'queued', version: 1, updatedAt: record.createdAt };
    } catch (error) {
      // A Redis that went silent may have made the record: then there is a job, and it needs its audio. The reconciler
      // deletes what belongs to none.
      if (!(creating && error instanceof InfrastructureFault)) await sent.undo().catch(() => {});
      throw error;
    }
  }

  /** Reads a request that was answered before, and keeps nothing of it. */
  async function fingerprint(request: IncomingMessage, field: string): Promise<string> {
    if (isJson(request)) return fingerprintOf({ url: request.url, ...(await readJson(request)) });
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
   * @throws {ProblemError} batch_state: a row's result is the batch's, which writes it when its chunk has ended.
   */
  async function cancelOrDelete(tenant: string, id: string): Promise<JobRecord | undefined> {
    for (;;) {
      const record = await get(tenant, id);
      if (isFinished(record.state)) {
        if (record.batch) {
          throw new ProblemError(
            'batch_state',
            `This job is a row of the batch ${record.batch.id}: its result is deleted with the batch.`,
          );
        }
        await deleteObjects(record);
        await records.remove(tenant, id);
        log.info({ jobId: id }, 'deleted');
        return undefined;
      }
      const { outcome } = await records.commit(refOf(record), {
        from: anyOpenState,
        to: 'cancelled',
        events: [{ type: 'job.cancelled', data: jobData(record, 'cancelled') }],
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

const maxJsonBytes = 64 * 1024;

function isJson(request: IncomingMessage): boolean {
  return /^application\/json\s*(;|$)/i.test(request.headers['content-type'] ?? '');
}

/** @throws {ProblemError} bad_request, upload_cut */
async function readJson(request: IncomingMessage): Promise<{ value: unknown; sha256: string }> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  try {
    // Not ended early: whoever answers the refusal reads the rest away.
    for await (const chunk of request.iterator({ destroyOnReturn: false })) {
      bytes += chunk.length;
      if (bytes > maxJsonBytes) throw new ProblemError('bad_request', 'A job in JSON holds 64 KiB at most.');
      chunks.push(chunk);
    }
  } catch (error) {
    if (error instanceof ProblemError) throw error;
    throw new ProblemError('upload_cut', 'The connection ended before the request was complete.', {}, error);
  }
  const text = Buffer.concat(chunks);
  try {
    return {
      value: JSON.parse(text.toString('utf8')),
      sha256: createHash('sha256').update(text).digest('hex'),
    };
  } catch (error) {
    throw new ProblemError('bad_request', 'The body is not JSON.', {}, error);
  }
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
