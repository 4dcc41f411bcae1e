/**
 * The service as this page sees it. Shapes follow `/openapi.json`; only what the page reads is named here.
 * Every function rejects with a {@link Failure} that can be shown to a person, or with the signal's reason.
 */
import { words } from './words.ts';

export type State =
  | 'pending'
  | 'fetching'
  | 'queued'
  | 'decoding'
  | 'decoded'
  | 'classifying'
  | 'completed'
  | 'failed'
  | 'cancelled';

export interface Scored {
  label: string;
  /** 0..1 */
  confidence: number;
}

interface InputFacts {
  codec: string;
  /** Hz */
  sampleRate: number;
  channels: number;
  /** Bits per second. */
  bitRate?: number;
  /** Seconds, as are the next two. */
  duration: number;
  analysedStart: number;
  analysedEnd: number;
}

export interface Result {
  top: Scored[];
  uncertain: boolean;
  /** Present when `uncertain`. */
  uncertainBecause?: 'silent' | 'not_music' | 'confidence';
  lead: number;
  /** 0..1: the least confidence that counts as an answer. */
  threshold: number;
  /** Of the test songs answered with about this confidence, `percent` of 100 were right. */
  reliability?: { percent: number };
}

export interface Job {
  id: string;
  state: State;
  version: number;
  createdAt: string;
  updatedAt: string;
  result?: Result;
  input?: InputFacts;
  warnings: { code: string; message: string }[];
  error?: { code: string; message: string; retryable: boolean };
  links: { self: string; events: string; spectrogram: string; explanation?: string; vectors?: string };
}

export interface Model {
  name: string;
  version: string;
  labels: string[];
  provider: string;
  calibrated: boolean;
  accuracy: 'none' | { split: string; clips: number; top1: number };
  retention: { audioHours: number; resultDays: number };
  limits: { maxBytes: number };
}

/** Something went wrong, in a sentence for the person in front of the page. */
export class Failure extends Error {
  override readonly name = 'Failure';
  /** Whether the same song, unchanged, can succeed later. */
  readonly retryable: boolean;
  readonly status: number | undefined;

  constructor(message: string, retryable: boolean, status?: number) {
    super(message);
    this.retryable = retryable;
    this.status = status;
  }
}

function isFinished(state: State): boolean {
  return state === 'completed' || state === 'failed' || state === 'cancelled';
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** RFC 9457 body, or whatever a proxy on the way made of it. */
function problemFrom(status: number, body: string): Failure {
  const problem = parse(body) as { detail?: unknown; retryable?: unknown } | undefined;
  if (typeof problem?.detail !== 'string')
    return new Failure(words.failures.unexpected(status), true, status);
  return new Failure(problem.detail, problem.retryable === true, status);
}

function jobFrom(body: string): Job {
  const job = parse(body) as Job | undefined;
  if (!job?.id || !job.state || !job.links) throw new Failure(words.failures.garbled, true);
  return job;
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { credentials: 'same-origin', cache: 'no-store', ...init });
  } catch {
    init.signal?.throwIfAborted();
    throw new Failure(words.failures.serviceAway, true);
  }
  if (!response.ok) throw problemFrom(response.status, await response.text().catch(() => ''));
  return response;
}

export async function fetchModel(): Promise<Model> {
  return (await (await request('/v1/model')).json()) as Model;
}

/** The picture as stored (224x224), each pixel `scale` times as wide: sharp when shown large. */
export async function fetchSpectrogram(job: Job, scale: number, signal: AbortSignal): Promise<Blob> {
  return (await request(`${job.links.spectrogram}?scale=${scale}`, { signal })).blob();
}

/** Tells the service to stop and forget; the request outlives the page, should it be closed at this moment. */
export async function deleteJob(job: Job): Promise<void> {
  await request(job.links.self, { method: 'DELETE', keepalive: true, signal: AbortSignal.timeout(10_000) });
}

/**
 * Sends the song. XMLHttpRequest, because `fetch` does not tell how far an upload has come.
 * @param onSent share of the bytes that have left, 0..1
 */
