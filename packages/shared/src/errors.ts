/**
 * Every failure that has a name.
 *
 * A {@link ProblemError} is a failure somebody can act on: it carries a stable `code`, becomes RFC 9457
 * problem+json at the API and the `error` of a failed job. An {@link InfrastructureFault} says that a part
 * of the system was away; it is nobody's input's fault, spends no attempt, and never reaches a caller as the
 * job's outcome. Anything else that is thrown is a bug and is reported as `internal_error`.
 */

interface ProblemKind {
  readonly status: number;
  readonly title: string;
  /** Whether the same request, unchanged, can succeed later. */
  readonly retryable: boolean;
}

const kinds = {
  // The request
  bad_option: { status: 400, title: 'An option has a value that cannot be used', retryable: false },
  bad_request: { status: 400, title: 'The request could not be read', retryable: false },
  model_cannot_explain: { status: 400, title: 'This model cannot explain its answers', retryable: false },
  callback_not_allowed: {
    status: 400,
    title: 'This callback URL lies under no endpoint that is enabled',
    retryable: false,
  },
  no_file: { status: 400, title: 'No audio file was sent', retryable: false },
  too_many_files: { status: 400, title: 'More than one file was sent', retryable: false },
  presigned_not_served: { status: 400, title: 'This storage takes no signed uploads', retryable: false },
  upload_cut: { status: 400, title: 'The upload ended before it was complete', retryable: true },
  unauthorized: { status: 401, title: 'An API key is needed', retryable: false },
  host_not_allowed: { status: 403, title: 'This host name is not served', retryable: false },
  not_found: { status: 404, title: 'There is nothing at this address', retryable: false },
  tenant_not_found: { status: 404, title: 'No such tenant', retryable: false },
  batch_not_found: { status: 404, title: 'No such batch', retryable: false },
  mapping_not_found: { status: 404, title: 'No such mapping', retryable: false },
  result_not_found: { status: 404, title: 'No such result', retryable: false },
  job_not_found: { status: 404, title: 'No such job', retryable: false },
  endpoint_not_found: { status: 404, title: 'No such endpoint', retryable: false },
  event_not_found: { status: 404, title: 'No such event', retryable: false },
  no_spectrogram: { status: 404, title: 'This job has no spectrogram', retryable: false },
  no_explanation: { status: 404, title: 'This job has no explanation', retryable: false },
  no_vectors: { status: 404, title: 'This job has no vectors', retryable: false },
  method_not_allowed: { status: 405, title: 'This method is not served here', retryable: false },
  upload_not_found: { status: 404, title: 'No such upload', retryable: false },
  upload_unfinished: { status: 409, title: 'The upload is not complete yet', retryable: true },
  upload_finished: { status: 409, title: 'The upload is complete already', retryable: false },
  upload_mismatch: { status: 409, title: 'What was sent is not what was stated', retryable: false },
  batch_state: {
    status: 409,
    title: 'The batch is in a state in which this cannot be done',
    retryable: false,
  },
  endpoint_exists: {
    status: 409,
    title: 'An endpoint with this URL is registered already',
    retryable: false,
  },
  endpoint_unverified: {
    status: 409,
    title: 'The endpoint has not proven yet whose it is',
    retryable: false,
  },
  too_many_endpoints: { status: 409, title: 'No further endpoint can be registered', retryable: false },
  too_many_replays: { status: 409, title: 'Too many ranges are being told again', retryable: true },
  job_not_finished: { status: 409, title: 'The job has not got that far yet', retryable: true },
  idempotency_in_flight: {
    status: 409,
    title: 'A request with this Idempotency-Key is still under way',
    retryable: true,
  },
  idempotency_key_reused: {
    status: 422,
    title: 'This Idempotency-Key came with another request before',
    retryable: false,
  },
  rate_limited: { status: 429, title: 'Too many requests', retryable: true },
  quota_exceeded: { status: 429, title: 'A daily quota is used up', retryable: true },
  file_too_large: { status: 413, title: 'The file is larger than this service takes', retryable: false },
  wrong_content_type: { status: 415, title: 'The request has the wrong content type', retryable: false },
  manifest_invalid: { status: 422, title: 'The manifest cannot be read', retryable: false },
  manifest_too_large: {
    status: 413,
    title: 'The manifest is larger than this service takes',
    retryable: false,
  },
  mapping_invalid: { status: 422, title: 'The mapping to house genres cannot be used', retryable: false },
  // The audio
  empty_file: { status: 422, title: 'The file is empty', retryable: false },
  not_audio: { status: 422, title: 'The file is not audio that can be read', retryable: false },
  unsupported_format: { status: 415, title: 'This container or codec is not supported', retryable: false },
  no_audio_stream: { status: 422, title: 'The file holds no audio stream', retryable: false },
  audio_too_short: {
    status: 422,
    title: 'The audio is too short to say anything about it',
    retryable: false,
  },
  audio_too_long: { status: 422, title: 'The audio is longer than this service takes', retryable: false },
  range_outside_audio: { status: 422, title: 'The asked range lies outside the audio', retryable: false },
  decode_failed: { status: 422, title: 'The audio could not be decoded', retryable: false },
  decode_timeout: { status: 422, title: 'Decoding took longer than this file may take', retryable: false },
  // URLs
  url_not_allowed: { status: 422, title: 'This URL is not called', retryable: false },
  url_not_found: { status: 422, title: 'There is nothing at this URL', retryable: false },
  url_forbidden: { status: 422, title: 'The server of this URL refused to be read', retryable: false },
  too_many_redirects: { status: 422, title: 'This URL leads from one to another', retryable: false },
  fetch_failed: { status: 502, title: 'The URL could not be read at present', retryable: true },
  fetch_timeout: { status: 504, title: 'Reading the URL took too long', retryable: true },
  // Source buckets
  source_not_allowed: {
    status: 403,
    title: 'This object lies outside the registered sources',
    retryable: false,
  },
  source_forbidden: { status: 422, title: 'The source refused to be read', retryable: false },
  source_not_found: { status: 422, title: 'The source has no such object', retryable: false },
  source_changed: { status: 409, title: 'The object changed after it was named', retryable: false },
  source_unavailable: { status: 502, title: 'The source cannot be reached at present', retryable: true },
  too_many_sources: { status: 409, title: 'No further source can be registered', retryable: false },
  secrets_not_kept: { status: 501, title: 'This service keeps no credentials', retryable: false },
  // The system
  quarantined: {
    status: 422,
    title: 'This file stopped a worker more than once and is set aside',
    retryable: false,
  },
  cursor_expired: { status: 410, title: 'Events behind this cursor were deleted', retryable: false },
  batch_gone: { status: 410, title: 'The batch and its results were deleted', retryable: false },
  result_gone: { status: 410, title: 'The result was deleted', retryable: false },
  audio_gone: { status: 410, title: 'The audio of this job is no longer stored', retryable: false },
  model_not_served: { status: 503, title: 'No worker serves this model at present', retryable: true },
  too_busy: { status: 429, title: 'Too many jobs are under way', retryable: true },
  unavailable: { status: 503, title: 'A part of the service is away', retryable: true },
  result_timeout: { status: 504, title: 'The result was not ready in time', retryable: true },
  internal_error: { status: 500, title: 'Something went wrong on our side', retryable: true },
} as const satisfies Record<string, ProblemKind>;

