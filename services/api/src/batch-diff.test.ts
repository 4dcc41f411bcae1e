/** Two runs compared and a catalogue audited: over HTTP, with batches that only the storage has. */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import type { BatchRecord } from '@acousticsense/shared/batch';
import { parseMapping } from '@acousticsense/shared/house-genres';
import { parse } from 'csv-parse/sync';
import { type Audit, auditSchema, diffRowSchema, diffSummarySchema } from './result-schemas.ts';
import { problemSchema } from './schemas.ts';
import {
  badAudio,
  description,
  type Ending,
  heard,
  labels,
  startCatalogue,
  storeBatch,
  type TestCatalogue,
  tracks,
} from './testing/catalogue.ts';

const mapping = parseMapping(
  JSON.stringify({ 'Hip-Hop': ['Urban'], Rap: ['Urban'] }),
  'application/json',
  labels,
);
const label = (name: string, confidence = 0.9): Ending => ({ outcome: heard(name, confidence) });
const silent: Ending = { outcome: { probabilities: null, windows: [null], provider: 'cpu' } };
const failed: Ending = { error: badAudio };

let catalogue: TestCatalogue;
before(async () => {
  catalogue = await startCatalogue();
});
after(() => catalogue[Symbol.asyncDispose]());

async function run(
  endings: readonly Ending[],
  more: Parameters<TestCatalogue['batch']>[1] = {},
  manifest = tracks(endings.length),
): Promise<BatchRecord> {
  return catalogue.finish(await catalogue.batch(manifest, more), (row) => endings[row]!);
}
const repeats = ({ id }: { id: string }) => ({ origin: { kind: 'rerun', of: id } }) as const;

async function diffOf(from: { id: string }, to: { id: string }, query = '') {
  const at = `/v1/batches/${to.id}/diff?with=${from.id}${query}`;
  const lines = (await catalogue.get(at)).lines().map((line) => diffRowSchema.parse(line));
  const summary = diffSummarySchema.parse((await catalogue.get(`${at}&summary=true`)).json());
  return { lines, summary };
}

