/** A catalogue's own question: where does what it declares stand against what is heard, and which rows to look at first. */
import type { PartRow } from '@acousticsense/shared/batch';
import { createTopDisagreements } from '@acousticsense/shared/house-genres';
import { runOf } from './batch-diff.ts';
import { createBoundedCounts } from './bounded-counts.ts';
import type { Audit } from './result-schemas.ts';
import { audioName, type OpenBatch, type Results } from './results.ts';

type Declared = Audit['byDeclared'][number];
type Disagreement = Audit['disagreements'][number];

const mostDeclared = 10_000;

/**
 * Reads all rows that have ended.
 * @param limit how many disagreements, the most confident ones first; those that are equal in the manifest's order.
 * @throws {ProblemError} batch_gone
 */
export async function auditBatch(
  results: Pick<Results, 'ended'>,
  opened: OpenBatch,
  limit: number,
  signal: AbortSignal,
): Promise<Audit> {
  const verdicts = { agree: 0, disagree: 0, uncertain: 0, undeclared: 0, unknown_genre: 0 };
  const declared = createBoundedCounts<Declared>(mostDeclared);
  const top = createTopDisagreements<{ confidence: number; line: number; row: Disagreement }>(limit);
  let [rows, unanswered] = [0, 0];
  for await (const slice of results.ended(opened, {}, signal)) {
    for (const row of slice) {
      const { verdict } = row;
      rows += 1;
      if (verdict === undefined) {
        unanswered += 1;
        continue;
      }
      verdicts[verdict] += 1;
      if (verdict === 'undeclared') continue;
      for (const genre of new Set(row.declaredGenre)) {
        const none = () => ({ genre, rows: 0, agree: 0, disagree: 0, uncertain: 0, unknown_genre: 0 });
        const counts = declared.of(genre, none);
        if (!counts) continue;
        counts.rows += 1;
        counts[verdict] += 1;
      }
      if (verdict === 'disagree')
        top.add({ confidence: row.disagreement ?? 0, line: row.line, row: disagreementOf(opened, row) });
    }
  }
  return {
    batch: { ...runOf(opened), mapped: opened.batch.mapped },
    rows,
    unanswered,
    verdicts,
    byDeclared: [...declared.values].sort((a, b) => b.rows - a.rows),
    otherDeclared: declared.others,
    disagreements: top.sorted().map(({ row }) => row),
  };
}

function disagreementOf({ model }: OpenBatch, row: PartRow): Disagreement {
  const probabilities = row.outcome?.probabilities ?? [];
  const confidence = Math.max(0, ...probabilities);
  return {
    row: row.row,
    line: row.line,
    ...(row.ref === undefined ? {} : { ref: row.ref }),
    audio: audioName(row.audio),
    declaredGenre: row.declaredGenre ?? [],
    predicted: row.predicted ?? '',
    predictedProbability: row.confidence ?? 0,
    disagreement: row.disagreement ?? 0,
    label: model?.labels[probabilities.indexOf(confidence)] ?? '',
    confidence,
  };
}
