/**
 * ffmpeg and ffprobe: the only module that knows them, and the only one that knows fluent-ffmpeg (archived
 * upstream; here it builds the command line and starts the process).
 *
 * What keeps a hostile file harmless: it lies in its own directory under a fixed name; the demuxer is forced from
 * its first bytes (container.ts), so that ffmpeg never guesses; whitelists of demuxers, decoders and protocols;
 * no network and no stdin; limits on output, on time without output and on time in all. External tracks of MOV
 * files stay closed (`enable_drefs`, `use_absolute_path`: both off, stated below although they are the defaults).
 */
import { type ChildProcess, execFile } from 'node:child_process';
import { PassThrough } from 'node:stream';
import { promisify } from 'node:util';
import type { Profile } from '@acousticsense/shared/bundle';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import fluent from 'fluent-ffmpeg';
import { z } from 'zod';
import { type Container, identifyContainer } from './container.ts';

export interface FfmpegOptions {
  readonly ffmpegPath: string;
  readonly ffprobePath: string;
  /** ffmpeg is killed when it has been waited for this long without a byte. */
  readonly stallMs: number;
  /** ffmpeg is killed after base + perMegabyte x size of the file. */
  readonly budgetBaseMs: number;
  readonly budgetPerMegabyteMs: number;
  /** No more seconds than these are read from a file, whatever its header says. */
  readonly maxDurationSeconds: number;
}

export interface AudioFacts {
  readonly container: Container;
  /** ffmpeg's name of the codec, such as `mp3` or `pcm_s16le`. */
  readonly codec: string;
  /** Hz, as stored. */
  readonly sampleRate: number;
  readonly channels: number;
  /** Seconds, as the file says or as estimated from its size; absent when nothing tells. */
  readonly duration?: number;
  /** The duration comes from an index or a header that fits the file's size: seeking by it is safe. */
  readonly durationTrusted: boolean;
  /** The file is shorter than its own header says. */
  readonly truncated: boolean;
  /** Bits per second. */
  readonly bitRate?: number;
}

/** What happened while reading; complete when the iteration has ended. */
export interface DecodeReport {
  /** Samples handed out. */
  samples: number;
  /** Samples that were no finite number, or absurdly large, and became 0. */
  sanitised: number;
  /** Lines that ffmpeg wrote at level `error`. */
  errorLines: number;
  firstError?: string;
  /** ffmpeg ended by itself: there is no more audio. */
  reachedEnd: boolean;
  /** ffmpeg ended by itself with an error: what was read is a part. */
  failed: boolean;
}

export interface MonoRead {
  /** Mono PCM at the profile's sample rate, in chunks; each array belongs to the receiver. */
  readonly pcm: AsyncIterable<Float32Array>;
  readonly report: Readonly<DecodeReport>;
}

export interface Ffmpeg {
  /**
   * Reads what the file says about itself.
   * @throws {ProblemError} `empty_file`, `not_audio`, `unsupported_format`, `no_audio_stream`, `decode_failed`.
   */
  probe(file: string, signal: AbortSignal): Promise<AudioFacts>;
  /**
   * Decodes the first audio stream from `start` seconds to its end, or until the iteration is left. A stream with
   * back-pressure: never the whole file in memory. ffmpeg is gone when the iteration has ended, however it ended.
   * @throws {ProblemError} `decode_timeout`, `audio_too_long`; an ffmpeg that fails is in the report.
   */
  readMono(
    file: string,
    facts: AudioFacts,
    of: { profile: Pick<Profile, 'sampleRate' | 'channels' | 'resampler'>; start?: number },
    signal: AbortSignal,
  ): MonoRead;
}

const demuxers = 'mp3,aac,wav,aiff,flac,ogg,mov';
const codecs = new Set([
  'mp1',
  'mp2',
  'mp3',
  'aac',
  'alac',
  'flac',
  'vorbis',
  'opus',
  'adpcm_ms',
  'adpcm_ima_wav',
  'adpcm_ima_qt',
]);
const pcmCodecs = [
  'u8',
  's8',
  's16le',
  's16be',
  's24le',
  's24be',
  's32le',
  's32be',
  'f32le',
  'f32be',
  'f64le',
  'f64be',
  'alaw',
  'mulaw',
];
for (const format of pcmCodecs) codecs.add(`pcm_${format}`);
/** Decoders go by other names than codecs. */
const decoders = [...codecs, 'mp1float', 'mp2float', 'mp3float', 'aac_fixed', 'libopus', 'libvorbis'].join(
  ',',
);
/** What ffmpeg says about a picture or video stream whose decoder it may not use. */
const harmless =
  /not on whitelist|Failed to open codec in avformat_find_stream_info|Could not find codec parameters/;
