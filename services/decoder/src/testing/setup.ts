/** What the decoder's tests share: the default model's profile, real ffmpeg, a directory that goes away. */
import { readFileSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Profile, profileSchema } from '@acousticsense/shared/bundle';
import type { Selection } from '@acousticsense/shared/job';
import { parseNpy } from '@acousticsense/shared/tensor';
import { loadConfig } from '../config.ts';
import { createFfmpeg, type FfmpegOptions } from '../ffmpeg.ts';
import { createFrontEnd } from '../front-end.ts';

/** The front end of the embedded default model: 30 s windows, 128 bands, 128 frames. */
export const defaultProfile: Profile = {
  sampleRate: 22_050,
  channels: 'mean',
  resampler: 'soxr',
  window: 'hann',
  fftSize: 2048,
  hopLength: 5168,
  centered: false,
  padMode: 'none',
  power: 2,
  melScale: 'slaney',
  melNorm: 'slaney',
  melBands: 128,
  minHz: 0,
  maxHz: 11_025,
  reference: 'max',
  scope: 'window',
  floorDb: -70,
  stretch: 'none',
  quantisation: 'linear-uint8',
  windowFrames: 128,
  stepFrames: 64,
  placement: 'anchored',
  shortInput: 'loop',
};

/** 2.97 s windows of 128 frames, so that short files hold several. */
export const fineProfile: Profile = {
  ...defaultProfile,
  hopLength: 512,
  centered: true,
  padMode: 'zero',
  floorDb: -80,
};

const shipped = new URL('../../../../models/profiles/ccmusic-mel.json', import.meta.url);
/** The shipped front end of the seed's checkpoint: slices of 11.4 s, reference over the track, each slice stretched. */
export const ccmusicProfile: Profile = profileSchema.parse(JSON.parse(readFileSync(shipped, 'utf8')).profile);

export const profiles = { default: defaultProfile, fine: fineProfile, ccmusic: ccmusicProfile };

export const ffmpegOptions: FfmpegOptions = loadConfig({}).ffmpeg;

export interface TestDirectory extends AsyncDisposable {
  readonly directory: string;
  file(name: string): string;
}

export async function openDirectory(): Promise<TestDirectory> {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-decoder-'));
  return {
    directory,
    file: (name) => path.join(directory, name),
    [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }),
  };
}

/** Runs the whole front end on a file. */
export async function analyse(
  file: string,
  {
    profile = defaultProfile,
    options = ffmpegOptions,
    signal = AbortSignal.timeout(60_000),
    ...selection
  }: Partial<Selection> & { profile?: Profile; options?: FfmpegOptions; signal?: AbortSignal } = {},
) {
  await using scratch = await openDirectory();
  const frontEnd = createFrontEnd({
    ffmpeg: createFfmpeg(options),
    profile,
    maxSeconds: options.maxDurationSeconds,
  });
  const asked: Selection = { windows: 'middle', start: 0, ...selection };
  const { tensorFile, spectrogramFile, ...facts } = await frontEnd.analyse(
    file,
    asked,
    scratch.directory,
    signal,
  );
  const [tensor, spectrogram] = await Promise.all(
    [tensorFile, spectrogramFile].map(async (at) => parseNpy(await readFile(at))),
  );
  return {
    ...facts,
    tensor: tensor!,
    spectrogram: spectrogram!,
    codes: facts.warnings.map(({ code }) => code),
  };
}

/** Command lines of running processes that name this path. */
export async function processesNaming(needle: string): Promise<string[]> {
  const found: string[] = [];
  for (const pid of await readdir('/proc')) {
    if (!/^\d+$/.test(pid) || Number(pid) === process.pid) continue;
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    if (command.includes(needle)) found.push(command.replaceAll('\0', ' '));
  }
  return found;
}
