/**
 * A catalogue's own genres: which of them each label of the model stands for, how likely they are, and whether what
 * the catalogue declares agrees with what is heard. docs/house-genres.md says it to those who use it.
 */
import { CsvError, parse } from 'csv-parse/sync';
import { z } from 'zod';
import { ProblemError } from './errors.ts';

/** Every label of the model with its house genres: plain JSON, to be kept with a batch. */
export const mappingSchema = z.strictObject({
  labels: z.array(z.string()).describe("the model's, in its order"),
  house: z.array(z.array(z.string()).min(1)).describe('of the label at the same place'),
});
export type Mapping = z.infer<typeof mappingSchema>;

export interface HouseGenre {
  genre: string;
  /** 0 to 1. */
  probability: number;
}

/**
 * `unknown_genre`: nothing that is declared is a house genre or a label, so nothing can be compared. That says
 * something about the mapping and nothing about the track.
 */
export const verdicts = ['agree', 'disagree', 'uncertain', 'undeclared', 'unknown_genre'] as const;
export type Verdict = (typeof verdicts)[number];

export interface Judgement {
  verdict: Verdict;
  /** The likeliest house genre; null when all is silent. */
  predicted: HouseGenre | null;
  /** Of `disagree`: by how much the predicted genre is likelier than the likeliest declared one; 0 to 1. */
  confidence?: number;
}

export interface Heard {
  readonly declared: readonly string[] | undefined;
  /** In label order; null when all is silent. */
  readonly probabilities: readonly number[] | null;
  /** The answer is marked as none to rely on. */
  readonly uncertain: boolean;
}

export interface House {
  /** Every house genre, likeliest first. They need not add up to 1: a label may stand for several. */
  rank(probabilities: readonly number[]): HouseGenre[];
  judge(heard: Heard): Judgement;
}

/** Without a mapping every label is a house genre. */
export function ownNames(labels: readonly string[]): Mapping {
  return { labels: [...labels], house: labels.map((label) => [label]) };
}

const maxGenres = 64;
const genreName = z
  .string()
  .trim()
  .max(100)
  .regex(/^\P{Cc}*$/u)
  .refine((name) => essence(name) !== '');
const jsonMapping = z.record(
  z.string(),
  z.union([genreName.transform((one) => [one]), z.array(genreName).min(1)]),
);

/**
 * Reads a mapping file: JSON `{ "label": ["house genre", ...] }` or CSV with the columns `model,house`, a pair a line.
 * A label that it leaves out keeps its own name.
 *
 * @param labels the model's, in its order
 * @throws {ProblemError} mapping_invalid, wrong_content_type
 */
export function parseMapping(text: string, contentType: string, labels: readonly string[]): Mapping {
  const type = contentType.split(';')[0]!.trim().toLowerCase();
  if (type !== 'application/json' && type !== 'text/csv') {
    throw new ProblemError(
      'wrong_content_type',
      `Send the mapping as application/json or text/csv, not as "${contentType.slice(0, 100)}".`,
    );
  }
  const given = type === 'text/csv' ? readCsv(text) : readJson(text);
  if (given.length === 0) throw invalid('It maps no label.');
  const findLabel = createFinder(labels);
  /** By essence, so that a house genre has one spelling: the first. */
  const spelling = new Map<string, string>();
  const house = labels.map(() => new Set<string>());
  for (const [label, genres] of given) {
    const index = findLabel(label);
    if (index === undefined) {
      throw invalid(`It names the label "${label.slice(0, 100)}", and the model has ${labels.join(', ')}.`);
    }
    for (const genre of genres) {
      const key = essence(genre);
      if (!spelling.has(key)) spelling.set(key, genre);
      house[index]!.add(spelling.get(key)!);
    }
    if (house[index]!.size > maxGenres) {
      throw invalid(`The label "${labels[index]}" has more than ${maxGenres} house genres.`);
    }
  }
  // After all that is mapped, whose spelling counts.
  const complete = labels.map((label, index) =>
    house[index]!.size > 0 ? [...house[index]!] : [spelling.get(essence(label)) ?? label],
  );
  return { labels: [...labels], house: complete };
}

function readJson(text: string): [string, string[]][] {
  let value: unknown;
  try {
    value = JSON.parse(text.replace(/^\uFEFF/, ''));
  } catch (error) {
    throw invalid(`It is not JSON: ${(error as Error).message}.`);
  }
  const parsed = jsonMapping.safeParse(value);
  if (parsed.success) return Object.entries(parsed.data);
  const label = parsed.error.issues[0]!.path[0];
  throw invalid(
    label === undefined
      ? 'It must be an object that leads from labels to house genres, such as {"Rap": ["Urban"]}.'
      : `The label "${String(label).slice(0, 100)}" must lead to one or more names of house genres, of up to 100 characters each.`,
  );
}