describe('a run compared with its repetition', () => {
  test('tells the rows that differ, with both answers, and sums up', async () => {
    const old = await run([label('Rap'), label('Rock'), label('Jazz'), failed, silent, label('Pop', 0.6)]);
    const next = await run(
      [label('Rap', 0.7), label('Pop', 0.8), label('Jazz'), label('Pop'), silent, label('Rap', 0.4)],
      { name: 'new ears', ...repeats(old) },
    );
    const { lines, summary } = await diffOf(old, next);
    const side = (row: number, name: string | null, confidence: number | null, uncertain = false) => ({
      ...{ row, state: 'completed', label: name, confidence, uncertain },
    });
    assert.deepEqual(lines, [
      {
        ref: 'track-1',
        audio: 's3://b/1.flac',
        changed: ['label'],
        from: side(1, 'Rock', 0.9),
        to: side(1, 'Pop', 0.8),
      },
      {
        ref: 'track-3',
        audio: 's3://b/3.flac',
        changed: ['state'],
        from: {
          row: 3,
          state: 'failed',
          label: null,
          confidence: null,
          uncertain: false,
          error: 'not_audio',
        },
        to: side(3, 'Pop', 0.9),
      },
      {
        ref: 'track-5',
        audio: 's3://b/5.flac',
        changed: ['label'],
        from: side(5, 'Pop', 0.6),
        to: side(5, 'Rap', 0.4, true),
      },
    ]);
    const model = {
      name: 'ears',
      version: '3',
      digest: description.digest,
      profile: description.profileHash,
    };
    assert.deepEqual(summary, {
      from: { id: old.id, model, threshold: 0.5 },
      to: { id: next.id, name: 'new ears', model, threshold: 0.5 },
      alignedBy: 'row',
      compared: 6,
      same: 3,
      changed: 3,
      changes: { state: 1, label: 2, house: 0 },
      onlyInFrom: 0,
      onlyInTo: 0,
      uncertainInEither: 2,
      // 0.2, 0.1, 0 and 0.2
      meanConfidenceDifference: 0.125,
      labels: summary.labels,
      otherChanges: 0,
    });
    assert.deepEqual(
      summary.labels.map(({ from, to, rows }) => [from, to, rows]),
      [
        ['Rap', 'Rap', 1],
        ['Rock', 'Pop', 1],
        ['Jazz', 'Jazz', 1],
        [null, null, 1],
        ['Pop', 'Rap', 1],
      ],
    );
    const { summary: strict } = await diffOf(old, next, '&threshold=0.85');
    assert.deepEqual([strict.uncertainInEither, strict.from.threshold], [4, 0.85]);
  });

  test('says when the house genre stays though the label does not', async () => {
    const old = await run([label('Rap'), label('Rap'), label('Jazz')], { mapping });
    const next = await run([label('Hip-Hop'), label('Pop'), label('Jazz')], { mapping, ...repeats(old) });
    const { lines, summary } = await diffOf(old, next);
    assert.deepEqual(
      lines.map(({ changed, from, to }) => [changed, from.house, to.house]),
      [
        [['label'], 'Urban', 'Urban'],
        [['label', 'house'], 'Urban', 'Pop'],
      ],
    );
    assert.deepEqual(summary.changes, { state: 0, label: 2, house: 1 });
    assert.deepEqual(
      summary.houses?.map(({ from, to, rows }) => `${from} ${to} ${rows}`),
      ['Urban Urban 1', 'Urban Pop 1', 'Jazz Jazz 1'],
    );
    const unmapped = await run([label('Rap'), label('Rap'), label('Jazz')], repeats(old));
    assert.equal((await diffOf(old, unmapped)).summary.houses, undefined, 'there is nothing to compare');
  });

  test('is aligned by rows through a chain of repetitions, a link of which is deleted', async () => {
    // Without refs only the place can tell which rows are one.
    const manifest = tracks(2, (n) => ({
      ref: undefined,
      audio: { s3: { bucket: 'b', key: `${n}.flac` } },
    })).map(({ ref: _, ...row }) => row);
    const first = await run([label('Rap'), label('Rock')], {}, manifest);
    const second = await run([label('Rap'), label('Rock')], repeats(first), manifest);
    const third = await run([label('Rap'), label('Pop')], repeats(second), manifest);
    const sibling = await run([label('Jazz'), label('Rock')], repeats(first), manifest);
    const changed = async (from: BatchRecord, to: BatchRecord) => {
      const { lines, summary } = await diffOf(from, to);
      assert.deepEqual([summary.alignedBy, summary.compared], ['row', 2]);
      return lines.map((line) => line.from.row);
    };
    assert.deepEqual(await changed(first, third), [1]);
    assert.deepEqual(await changed(third, first), [1]);
    assert.deepEqual(await changed(third, sibling), [0, 1]);
    await catalogue.batches.remove(first, Date.now());
    assert.deepEqual(await changed(second, sibling), [0], 'what both repeat is known by its id');
  });

  test('counts rows that one of the two has not ended', async () => {
    const old = await run(Array.from({ length: 1_200 }, () => label('Rap')));
    const next = await catalogue.batch(tracks(1_200), repeats(old));
    await catalogue.openChunk(next, 0);
    for (const row of [0, 5, 999]) await catalogue.end(next, row, label(row === 5 ? 'Pop' : 'Rap'));
    const there = await diffOf(old, next);
    assert.deepEqual(
      there.lines.map(({ from, to }) => [from.row, to.row]),
      [[5, 5]],
    );
    const { compared, same, changed, onlyInFrom, onlyInTo } = there.summary;
    assert.deepEqual([compared, same, changed, onlyInFrom, onlyInTo], [3, 2, 1, 1_197, 0]);
    const back = await diffOf(next, old);
    assert.deepEqual([back.summary.onlyInFrom, back.summary.onlyInTo], [0, 1_197]);
    assert.equal(back.lines.length, 1);
  });
});

