/**
 * From an audio file to what the model reads: one call that hides how the file is gone through.
 *
 * Two ways lead to the same numbers. Windows at known places of a file whose length is trusted are sought one by
 * one (`readSpans`). Everything else is read from the start of the range to its end, all frames go to a scratch file
 * (`readAll`), and windows are chosen when the true length is known. One window of a file whose length is not
 * trusted costs a pass that only counts. When a header turns out to have lied, the file is read again in full.
 */
import { open, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Profile } from '@acousticsense/shared/bundle';
import { ProblemError } from '@acousticsense/shared/errors';
import type { InputFacts, Selection, Warning } from '@acousticsense/shared/job';
import { npyHeader, type WindowInfo } from '@acousticsense/shared/tensor';
import type { AudioFacts, DecodeReport, Ffmpeg } from './ffmpeg.ts';
import { createFrameStore, type FrameStore } from './frame-store.ts';
import { countFrames, createFrameCutter, type FrameGrid } from './frames.ts';
import { createMelFilterbank, createPowerSpectrum, tinyPower, toDecibels } from './log-mel.ts';
import { createSpectrogram, type Spectrogram } from './spectrogram.ts';
import { collectWarnings, createLevelMeter, estimateBandwidth, silentDbfs } from './warnings.ts';
import { decibelRange, peakOf, planWindows, quantise } from './windows.ts';

/** Raised by every change of a number that the front end writes: it is part of a tensor's key. */
export const frontEndVersion = '1';

export interface Analysis {
  /** uint8 [windows, bands, frames] as `.npy` in the scratch directory. */
  readonly tensorFile: string;
  /** uint8 [128, columns] as `.npy` in the scratch directory; row 0 the lowest band. */
  readonly spectrogramFile: string;
  readonly windows: WindowInfo[];
  readonly input: InputFacts;
  readonly warnings: Warning[];
}

export interface FrontEnd {
  /**
   * @param scratch an own directory of this call, which the caller removes.
   * @param onProgress fraction of the range that has been read, 0..1.
   * @throws {ProblemError} every way in which audio can be unusable; see `errors.ts`, "The audio".
   */
  analyse(
    file: string,
    selection: Selection,
    scratch: string,
    signal: AbortSignal,
    onProgress?: (fraction: number) => void,
  ): Promise<Analysis>;
}

const shortestSeconds = 1;
/** Declared durations are off by encoder padding; windows that are sought stay clear of the end by this much. */
const endMarginSeconds = 0.5;
/** Up to here a file of unknown length is read once and in full rather than counted first. */
const readAllSeconds = 120;
/** Starting ffmpeg costs as much as decoding about a minute. */
const seekCostSeconds = 60;