export type ProblemCode = keyof typeof kinds;
export const problemCodes = Object.keys(kinds) as [ProblemCode, ...ProblemCode[]];

export interface ProblemDetails {
  /** The request field that was wrong, where there is one. */
  readonly field?: string;
  /** Seconds after which it makes sense to try again. */
  readonly retryAfter?: number;
  /** Epoch milliseconds at which what was asked for was deleted. */
  readonly deletedAt?: number;
}

/** The part of a problem that is stored in a job record. */
export interface StoredProblem {
  code: ProblemCode;
  message: string;
  retryable: boolean;
}

export class ProblemError extends Error {
  override readonly name = 'ProblemError';
  readonly code: ProblemCode;
  readonly details: ProblemDetails;

  /** @param message one sentence for the caller: what was wrong and what to do. */
  constructor(code: ProblemCode, message: string, details: ProblemDetails = {}, cause?: unknown) {
    super(message, { cause });
    this.code = code;
    this.details = details;
  }

  get status(): number {
    return kinds[this.code].status;
  }

  get title(): string {
    return kinds[this.code].title;
  }

  get retryable(): boolean {
    return kinds[this.code].retryable;
  }

  toStored(): StoredProblem {
    return { code: this.code, message: this.message, retryable: this.retryable };
  }
}

/** Redis, object storage, a child process or the network was away. Retried without spending an attempt. */
export class InfrastructureFault extends Error {
  override readonly name = 'InfrastructureFault';
  /** What was away, for logs and readiness: `redis`, `storage`, `model`. */
  readonly part: string;

  constructor(part: string, message: string, cause?: unknown) {
    super(message, { cause });
    this.part = part;
  }
}

/** Invalid configuration or a bundle that fails its checks: the only failures a service exits for. */
export class StartupError extends Error {
  override readonly name = 'StartupError';
}

/** RFC 9457 body of a problem. Every `type` is explained in docs/errors.md. */
export function toProblemJson(error: ProblemError, instance?: string): Record<string, unknown> {
  return {
    type: `urn:acousticsense:problem:${error.code}`,
    title: error.title,
    status: error.status,
    detail: error.message,
    code: error.code,
    retryable: error.retryable,
    ...(error.details.field === undefined ? {} : { field: error.details.field }),
    ...(error.details.deletedAt === undefined
      ? {}
      : { deletedAt: new Date(error.details.deletedAt).toISOString() }),
    ...(instance === undefined ? {} : { instance }),
  };
}

/** ioredis and BullMQ have no common error class: connection loss is told by these codes and messages. */
export function isRedisAway(error: unknown): boolean {
  if (!(error instanceof Error)) return false;
  const { code = '', syscall } = error as NodeJS.ErrnoException;
  // ENOENT is a socket that is gone when it comes from connecting, and a missing file otherwise.
  if (code === 'ENOENT') return syscall === 'connect';
  return (
    ['ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'ETIMEDOUT', 'EAI_AGAIN', 'ENOTFOUND'].includes(code) ||
    /Connection is closed|Stream isn't writeable|max retries per request|Command timed out|Command aborted due to connection close|Socket timeout|sentinels? (are|is) unreachable|^LOADING|^MISCONF|^READONLY|^OOM|^NOAUTH|^WRONGPASS|^NOREPLICAS|^MASTERDOWN/i.test(
      error.message,
    )
  );
}
