/** From answered files to the report of an evaluation, as data, as Markdown and as a terminal's text. */
import type { AnsweredFile } from './answers.ts';
import type { LabelMatcher } from './labels.ts';
import {
  type Accuracy,
  accuracy,
  type Bin,
  best,
  type Confusion,
  type Coverage,
  calibrationError,
  commonestConfusions,
  confusionMatrix,
  coverageAt,
  type Judged,
  type LabelRecall,
  recallByLabel,
  reliability,
} from './metrics.ts';
import type { Analysis, Model } from './service.ts';
import type { Terminal } from './terminal.ts';

export interface Report {
  source: string;
  rule: string;
  model: { name: string; version: string; digest: string; calibrated: boolean };
  /** Execution providers that really ran. */
  providers: string[];
  options: Analysis;
  files: number;
  /** Got an answer and have a label that the model knows. */
  judged: number;
  /** Got no genre: how many, by error code; `silent` is audio without sound. */
  failed: Record<string, number>;
  failures: { file: string; code: string; message: string }[];
  /** Labels that the model does not have, with the number of their files: answered, not judged. */
  unknownLabels: Record<string, number>;
  /** Null when nothing could be judged; so are all figures under it. */
  accuracy: Accuracy | null;
  recall: LabelRecall[];
  confusions: Confusion[];
  /** Labels that occur as truth or as answer; counts [truth][answer] in their order. */
  matrix: { labels: string[]; counts: number[][] };
  /** Expected calibration error over 15 equal-width bins. */
  calibrationError: number | null;
  reliability: Bin[];
  coverage: Coverage[];
  uncertain: { threshold: number; clips: number; share: number | null };
}

const reliabilityBins = 15;
const coverageThresholds = [0.3, 0.5, 0.7];

export function judge(
  answered: readonly AnsweredFile[],
  about: {
    source: string;
    rule: string;
    model: Model;
    options: Analysis;
    /** Below this confidence an answer is uncertain. */
    threshold: number;
    match: LabelMatcher;
  },
): Report {
  const { model, threshold, match } = about;
  const failures: Report['failures'] = [];
  const unknownLabels: string[] = [];
  const judged: (Judged & { uncertain: boolean })[] = [];
  const providers = new Set<string>();
  for (const { file, answer } of answered) {
    const { result, error } = answer;
    if (result !== undefined) providers.add(result.provider);
    if (result === undefined || result.silent) {
      failures.push({
        file: file.name,
        code: error?.code ?? 'silent',
        message: error?.message ?? 'All of it is silent: it has no genre.',
      });
      continue;
    }
    const truth = match(file.label);
    if (truth === undefined) {
      unknownLabels.push(file.label);
      continue;
    }
    const one = { truth, probabilities: model.labels.map((label) => result.probabilities[label] ?? 0) };
    const uncertain = result.uncertainBecause === 'not_music' || best(one).confidence < threshold;
    judged.push({ ...one, uncertain });
  }
  const answers = judged.map(best);
  const full = confusionMatrix(judged, model.labels);
  const uncertain = judged.filter((one) => one.uncertain).length;
  return {
    source: about.source,
    rule: about.rule,
    model: {
      name: model.name,
      version: model.version,
      digest: model.digest,
      calibrated: model.calibrated,
    },
    providers: [...providers].sort(),
    options: about.options,
    files: answered.length,
    judged: judged.length,
    failed: countBy(failures.map(({ code }) => code)),
    failures,
    unknownLabels: countBy(unknownLabels),
    accuracy: judged.length === 0 ? null : accuracy(judged),
    recall: recallByLabel(judged, model.labels),
    confusions: commonestConfusions(full, model.labels),
    matrix: withoutEmpty(full, model.labels),
    calibrationError: judged.length === 0 ? null : calibrationError(answers, reliabilityBins),
    reliability: reliability(answers, reliabilityBins),
    coverage: judged.length === 0 ? [] : coverageThresholds.map((at) => coverageAt(answers, at)),
    uncertain: {
      threshold,
      clips: uncertain,
      share: judged.length === 0 ? null : uncertain / judged.length,
    },
  };
}

function countBy(values: readonly string[]): Record<string, number> {
  // No plain object while counting: a label may be called "constructor".
  const counts = new Map<string, number>();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return Object.fromEntries(counts);
}

/** Without the labels that are neither anybody's truth nor anybody's answer. */
function withoutEmpty(counts: readonly (readonly number[])[], labels: readonly string[]): Report['matrix'] {
  const kept = labels
    .map((_, index) => index)
    .filter((index) => counts.some((row, truth) => (truth === index ? row.some(Boolean) : row[index]! > 0)));
  return {
    labels: kept.map((index) => labels[index]!),
    counts: kept.map((truth) => kept.map((answer) => counts[truth]![answer]!)),
  };
}

/** `55.0 %` */
export const percent = (share: number | null) => (share === null ? '-' : `${(share * 100).toFixed(1)} %`);

type Table = { readonly head: readonly string[]; readonly rows: readonly (readonly string[])[] };
interface Section {
  readonly title: string;
  readonly text?: string;
  readonly table?: Table;
}

