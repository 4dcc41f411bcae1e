/** The decode stage: an audio object -> log-mel windows and a spectrogram in storage -> the job record. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { ProblemError } from '@acousticsense/shared/errors';
import {
  type Decoded,
  inlineWindows,
  type JobRecord,
  type Sidecar,
  type SourceObject,
  type StoredAudio,
  sidecarSchema,
} from '@acousticsense/shared/job';
import { spectrogramKey, tensorKey } from '@acousticsense/shared/object-keys';
import type { Queues } from '@acousticsense/shared/queues';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { Sources } from '@acousticsense/shared/sources';
import type { Stage, StageJob } from '@acousticsense/shared/stage';
import { ObjectChanged, ObjectNotFound, type Storage, toScratch } from '@acousticsense/shared/storage';
import { type Analysis, type FrontEnd, frontEndVersion } from './front-end.ts';
import { hashSelection } from './windows.ts';

export interface DecodeStageDeps {
  readonly storage: Storage;
  readonly frontEnd: FrontEnd;
  readonly queues: Pick<Queues, 'add'>;
  readonly sources: Pick<Sources, 'sourceFor'>;
  readonly sourceReader: Pick<SourceReader, 'download'>;
  /** Largest object of a source that is read, in bytes. */
  readonly maxSourceBytes: number;
  readonly profileHash: string;
  readonly scratchDirectory: string;
}

interface DecodedAt {
  readonly decoded: Decoded;
  /** When the audio lay in scratch, on the clock that never jumps (`performance.now`): no time is negative. */
  readonly fetchedAt: number;
}