/** ffmpeg's `pan` names no more. */
const maxChannels = 64;
/** Decoded before the wanted start and dropped: codecs and the resampler need a run-up. */
const runUpSeconds = 1;
/** Nothing that was audio is louder than this (120 dB over full scale). */
const absurdSample = 1e6;

/**
 * Options in front of `-i`. ffprobe opens a decoder for every stream and gives up on one that is not whitelisted, so
 * there (`probing`) only audio is held to the list: a file with a picture would be refused otherwise.
 */
function inputOptions({ demuxer }: Container, { probing = false } = {}): string[] {
  return [
    ...[
      '-format_whitelist',
      demuxers,
      '-protocol_whitelist',
      'file',
      probing ? '-codec_whitelist:a' : '-codec_whitelist',
      decoders,
    ],
    ...(demuxer === 'mov' ? ['-enable_drefs', '0', '-use_absolute_path', '0'] : []),
    ...['-f', demuxer],
  ];
}

const count = z.coerce.number();
const probeSchema = z.object({
  streams: z.array(
    z.object({
      codec_name: z.string().optional(),
      sample_rate: count.optional(),
      channels: count.optional(),
      duration: count.optional(),
      bit_rate: count.optional(),
    }),
  ),
  format: z.object({ duration: count.optional(), bit_rate: count.optional() }).default({}),
});

export function createFfmpeg(options: FfmpegOptions): Ffmpeg {
  return {
    probe: (file, signal) => probe(options, file, signal),
    readMono(file, facts, { profile, start = 0 }, signal) {
      const report: DecodeReport = {
        samples: 0,
        sanitised: 0,
        errorLines: 0,
        reachedEnd: false,
        failed: false,
      };
      return { report, pcm: read(options, file, facts, profile, start, signal, report) };
    },
  };
}

/** The version line of ffmpeg. @throws {InfrastructureFault} when it cannot be run or lacks the resampler. */
export async function checkFfmpeg(options: FfmpegOptions, resampler: Profile['resampler']): Promise<string> {
  const ask = async (program: string) => {
    try {
      return (await promisify(execFile)(program, ['-version'], { timeout: 10_000 })).stdout;
    } catch (error) {
      throw new InfrastructureFault('ffmpeg', `${program} cannot be run: ${(error as Error).message}`, error);
    }
  };
  const [version] = await Promise.all([ask(options.ffmpegPath), ask(options.ffprobePath)]);
  if (resampler === 'soxr' && !version.includes('--enable-libsoxr')) {
    throw new InfrastructureFault(
      'ffmpeg',
      `${options.ffmpegPath} was built without libsoxr, which the model's profile asks for.`,
    );
  }
  return version.split('\n')[0]!;
}

