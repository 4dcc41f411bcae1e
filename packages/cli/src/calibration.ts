/** Writes into a bundle what was measured on its owner's labelled files. */
import { createHash } from 'node:crypto';
import { readFile, realpath } from 'node:fs/promises';
import path from 'node:path';
import { type Bundle, loadBundle, type Manifest, manifestSchema } from '@acousticsense/shared/bundle';
import { Failure, systemCode } from './failure.ts';
import { type Accuracy, accuracy, best, pickThreshold, reliability } from './metrics.ts';
import { type Aggregation, answerOf, type Clip, crossValidated } from './temperature.ts';
import { writeWhole } from './whole-file.ts';

export type Calibration = Exclude<Manifest['calibration'], 'none'>;

export interface Fitted {
  readonly calibration: Calibration;
  readonly threshold: number;
  readonly accuracy: Accuracy & { readonly split: string };
}

export const fewestClips = 50;
const reliabilityBins = 10;

/**
 * @param data what the clips are, in words for the manifest.
 * @throws {Failure} on clips that no temperature can be fitted on.
 */
export function fitCalibration(
  clips: readonly Clip[],
  { aggregation, data, labels }: { aggregation: Aggregation; data: string; labels: readonly string[] },
): Fitted {
  if (clips.length < fewestClips) {
    throw new Failure(
      `${clips.length} labelled files with sound are too few to calibrate on: ${fewestClips} are the least, a few hundred are good.`,
    );
  }
  const present = new Set(clips.map(({ truth }) => truth));
  if (present.size < 2) {
    throw new Failure(
      `All files are ${labels[clips[0]!.truth]}: to calibrate on, at least two of the model's labels must occur, better all.`,
    );
  }
  const { temperature, eceBefore, ece } = crossValidated(clips, aggregation);
  const kept = rounded(temperature);
  const judged = clips.map((clip) => answerOf(clip, kept, aggregation));
  const answers = judged.map(best);
  const oneWindow = clips.map((clip) => best(answerOf(middleWindow(clip), kept, aggregation)));
  const { top1, top3, meanRecall } = accuracy(judged);
  return {
    calibration: {
      method: 'temperature',
      temperature: kept,
      data,
      clips: clips.length,
      eceBefore: rounded(eceBefore),
      ece: rounded(ece),
      reliability: reliability(oneWindow, reliabilityBins).map(({ from, to, clips, right }) => ({
        from,
        to,
        clips,
        right,
      })),
    },
    threshold: pickThreshold(answers),
    accuracy: {
      split: data,
      clips: clips.length,
      top1: rounded(top1),
      top3: rounded(top3),
      meanRecall: rounded(meanRecall),
    },
  };
}

/** The manifest's `reliability` is of answers from one window, whatever was analysed here. */
function middleWindow({ name, truth, logits }: Clip): Clip {
  return { name, truth, logits: [logits[Math.floor(logits.length / 2)]!] };
}

const rounded = (value: number) => Math.round(value * 1e4) / 1e4;

/**
 * Replaces calibration, threshold and accuracy in model.json in one step; all else stays as it was written.
 *
 * @param measured the bundle whose answers were fitted.
 * @returns the bundle as it is now, with another digest.
 * @throws {Failure} when it cannot be written, or is another one by now; then nothing has changed.
 */
export async function writeCalibration(measured: Bundle, fitted: Fitted): Promise<Bundle> {
  const { directory } = measured;
  // Through a link: the file it leads to is replaced, not the link.
  const file = await realpath(path.join(directory, 'model.json'));
  const text = await readFile(file);
  if (createHash('sha256').update(text).digest('hex') !== measured.digest) {
    throw new Failure(
      `${file} has changed since the files were sent, so what was measured is not of this model: nothing was written.`,
    );
  }
  const manifest = { ...(JSON.parse(text.toString('utf8')) as object), ...fitted };
  manifestSchema.parse(manifest);
  try {
    await writeWhole(file, `${JSON.stringify(manifest, null, 2)}\n`);
  } catch (error) {
    throw new Failure(`${file} cannot be written (${systemCode(error)}): nothing was changed.`);
  }
  return loadBundle(directory, { verifyFiles: false });
}
