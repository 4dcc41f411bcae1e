import path from 'node:path';
import { loadBundle } from '@acousticsense/shared/bundle';
import { type AnsweredFile, answerFiles, forgettingJournal, openJournal } from '../answers.ts';
import { fewestClips, fitCalibration, writeCalibration } from '../calibration.ts';
import { defineCommand } from '../command.ts';
import { percent } from '../evaluation.ts';
import { Failure, UsageError } from '../failure.ts';
import { findLabelledAudio } from '../labelled-audio.ts';
import { createLabelMatcher, type LabelMatcher, readAliases } from '../labels.ts';
import { findBundle } from '../private-system.ts';
import type { Clip } from '../temperature.ts';
import { analysisOf, analysisOptions, concurrencyOf, withService } from './with-service.ts';

export const modelCalibrate = defineCommand({
  name: 'model calibrate',
  summary: "Make a bundle's confidences mean what they say, by labelled files it was not trained on.",
  operands: [{ name: 'BUNDLE', help: 'the bundle whose model.json is written' }],
  options: {
    data: {
      type: 'string',
      value: 'CSV|DIR',
      help: `labelled files, named as for \`acousticsense evaluate\`; at least ${fewestClips}`,
    },
    ...analysisOptions,
    aliases: { type: 'string', value: 'FILE', help: "JSON that leads from labels to the model's" },
    out: {
      type: 'string',
      value: 'DIR',
      help: 'keep the answers there, so that a run that was stopped goes on where it was',
    },
    'dry-run': { type: 'boolean', help: 'measure, and write nothing' },
    json: { type: 'boolean', help: 'print what was fitted as JSON' },
  },
  notes:
    "Temperature scaling: logits are divided by one fitted number, so the best answer of a window stays the same. The error after it is measured by cross-validation, on files that the number was not fitted on. A model that lets windows vote is fitted on its windows: votes know no temperature.\nThe threshold becomes the least one above which two answers in three are right. The bundle's digest changes: services that serve it have to be started again.",
  examples: [
    { line: 'model calibrate models/ccmusic --data valid.csv', does: 'as the bundle analyses by default' },
    { line: 'model calibrate my-bundle --data valid/ --windows all --dry-run', does: 'what would it give?' },
  ],
  async run({ operands, options, terminal, config, signal }) {
    if (options.data === undefined)
      throw new UsageError('acousticsense model calibrate needs --data CSV|DIR: labelled files.');
    const analysis = analysisOf(options);
    const concurrency = concurrencyOf(options);
    const directory = findBundle(operands[0]!);
    const bundle = await loadBundle(directory, { verifyFiles: false });
    const { manifest } = bundle;
    const { labels, aggregation } = manifest;
    const aliases = options.aliases === undefined ? {} : await readAliases(options.aliases);
    const match = createLabelMatcher(labels, aliases);
    const audio = await findLabelledAudio(options.data, (label) => match(label) !== undefined);
    // What the model has no label for cannot be judged: it is not even sent.
    const files = audio.files.filter(({ label }) => match(label) !== undefined);
    const left = audio.files.length - files.length;
    for (const note of [audio.rule, ...audio.notes]) terminal.note(note);
    if (left > 0) terminal.note(`${left} files have labels that the model does not know; they are left out.`);
    // Before hours of work: what the fit would refuse in the end.
    refuseBefore(files.length);

    const { answered } = await withService(
      { options: { bundle: directory }, config, terminal, signal },
      async (service, running) => {
        await using journal =
          options.out === undefined ? forgettingJournal() : await openJournal(path.resolve(options.out));
        // Awaited here: the journal is closed on return.
        return await answerFiles(files, {
          service,
          options: { ...analysis, vectors: true },
          journal,
          concurrency,
          startProgress: (total) => terminal.progress('files', total),
          signal: running,
        });
      },
    );
    const clips = toClips(answered, match);
    if (clips.length < files.length) {
      terminal.note(
        `${files.length - clips.length} files gave no genre (broken or silent); they are left out.`,
      );
    }
    const windows = analysis.windows ?? manifest.windows;
    const data = `${clips.length} files of ${path.basename(path.resolve(options.data))}, windows: ${windows}`;
    const fitted = fitCalibration(clips, { aggregation, data, labels });
    const { calibration, threshold, accuracy } = fitted;
    const dryRun = options['dry-run'] === true;
    const { digest } = dryRun
      ? await loadBundle(directory, { verifyFiles: false })
      : await writeCalibration(bundle, fitted);
    if (options.json === true)
      terminal.print(JSON.stringify({ bundle: directory, digest, written: !dryRun, ...fitted }, null, 2));
    else {
      terminal.print(
        [
          `temperature ${calibration.temperature}, fitted on ${calibration.clips} files`,
          `calibration error ${percent(calibration.eceBefore)} before, ${percent(calibration.ece)} after (cross-validated${aggregation === 'vote' ? ', of windows' : ''})`,
          `top-1 ${percent(accuracy.top1)}, top-3 ${percent(accuracy.top3)}, mean recall ${percent(accuracy.meanRecall)}`,
          `threshold ${threshold}: at or above it two answers in three are right`,
          dryRun
            ? 'Nothing was written.'
            : `${path.join(directory, 'model.json')} is written. The digest is now ${digest}: start services that serve this bundle again.`,
        ].join('\n'),
      );
    }
    if (calibration.temperature > 19 || calibration.temperature < 0.06) {
      terminal.note(
        'The temperature is at the end of its range: the answers have hardly anything to do with these labels. Are the labels right, and does `acousticsense model check` pass?',
      );
    } else if (calibration.ece > calibration.eceBefore) {
      terminal.note(
        'The temperature does not lower the error on files it was not fitted on: the model was calibrated well, or these are too few.',
      );
    }
    return 0;
  },
});

function refuseBefore(count: number): void {
  if (count >= fewestClips) return;
  throw new Failure(
    `${count} files with a label that the model knows are too few to calibrate on: ${fewestClips} are the least, a few hundred are good.`,
  );
}

function toClips(answered: readonly AnsweredFile[], match: LabelMatcher): Clip[] {
  return answered.flatMap(({ file, answer }) => {
    const logits = (answer.vectors?.windows ?? []).flatMap((window) =>
      window.logits === null ? [] : [window.logits],
    );
    return logits.length === 0 ? [] : [{ name: file.name, truth: match(file.label)!, logits }];
  });
}
