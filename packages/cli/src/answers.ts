/**
 * Files through the service, a bounded number at a time, every answer kept in a journal as it comes: a run that
 * was stopped goes on where it was, and a second run asks only for what is new.
 */
import { type FileHandle, mkdir, open, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { vectorsSchema } from '@acousticsense/shared/job';
import { z } from 'zod';
import { Failure, systemCode } from './failure.ts';
import type { LabelledFile } from './labelled-audio.ts';
import type { Analysis, Service } from './service.ts';
import type { Progress } from './terminal.ts';

const answerSchema = z.object({
  v: z.literal(1),
  /** What was asked: the file as it was, the model, the options. */
  path: z.string(),
  size: z.number(),
  modified: z.number(),
  model: z.string(),
  options: z.object({
    windows: z.string().optional(),
    start: z.number().optional(),
    duration: z.number().optional(),
    vectors: z.boolean().optional(),
  }),
  result: z
    .object({
      probabilities: z.record(z.string(), z.number()),
      silent: z.boolean(),
      uncertainBecause: z.string().optional(),
      windows: z.number(),
      provider: z.string(),
    })
    .optional(),
  error: z.object({ code: z.string(), message: z.string(), retryable: z.boolean() }).optional(),
  vectors: vectorsSchema.optional(),
});
export type Answer = z.infer<typeof answerSchema>;

export interface Journal extends AsyncDisposable {
  find(key: string): Answer | undefined;
  /** @throws {Failure} when it cannot be kept. */
  add(answer: Answer): Promise<void>;
}

/** What two answers have in common when the one makes the other needless. */
function keyOf({
  path: file,
  size,
  modified,
  model,
  options,
}: Omit<Answer, 'v' | 'result' | 'error'>): string {
  const { windows, start, duration, vectors } = options;
  return JSON.stringify([file, size, modified, model, windows, start, duration, vectors === true]);
}

/** Kept in memory only. */
export function forgettingJournal(): Journal {
  return { find: () => undefined, add: async () => {}, [Symbol.asyncDispose]: async () => {} };
}

/** @throws {Failure} when the directory cannot be written. */
export async function openJournal(directory: string): Promise<Journal> {
  const file = path.join(directory, 'answers.jsonl');
  let handle: FileHandle;
  let text: string;
  try {
    await mkdir(directory, { recursive: true });
    handle = await open(file, 'a');
    text = await readFile(file, 'utf8');
  } catch (error) {
    throw new Failure(`${directory} cannot be written (${systemCode(error)}): give another one with --out.`);
  }
  const known = new Map<string, Answer>();
  for (const line of text.split('\n')) {
    // A line that was cut when the run was killed is not one: its file is asked again.
    const { data } = answerSchema.safeParse(parseJson(line));
    if (data !== undefined && !data.error?.retryable) known.set(keyOf(data), data);
  }
  // What is appended must not become the rest of a cut line.
  if (text !== '' && !text.endsWith('\n')) await handle.appendFile('\n');
  return {
    find: (key) => known.get(key),
    async add(answer) {
      await handle.appendFile(`${JSON.stringify(answer)}\n`).catch((error: unknown) => {
        throw new Failure(`${file} cannot be written (${systemCode(error)}): the last answer is not kept.`);
      });
    },
    [Symbol.asyncDispose]: () => handle.close(),
  };
}

export interface AnsweredFile {
  readonly file: LabelledFile;
  readonly answer: Answer;
}

export interface Answers {
  /** In the order of the files. */
  readonly answered: readonly AnsweredFile[];
  /** How many of them were in the journal already. */
  readonly known: number;
}

/**
 * @param startProgress called with the number of files that are sent.
 * @throws {Failure} when the service is gone, or has changed its model meanwhile.
 */
export async function answerFiles(
  files: readonly LabelledFile[],
  run: {
    service: Service;
    options: Analysis & { vectors?: boolean };
    journal: Journal;
    concurrency: number;
    startProgress: (total: number) => Progress;
    signal: AbortSignal;
  },
): Promise<Answers> {
  const { service, options, journal, concurrency } = run;
  const { digest } = service.model;
  const answers = new Map<string, Answer>();
  const open: { file: LabelledFile; asked: Omit<Answer, 'v'> }[] = [];
  for (const file of files) {
    const facts = await stat(file.path).catch(() => undefined);
    const asked = {
      path: file.path,
      size: facts?.size ?? 0,
      modified: facts?.mtimeMs ?? 0,
      model: digest,
      options,
    };
    const found = journal.find(keyOf(asked));
    if (found === undefined) open.push({ file, asked });
    else answers.set(file.path, found);
  }
  const known = answers.size;
  if (open.length > 0) {
    const progress = run.startProgress(open.length);
    // The first that cannot go on stops the others.
    const stop = new AbortController();
    const signal = AbortSignal.any([run.signal, stop.signal]);
    const queue = open.values();
    const work = async () => {
      for (const { file, asked } of queue) {
        const answered = await service.analyse(file.path, options, signal);
        if (answered.ok && answered.digest !== digest) {
          throw new Failure(
            `${service.url} has changed its model during the run (${digest.slice(0, 12)} became ${answered.digest.slice(0, 12)}): run the same command again.`,
          );
        }
        const answer: Answer = { v: 1, ...asked, ...contentOf(answered) };
        await journal.add(answer);
        answers.set(file.path, answer);
        progress.advance(answered.ok ? 'done' : 'failed');
      }
    };
    const workers = Array.from({ length: Math.min(concurrency, open.length) }, () =>
      work().catch((error: unknown) => {
        stop.abort(error);
        throw error;
      }),
    );
    try {
      const results = await Promise.allSettled(workers);
      if (stop.signal.aborted) throw run.signal.aborted ? run.signal.reason : stop.signal.reason;
      for (const result of results) if (result.status === 'rejected') throw result.reason;
    } finally {
      progress.end();
    }
  }
  return { answered: files.map((file) => ({ file, answer: answers.get(file.path)! })), known };
}

function contentOf(
  answered: Awaited<ReturnType<Service['analyse']>>,
): Pick<Answer, 'result' | 'error' | 'vectors'> {
  if (!answered.ok) return { error: answered.fault };
  const { result, vectors } = answered;
  const { probabilities, uncertainBecause, windows, provider, top } = result;
  return {
    result: {
      probabilities,
      silent: top.length === 0,
      ...(uncertainBecause === undefined ? {} : { uncertainBecause }),
      windows: windows.length,
      provider,
    },
    ...(vectors === undefined ? {} : { vectors }),
  };
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
