/** Labels as people write them, matched to the model's. */
import { readFile } from 'node:fs/promises';
import { z } from 'zod';
import { Failure } from './failure.ts';

/** @returns the index of the model's label that is meant, or undefined. */
export type LabelMatcher = (label: string) => number | undefined;

/** `Hip-Hop`, `hip hop` and `hiphop` are one: only letters and digits count, in any case, of any script. */
export const essence = (label: string) =>
  label
    .normalize('NFKC')
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]/gu, '');

/**
 * A label that is written exactly as the model's is that one; then aliases; then what differs in case and
 * punctuation only.
 *
 * @param aliases `{ "their label": "the model's label" }`
 * @throws {Failure} when an alias leads to no label of the model.
 */
export function createLabelMatcher(
  labels: readonly string[],
  aliases: Readonly<Record<string, string>> = {},
): LabelMatcher {
  // The first of two labels that differ in punctuation only has the name; both can be written exactly.
  const plain = new Map([...labels].reverse().map((label) => [essence(label), labels.indexOf(label)]));
  const find = (label: string) => {
    const exact = labels.indexOf(label);
    return exact >= 0 ? exact : plain.get(essence(label));
  };
  const known = new Map<string, number>();
  for (const [theirs, ours] of Object.entries(aliases)) {
    const index = find(ours);
    if (index === undefined) {
      throw new Failure(
        `The alias "${theirs}" leads to "${ours}", which the model does not know: it has ${labels.join(', ')}.`,
      );
    }
    known.set(essence(theirs), index);
  }
  return (label) => {
    const exact = labels.indexOf(label);
    return exact >= 0 ? exact : (known.get(essence(label)) ?? find(label));
  };
}

/** @throws {Failure} when the file is not a JSON object of texts. */
export async function readAliases(file: string): Promise<Record<string, string>> {
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch {
    throw new Failure(`The aliases file ${file} cannot be read.`);
  }
  try {
    return z.record(z.string(), z.string()).parse(JSON.parse(text));
  } catch {
    throw new Failure(
      `The aliases file ${file} must be JSON that leads from labels to the model's, such as {"hiphop": "Hip-Hop"}.`,
    );
  }
}
