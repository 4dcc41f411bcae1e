/** The inference stage: the windows of one tensor -> logits -> probabilities -> the job record. */
import type { Manifest } from '@acousticsense/shared/bundle';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import type { Decoded } from '@acousticsense/shared/job';
import type { Stage, StageJob } from '@acousticsense/shared/stage';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';
import { parseNpy } from '@acousticsense/shared/tensor';
import { aggregate } from './aggregate.ts';
import { type Batcher, CrashedAlone, type Inferred } from './batcher.ts';

export interface InferenceStageDeps {
  readonly manifest: Pick<Manifest, 'profile' | 'calibration' | 'aggregation'>;
  readonly storage: Pick<Storage, 'read'>;
  readonly batcher: Batcher;
  /** The provider in use: what a result names when no window had to be run. */
  readonly provider: () => string;
}

const maxCrashes = 2;

export function createInferenceStage({ manifest, storage, batcher, provider }: InferenceStageDeps): Stage {
  const { melBands, windowFrames } = manifest.profile;
  const windowBytes = melBands * windowFrames;

  return {
    async run(job, signal) {
      const { decoded } = job.record;
      if (decoded === undefined) return job.sendBack('the record holds nothing decoded');
      const waited = waitSinceDecoded(job);

      using _room = await batcher.admit(decoded.windows.length * windowBytes, signal);
      const windows = await readWindows(decoded, signal);
      if (typeof windows === 'string') return job.sendBack(windows);

      const heard = windows.filter((_, i) => !decoded.windows[i]!.silent);
      const inferred = heard.length === 0 ? nothing() : await classify(job, heard, signal);
      let next = 0;
      const logits = decoded.windows.map(({ silent }) => (silent ? null : inferred.logits[next++]!));

      await job.commit('completed', {
        outcome: { ...aggregate(logits, manifest), provider: inferred.provider },
        timings: { inferenceWait: waited, batchWait: inferred.batchWaitMs, inference: inferred.runMs },
      });
    },

    async handOn() {},
  };

  /** @returns the windows, or in words why the tensor is not the one that the record describes. */
  async function readWindows(decoded: Decoded, signal: AbortSignal): Promise<Uint8Array[] | string> {
    const expected = [decoded.windows.length, melBands, windowFrames];
    try {
      const { shape, data } = parseNpy(await storage.read(`${decoded.tensorKey}.npy`, signal));
      if (JSON.stringify(shape) !== JSON.stringify(expected))
        return `the tensor is ${shape}, expected ${expected}`;
      return decoded.windows.map((_, i) => data.subarray(i * windowBytes, (i + 1) * windowBytes));
    } catch (error) {
      if (error instanceof ObjectNotFound) return error.message;
      if (error instanceof TypeError) return `the tensor is damaged: ${error.message}`;
      throw error;
    }
  }

  async function classify(job: StageJob, windows: Uint8Array[], signal: AbortSignal): Promise<Inferred> {
    try {
      const alone = (job.record.crashes ?? 0) > 0;
      return await batcher.submit(job.record.id, windows, { signal, alone });
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
  function nothing(): Inferred {
    return { logits: [], batchWaitMs: 0, runMs: 0, provider: provider() };
  }
}

/** Milliseconds since acceptance that the decoder does not account for. */
function waitSinceDecoded({ record }: StageJob): number {
  const { decodeWait = 0, decodeFetch = 0, decode = 0 } = record.timings ?? {};
  return Math.max(0, Date.now() - record.createdAt - decodeWait - decodeFetch - decode);
}
