import { randomBytes } from 'node:crypto';
import { request as httpRequest } from 'node:http';
import { request as httpsRequest } from 'node:https';
import { setTimeout as sleep } from 'node:timers/promises';
import { eventTypes } from '@acousticsense/shared/events';
import { sign } from '@acousticsense/shared/webhook-signature';
import { z } from 'zod';
import { type Caller, problemSchema } from '../caller.ts';
import { defineCommand } from '../command.ts';
import { Failure, Stopped, UsageError } from '../failure.ts';
import { callerOf, callerOptions } from './with-caller.ts';

/** How long the service holds a question until there is an event. */
const waitSeconds = 25;
/** As the service has it for an endpoint. */
const timeoutMs = 15_000;
const longestPauseMs = 30_000;

const pageSchema = z.object({
  events: z.array(
    z.object({
      id: z.string(),
      cursor: z.string(),
      type: z.string(),
      timestamp: z.string(),
      data: z.record(z.string(), z.unknown()),
    }),
  ),
  next: z.string(),
});
type Page = z.infer<typeof pageSchema>;

export const webhooksListen = defineCommand({
  name: 'webhooks listen',
  summary: 'Send the events of a service to a program on this machine, signed as its webhooks are.',
  operands: [],
  options: {
    'forward-to': { type: 'string', value: 'URL', help: 'where to: http://localhost:3000/hook' },
    types: {
      type: 'string',
      value: 'A,B',
      help: 'only events of these types (default: all but batch.progress, as for an endpoint)',
    },
    secret: {
      type: 'string',
      value: 'whsec_...',
      help: 'sign with this secret (default: a new one, which is shown)',
    },
    after: {
      type: 'string',
      value: 'CURSOR',
      help: 'begin behind this event (default: with what happens from now on)',
    },
    ...callerOptions,
  },
  notes:
    'The events are fetched from the feed of the service: nothing needs to reach this machine, and no endpoint is registered.\nEach is sent once, in order, whatever is answered; start again with --after and its cursor to have it sent anew.',
  examples: [
    { line: 'webhooks listen --forward-to http://localhost:3000/hook', does: 'what happens from now on' },
    {
      line: 'webhooks listen --forward-to http://localhost:3000/hook --types job.completed,job.failed --url https://genre.example.com',
      does: 'two types of another service',
    },
  ],
  async run({ options, terminal, config, signal }) {
    const target = targetOf(options['forward-to']);
    const types = typesOf(options.types);
    const secret = options.secret ?? `whsec_${randomBytes(24).toString('base64')}`;
    checkSecret(secret);
    if (options.after === '') throw new UsageError('--after takes the cursor of an event.');
    const caller = callerOf(options, config);

    const feed = createFeed(caller, types, (text) => terminal.note(text));
    let after = await feed.start(options.after, signal);
    terminal.note(
      `Events of ${caller.base} go to ${target.href}.\nThey are signed with ${options.secret === undefined ? secret : 'the secret that you gave'}. Ctrl-C stops.`,
    );
    try {
      for (;;) {
        const { events, next } = await feed.next(after, signal);
        for (const event of events) {
          const { verdict, ok, ms } = await forward(event, target, secret, signal);
          after = event.cursor;
          const at = new Date().toISOString().slice(11, 19);
          const shown = terminal.paint(ok ? 'green' : 'red', verdict);
          terminal.print(`${at}  ${event.type.padEnd(17)}  ${event.id}  ${shown}  ${ms} ms`);
        }
        after = next;
      }
    } catch (error) {
      if (!signal.aborted) throw error;
      throw new Stopped(`Stopped. With --after ${after} it goes on from here.`);
    }
  },
});

function targetOf(given: string | undefined): URL {
  if (given === undefined) throw new UsageError('Say where to send them: --forward-to URL.');
  const url = URL.parse(given);
  if (url !== null && ['http:', 'https:'].includes(url.protocol)) return url;
  throw new UsageError(`--forward-to ${given} is no address: it begins with http:// or https://.`);
}

function typesOf(given: string | undefined): readonly string[] {
  if (given === undefined) return eventTypes.filter((type) => type !== 'batch.progress');
  const types = given.split(',').map((type) => type.trim());
  const unknown = types.find((type) => !eventTypes.some((one) => one === type));
  if (unknown === undefined) return types;
  throw new UsageError(`--types: there is no type "${unknown}". There are: ${eventTypes.join(', ')}.`);
}

