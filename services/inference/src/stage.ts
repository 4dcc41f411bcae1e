/**
 * The inference stage: the windows of one tensor -> logits -> probabilities -> the job record, and beside it what the
 * job asked for: attention maps and vectors, in objects that are there before the record says `completed`.
 */
import type { Manifest } from '@acousticsense/shared/bundle';
import { meanOf } from '@acousticsense/shared/doubt';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import {
  type Decoded,
  inlineWindows,
  type Outcome,
  sidecarSchema,
  type Timeline,
} from '@acousticsense/shared/job';
import { explanationKey, timelineKey, vectorsKey } from '@acousticsense/shared/object-keys';
import type { Stage, StageJob } from '@acousticsense/shared/stage';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { parseNpy, type WindowInfo } from '@acousticsense/shared/tensor';
import { aggregate } from './aggregate.ts';
import { type Batcher, CrashedAlone, type Inferred } from './batcher.ts';
import { explainedOf, explanationOf, vectorsOf } from './extras.ts';
import { CannotExplain } from './model-process.ts';
import type { GraphName, GraphOutputs } from './model-session.ts';

export interface InferenceStageDeps {
  readonly manifest: Pick<Manifest, 'profile' | 'calibration' | 'aggregation' | 'labels' | 'graph'>;
  readonly storage: Pick<Storage, 'read' | 'put'>;
  readonly batcher: Batcher;
  /** The provider in use: what a result names when no window had to be run. */
  readonly provider: () => string;
}

const maxCrashes = 2;

