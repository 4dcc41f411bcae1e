import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ProblemError } from './errors.ts';
import {
  createHouse,
  createTopDisagreements,
  type Heard,
  type Mapping,
  mappingSchema,
  ownNames,
  parseMapping,
} from './house-genres.ts';

const labels = ['Blues', 'Hip-Hop', 'Pop', 'Rap', 'Rock', 'World'];
const json = (value: unknown) => parseMapping(JSON.stringify(value), 'application/json', labels);
const csv = (text: string) => parseMapping(text, 'text/csv; charset=utf-8', labels);
const problem = (code: string, message: RegExp) => (error: unknown) =>
  error instanceof ProblemError && error.code === code && message.test(error.message);

/** Probabilities in label order, the rest 0. */
const heard = (of: Partial<Record<string, number>>) => labels.map((label) => of[label] ?? 0);
const judge = (mapping: Mapping, given: Partial<Heard>) =>
  createHouse(mapping).judge({ declared: undefined, probabilities: heard({}), uncertain: false, ...given });

const urban = json({ 'Hip-Hop': ['Urban'], rap: 'urban', Pop: ['Pop', 'Pop/Rock'], Rock: ['Pop/Rock'] });

test('JSON and CSV say the same mapping; labels that are left out keep their names', () => {
  assert.deepEqual(urban, {
    labels,
    house: [['Blues'], ['Urban'], ['Pop', 'Pop/Rock'], ['Urban'], ['Pop/Rock'], ['World']],
  });
  const table =
    '\uFEFFmodel,house\r\nHip-Hop,Urban\r\n rap , urban \r\nPop,Pop\r\n\r\nPop,"Pop/Rock"\r\nPop,POP\r\nRock,Pop/Rock\r\n';
  assert.deepEqual(csv(table), urban);
  assert.deepEqual(mappingSchema.parse(JSON.parse(JSON.stringify(urban))), urban);
});

test('a label that keeps its name joins the house genre that is written otherwise', () => {
  assert.deepEqual(json({ Rap: 'HipHop' }).house, [
    ['Blues'],
    ['HipHop'],
    ['Pop'],
    ['HipHop'],
    ['Rock'],
    ['World'],
  ]);
});

test('a mapping that cannot be used says why', () => {
  const invalid = (message: RegExp) => problem('mapping_invalid', message);
  assert.throws(() => json({ Techno: ['Dance'] }), invalid(/"Techno".*the model has Blues, Hip-Hop, Pop/));
  assert.throws(() => json({ Rap: [] }), invalid(/"Rap" must lead to one or more/));
  assert.throws(() => json({ Rap: ['!!'] }), invalid(/"Rap" must lead/));
  assert.throws(() => json({ Rap: [7] }), invalid(/"Rap" must lead/));
  assert.throws(() => json({ Rap: 'x'.repeat(101) }), invalid(/"Rap" must lead/));
  assert.throws(() => json({ Rap: Array.from({ length: 65 }, (_, i) => `g${i}`) }), invalid(/more than 64/));
  assert.throws(() => json(['Rap']), invalid(/must be an object/));
  assert.throws(() => json({}), invalid(/maps no label/));
  assert.throws(() => parseMapping('{"Rap":', 'application/json', labels), invalid(/not JSON/));
  assert.throws(() => csv('model,house\n'), invalid(/maps no label/));
  assert.throws(() => csv(''), invalid(/"model,house"/));
  assert.throws(() => csv('house,model\nUrban,Rap\n'), invalid(/"model,house"/));
  assert.throws(() => csv('model,house\nRap,\n'), invalid(/Line 2 must hold/));
  assert.throws(() => csv('model,house\nRap\n'), invalid(/not CSV.*line 2/));
  assert.throws(() => csv('model,house\nTechno,Dance\n'), invalid(/"Techno"/));
  assert.throws(
    () => parseMapping('<x/>', 'text/xml', labels),
    problem('wrong_content_type', /application\/json or text\/csv/),
  );
});

test('a house genre is as likely as its labels together, each counted once', () => {
  const ranked = createHouse(urban).rank(heard({ Rap: 0.25, 'Hip-Hop': 0.25, Pop: 0.375, Rock: 0.125 }));
  assert.deepEqual(ranked, [
    { genre: 'Urban', probability: 0.5 },
    { genre: 'Pop/Rock', probability: 0.5 },
    { genre: 'Pop', probability: 0.375 },
    { genre: 'Blues', probability: 0 },
    { genre: 'World', probability: 0 },
  ]);
  const total = ranked.reduce((sum, { probability }) => sum + probability, 0);
  assert.ok(total > 1, 'a label that stands for two genres counts for both');
  const all = createHouse(json(Object.fromEntries(labels.map((label) => [label, 'Music']))));
  assert.deepEqual(all.rank(heard({ Rap: 0.7, Pop: 0.2, Rock: 0.10000000000000009 })), [
    { genre: 'Music', probability: 1 },
  ]);
});

test('probabilities of another model are refused', () => {
  assert.throws(() => createHouse(urban).rank([1]), RangeError);
});