function checkSecret(secret: string): void {
  try {
    if (!secret.startsWith('whsec_')) throw new Error('another prefix');
    sign({ id: 'evt', body: '' }, [secret], 0);
  } catch {
    throw new UsageError('--secret is none: it begins with whsec_, and base64 follows.');
  }
}

/** It is there, and cannot answer now. */
class ServerFault extends Failure {}

/** The service's feed of events, with patience for a service that comes and goes. */
function createFeed({ base, request }: Caller, types: readonly string[], note: (text: string) => void) {
  async function read(query: Record<string, string | number>, signal: AbortSignal, answerMs: number) {
    const search = new URLSearchParams({ types: types.join(',') });
    for (const [name, value] of Object.entries(query)) search.set(name, String(value));
    const { response, body } = await request(`/v1/events?${search}`, signal, () => ({}), {
      answerMs,
      awayMs: Infinity,
      onAway: (away) => note(away ? `${base} does not answer; it is asked again.` : `${base} is back.`),
    });
    const { data: page } = pageSchema.safeParse(body);
    if (response.ok && page !== undefined) return { page, date: response.headers.get('date') };
    const { data: problem } = problemSchema.safeParse(body);
    if (response.status >= 500 && problem?.retryable !== false)
      throw new ServerFault(`${base} answers ${response.status}.`);
    throw new Failure(
      problem === undefined || response.status === 404
        ? `${base} has no feed of events: it answers ${response.status}.`
        : `${base} refuses: ${problem.detail}`,
    );
  }

  return {
    /**
     * @returns where to begin: behind `after`, if it can be used, or with what happens from now on. A cursor begins with
     *   a time in ms, and the service tells its own, to the second, with every answer.
     */
    async start(after: string | undefined, signal: AbortSignal): Promise<string> {
      const query = { limit: 1, wait: 0, ...(after === undefined ? {} : { after }) };
      const { date } = await read(query, signal, 30_000);
      return after ?? `${Date.parse(date ?? '') || Date.now()}-0`;
    },

    /** The events behind a cursor; after a while without any, none. */
    async next(after: string, signal: AbortSignal): Promise<Page> {
      for (let attempt = 0; ; attempt += 1) {
        try {
          return (await read({ after, wait: waitSeconds }, signal, (waitSeconds + 15) * 1_000)).page;
        } catch (error) {
          if (!(error instanceof ServerFault)) throw error;
          if (attempt === 0) note(`${error.message} It is asked again.`);
          await sleep(Math.min(longestPauseMs, 500 * 2 ** attempt), undefined, { signal });
        }
      }
    },
  };
}

/**
 * Sends it as the webhook service does: the same body, the same headers, redirects not followed.
 * @throws the signal's reason, and nothing for what the receiver does.
 */
async function forward(
  { id, type, timestamp, data }: Page['events'][number],
  target: URL,
  secret: string,
  signal: AbortSignal,
): Promise<{ verdict: string; ok: boolean; ms: number }> {
  const body = JSON.stringify({ type, timestamp, data });
  const from = performance.now();
  const ended = (verdict: string, ok: boolean) => ({ verdict, ok, ms: Math.round(performance.now() - from) });
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  const late = AbortSignal.timeout(timeoutMs);
  const request = (target.protocol === 'https:' ? httpsRequest : httpRequest)(target, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      'content-length': Buffer.byteLength(body),
      'user-agent': 'AcousticSense',
      ...sign({ id, body }, [secret], Date.now()),
    },
    signal: AbortSignal.any([signal, late]),
  });
  request.once('error', reject).once('response', (response) => {
    resolve(response.statusCode!);
    // Whatever it still says is not waited for.
    response.on('error', () => {}).resume();
    response.once('end', () => request.destroy()).setTimeout(1_000, () => request.destroy());
  });
  request.end(body);
  try {
    const status = await promise;
    return ended(String(status), status >= 200 && status < 300);
  } catch (error) {
    signal.throwIfAborted();
    if (late.aborted) return ended('no answer in time', false);
    const { code, message } = error as NodeJS.ErrnoException;
    return ended(code ?? message, false);
  }
}