export function createInferenceStage({ manifest, storage, batcher, provider }: InferenceStageDeps): Stage {
  const { melBands, windowFrames } = manifest.profile;
  const { outputs, explain } = manifest.graph;
  const windowBytes = melBands * windowFrames;

  return {
    async run(job, signal) {
      const { decoded } = job.record;
      if (decoded === undefined) return job.sendBack('the record holds nothing decoded');
      const waited = waitSinceDecoded(job);
      const spans = decoded.windows ?? (await readSpans(decoded, signal));
      if (spans === undefined) return job.sendBack('the sidecar of the tensor is gone');

      using _room = await batcher.admit(spans.length * windowBytes, signal);
      const windows = await readWindows(decoded, spans.length, signal);
      if (typeof windows === 'string') return job.sendBack(windows);

      const heard = spans.flatMap(({ silent, start, end }, i) =>
        silent ? [] : [{ start, end, cells: windows[i]! }],
      );
      const inferred = heard.length === 0 ? nothing() : await classify(job, heard, signal);
      let next = 0;
      const answers = spans.map(({ silent }) => (silent ? null : inferred.windows[next++]!));
      const { probabilities, windows: perWindow } = aggregate(
        answers.map((answer) => answer?.logits ?? null),
        manifest,
      );
      const outliers = outputs.outlier ? answers.map((answer) => answer && outlierOf(answer)) : undefined;

      const { record } = job;
      const { extras } = record;
      const write = (key: string, value: unknown) =>
        storage.put(key, Buffer.from(JSON.stringify(value)), signal);
      const timeline: Timeline = {
        v: 1,
        windows: spans,
        probabilities: perWindow,
        ...(outliers ? { outliers } : {}),
      };
      const short = spans.length <= inlineWindows;
      if (!short) await write(timelineKey(record), timeline);
      const outlier = meanOf(outliers);
      const outcome: Outcome = {
        probabilities,
        ...(short ? { windows: perWindow, ...(outliers ? { outliers } : {}) } : {}),
        ...(outlier === undefined ? {} : { outlier }),
        provider: inferred.provider,
      };
      if (extras?.vectors) {
        const embeds = outputs.embedding !== undefined;
        const vectors = vectorsOf(manifest.labels, spans, answers, embeds);
        await write(vectorsKey(record), vectors);
      }
      if (extras?.explain && explain) {
        const shown = explainedOf(heard);
        const maps = await attentionOf(job, shown, signal);
        const columns = explain.output.shape.at(-1) as number;
        if (maps) await write(explanationKey(record), explanationOf(shown, maps, columns));
      }

      await job.commit('completed', {
        outcome,
        timings: { inferenceWait: waited, batchWait: inferred.batchWaitMs, inference: inferred.runMs },
      });
    },

    async handOn() {},
  };

  /** @returns the windows, or in words why the tensor is not the one that the record describes. */
  async function readWindows(
    decoded: Decoded,
    count: number,
    signal: AbortSignal,
  ): Promise<Uint8Array[] | string> {
    const expected = [count, melBands, windowFrames];
    try {
      const { shape, data } = parseNpy(await storage.read(`${decoded.tensorKey}.npy`, signal));
      if (JSON.stringify(shape) !== JSON.stringify(expected))
        return `the tensor is ${shape}, expected ${expected}`;
      return Array.from({ length: count }, (_, i) => data.subarray(i * windowBytes, (i + 1) * windowBytes));
    } catch (error) {
      if (error instanceof ObjectNotFound) return error.message;
      if (error instanceof TypeError) return `the tensor is damaged: ${error.message}`;
      throw error;
    }
  }

  /** Where the windows lie, of a recording of too many to stand in the record. */
  async function readSpans({ tensorKey }: Decoded, signal: AbortSignal): Promise<WindowInfo[] | undefined> {
    try {
      const text = await storage.read(`${tensorKey}.json`, signal);
      return sidecarSchema.safeParse(JSON.parse(text.toString('utf8'))).data?.windows;
    } catch (error) {
      if (error instanceof ObjectNotFound || error instanceof SyntaxError) return undefined;
      throw error;
    }
  }

  function classify(job: StageJob, windows: Heard[], signal: AbortSignal): Promise<Inferred<'classify'>> {
    return accusing(job, (alone) => batcher.submit(job.record.id, windows.map(cellsOf), { signal, alone }));
  }

  /** @returns undefined when the explain graph cannot be used: the genre is worth having without it. */
  async function attentionOf(
    job: StageJob,
    windows: Heard[],
    signal: AbortSignal,
  ): Promise<GraphOutputs['explain'][] | undefined> {
    if (windows.length === 0) return [];
    const { id } = job.record;
    const ask = (alone: boolean) => batcher.explain(id, windows.map(cellsOf), { signal, alone });
    try {
      return (await accusing(job, ask)).windows;
    } catch (error) {
      if (!(error instanceof CannotExplain)) throw error;
      job.log.error({ reason: error.message }, 'completed without the attention maps that were asked for');
      return undefined;
    }
  }

  /** Runs windows of a job; one that killed the model by itself counts against it. */
  async function accusing<G extends GraphName>(
    job: StageJob,
    ask: (alone: boolean) => Promise<Inferred<G>>,
  ): Promise<Inferred<G>> {
    try {
      return await ask((job.record.crashes ?? 0) > 0);
    } catch (error) {
      if (!(error instanceof CrashedAlone)) throw error;
      if ((await job.recordCrash()) >= maxCrashes) {
        throw new ProblemError(
          'quarantined',
          'This audio stopped the model more than once and is set aside; other files are not affected.',
        );
      }
      throw new InfrastructureFault('model', error.message, error);
    }
  }

  /** All windows are silent: there is nothing to ask the model. */
  function nothing(): Inferred<'classify'> {
    return { windows: [], batchWaitMs: 0, runMs: 0, provider: provider() };
  }
}

interface Heard {
  readonly start: number;
  readonly end: number;
  /** uint8 [bands, frames] */
  readonly cells: Uint8Array;
}
const cellsOf = ({ cells }: Heard) => cells;

/** @throws {RangeError} on a score that is not finite: JSON would turn it into "silent". */
function outlierOf({ outlier }: GraphOutputs['classify']): number {
  const score = outlier?.[0];
  if (!Number.isFinite(score))
    throw new RangeError('the model gave an outlier score that is not a finite number');
  return Math.round(score! * 1e4) / 1e4;
}

/** Milliseconds since acceptance that the decoder does not account for. */
function waitSinceDecoded({ record }: StageJob): number {
  const { decodeWait = 0, decodeFetch = 0, decode = 0 } = record.timings ?? {};
  return Math.max(0, Date.now() - record.createdAt - decodeWait - decodeFetch - decode);
}