export function createFrontEnd({
  ffmpeg,
  profile,
  maxSeconds,
}: {
  ffmpeg: Ffmpeg;
  profile: Profile;
  maxSeconds: number;
}): FrontEnd {
  const { sampleRate, fftSize, hopLength: hop, melBands: bands, windowFrames, power } = profile;
  const grid: FrameGrid = { fftSize, hop, lead: profile.centered ? fftSize / 2 : 0 };
  // Their work areas are shared by all jobs of the process: every use is synchronous.
  const spectrum = createPowerSpectrum(fftSize);
  const filterbank = createMelFilterbank(profile);

  async function analyse(
    file: string,
    selection: Selection,
    scratch: string,
    signal: AbortSignal,
    onProgress: (fraction: number) => void = () => {},
  ): Promise<Analysis> {
    const facts = await ffmpeg.probe(file, signal);
    const store = await createFrameStore(path.join(scratch, 'frames.f32'), bands);
    try {
      const job: Job = { file, facts, selection, signal, onProgress, store, limit: limitOf(selection) };
      const pass = await readRange(job);
      return await render(job, pass, scratch);
    } finally {
      await store.close();
    }
  }

  /** Samples in the range, were the file endless. */
  function limitOf({ duration }: Selection): number {
    return duration === undefined ? Number.POSITIVE_INFINITY : Math.round(duration * sampleRate);
  }

  async function readRange(job: Job): Promise<Pass> {
    const { facts, selection } = job;
    const { start, windows } = selection;
    if (facts.durationTrusted && start >= facts.duration!) throw outside(start, facts.duration!);
    if (profile.scope === 'track' || windows === 'all') return readAll(job);

    let length: number | undefined;
    let counted: Counted | undefined;
    if (facts.durationTrusted) {
      length = Math.min(job.limit, Math.floor((facts.duration! - endMarginSeconds - start) * sampleRate));
    } else if (isSingle(windows) && (facts.duration ?? Number.POSITIVE_INFINITY) - start > readAllSeconds) {
      counted = await countRange(job);
      length = counted.length;
    }
    if (length === undefined || countFrames(grid, length) <= windowFrames) return readAll(job);
    if (length > maxSeconds * sampleRate) throw tooLong();
    const seekSeconds = (windowFrames * hop) / sampleRate + seekCostSeconds;
    const places = typeof windows === 'number' ? windows : 1;
    if (places * seekSeconds > (0.7 * length) / sampleRate) return readAll(job);
    return (await readSpans(job, length, counted)) ?? readAll(job);
  }

  /** A first pass that only counts samples. */
  async function countRange(job: Job): Promise<Counted> {
    const { pcm, report } = ffmpeg.readMono(
      job.file,
      job.facts,
      { profile, start: job.selection.start },
      job.signal,
    );
    let length = 0;
    for await (const chunk of pcm) {
      length += chunk.length;
      tellProgress(job, length / 2);
      if (length >= job.limit) break;
    }
    return { length: Math.min(length, job.limit), report };
  }

  function tellProgress({ facts, selection, limit, onProgress }: Job, samples: number): void {
    if (facts.duration === undefined) return;
    const expected = Math.min(limit, (facts.duration - selection.start) * sampleRate);
    if (expected > 0) onProgress(Math.min(1, samples / expected));
  }

  /** Collects what every way of reading collects. */
  function createCollector(store: FrameStore, spectrogram: Spectrogram) {
    const meanPower = new Float64Array(spectrum.bins);
    const levels = createLevelMeter();
    let frames = 0;
    let loudest = 0;

    function onFrame(frame: number, buffer: Float32Array, offset: number): void {
      const bins = spectrum.transform(buffer, offset);
      for (let bin = 0; bin < bins.length; bin += 1) meanPower[bin]! += bins[bin]!;
      frames += 1;
      const { block, offset: at } = store.next(frame);
      filterbank.apply(bins, block, at);
      if (profile.scope === 'track') loudest = Math.max(loudest, peakOf(block.subarray(at, at + bands)));
    }

    return {
      levels,
      spectrogram,
      get loudest() {
        return loudest;
      },
      get meanPower() {
        return meanPower.map((sum) => sum / Math.max(1, frames));
      },
      /** Takes samples from `firstSample` on; frames from `firstFrame` on. */
      begin(firstFrame: number, firstSample: number) {
        const cutter = createFrameCutter(grid, { firstFrame, firstSample }, onFrame);
        const picture = spectrogram.cutterFrom(firstSample);
        let position = firstSample;
        return {
          async push(pcm: Float32Array): Promise<void> {
            levels.push(pcm, position);
            position += pcm.length;
            cutter.push(pcm);
            picture.push(pcm);
            await store.drain();
          },
          finish(frameCount: number, pictureColumns: number): void {
            cutter.finish(frameCount);
            picture.finish(pictureColumns);
          },
        };
      },
    };
  }

  async function readAll(job: Job): Promise<Pass> {
    const { file, facts, selection, signal, store, limit } = job;
    const declared =
      facts.duration === undefined ? 0 : Math.max(0, (facts.duration - selection.start) * sampleRate);
    const expectedSamples = Math.min(limit, declared, maxSeconds * sampleRate);
    const spectrogram = createSpectrogram(profile, spectrum, { origin: 0, expectedSamples });
    const collector = createCollector(store, spectrogram);
    const sink = collector.begin(0, 0);
    const { pcm, report } = ffmpeg.readMono(file, facts, { profile, start: selection.start }, signal);
    let length = 0;
    for await (const chunk of pcm) {
      const part = chunk.length > limit - length ? chunk.subarray(0, limit - length) : chunk;
      await sink.push(part);
      length += part.length;
      tellProgress(job, length);
      if (length >= limit) break;
    }
    requireAudio(job, length, report);
    const frames = countFrames(grid, length);
    sink.finish(frames, spectrogram.columnsIn(length));
    const starts = planWindows(selection.windows, frames, profile);
    return {
      collector,
      report,
      starts,
      frames,
      length,
      ...(report.reachedEnd ? { endsAt: selection.start + length / sampleRate } : {}),
    };
  }

  /** @returns undefined when the file ends before a window does: its length was not what it said. */
  async function readSpans(
    job: Job,
    length: number,
    counted: Counted | undefined,
  ): Promise<Pass | undefined> {
    const { file, facts, selection, signal, store, limit } = job;
    const frames = countFrames(grid, length);
    const starts = planWindows(selection.windows, frames, profile);
    const origin = starts[0]! * hop;
    const end = Math.min((starts.at(-1)! + windowFrames) * hop, limit);
    const spectrogram = createSpectrogram(profile, spectrum, { origin, expectedSamples: end - origin });
    const collector = createCollector(store, spectrogram);
    const reports: DecodeReport[] = [];
    for (const [index, first] of starts.entries()) {
      const from = Math.max(0, first * hop - grid.lead);
      const needed = Math.min(length, (first + windowFrames - 1) * hop - grid.lead + fftSize);
      const until = Math.min(limit, Math.max(needed, (first + windowFrames) * hop));
      const sink = collector.begin(first, from);
      const at = selection.start + from / sampleRate;
      const { pcm, report } = ffmpeg.readMono(file, facts, { profile, start: at }, signal);
      let position = from;
      for await (const chunk of pcm) {
        const part = chunk.length > until - position ? chunk.subarray(0, until - position) : chunk;
        await sink.push(part);
        position += part.length;
        if (position >= until) break;
      }
      if (position < needed) return undefined;
      sink.finish(first + windowFrames, spectrogram.columnsIn(position));
      reports.push(report);
      job.onProgress((index + 1) / starts.length);
    }
    const endsAt = counted?.report.reachedEnd ? { endsAt: selection.start + length / sampleRate } : {};
    return { collector, report: counted?.report ?? sum(reports), starts, frames, length, ...endsAt };
  }

  function requireAudio({ facts, selection }: Job, length: number, report: Readonly<DecodeReport>): void {
    if (length >= shortestSeconds * sampleRate) return;
    const seconds = length / sampleRate;
    const { start, duration } = selection;
    if (report.failed || (length === 0 && report.errorLines > 0)) {
      throw new ProblemError(
        'decode_failed',
        `The audio could not be decoded${report.firstError === undefined ? '' : ` (${report.firstError.trim()})`}: send another copy.`,
      );
    }
    if (start > 0 && length === 0) throw outside(start, facts.duration);
    const what = start > 0 || duration !== undefined ? 'The asked range' : 'The file';
    throw new ProblemError(
      'audio_too_short',
      `${what} holds ${seconds.toFixed(3)} s of audio: at least ${shortestSeconds} s are needed, 15 to 30 s are best.`,
    );
  }

  function tooLong(): ProblemError {
    return new ProblemError(
      'audio_too_long',
      `The audio is longer than the ${maxSeconds} s that are read: cut it, or ask for a range.`,
    );
  }

  async function render(job: Job, pass: Pass, scratch: string): Promise<Analysis> {
    const { store, selection, facts } = job;
    const { collector, starts, frames, length } = pass;
    const validFrames = Math.min(windowFrames, frames);
    const tensorFile = path.join(scratch, 'tensor.npy');
    const spectrogramFile = path.join(scratch, 'spectrogram.npy');
    const windows: WindowInfo[] = [];
    let clipped = 0;

    const tensor = await open(tensorFile, 'w');
    try {
      await tensor.write(npyHeader([starts.length, bands, windowFrames]));
      const bytes = new Uint8Array(bands * windowFrames);
      for (const first of starts) {
        const mel = await store.read(first, validFrames);
        const reference = Math.max(profile.scope === 'track' ? collector.loudest : peakOf(mel), tinyPower);
        const range = decibelRange(mel, { ...profile, reference });
        const { quantisation } = profile;
        quantise(mel, bytes, { bands, windowFrames, validFrames, range, quantisation, power });
        await tensor.write(bytes);
        const until = Math.min(length, (first + windowFrames) * hop);
        const { peak, clippedShare } = collector.levels.between(first * hop, until);
        const peakDbfs = toDecibels(peak * peak, 2);
        windows.push({
          start: seconds(selection.start + (first * hop) / sampleRate),
          end: seconds(selection.start + until / sampleRate),
          validFrames,
          dbAt0: range.topDb - range.spanDb,
          dbAt255: range.topDb,
          peakDbfs,
          silent: peakDbfs < silentDbfs,
        });
        clipped += clippedShare / starts.length;
      }
    } finally {
      await tensor.close();
    }

    const until = Math.min(length, (starts.at(-1)! + windowFrames) * hop);
    const picture = collector.spectrogram.render(starts[0]! * hop, until);
    await writeFile(spectrogramFile, Buffer.concat([npyHeader(picture.shape), picture.data]));

    const bandwidth = estimateBandwidth(collector.meanPower, sampleRate);
    const duration = pass.endsAt ?? facts.duration ?? selection.start + length / sampleRate;
    const input: InputFacts = {
      container: facts.container.name,
      codec: facts.codec,
      sampleRate: facts.sampleRate,
      channels: facts.channels,
      duration: seconds(duration),
      bitRate: Math.round(facts.bitRate ?? (facts.container.size * 8) / duration),
      analysedStart: windows[0]!.start,
      analysedEnd: windows.at(-1)!.end,
      bandwidth: Math.round(Math.min(bandwidth.hz, facts.sampleRate / 2)),
    };
    const warnings = collectWarnings({
      facts,
      report: pass.report,
      windows,
      analysedSeconds: (until - starts[0]! * hop) / sampleRate,
      ...(pass.endsAt === undefined ? {} : { actualSeconds: pass.endsAt }),
      clippedShare: clipped,
      bandwidth,
    });
    return { tensorFile, spectrogramFile, windows, input, warnings };
  }

  type Collector = ReturnType<typeof createCollector>;
  interface Pass {
    readonly collector: Collector;
    readonly report: Readonly<DecodeReport>;
    /** First frames of the windows. */
    readonly starts: readonly number[];
    /** Frames and samples in the range; of a sought file, as far as its windows needed to know. */
    readonly frames: number;
    readonly length: number;
    /** Seconds at which the file ends, when its end was seen. */
    readonly endsAt?: number;
  }

  return { analyse };
}