test('runs of two manifests are compared by ref, whatever their orders', async () => {
  const { storage } = catalogue;
  const count = 3_500;
  // 11 has no common divisor with the count: every row once, all over the place.
  const shuffled = (row: number) => (row * 11) % count;
  const from = {
    id: await storeBatch(storage, count, (row) => ({
      ref: `track-${row}`,
      outcome: heard('Rock', 0.9),
      ...(row === 10 ? { state: 'failed' } : {}),
    })),
  };
  const to = {
    id: await storeBatch(storage, count, (row) => ({
      ref: shuffled(row) < 100 ? `other-${row}` : `track-${shuffled(row)}`,
      outcome: heard(shuffled(row) % 1_000 === 500 ? 'Jazz' : 'Rock', 0.8),
    })),
  };
  const { lines, summary } = await diffOf(from, to);
  assert.deepEqual(
    lines.map(({ ref, from, to }) => [ref, from.row, shuffled(to.row), to.label]),
    [500, 1_500, 2_500].map((row) => [`track-${row}`, row, row, 'Jazz']),
  );
  const { alignedBy, compared, same, onlyInFrom, onlyInTo, meanConfidenceDifference } = summary;
  assert.deepEqual(
    [alignedBy, compared, same, onlyInFrom, onlyInTo, meanConfidenceDifference],
    ['ref', 3_400, 3_397, 100, 100, 0.1],
  );
  const nothing = { id: await storeBatch(storage, 5, () => ({ ref: undefined as never })) };
  const alone = (await diffOf(from, nothing)).summary;
  assert.deepEqual([alone.compared, alone.onlyInFrom, alone.onlyInTo], [0, count, 5]);
  assert.equal(alone.meanConfidenceDifference, null);
});

test('a comparison needs another batch of the same tenant', async () => {
  const batch = await run([label('Rap')]);
  const foreign = await run([label('Rap')], { tenant: 'other' });
  const refused = async (query: string) => {
    const answer = await catalogue.get(`/v1/batches/${batch.id}/diff${query}`);
    const { code, field } = problemSchema.parse(answer.json());
    return [answer.status, code, field];
  };
  assert.deepEqual(await refused(''), [400, 'bad_option', 'with']);
  assert.deepEqual(await refused('?with=x'), [400, 'bad_option', 'with']);
  assert.deepEqual(await refused(`?with=${batch.id}&summary=1`), [400, 'bad_option', 'summary']);
  assert.deepEqual(await refused(`?with=${foreign.id}`), [404, 'batch_not_found', undefined]);
  const same = await diffOf(batch, batch);
  assert.deepEqual([same.lines, same.summary.compared, same.summary.same], [[], 1, 1]);
});

