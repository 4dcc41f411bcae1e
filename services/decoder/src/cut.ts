/**
 * Cuts audio files into windows exactly as the service does, for those who train, calibrate or compare a model:
 *
 *     node services/decoder/src/cut.ts --profile FILE|BUNDLE --windows all|middle|N --out DIR < list-of-files
 *
 * Reads one path a line. Writes DIR/<n>.npy, uint8 [windows, bands, frames], for the n-th path (from 0), and for each
 * one JSON line in the order in which they are done: `{file, tensor, windows, input, warnings}`, or
 * `{file, error: {code, message}}`: a bad file does not stop the others. Exits with 0 when all were gone through, and
 * with 1 and one sentence when the options, the profile or ffmpeg are not usable.
 */
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rename, rm, stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { loadBundle, type Profile, profileSchema } from '@acousticsense/shared/bundle';
import { InfrastructureFault, ProblemError, StartupError } from '@acousticsense/shared/errors';
import { type Selection, windowChoiceSchema } from '@acousticsense/shared/job';
import { loadConfig } from './config.ts';
import { checkFfmpeg, createFfmpeg } from './ffmpeg.ts';
import { createFrontEnd, type FrontEnd } from './front-end.ts';

const usage =
  'usage: node cut.ts --profile FILE|BUNDLE --windows all|middle|N --out DIR [--start SECONDS] [--duration SECONDS] [--jobs N] < list-of-files';

interface Options {
  readonly profile: string;
  readonly out: string;
  readonly selection: Selection;
  /** Files at a time: one ffmpeg each; the front end itself shares one core. */
  readonly jobs: number;
}

function readOptions(args: string[]): Options {
  const text = { type: 'string' } as const;
  const options = { profile: text, windows: text, out: text, start: text, duration: text, jobs: text };
  let values: { [name in keyof typeof options]?: string };
  try {
    ({ values } = parseArgs({ args, options }));
  } catch (cause) {
    throw new StartupError(`${(cause as Error).message}\n${usage}`, { cause });
  }
  const { profile, out, windows = 'all', start = '0', duration } = values;
  if (profile === undefined || out === undefined)
    throw new StartupError(`--profile and --out are needed.\n${usage}`);
  const choice = windowChoiceSchema.safeParse(/^\d+$/.test(windows) ? Number(windows) : windows);
  if (!choice.success) throw new StartupError(`--windows ${windows}: it must be all, middle or 1 to 64.`);
  return {
    profile,
    out,
    selection: {
      windows: choice.data,
      start: number('start', start, 0),
      ...(duration === undefined ? {} : { duration: number('duration', duration, 0.001) }),
    },
    jobs: Math.floor(number('jobs', values.jobs ?? `${availableParallelism()}`, 1)),
  };
}

function number(name: string, text: string, least: number): number {
  const value = Number(text);
  if (text.trim() !== '' && Number.isFinite(value) && value >= least) return value;
  throw new StartupError(`--${name} ${text}: it must be a number of at least ${least}.`);
}

/** The profile of a bundle (a directory), of a shipped profile's file (its `profile`), or a bare one in a file. */
async function loadProfile(location: string): Promise<Profile> {
  const found = await stat(location).catch(() => undefined);
  if (found === undefined) throw new StartupError(`--profile ${location}: there is no such file or bundle.`);
  if (found.isDirectory()) return (await loadBundle(location, { verifyFiles: false })).manifest.profile;
  let json: unknown;
  try {
    json = JSON.parse(await readFile(location, 'utf8'));
  } catch (cause) {
    throw new StartupError(`--profile ${location} is not JSON.`, { cause });
  }
  const held = (json as { profile?: unknown } | null)?.profile;
  const parsed = profileSchema.safeParse(held ?? json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  throw new StartupError(
    `--profile ${location}: ${issue.path.join('.') || 'the profile'}: ${issue.message}.`,
  );
}

/** What is said of one file; its tensor appears under its name when it is complete. */
async function cut(
  file: string,
  tensor: string,
  { frontEnd, selection, scratch, signal }: Cutting,
): Promise<object> {
  const own = await mkdtemp(path.join(scratch, 'file-'));
  try {
    const analysis = await frontEnd.analyse(file, selection, own, signal);
    const { windows, input, warnings } = analysis;
    await rename(analysis.tensorFile, tensor);
    return { file, tensor, windows, input, warnings };
  } catch (error) {
    if (error instanceof ProblemError) return { file, error: { code: error.code, message: error.message } };
    const { code = '', message } = error as NodeJS.ErrnoException;
    if (error instanceof InfrastructureFault || !cannotRead.includes(code)) throw error;
    const cause = code === 'ENOENT' ? 'there is no such file' : message;
    return { file, error: { code: 'unreadable', message: `The file cannot be read: ${cause}.` } };
  } finally {
    await rm(own, { recursive: true, force: true });
  }
}

interface Cutting {
  readonly frontEnd: FrontEnd;
  readonly selection: Selection;
  readonly scratch: string;
  readonly signal: AbortSignal;
}

const cannotRead = ['ENOENT', 'EACCES', 'EISDIR', 'ENOTDIR', 'ELOOP', 'ENAMETOOLONG'];

async function main(stop: AbortController): Promise<void> {
  const { profile: location, out, selection, jobs } = readOptions(process.argv.slice(2));
  const profile = await loadProfile(location);
  const config = loadConfig(process.env).ffmpeg;
  await checkFfmpeg(config, profile.resampler);
  const ffmpeg = createFfmpeg(config);
  const frontEnd = createFrontEnd({ ffmpeg, profile, maxSeconds: config.maxDurationSeconds });
  await mkdir(out, { recursive: true });
  // Beside the tensors, so that a rename brings a complete one in.
  const scratch = await mkdtemp(path.join(out, '.cut-'));
  const { signal } = stop;
  const stopped = new Promise<never>((_, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason));
  });

  const running = new Set<Promise<object>>();
  const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  let count = 0;
  // One reader for all workers: calls of next() queue up inside the iterator.
  const work = async () => {
    for (let line = await lines.next(); line.done !== true; line = await lines.next()) {
      if (line.value === '') continue;
      const tensor = path.join(out, `${count}.npy`);
      count += 1;
      const told = cut(line.value, tensor, { frontEnd, selection, scratch, signal });
      running.add(told);
      const text = JSON.stringify(await told);
      running.delete(told);
      if (!process.stdout.write(`${text}\n`)) await once(process.stdout, 'drain');
    }
  };
  try {
    await Promise.race([Promise.all(Array.from({ length: jobs }, work)), stopped]);
  } finally {
    stop.abort(new Error('another file stopped the program'));
    await Promise.allSettled(running);
    await rm(scratch, { recursive: true, force: true });
  }
}

const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const)
  process.once(signal, () => stop.abort(new StartupError(`Stopped by ${signal}.`)));
// Whoever reads the lines has gone: nobody is left to cut for.
process.stdout.on('error', () => stop.abort(new StartupError('Nobody reads the output any more.')));
try {
  await main(stop);
} catch (error) {
  const expected = error instanceof StartupError || error instanceof InfrastructureFault;
  console.error(expected ? error.message : error);
  process.exit(1);
}
