import { stat } from 'node:fs/promises';
import path from 'node:path';
import { loadBundle } from '@acousticsense/shared/bundle';
import { answerFiles, forgettingJournal } from '../answers.ts';
import { defineCommand, numberOption } from '../command.ts';
import { percent } from '../evaluation.ts';
import { Failure, UsageError } from '../failure.ts';
import { createLabelMatcher } from '../labels.ts';
import { compareLogits, type Parity, readReference } from '../parity.ts';
import { findBundle } from '../private-system.ts';
import { analysisOf, analysisOptions, concurrencyOf, withService } from './with-service.ts';

const shownMismatches = 20;

export const modelParity = defineCommand({
  name: 'model parity',
  summary: "Compare the pipeline's logits with those of your own script on the same audio.",
  operands: [{ name: 'BUNDLE', help: 'a directory with a model.json' }],
  options: {
    reference: {
      type: 'string',
      value: 'CSV',
      help: "your script's numbers: file,window,<one column for each label, named after it or in the bundle's order>; windows count from 0",
    },
    audio: { type: 'string', value: 'DIR', help: 'where those files are' },
    ...analysisOptions,
    tolerance: {
      type: 'string',
      value: 'T',
      help: 'the largest difference of a logit that passes (default: 0.001)',
    },
    'min-agreement': {
      type: 'string',
      value: 'SHARE',
      help: 'judge by the share of windows with the same best label instead (0.99): for a reference whose audio or picture went through a lossy step; with --tolerance both must hold',
    },
    json: { type: 'boolean', help: 'print the comparison as JSON' },
  },
  notes:
    'All windows are compared unless --windows says otherwise. Exit code 1 when a difference is too large, or a file or a window of the reference has no counterpart.',
  examples: [
    {
      line: 'model parity models/ccmusic --reference logits.csv --audio songs/',
      does: 'exactly the same numbers?',
    },
    {
      line: 'model parity models/ccmusic --reference logits.csv --audio songs/ --min-agreement 0.99',
      does: 'the same answers?',
    },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const { reference: csv, audio } = options;
    if (csv === undefined) throw new UsageError('acousticsense model parity needs --reference CSV.');
    if (audio === undefined) throw new UsageError('acousticsense model parity needs --audio DIR.');
    const minAgreement = numberOption('min-agreement', options['min-agreement'], { least: 0, most: 1 });
    const asked = numberOption('tolerance', options.tolerance, { least: 0 });
    const tolerance = asked ?? (minAgreement === undefined ? 1e-3 : undefined);
    const analysis = { windows: 'all', ...analysisOf(options) };
    const concurrency = concurrencyOf(options);
    const directory = findBundle(operands[0]!);
    const { labels } = (await loadBundle(directory, { verifyFiles: false })).manifest;
    const reference = await readReference(csv, { labels, match: createLabelMatcher(labels) });
    if (!(await stat(audio).catch(() => undefined))?.isDirectory())
      throw new Failure(`There is no directory ${audio}.`);
    terminal.note(reference.columns);

    const files = [...reference.files.keys()].map((name) => ({
      path: path.resolve(audio, name),
      name,
      label: '',
    }));
    const { answered } = await withService(
      { options: { bundle: directory }, config, terminal, signal },
      (service, running) =>
        answerFiles(files, {
          service,
          options: { ...analysis, vectors: true },
          journal: forgettingJournal(),
          concurrency,
          startProgress: (total) => terminal.progress('files', total),
          signal: running,
        }),
    );
    const ours = new Map(
      answered.map(({ file, answer }) => [
        file.name,
        answer.vectors?.windows.map(({ logits }) => logits) ?? answer.error?.message ?? 'no logits came',
      ]),
    );
    const parity = compareLogits(reference.files, ours, labels);
    const passed = judge(parity, tolerance, minAgreement);
    if (options.json === true)
      terminal.print(JSON.stringify({ passed, tolerance, minAgreement, ...parity }, null, 2));
    else terminal.print(describe(parity, { passed, tolerance, minAgreement }));
    return passed ? 0 : 1;
  },
});

function judge(
  { maxError, top1Agreement, mismatches }: Parity,
  tolerance: number | undefined,
  minAgreement: number | undefined,
): boolean {
  if (mismatches.length > 0 || maxError === null || top1Agreement === null) return false;
  return (
    (tolerance === undefined || maxError <= tolerance) &&
    (minAgreement === undefined || top1Agreement >= minAgreement)
  );
}

function describe(
  parity: Parity,
  verdict: { passed: boolean; tolerance: number | undefined; minAgreement: number | undefined },
): string {
  const { maxError, meanError, maxErrorShare, meanErrorShare, worst, mismatches } = parity;
  const { passed, tolerance, minAgreement } = verdict;
  const lines = [`${parity.windows} windows of ${parity.files} files, ${parity.values} logits compared`];
  if (maxError !== null && worst !== null) {
    const asShare = (share: number | null) => `${(share! * 100).toPrecision(2)} %`;
    lines.push(
      `largest difference ${maxError.toExponential(2)}, mean ${meanError!.toExponential(2)}: ${asShare(maxErrorShare)} and ${asShare(meanErrorShare)} of the reference's standard deviation (${parity.referenceStd!.toPrecision(4)})`,
      `largest at ${worst.file}, window ${worst.window}, ${worst.label}: ${worst.reference} in the reference, ${worst.ours} here`,
      `the same best label in ${percent(parity.top1Agreement)} of the windows`,
    );
  }
  if (mismatches.length > 0) {
    lines.push('Without a counterpart:', ...mismatches.slice(0, shownMismatches).map((one) => `  ${one}`));
    if (mismatches.length > shownMismatches) lines.push(`  and ${mismatches.length - shownMismatches} more`);
  }
  const rules = [
    ...(tolerance === undefined ? [] : [`no difference above ${tolerance}`]),
    ...(minAgreement === undefined ? [] : [`the same best label in at least ${percent(minAgreement)}`]),
  ].join(', ');
  lines.push(passed ? `Passed: ${rules}.` : `FAILED: asked for ${rules}, and a counterpart to everything.`);
  return lines.join('\n');
}