describe('the audit of a batch', () => {
  const audited = async (id: string, query = ''): Promise<Audit> =>
    auditSchema.parse((await catalogue.get(`/v1/batches/${id}/audit${query}`)).json());

  test('counts verdicts, also by declared genre, and sorts disagreements by how confident they are', async () => {
    const declared = [['Rap'], ['Jazz', 'Rock'], ['Pop'], ['Pop'], undefined, ['Polka'], ['Pop'], ['Pop']];
    const endings = [label('Hip-Hop'), label('Pop', 0.7), label('Rap', 0.95), label('Jazz', 0.4)];
    const manifest = tracks(8, (n) => (declared[n] ? { declaredGenre: declared[n] } : {}));
    const batch = await run(
      [...endings, label('Pop'), label('Pop'), failed, 'cancelled'],
      { mapping, name: 'back catalogue' },
      manifest,
    );
    const audit = await audited(batch.id);
    const none = { agree: 0, disagree: 0, uncertain: 0, unknown_genre: 0 };
    assert.deepEqual(
      { ...audit, disagreements: audit.disagreements.map(({ row }) => row) },
      {
        batch: {
          ...{ id: batch.id, name: 'back catalogue', threshold: 0.5, mapped: true },
          model: audit.batch.model,
        },
        ...{ rows: 8, unanswered: 2 },
        verdicts: { agree: 1, disagree: 2, uncertain: 1, undeclared: 1, unknown_genre: 1 },
        byDeclared: [
          { ...none, genre: 'Pop', rows: 2, disagree: 1, uncertain: 1 },
          { ...none, genre: 'Rap', rows: 1, agree: 1 },
          { ...none, genre: 'Jazz', rows: 1, disagree: 1 },
          { ...none, genre: 'Rock', rows: 1, disagree: 1 },
          { ...none, genre: 'Polka', rows: 1, unknown_genre: 1 },
        ],
        otherDeclared: 0,
        disagreements: [2, 1],
      },
    );
    const counted = (await catalogue.batches.get(batch))!;
    assert.deepEqual(
      audit.verdicts,
      {
        ...{ agree: counted.agree, disagree: counted.disagree, undeclared: counted.undeclared },
        ...{ uncertain: counted.uncertain, unknown_genre: counted.unknown_genre },
      },
      'as the batch itself counts',
    );
    const [worst] = audit.disagreements;
    assert.deepEqual(worst, {
      ...{ row: 2, line: 3, ref: 'track-2', audio: 's3://b/2.flac', declaredGenre: ['Pop'] },
      ...{ predicted: 'Urban', predictedProbability: worst!.predictedProbability },
      ...{ disagreement: worst!.disagreement, label: 'Rap', confidence: 0.95 },
    });
    assert.ok(worst!.predictedProbability > 0.95 && worst!.disagreement > 0.9);
    const lax = await audited(batch.id, '?threshold=0.3&limit=2');
    assert.deepEqual([lax.verdicts.disagree, lax.disagreements.map(({ row }) => row)], [3, [2, 1]]);
  });

  test('finds the most confident among thousands, as JSON and as CSV', async () => {
    const count = 5_000;
    const sureness = (row: number) => 0.55 + ((row * 37) % 400) / 1_000;
    const id = await storeBatch(catalogue.storage, count, (row) => ({
      declaredGenre: [row % 2 === 0 ? 'Rock' : '=Jazz'],
      outcome: heard('Rock', sureness(row)),
    }));
    const audit = await audited(id, '?limit=100000');
    assert.deepEqual([audit.verdicts.agree, audit.verdicts.disagree], [2_500, 2_500]);
    const expected = Array.from({ length: count }, (_, row) => row)
      .filter((row) => row % 2 === 1)
      .sort((a, b) => sureness(b) - sureness(a) || a - b);
    assert.deepEqual(
      audit.disagreements.map(({ row }) => row),
      expected,
    );
    assert.equal((await audited(id)).disagreements.length, 1_000, 'the default');
    const csv = await catalogue.get(`/v1/batches/${id}/audit.csv?limit=700`);
    assert.match(csv.headers.get('content-disposition')!, /-audit\.csv/);
    const records: Record<string, string>[] = parse(csv.text, { columns: true });
    assert.deepEqual(
      records.map(({ row }) => Number(row)),
      expected.slice(0, 700),
    );
    assert.equal(records[0]!['declaredGenre'], "'=Jazz", 'a spreadsheet runs nothing');
    for (const limit of ['0', '100001', 'all'])
      assert.equal((await catalogue.get(`/v1/batches/${id}/audit?limit=${limit}`)).json().field, 'limit');
  });

  test('tells a bounded number of spellings apart', async () => {
    const id = await storeBatch(catalogue.storage, 12_000, (row) => ({
      declaredGenre: [`Rock ${row}`, 'Rock'],
      outcome: heard('Rock', 0.9),
    }));
    const audit = await audited(id);
    assert.deepEqual(
      [audit.byDeclared.length, audit.otherDeclared, audit.byDeclared[0]],
      [
        10_000,
        12_000 - 9_999,
        { genre: 'Rock', rows: 12_000, agree: 12_000, disagree: 0, uncertain: 0, unknown_genre: 0 },
      ],
    );
  });
});