// execFile and not fluent-ffmpeg, whose ffprobe cannot be stopped and buffers without a bound.
async function probe(options: FfmpegOptions, file: string, signal: AbortSignal): Promise<AudioFacts> {
  const container = await identifyContainer(file);
  const wanted = 'format=duration,bit_rate:stream=codec_name,sample_rate,channels,duration,bit_rate';
  const args = ['-hide_banner', '-v', 'warning', ...inputOptions(container, { probing: true })];
  args.push('-select_streams', 'a', '-show_entries', wanted, '-of', 'json', '-i', `file:${file}`);
  let stdout: string;
  let stderr: string;
  try {
    const limits = { signal, timeout: options.stallMs, maxBuffer: 4 << 20, killSignal: 'SIGKILL' } as const;
    ({ stdout, stderr } = await promisify(execFile)(options.ffprobePath, args, limits));
  } catch (error) {
    signal.throwIfAborted();
    const { code, killed } = error as { code?: unknown; killed?: boolean };
    if (typeof code === 'string' && code !== 'ERR_CHILD_PROCESS_STDIO_MAXBUFFER') {
      throw new InfrastructureFault('ffmpeg', `ffprobe cannot be run: ${code}`, error);
    }
    if (killed === true && code === undefined) {
      throw new ProblemError(
        'decode_timeout',
        'The file could not be examined in time: it is probably damaged.',
        {},
        error,
      );
    }
    if (String((error as { stderr?: unknown }).stderr).includes('Could not open codec')) {
      throw new ProblemError(
        'unsupported_format',
        `The ${container.name} file holds a codec that is not read here: convert it to FLAC, MP3 or WAV.`,
        {},
        error,
      );
    }
    throw unreadable(container, error);
  }

  const { streams, format } = probeSchema.parse(JSON.parse(stdout));
  const stream = streams[0];
  if (stream === undefined) {
    throw new ProblemError('no_audio_stream', 'The file holds no audio stream: send one with sound.');
  }
  const codec = stream.codec_name ?? 'unknown';
  if (!codecs.has(codec)) {
    throw new ProblemError(
      'unsupported_format',
      `The audio is coded as ${codec}, which is not read here: convert it to FLAC, MP3 or WAV.`,
    );
  }
  const { sample_rate: sampleRate = 0, channels = 0 } = stream;
  if (sampleRate < 1 || channels < 1) throw unreadable(container);
  if (channels > maxChannels) {
    throw new ProblemError(
      'unsupported_format',
      `The audio has ${channels} channels, ${maxChannels} are the most that is read.`,
    );
  }
  const duration = stream.duration ?? format.duration;
  const shortened = container.declaredSize !== undefined && container.size < 0.95 * container.declaredSize;
  // libavformat's own words, the same since 2012 and 2014; without them a wrong duration would be trusted.
  const truncated = shortened || stderr.includes('filesize and duration do not match');
  const estimated = stderr.includes('Estimating duration from bitrate');
  const bitRate = stream.bit_rate ?? format.bit_rate;
  return {
    container,
    codec,
    sampleRate,
    channels,
    durationTrusted: duration !== undefined && !estimated && !truncated,
    truncated,
    ...(duration === undefined ? {} : { duration }),
    ...(bitRate === undefined ? {} : { bitRate }),
  };
}

function unreadable(container: Container, cause?: unknown): ProblemError {
  return container.name === 'mp3' || container.name === 'aac'
    ? new ProblemError(
        'not_audio',
        'The file looks like MPEG audio but holds none that can be read: send another copy.',
        {},
        cause,
      )
    : new ProblemError(
        'decode_failed',
        `The ${container.name} file is damaged, its header cannot be read: send another copy.`,
        {},
        cause,
      );
}

/**
 * The exact mean of all channels; ffmpeg's own down-mix weighs surround channels and normalises by sample format.
 * Floats first, because `pan` on integers rounds.
 */
function filterFor(
  { channels }: AudioFacts,
  { sampleRate, resampler }: Pick<Profile, 'sampleRate' | 'resampler'>,
): string {
  const weight = 1 / channels;
  const mean = Array.from({ length: channels }, (_, c) => `${weight}*c${c}`).join('+');
  const resample = resampler === 'soxr' ? 'resampler=soxr:precision=20' : 'resampler=swr';
  return `aformat=sample_fmts=fltp,pan=mono|c0=${mean},aresample=${sampleRate}:${resample}`;
}