/** What there is to say, in order; both the Markdown and the terminal's text are made of it. */
function sections(report: Report): Section[] {
  const { accuracy: figures, uncertain } = report;
  const failed = Object.values(report.failed).reduce((a, b) => a + b, 0);
  const strangers = Object.entries(report.unknownLabels);
  const summary: Section[] = [
    {
      title: 'Files',
      text: [
        `${report.files} files, ${report.judged} judged, ${failed} failed${describeCounts(report.failed)}.`,
        report.rule,
        ...(strangers.length === 0
          ? []
          : [
              `The model does not know ${strangers.map(([label, clips]) => `${label} (${clips})`).join(', ')}: those files were answered and not judged.`,
            ]),
      ].join(' '),
    },
  ];
  if (figures === null) return summary;
  return [
    ...summary,
    {
      title: 'Accuracy',
      table: {
        head: [
          'top-1',
          'top-3',
          'mean recall',
          'calibration error',
          `uncertain (under ${uncertain.threshold}, or no music)`,
        ],
        rows: [
          [
            percent(figures.top1),
            percent(figures.top3),
            percent(figures.meanRecall),
            percent(report.calibrationError),
            percent(uncertain.share),
          ],
        ],
      },
    },
    {
      title: 'Recall per genre',
      table: {
        head: ['genre', 'files', 'right', 'recall', '95 % interval'],
        rows: report.recall.map(({ label, clips, right, recall, low, high }) => [
          label,
          String(clips),
          String(right),
          percent(recall),
          `${(low * 100).toFixed(0)}-${(high * 100).toFixed(0)} %`,
        ]),
      },
    },
    {
      title: 'Commonest confusions',
      ...(report.confusions.length === 0
        ? { text: 'None: every answer is right.' }
        : {
            table: {
              head: ['is', 'was called', 'files', 'of that genre'],
              rows: report.confusions.map(({ truth, answer, clips, share }) => [
                truth,
                answer,
                String(clips),
                percent(share),
              ]),
            },
          }),
    },
    {
      title: 'Answers at a confidence or above',
      table: {
        head: ['confidence', 'files', 'coverage', 'right of them'],
        rows: report.coverage.map(({ threshold, clips, coverage, precision }) => [
          String(threshold),
          String(clips),
          percent(coverage),
          percent(precision),
        ]),
      },
    },
    {
      title: 'Reliability',
      text: 'Well calibrated is a model whose share of right answers is as large as its mean confidence.',
      table: {
        head: ['confidence', 'files', 'mean confidence', 'right'],
        rows: report.reliability
          .filter(({ clips }) => clips > 0)
          .map(({ from, to, clips, right, meanConfidence }) => [
            `${from.toFixed(2)}-${to.toFixed(2)}`,
            String(clips),
            percent(meanConfidence),
            percent(right / clips),
          ]),
      },
    },
  ];
}

function describeCounts(counts: Record<string, number>): string {
  const entries = Object.entries(counts);
  return entries.length === 0 ? '' : ` (${entries.map(([code, count]) => `${code} ${count}`).join(', ')})`;
}

export function toText(report: Report, terminal: Pick<Terminal, 'paint'>): string {
  return sections(report)
    .map(({ title, text, table }) =>
      [terminal.paint('bold', title), ...(text ? [text] : []), ...(table ? textTable(table) : [])].join('\n'),
    )
    .join('\n\n');
}

/** Columns as wide as they need; numbers to the right. */
function textTable({ head, rows }: Table): string[] {
  const lines = [head, ...rows];
  const width = head.map((_, column) => Math.max(...lines.map((line) => line[column]!.length)));
  const numeric = head.map(
    (_, column) => column > 0 && rows.every((row) => /^[\d.]+( %)?$|^-$/.test(row[column]!)),
  );
  return lines.map((line) =>
    `  ${line.map((cell, column) => (numeric[column] ? cell.padStart(width[column]!) : cell.padEnd(width[column]!))).join('   ')}`.trimEnd(),
  );
}

const listedFailures = 50;

export function toMarkdown(report: Report): string {
  const { model, options, providers, failures } = report;
  const asked = Object.entries(options).map(([name, value]) => `${name} ${value}`);
  return [
    `# Evaluation of ${model.name} ${model.version}`,
    '',
    `Source: \`${report.source}\`. Model digest \`${model.digest}\`, ${model.calibrated ? 'calibrated' : 'not calibrated'}, run on ${providers.join(', ') || 'nothing'}. Options: ${asked.join(', ') || "the model's own"}.`,
    '',
    ...sections(report).flatMap(({ title, text, table }) => [
      `## ${title}`,
      '',
      ...(text ? [text, ''] : []),
      ...(table
        ? [
            `| ${table.head.join(' | ')} |`,
            `|${table.head.map(() => '---').join('|')}|`,
            ...table.rows.map((row) => `| ${row.map(escapePipes).join(' | ')} |`),
            '',
          ]
        : []),
    ]),
    ...(report.accuracy === null
      ? []
      : ['## Pictures', '', '![Confusion matrix](confusion.png)', '', '![Reliability](reliability.png)', '']),
    ...(failures.length === 0
      ? []
      : [
          '## Files without an answer',
          '',
          ...failures
            .slice(0, listedFailures)
            .map(({ file, code, message }) => `- \`${file}\`: ${code}. ${message}`),
          ...(failures.length > listedFailures
            ? [`- and ${failures.length - listedFailures} more, all in report.json`]
            : []),
          '',
        ]),
  ].join('\n');
}

const escapePipes = (cell: string) => cell.replaceAll('|', '\\|');