function readCsv(text: string): [string, string[]][] {
  let records: { record: string[]; info: { lines: number } }[];
  try {
    const options = { bom: true, info: true, skip_empty_lines: true, trim: true };
    records = parse(text, options) as unknown as typeof records;
  } catch (error) {
    if (!(error instanceof CsvError)) throw error;
    throw invalid(`It is not CSV: ${error.message.replace(/\.$/, '')}.`);
  }
  const [header, ...pairs] = records;
  if (header?.record.join(',') !== 'model,house') {
    throw invalid('Its first line must name the columns "model,house", and no others.');
  }
  return pairs.map(({ record: [label, genre], info }) => {
    const parsed = genreName.safeParse(genre);
    if (!label || !parsed.success) {
      throw invalid(`Line ${info.lines} must hold a label and a house genre of up to 100 characters.`);
    }
    return [label, [parsed.data]];
  });
}

/** What asks a mapping often: made once, asked for every row. */
export function createHouse(mapping: Mapping): House {
  const genres = [...new Set(mapping.house.flat())];
  const place = new Map(genres.map((genre, index) => [genre, index]));
  /** Places of house genres, by label. */
  const genresOf = mapping.house.map((names) => names.map((name) => place.get(name)!));
  const findGenre = createFinder(genres);
  const findLabel = createFinder(mapping.labels);

  function likelihoods(probabilities: readonly number[]): number[] {
    if (probabilities.length !== genresOf.length) {
      throw new RangeError(`${probabilities.length} probabilities for ${genresOf.length} labels.`);
    }
    const sums = genres.map(() => 0);
    probabilities.forEach((probability, label) => {
      for (const genre of genresOf[label]!) sums[genre]! += probability;
    });
    return sums.map((sum) => Math.min(1, sum));
  }

  /** A house genre by its name; else the house genres of the label that has this name. */
  function meantBy(declared: string): readonly number[] {
    const genre = findGenre(declared);
    if (genre !== undefined) return [genre];
    const label = findLabel(declared);
    return label === undefined ? [] : genresOf[label]!;
  }

  function ranked(likely: readonly number[]): HouseGenre[] {
    return genres
      .map((genre, index) => ({ genre, probability: likely[index]! }))
      .sort((a, b) => b.probability - a.probability);
  }

  return {
    rank: (probabilities) => ranked(likelihoods(probabilities)),

    judge({ declared = [], probabilities, uncertain }) {
      const likely = probabilities && likelihoods(probabilities);
      const predicted = likely && ranked(likely)[0]!;
      if (declared.length === 0) return { verdict: 'undeclared', predicted };
      const meant = declared.flatMap(meantBy);
      if (meant.length === 0) return { verdict: 'unknown_genre', predicted };
      if (uncertain || !probabilities || !likely || !predicted) return { verdict: 'uncertain', predicted };
      // Labels may add up to a house genre that the likeliest label has no part in: either is a fair answer.
      const likeliestLabel = probabilities.indexOf(Math.max(...probabilities));
      const declaredBest = Math.max(...meant.map((genre) => likely[genre]!));
      const agrees =
        declaredBest >= predicted.probability ||
        meant.some((genre) => genresOf[likeliestLabel]!.includes(genre));
      if (agrees) return { verdict: 'agree', predicted };
      return { verdict: 'disagree', predicted, confidence: predicted.probability - declaredBest };
    },
  };
}

interface Disagreement {
  readonly confidence: number;
  readonly line: number;
}

/**
 * The `limit` most confident disagreements of any number, whatever the order in which they come: equal ones stand in
 * the order of the manifest.
 */
export function createTopDisagreements<Row extends Disagreement>(limit: number) {
  /** Best first. */
  const top: Row[] = [];
  const precedes = (a: Row, b: Row) =>
    a.confidence > b.confidence || (a.confidence === b.confidence && a.line < b.line);
  return {
    add(row: Row): void {
      if (top.length >= limit && (limit === 0 || !precedes(row, top.at(-1)!))) return;
      let from = 0;
      let to = top.length;
      while (from < to) {
        const middle = (from + to) >> 1;
        if (precedes(row, top[middle]!)) to = middle;
        else from = middle + 1;
      }
      top.splice(from, 0, row);
      if (top.length > limit) top.pop();
    },
    sorted: (): Row[] => [...top],
  };
}

/** Exact first, then by essence; of two names with one essence the first has it. */
function createFinder(names: readonly string[]): (name: string) => number | undefined {
  const exact = new Map(names.map((name, index) => [name, index]));
  const plain = new Map(names.map((name, index) => [essence(name), index] as const).reverse());
  plain.delete('');
  return (name) => exact.get(name) ?? plain.get(essence(name));
}

/**
 * `Hip-Hop`, `hip hop` and `hiphop` are one, so are `R&B`, `RnB` and `R and B`, `Música` and `musica`: letters and
 * digits of any script count, without case and Latin accents, and every "and" is an n.
 */
function essence(name: string): string {
  return name
    .normalize('NFKD')
    .replace(/[\u0300-\u036f]/g, '')
    .toLowerCase()
    .replace(/[&+]/g, ' n ')
    .split(/[^\p{L}\p{N}\p{M}]+/u)
    .map((word) => (word === 'and' ? 'n' : word))
    .join('');
}

function invalid(message: string): ProblemError {
  return new ProblemError('mapping_invalid', `The mapping cannot be used. ${message}`);
}