async function* read(
  options: FfmpegOptions,
  file: string,
  facts: AudioFacts,
  profile: Pick<Profile, 'sampleRate' | 'channels' | 'resampler'>,
  start: number,
  signal: AbortSignal,
  report: DecodeReport,
): AsyncGenerator<Float32Array, void, undefined> {
  signal.throwIfAborted();
  const seek = Math.max(0, start - runUpSeconds);
  let skip = Math.round(start * profile.sampleRate) - Math.round(seek * profile.sampleRate);
  const budgetMs = options.budgetBaseMs + (options.budgetPerMegabyteMs * facts.container.size) / 2 ** 20;
  const output = new PassThrough({ highWaterMark: 256 * 1024 });

  const before = ['-nostdin', '-hide_banner', '-loglevel', 'repeat+error'];
  // CPU seconds, kept by the kernel: ends an ffmpeg that outlives this process without writing anything.
  before.push('-timelimit', `${Math.ceil(budgetMs / 1000)}`, ...inputOptions(facts.container));
  if (seek > 0) before.push('-ss', seek.toFixed(6));
  const after = ['-map', '0:a:0', '-vn', '-sn', '-dn', '-map_metadata', '-1'];
  after.push('-af', filterFor(facts, profile), '-c:a', 'pcm_f32le', '-f', 'f32le');
  const command = fluent({ stdoutLines: 20 })
    .setFfmpegPath(options.ffmpegPath)
    .input(`file:${file}`)
    // Spread: a single array would have its elements split at spaces.
    .inputOptions(...before)
    .output(output)
    .outputOptions(...after);

  let child: ChildProcess | undefined;
  let stopped: unknown;
  const gone = Promise.withResolvers<{ failed: boolean; error?: unknown }>();
  /** Ends everything; the reader sees `reason`. */
  const stop = (reason: unknown) => {
    stopped ??= reason;
    child?.kill('SIGKILL');
    output.destroy(reason instanceof Error ? reason : undefined);
  };
  command.on('start', () => {
    child = (command as unknown as { ffmpegProc: ChildProcess }).ffmpegProc;
    child.once('close', (code) => gone.resolve({ failed: code !== 0 }));
    if (stopped !== undefined) child.kill('SIGKILL');
  });
  // Before the start: it could not be run. Afterwards `close` tells.
  command.on('error', (error: Error) => {
    if (child === undefined) gone.resolve({ failed: true, error });
    output.destroy();
  });
  command.on('stderr', (line: string) => {
    if (line.trim() === '' || harmless.test(line)) return;
    report.errorLines += 1;
    report.firstError ??= line.slice(0, 300);
  });

  const onAbort = () => stop(signal.reason);
  signal.addEventListener('abort', onAbort, { once: true });
  const budget = setTimeout(
    () =>
      stop(
        new ProblemError(
          'decode_timeout',
          `Decoding took longer than the ${Math.round(budgetMs / 1000)} s that a file of this size may take.`,
        ),
      ),
    budgetMs,
  );
  let watchdog: NodeJS.Timeout | undefined;
  const onStall = () =>
    stop(
      new ProblemError(
        'decode_timeout',
        `Decoding made no progress for ${Math.round(options.stallMs / 1000)} s: the file is probably damaged.`,
      ),
    );

  try {
    command.run();
    const reader = output[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    let rest: Buffer = Buffer.alloc(0);
    while (true) {
      // Armed only while ffmpeg is waited for: a slow receiver is no stall.
      watchdog = setTimeout(onStall, options.stallMs);
      const next = await reader
        .next()
        .catch((error) => {
          throw stopped ?? error;
        })
        .finally(() => clearTimeout(watchdog));
      if (next.done === true) break;
      const bytes: Buffer = rest.length === 0 ? next.value : Buffer.concat([rest, next.value]);
      const whole = bytes.length - (bytes.length % 4);
      rest = bytes.subarray(whole);
      let pcm = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + whole));
      const skipped = Math.min(skip, pcm.length);
      skip -= skipped;
      pcm = pcm.subarray(skipped);
      if (pcm.length === 0) continue;
      report.sanitised += sanitise(pcm);
      report.samples += pcm.length;
      if (report.samples > options.maxDurationSeconds * profile.sampleRate) {
        throw new ProblemError(
          'audio_too_long',
          `The audio is longer than the ${options.maxDurationSeconds} s that are read: cut it, or ask for a range.`,
        );
      }
      yield pcm;
    }
    watchdog = setTimeout(onStall, options.stallMs);
    const end = await gone.promise.finally(() => clearTimeout(watchdog));
    if (stopped !== undefined) throw stopped;
    if (child === undefined) throw new InfrastructureFault('ffmpeg', 'ffmpeg cannot be run', end.error);
    report.reachedEnd = true;
    report.failed = end.failed;
  } finally {
    signal.removeEventListener('abort', onAbort);
    clearTimeout(budget);
    stop('done');
    // The scratch directory may be removed only when nothing reads from it.
    await gone.promise;
  }
}

/** Replaces what is no finite sample by 0, in place. @returns how many were. */
function sanitise(pcm: Float32Array): number {
  let replaced = 0;
  for (let n = 0; n < pcm.length; n += 1) {
    const sample = pcm[n]!;
    // Written so that NaN fails it.
    if (sample <= absurdSample && sample >= -absurdSample) continue;
    pcm[n] = 0;
    replaced += 1;
  }
  return replaced;
}
