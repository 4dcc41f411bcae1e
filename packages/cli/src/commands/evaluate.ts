import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { answerFiles, openJournal } from '../answers.ts';
import { defineCommand, numberOption } from '../command.ts';
import { judge, type Report, toMarkdown, toText } from '../evaluation.ts';
import { Failure, systemCode, UsageError } from '../failure.ts';
import { findLabelledAudio, type LabelledFile } from '../labelled-audio.ts';
import { createLabelMatcher, readAliases } from '../labels.ts';
import { confusionPicture, reliabilityPicture, toPng } from '../pictures.ts';
import { writeWhole } from '../whole-file.ts';
import { analysisOf, analysisOptions, concurrencyOf, withService } from './with-service.ts';

export const evaluate = defineCommand({
  name: 'evaluate',
  summary: 'Send labelled files through the pipeline and tell how good the answers are.',
  operands: [
    {
      name: 'DIR|CSV',
      help: 'audio with one folder per label, or files named after their label (rock.01.mp3, Folk_Song.mp3), or a CSV with the columns path,label (paths relative to the CSV)',
    },
  ],
  options: {
    bundle: {
      type: 'string',
      value: 'BUNDLE',
      help: "evaluate this model bundle in a private system (default: the project's own models/default)",
    },
    url: { type: 'string', value: 'URL', help: 'evaluate the model of this running service instead' },
    key: { type: 'string', value: 'KEY', help: 'its API key; better in the variable ACOUSTICSENSE_KEY' },
    ...analysisOptions,
    aliases: {
      type: 'string',
      value: 'FILE',
      help: 'JSON that leads from labels to the model\'s: {"hiphop": "Hip-Hop"}; case and punctuation never matter',
    },
    threshold: {
      type: 'string',
      value: 'T',
      help: "count answers under this confidence as uncertain (default: the model's own threshold)",
    },
    out: {
      type: 'string',
      value: 'DIR',
      help: 'where answers and reports are kept (default: acousticsense-evaluation)',
    },
    json: { type: 'boolean', help: 'print the report as JSON' },
  },
  notes:
    'The report has accuracy, recall per genre, the commonest confusions, calibration and coverage.\nAnswers are kept as they come in OUT/answers.jsonl: the same command after Ctrl-C goes on where it was, and files that were answered by the same model with the same options are not sent again.\nOUT also gets report.json, report.md, confusion.png, reliability.png and both pictures as SVG.',
  examples: [
    { line: 'evaluate music/', does: 'the embedded model on folders named by genre' },
    { line: 'evaluate test.csv --bundle my-bundle --windows all --out report', does: 'a bundle of your own' },
    { line: 'evaluate test.csv --url http://localhost:8000 --json > report.json', does: 'a running service' },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const analysis = analysisOf(options);
    const asked = numberOption('threshold', options.threshold, { least: 0, most: 1 });
    const concurrency = concurrencyOf(options);
    if (options.url !== undefined && options.bundle !== undefined) {
      throw new UsageError('Give --bundle or --url, not both: a running service has its own model.');
    }
    if (options.url === undefined && options.key !== undefined)
      throw new UsageError('--key is for a running service: give its --url too.');
    const source = operands[0]!;
    const aliases = options.aliases === undefined ? {} : await readAliases(options.aliases);
    // Before anything is started: a wrong path is told at once.
    await findLabelledAudio(source, () => true);
    const out = path.resolve(options.out ?? 'acousticsense-evaluation');

    return withService({ options, config, terminal, signal }, async (service, running) => {
      const match = createLabelMatcher(service.model.labels, aliases);
      const audio = await findLabelledAudio(source, (label) => match(label) !== undefined);
      for (const note of [audio.rule, ...audio.notes]) terminal.note(note);
      refuseStrangers(audio.files, match, service.model.labels);
      await using journal = await openJournal(out);
      let sent = 0;
      const { answered, known } = await answerFiles(audio.files, {
        service,
        options: analysis,
        journal,
        concurrency,
        startProgress(total) {
          sent = total;
          if (total < audio.files.length) {
            terminal.note(`${audio.files.length - total} files were answered before; ${total} are sent.`);
          }
          return terminal.progress('files', total);
        },
        signal: running,
      }).catch((error: Error) => {
        if (sent > 0) terminal.note(`The answers so far are in ${out}; the same command goes on from there.`);
        throw error;
      });
      if (known === audio.files.length) terminal.note('Every file was answered before; none is sent.');
      const threshold = asked ?? service.model.threshold;
      const { rule } = audio;
      const report = judge(answered, {
        source,
        rule,
        model: service.model,
        options: analysis,
        threshold,
        match,
      });
      await writeReport(out, report);
      terminal.print(options.json === true ? JSON.stringify(report, null, 2) : toText(report, terminal));
      terminal.note(`\nThe report is in ${out}.`);
      if (report.judged > 0) return 0;
      const [first] = report.failures;
      throw new Failure(
        first === undefined
          ? 'Nothing could be judged.'
          : `Nothing could be judged: ${first.file}: ${first.message}`,
      );
    });
  },
});

/** Hours of work would end with nothing to judge. */
function refuseStrangers(
  files: readonly LabelledFile[],
  match: (label: string) => number | undefined,
  labels: readonly string[],
): void {
  if (files.some(({ label }) => match(label) !== undefined)) return;
  const theirs = [...new Set(files.map(({ label }) => label))];
  const shown = `${theirs.slice(0, 10).join(', ')}${theirs.length > 10 ? `, and ${theirs.length - 10} more` : ''}`;
  throw new Failure(
    `The model knows none of the labels (${shown}): it has ${labels.join(', ')}. Lead from one to the other with --aliases.`,
  );
}

/** @throws {Failure} when a file cannot be written; every file that is there is whole. */
async function writeReport(out: string, report: Report): Promise<void> {
  const files: Record<string, string | Buffer> = {
    'report.json': `${JSON.stringify(report, null, 2)}\n`,
    'report.md': toMarkdown(report),
  };
  if (report.accuracy !== null) {
    const pictures = { confusion: confusionPicture(report), reliability: reliabilityPicture(report) };
    for (const [name, svg] of Object.entries(pictures)) {
      files[`${name}.svg`] = svg;
      files[`${name}.png`] = toPng(svg);
    }
  }
  for (const [name, content] of Object.entries(files)) {
    const file = path.join(out, name);
    try {
      await mkdir(out, { recursive: true });
      await writeWhole(file, content);
    } catch (error) {
      throw new Failure(`${file} cannot be written (${systemCode(error)}).`);
    }
  }
}
