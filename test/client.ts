/** What the tests do as a caller of the API: plain HTTP, nothing of the services' own code. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { JobResource } from '../services/api/src/schemas.ts';

export type Job = JobResource;

export interface Answer<T> {
  readonly status: number;
  readonly headers: Headers;
  readonly body: T;
}

export function formOf(
  audio: Uint8Array,
  { name = 'song.mp3', field = 'file', fields = {} as Record<string, string> } = {},
): FormData {
  const form = new FormData();
  for (const [key, value] of Object.entries(fields)) form.append(key, value);
  form.append(field, new Blob([audio as Uint8Array<ArrayBuffer>]), name);
  return form;
}

export async function request<T = Job>(url: string, init: RequestInit = {}): Promise<Answer<T>> {
  const response = await fetch(url, init);
  const text = await response.text();
  return {
    status: response.status,
    headers: response.headers,
    body: (text === '' ? undefined : JSON.parse(text)) as T,
  };
}

export interface Problem {
  status: number;
  code: string;
  detail: string;
  title: string;
  type: string;
  field?: string;
  retryable: boolean;
}

/** Sends audio; the job must be accepted. */
export async function upload(
  base: string,
  audio: Uint8Array,
  options: Parameters<typeof formOf>[1] = {},
): Promise<Job> {
  const answer = await request(`${base}/v1/jobs`, { method: 'POST', body: formOf(audio, options) });
  if (answer.status !== 202)
    throw new Error(`upload answered ${answer.status}: ${JSON.stringify(answer.body)}`);
  return answer.body;
}

/** Reads the job until `done` holds. */
export async function jobWhen(
  base: string,
  id: string,
  done: (job: Job) => boolean,
  timeoutMs = 60_000,
): Promise<Job> {
  const until = Date.now() + timeoutMs;
  let last: Job | undefined;
  while (Date.now() < until) {
    const answer = await request(`${base}/v1/jobs/${id}`).catch(() => undefined);
    if (answer?.status === 200) {
      last = answer.body;
      if (done(last)) return last;
    }
    await sleep(25);
  }
  throw new Error(`job ${id} did not get there in ${timeoutMs} ms: ${JSON.stringify(last)}`);
}

export const isFinished = ({ state }: Job) => ['completed', 'failed', 'cancelled'].includes(state);
export const finished = (base: string, id: string, timeoutMs?: number) =>
  jobWhen(base, id, isFinished, timeoutMs);

export interface ServerSentEvent {
  readonly id?: string;
  readonly event: string;
  readonly data: unknown;
}

/** Reads server-sent events until the stream ends. */
export async function* serverSentEvents(
  url: string,
  init: RequestInit = {},
): AsyncGenerator<ServerSentEvent> {
  const response = await fetch(url, init);
  if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
  let text = '';
  for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      const fields = new Map(
        text
          .slice(0, end)
          .split('\n')
          .map((line) => {
            const colon = line.indexOf(':');
            return [line.slice(0, colon), line.slice(colon + 1).trimStart()] as const;
          }),
      );
      text = text.slice(end + 2);
      const [event, data, id] = ['event', 'data', 'id'].map((name) => fields.get(name));
      if (event && data) yield { event, data: JSON.parse(data), ...(id ? { id } : {}) };
    }
  }
}

/** The job when it is finished, told by its event stream: no polling beside a measurement. */
export async function followed(base: string, sent: Job): Promise<Job> {
  let job = sent;
  for await (const { event, data } of serverSentEvents(base + sent.links.events))
    if (event === 'job') job = data as Job;
  if (!isFinished(job)) throw new Error(`the event stream of ${job.id} ended at ${job.state}`);
  return job;
}
