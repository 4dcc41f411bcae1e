/**
 * What does the product say about real, labelled files? Each goes through the API; its label is the first part of
 * its name (before `.` or `_`).
 *
 *   npm run bench -- labelled-files DIRECTORY... [--reference answers.csv] [--windows middle|all|N]
 *
 * With `--reference` (what `training/evaluate_audio.py` prints), the service is held against Python on the same
 * files: top-1 agreement, both accuracies, and the largest difference of a probability.
 */
import { glob, readFile } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { finished, upload } from '../test/client.ts';
import { startSystem } from '../test/system.ts';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { reference: { type: 'string' }, windows: { type: 'string', default: 'middle' } },
});
if (positionals.length === 0) throw new Error('name at least one directory of labelled audio');

const files: string[] = [];
for (const directory of positionals) {
  for await (const file of glob('**/*.{mp3,flac,wav,ogg,opus,m4a,aac,aiff}', { cwd: directory }))
    files.push(path.join(directory, file));
}
files.sort();

await using system = await startSystem({ env: { LOG_LEVEL: 'info' } });
const answers: { file: string; label: string; top: string[]; probabilities: Record<string, number> }[] = [];
for (const file of files) {
  const name = path.basename(file);
  const label = name.split(/[._]/)[0]!;
  const sent = await upload(system.url, await readFile(file), {
    name,
    fields: { topK: '15', windows: values.windows },
  });
  const job = await finished(system.url, sent.id);
  if (!job.result) throw new Error(`${name}: ${JSON.stringify(job.error)}`);
  answers.push({
    file: name,
    label,
    top: job.result.top.map((guess) => guess.label),
    probabilities: job.result.probabilities,
  });
  const shown = job.result.top
    .slice(0, 3)
    .map((guess) => `${guess.label} ${(guess.confidence * 100).toFixed(1)} %`);
  console.log(`${name.padEnd(44)} ${label.padEnd(14)} ${shown.join(', ')}`);
}

const key = (label: string) => label.toLowerCase().replaceAll(/[^a-z]/g, '');
const known = new Set(Object.keys(answers[0]!.probabilities).map(key));
const judged = answers.filter(({ label }) => known.has(key(label)));
const share = (n: number, of: number) => `${((100 * n) / of).toFixed(1)} % (${n} of ${of})`;
const within = (k: number) =>
  judged.filter(({ label, top }) => top.slice(0, k).some((one) => key(one) === key(label))).length;
console.log(
  `\ntop-1 ${share(within(1), judged.length)}, top-3 ${share(within(3), judged.length)}; ${answers.length - judged.length} files with a label the model does not know`,
);

if (values.reference) {
  const [head, ...lines] = (await readFile(values.reference, 'utf8'))
    .trim()
    .split('\n')
    .map((line) => line.split(','));
  const reference = new Map(
    lines
      .filter((cells) => cells.length >= 3)
      .map((cells) => [cells[0]!, new Map(head!.map((column, n) => [column, cells[n] ?? '']))]),
  );
  let same = 0;
  let compared = 0;
  let correct = 0;
  let correctThere = 0;
  let largest = { difference: 0, file: '' };
  for (const { file, label, top, probabilities } of answers) {
    const there = reference.get(file);
    if (!there) continue;
    compared += 1;
    const best = there.get('top1')!;
    if (key(best) === key(top[0]!)) same += 1;
    if (key(top[0]!) === key(label)) correct += 1;
    if (key(best) === key(label)) correctThere += 1;
    const theirs = Number(there.get('p1'));
    const difference = Math.abs(theirs - (probabilities[best] ?? 0));
    if (difference > largest.difference) largest = { difference, file };
  }
  console.log(
    `against Python on ${compared} files: same top-1 ${share(same, compared)}; accuracy ${share(correct, compared)} here, ${share(correctThere, compared)} there; largest difference of Python's best probability ${largest.difference.toFixed(4)} (${largest.file})`,
  );
}