export async function uploadSong(
  song: File,
  onSent: (share: number) => void,
  signal: AbortSignal,
): Promise<Job> {
  signal.throwIfAborted();
  const form = new FormData();
  form.set('topK', '5');
  form.set('file', song);
  const { status, body } = await new Promise<{ status: number; body: string }>((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    const abort = () => xhr.abort();
    signal.addEventListener('abort', abort, { once: true });
    xhr.upload.onprogress = ({ lengthComputable, loaded, total }) => {
      if (lengthComputable && total > 0) onSent(loaded / total);
    };
    xhr.onload = () => resolve({ status: xhr.status, body: xhr.responseText });
    xhr.onabort = () => reject(signal.reason);
    xhr.onerror = () => resolve({ status: 0, body: '' });
    xhr.onloadend = () => signal.removeEventListener('abort', abort);
    xhr.open('POST', '/v1/jobs');
    xhr.setRequestHeader('accept', 'application/json, application/problem+json');
    xhr.send(form);
  });
  if (status === 0) throw await whyUploadFailed(song);
  if (status < 200 || status > 299) throw problemFrom(status, body);
  return jobFrom(body);
}

/** A browser reports a vanished file, a dead network and a dead service as the same nameless error. */
async function whyUploadFailed(song: File): Promise<Failure> {
  const readable = await song
    .slice(0, 1)
    .arrayBuffer()
    .then(() => true)
    .catch(() => false);
  if (!readable) return new Failure(words.failures.fileUnreadable, false);
  const answers = await fetchModel()
    .then(() => true)
    .catch((error: unknown) => error instanceof Failure && error.status !== undefined);
  return new Failure(answers ? words.failures.uploadLost : words.failures.serviceAway, true);
}

export interface Watcher {
  onJob(job: Job): void;
  /** @param fraction 0..1 of this state's work */
  onFraction(state: State, fraction: number): void;
  /** `false`: the stream broke and is being opened again. */
  onConnected(connected: boolean): void;
}

/** How long nothing may be heard before the job is asked for directly; heartbeats are invisible to a page. */
const silenceMs = 5_000;
/** How long the service may stay unreachable before the person is asked what to do. */
const patienceMs = 30_000;

/**
 * Follows a job until it is finished, and resolves with that last state.
 *
 * The event stream is the fast path. It can die in ways a page is not told of (a half-open connection, a proxy
 * that buffers, an API restarted elsewhere), so whenever it is silent the job itself is read: the answer is
 * found with or without the stream. Versions put both sources in order.
 */
export async function watchJob(job: Job, watcher: Watcher, signal: AbortSignal): Promise<Job> {
  let latest = 0;
  let stream: EventSource | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined;
  let stopped = false;
  try {
    return await new Promise<Job>((resolve, reject) => {
      signal.addEventListener('abort', () => reject(signal.reason), { once: true });
      if (signal.aborted) reject(signal.reason);
      let lastHeard = performance.now();

      const heard = () => {
        lastHeard = performance.now();
        watcher.onConnected(true);
        clearTimeout(timer);
        timer = setTimeout(ask, silenceMs);
      };
      const take = (next: Job) => {
        if (stopped) return;
        heard();
        if (next.version < latest) return;
        latest = next.version;
        watcher.onJob(next);
        if (isFinished(next.state)) resolve(next);
      };
      const ask = async () => {
        try {
          take(jobFrom(await (await request(job.links.self, { signal })).text()));
          if (!stopped && stream?.readyState === EventSource.CLOSED) listen();
        } catch (error) {
          if (stopped) return;
          const status = error instanceof Failure ? error.status : undefined;
          if (status === 404 || status === 410)
            return reject(new Failure(words.failures.jobGone, true, status));
          if (status !== undefined && status >= 400 && status < 500) return reject(error);
          watcher.onConnected(false);
          if (performance.now() - lastHeard > patienceMs)
            return reject(new Failure(words.failures.watchLost, true));
          timer = setTimeout(ask, 1_000);
        }
      };
      const listen = () => {
        stream?.close();
        stream = new EventSource(job.links.events);
        stream.addEventListener('job', ({ data }: MessageEvent<string>) => {
          const next = parse(data) as Job | undefined;
          if (next?.state) take(next);
        });
        stream.addEventListener('progress', ({ data }: MessageEvent<string>) => {
          const progress = parse(data) as { state?: State; fraction?: number } | undefined;
          if (stopped || !progress?.state || typeof progress.fraction !== 'number') return;
          heard();
          watcher.onFraction(progress.state, progress.fraction);
        });
        // The browser opens a broken stream again by itself, unless the service refused it. Meanwhile: ask.
        stream.onerror = () => {
          if (stopped) return;
          clearTimeout(timer);
          timer = setTimeout(ask, 1_000);
        };
      };
      take(job);
      if (!isFinished(job.state)) listen();
    });
  } finally {
    stopped = true;
    clearTimeout(timer);
    stream?.close();
  }
}