export function createDecodeStage({
  storage,
  frontEnd,
  queues,
  sources,
  sourceReader,
  maxSourceBytes,
  profileHash,
  scratchDirectory,
}: DecodeStageDeps): Stage {
  return {
    async run(job, signal) {
      const { record } = job;
      const begunAt = Date.now();
      const begun = performance.now();
      const known = 'sha256' in record.audio ? record.audio.sha256 : undefined;
      const { decoded, fetchedAt } =
        (known && (await findDecoded(job, known, signal))) || (await decode(job, signal));
      const timings = {
        decodeWait: Math.max(0, begunAt - record.createdAt),
        decodeFetch: Math.round(fetchedAt - begun),
        decode: Math.round(performance.now() - fetchedAt),
      };
      await job.commit('decoded', { decoded, timings });
      await queues.add('inference', record);
    },

    async handOn({ record }) {
      await queues.add('inference', record);
    },
  };

  async function decode(job: StageJob, signal: AbortSignal): Promise<DecodedAt> {
    const { record } = job;
    await using scratch = await openScratch(scratchDirectory);
    // A fixed name: what the caller named the file reaches no command line.
    const audio = path.join(scratch.directory, 'audio');
    const contentId = await fetchAudio(record, audio, signal);
    const fetchedAt = performance.now();
    // Only now is it known what was sent: another job may have decoded the same sound.
    const before = await findDecoded(job, contentId, signal);
    if (before) return { ...before, fetchedAt };
    const key = keyOf(record, contentId);
    const analysis = await frontEnd.analyse(
      audio,
      record.selection,
      scratch.directory,
      signal,
      throttled(job),
    );
    await store(record, key, analysis, signal);
    return { decoded: decodedOf(contentId, key, analysis), fetchedAt };
  }

  function decodedOf(
    contentId: string,
    tensorKey: string,
    { windows, input, warnings }: Pick<Sidecar, 'windows' | 'input' | 'warnings'>,
  ): Decoded {
    const few = windows.length <= inlineWindows;
    return { contentId, tensorKey, ...(few ? { windows } : {}), input, warnings };
  }

  function keyOf({ tenant, selection }: JobRecord, contentId: string): string {
    const selectionHash = hashSelection(selection);
    return tensorKey({
      tenant,
      contentId,
      profileHash,
      selectionHash,
      frontEnd: frontEndVersion,
    });
  }

  /** What an earlier run of this job left complete before it could commit: the sidecar is written last. */
  async function findDecoded(
    { record, log }: StageJob,
    contentId: string,
    signal: AbortSignal,
  ): Promise<DecodedAt | undefined> {
    const key = keyOf(record, contentId);
    const wanted = [`${key}.npy`, ...(showsSpectrogram(record) ? [spectrogramKey(record)] : [])];
    const found = await Promise.all(wanted.map((object) => storage.stat(object)));
    if (found.includes(undefined)) return undefined;
    const sidecar = await readSidecar(`${key}.json`, signal);
    if (sidecar?.frontEnd !== frontEndVersion || sidecar.profileHash !== profileHash) return undefined;
    log.info({ tensorKey: key }, 'decoded before');
    return { decoded: decodedOf(contentId, key, sidecar), fetchedAt: performance.now() };
  }

  async function readSidecar(key: string, signal: AbortSignal): Promise<Sidecar | undefined> {
    try {
      const text = await storage.read(key, signal);
      return sidecarSchema.safeParse(JSON.parse(text.toString('utf8'))).data;
    } catch (error) {
      if (error instanceof ObjectNotFound || error instanceof SyntaxError) return undefined;
      throw error;
    }
  }

  /** @returns the SHA-256 of the audio. */
  async function fetchAudio(
    { tenant, audio }: JobRecord,
    file: string,
    signal: AbortSignal,
  ): Promise<string> {
    if ('key' in audio) return fetchStored(audio, file, signal);
    if ('source' in audio) return fetchFromSource(tenant, audio.source, file, signal);
    throw new Error('no reader for this kind of audio');
  }

  async function fetchStored(
    { key, etag, sha256 }: StoredAudio,
    file: string,
    signal: AbortSignal,
  ): Promise<string> {
    try {
      await toScratch(storage, key, file, signal, etag === undefined ? {} : { ifMatch: etag });
      return sha256 ?? (await digestOf(file));
    } catch (error) {
      if (error instanceof ObjectChanged) {
        throw new ProblemError(
          'source_changed',
          'The upload was replaced after this job was made of it, by its signed URL: upload it anew.',
          {},
          error,
        );
      }
      if (!(error instanceof ObjectNotFound)) throw error;
      throw new ProblemError(
        'audio_gone',
        'The audio of this job is no longer stored: send it again.',
        {},
        error,
      );
    }
  }

  /** The tenant's list is asked now: what it has removed since the job was accepted is read no more. */
  async function fetchFromSource(
    tenant: string,
    object: SourceObject,
    file: string,
    signal: AbortSignal,
  ): Promise<string> {
    const source = await sources.sourceFor(tenant, object.bucket, object.key);
    if (source === undefined) {
      throw new ProblemError(
        'source_not_allowed',
        `No source is registered that holds s3://${object.bucket}/${object.key.slice(0, 200)}; register its bucket and prefix.`,
      );
    }
    const limits = { signal, maxBytes: maxSourceBytes };
    return (await sourceReader.download(source, object, file, limits)).sha256;
  }

  async function store(
    record: JobRecord,
    key: string,
    analysis: Analysis,
    signal: AbortSignal,
  ): Promise<void> {
    const { tensorFile, spectrogramFile, windows, input, warnings } = analysis;
    // Both settle before either's failure is told: nothing is written after the job has been cleaned up.
    const puts = await Promise.allSettled([
      storage.put(`${key}.npy`, createReadStream(tensorFile), signal),
      ...(showsSpectrogram(record)
        ? [storage.put(spectrogramKey(record), createReadStream(spectrogramFile), signal)]
        : []),
    ]);
    for (const put of puts) if (put.status === 'rejected') throw put.reason;
    const sidecar: Sidecar = { v: 1, frontEnd: frontEndVersion, profileHash, windows, input, warnings };
    // Even when the job was cancelled just now: a tensor without its sidecar would be of no use to anybody.
    await storage.put(`${key}.json`, Buffer.from(JSON.stringify(sidecar)));
  }
}

/** Nobody looks at the sound of each of a million rows. */
const showsSpectrogram = (record: JobRecord) => record.batch === undefined;

async function digestOf(file: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(file), hash);
  return hash.digest('hex');
}

async function openScratch(parent: string): Promise<AsyncDisposable & { directory: string }> {
  await mkdir(parent, { recursive: true });
  const directory = await mkdtemp(path.join(parent, `decode-${process.pid}-`));
  return { directory, [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }) };
}

/** Removes what decoders that were killed left behind: directories named after a process that is no more. */
export async function clearScratch(parent: string): Promise<void> {
  await mkdir(parent, { recursive: true });
  for (const name of await readdir(parent)) {
    const pid = Number(/^decode-(\d+)-/.exec(name)?.[1]);
    if (pid && (pid === process.pid || !isAlive(pid))) {
      await rm(path.join(parent, name), { recursive: true, force: true });
    }
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/** At most five signs of progress a second: each is a message to every API process. */
function throttled(job: StageJob): (fraction: number) => void {
  let last = performance.now();
  return (fraction) => {
    if (performance.now() - last < 200) return;
    last = performance.now();
    job.progress(fraction);
  };
}