interface Job {
  readonly file: string;
  readonly facts: AudioFacts;
  readonly selection: Selection;
  readonly signal: AbortSignal;
  readonly onProgress: (fraction: number) => void;
  readonly store: FrameStore;
  /** Samples that the selection allows. */
  readonly limit: number;
}

interface Counted {
  readonly length: number;
  readonly report: Readonly<DecodeReport>;
}

function isSingle(windows: Selection['windows']): boolean {
  return windows === 'middle' || windows === 1;
}

function outside(start: number, duration: number | undefined): ProblemError {
  const length = duration === undefined ? 'ends before' : `is ${duration.toFixed(2)} s long, which is before`;
  return new ProblemError(
    'range_outside_audio',
    `The audio ${length} the asked start of ${start} s: ask for an earlier one.`,
    {
      field: 'start',
    },
  );
}

function sum(reports: readonly Readonly<DecodeReport>[]): DecodeReport {
  const total: DecodeReport = { samples: 0, sanitised: 0, errorLines: 0, reachedEnd: false, failed: false };
  for (const report of reports) {
    total.samples += report.samples;
    total.sanitised += report.sanitised;
    total.errorLines += report.errorLines;
    total.failed ||= report.failed;
  }
  return total;
}

/** Microseconds are enough, and keep the record's JSON short. */
function seconds(value: number): number {
  return Number(value.toFixed(6));
}