test('what is declared is compared without case, accents and punctuation', () => {
  const own = ownNames(['Hip-Hop', 'R&B', 'Rock', 'Música Popular', 'Drum & Bass', '嘻哈', 'ガラージ']);
  const house = createHouse(own);
  const verdict = (declared: string, index: number) =>
    house.judge({
      declared: [declared],
      probabilities: own.labels.map((_, label) => (label === index ? 1 : 0)),
      uncertain: false,
    }).verdict;
  for (const [declared, index] of [
    ...['hip hop', 'HIPHOP', 'Hip‐Hop', 'hip_hop'].map((name) => [name, 0] as const),
    ...['RnB', 'r & b', 'R and B', "R'n'B", 'R+B'].map((name) => [name, 1] as const),
    ['musica popular', 3] as const,
    ...['Drum and Bass', 'drum n bass', "Drum'n'Bass"].map((name) => [name, 4] as const),
    ['嘻哈', 5] as const,
  ]) {
    assert.equal(verdict(declared, index), 'agree', declared);
    assert.equal(verdict(declared, 2), 'disagree', declared);
  }
  assert.equal(verdict('カラーシ', 6), 'unknown_genre', 'voicing marks are no accents');
});

test('a track agrees when one of its declared genres is what is heard', () => {
  const probabilities = heard({ Rap: 0.75, Rock: 0.25 });
  const predicted = { genre: 'Urban', probability: 0.75 };
  for (const declared of [['Urban'], ['Blues', 'urban'], ['Rap'], ['hip hop'], ['Shoegaze', 'Urban']]) {
    assert.deepEqual(
      judge(urban, { declared, probabilities }),
      { verdict: 'agree', predicted },
      declared.join(),
    );
  }
});

test('a track disagrees by how much likelier the other genre is', () => {
  const probabilities = heard({ Rap: 0.75, Rock: 0.25 });
  const predicted = { genre: 'Urban', probability: 0.75 };
  assert.deepEqual(judge(urban, { declared: ['Blues', 'Rock'], probabilities }), {
    verdict: 'disagree',
    predicted,
    confidence: 0.5,
  });
  assert.deepEqual(judge(urban, { declared: ['Blues', 'Shoegaze'], probabilities }), {
    verdict: 'disagree',
    predicted,
    confidence: 0.75,
  });
});

test('labels that add up and the label that leads are both answers to agree with', () => {
  const probabilities = heard({ Rock: 0.375, Rap: 0.3125, 'Hip-Hop': 0.3125 });
  const predicted = { genre: 'Urban', probability: 0.625 };
  for (const declared of ['Urban', 'Pop/Rock']) {
    assert.deepEqual(judge(urban, { declared: [declared], probabilities }), { verdict: 'agree', predicted });
  }
  // One label of two genres: both are as likely.
  const pop = heard({ Pop: 1 });
  assert.equal(judge(urban, { declared: ['Pop/Rock'], probabilities: pop }).verdict, 'agree');
  assert.equal(judge(urban, { declared: ['Pop'], probabilities: pop }).verdict, 'agree');
});

test('a house genre is meant before a label of the same name', () => {
  const swapped = json({ World: ['Rock'], Rock: ['World'] });
  const probabilities = heard({ Rock: 1 });
  assert.equal(judge(swapped, { declared: ['World'], probabilities }).verdict, 'agree');
  assert.equal(judge(swapped, { declared: ['Rock'], probabilities }).verdict, 'disagree');
});

test('without a declared genre, with an unknown one, or with an answer not to rely on, nothing disagrees', () => {
  const probabilities = heard({ Rap: 1 });
  const verdict = (given: Partial<Heard>) => judge(urban, { probabilities, ...given }).verdict;
  assert.equal(verdict({ declared: undefined }), 'undeclared');
  assert.equal(verdict({ declared: [] }), 'undeclared');
  assert.equal(verdict({ declared: ['Shoegaze'] }), 'unknown_genre');
  assert.equal(verdict({ declared: ['...'] }), 'unknown_genre');
  assert.equal(verdict({ declared: ['Blues'], uncertain: true }), 'uncertain');
  assert.deepEqual(judge(urban, { declared: ['Blues'], probabilities: null }), {
    verdict: 'uncertain',
    predicted: null,
  });
  // Whatever is heard: the mapping lacks it.
  assert.equal(verdict({ declared: ['Shoegaze'], uncertain: true }), 'unknown_genre');
});

test('the most confident disagreements are kept, whatever the order in which they come', () => {
  const rows = Array.from({ length: 500 }, (_, line) => ({ line, confidence: ((line * 37) % 50) / 50 }));
  const best = rows.toSorted((a, b) => b.confidence - a.confidence || a.line - b.line);
  for (const limit of [0, 1, 7, 100, 1_000]) {
    for (const order of [rows, rows.toReversed(), best, best.toReversed()]) {
      const top = createTopDisagreements<(typeof rows)[number]>(limit);
      for (const row of order) top.add(row);
      assert.deepEqual(top.sorted(), best.slice(0, limit));
    }
  }
});
