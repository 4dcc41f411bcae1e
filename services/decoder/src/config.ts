/** Configuration of the decoder, from the environment. */
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { readVariables, workerConfig, workerVariables } from '@acousticsense/shared/common-config';
import { z } from 'zod';

const positive = (otherwise: number) => z.coerce.number().positive().default(otherwise);

const schema = z.object({
  ...workerVariables,
  /** Files decoded at a time, one ffmpeg each; default: one for each core that this process may use. */
  DECODE_CONCURRENCY: z.coerce.number().int().min(1).max(256).optional(),
  /** Where audio is copied to and long tracks' frames are spilled: up to 1 GB a job in the worst case. */
  SCRATCH_DIR: z.string().default(tmpdir()),
  /** Largest object of a source bucket that is read, in bytes: 512 MiB, as for uploads. */
  MAX_UPLOAD_BYTES: z.coerce.number().int().positive().default(536_870_912),
  /** Longest audio that is read, in seconds: 4 hours. */
  MAX_DURATION_SECONDS: positive(14_400),
  FFMPEG_PATH: z.string().default('ffmpeg'),
  FFPROBE_PATH: z.string().default('ffprobe'),
  /** ffmpeg is killed when it is waited for this long without any output. */
  DECODE_STALL_SECONDS: positive(20),
  /** ffmpeg is killed after base + per megabyte of file, in seconds: room for a busy machine. */
  DECODE_BUDGET_SECONDS: positive(120),
  DECODE_BUDGET_SECONDS_PER_MB: positive(5),
});

/**
 * @param cores cores that this process may use.
 * @throws {StartupError} naming the variable.
 */
export function loadConfig(env: NodeJS.ProcessEnv, cores = availableParallelism()) {
  const v = readVariables(schema, env);
  return {
    ...workerConfig(v),
    concurrency: v.DECODE_CONCURRENCY ?? cores,
    scratchDirectory: path.resolve(v.SCRATCH_DIR),
    maxSourceBytes: v.MAX_UPLOAD_BYTES,
    ffmpeg: {
      ffmpegPath: v.FFMPEG_PATH,
      ffprobePath: v.FFPROBE_PATH,
      stallMs: v.DECODE_STALL_SECONDS * 1000,
      budgetBaseMs: v.DECODE_BUDGET_SECONDS * 1000,
      budgetPerMegabyteMs: v.DECODE_BUDGET_SECONDS_PER_MB * 1000,
      maxDurationSeconds: v.MAX_DURATION_SECONDS,
    },
  };
}

export type DecoderConfig = ReturnType<typeof loadConfig>;
