/** Labelled files: a CSV that names them, or a directory whose folders or file names do. */
import { readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { readCsv } from './csv.ts';
import { Failure } from './failure.ts';
import { essence } from './labels.ts';

export interface LabelledFile {
  /** Absolute. */
  readonly path: string;
  /** As the user knows it: relative to the directory or the CSV. */
  readonly name: string;
  readonly label: string;
}

export interface LabelledAudio {
  readonly files: readonly LabelledFile[];
  /** Where the labels come from, as a sentence. */
  readonly rule: string;
  readonly notes: readonly string[];
}

/** Of the containers that the decoder reads. A CSV may name any file. */
const endings = /\.(mp3|wav|wave|flac|ogg|oga|opus|m4a|mp4|aac|aif|aiff|aifc)$/i;

/**
 * @param knows whether the model has a label: it decides between folders and file names, where both could be meant.
 * @throws {Failure}
 */
export async function findLabelledAudio(
  target: string,
  knows: (label: string) => boolean,
): Promise<LabelledAudio> {
  const there = await stat(target).catch(() => undefined);
  if (there === undefined) throw new Failure(`There is no file or directory ${target}.`);
  return there.isDirectory() ? fromDirectory(path.resolve(target), knows) : fromCsv(path.resolve(target));
}

/** The audio files under a directory, as paths relative to it, in a fixed order. */
async function findAudio(directory: string): Promise<{ audio: string[]; others: number }> {
  const entries = await readdir(directory, { recursive: true, withFileTypes: true }).catch(() => {
    throw new Failure(`The directory ${directory} cannot be read.`);
  });
  const names = entries
    .filter((entry) => (entry.isFile() || entry.isSymbolicLink()) && !entry.name.startsWith('.'))
    .map((entry) => path.relative(directory, path.join(entry.parentPath, entry.name)))
    .sort();
  const audio = names.filter((name) => endings.test(name));
  return { audio, others: names.length - audio.length };
}

async function fromDirectory(directory: string, knows: (label: string) => boolean): Promise<LabelledAudio> {
  const { audio, others } = await findAudio(directory);
  if (audio.length === 0) {
    throw new Failure(
      `${directory} holds no audio${others === 0 ? '' : ` among its ${others} files`}: MP3, WAV, FLAC, Ogg, Opus, AAC, M4A and AIFF are looked for.`,
    );
  }
  const folder = (name: string) => path.basename(path.dirname(name));
  const beginning = (name: string) => path.basename(name).split(/[._]/)[0]!;
  const known = (label: (name: string) => string) => audio.filter((name) => knows(label(name))).length;
  const inFolders = audio.every((name) => path.dirname(name) !== '.');
  const byFolder = inFolders && known(folder) >= known(beginning);
  const label = byFolder ? folder : beginning;
  return {
    files: audio.map((name) => ({ path: path.join(directory, name), name, label: label(name) })),
    rule: byFolder
      ? 'The label of a file is the name of its folder.'
      : 'The label of a file is the first part of its name, before "." or "_".',
    notes: others === 0 ? [] : [`${others} files that are no audio by their names are left out.`],
  };
}

function isSameLabel(one: string, other: string): boolean {
  return one === other || (essence(one) !== '' && essence(one) === essence(other));
}

async function fromCsv(file: string): Promise<LabelledAudio> {
  const { columns, rows } = await readCsv(file);
  const place = Object.fromEntries(
    ['path', 'label'].map((name) => {
      const index = columns.indexOf(name);
      if (index >= 0) return [name, index];
      throw new Failure(
        `${file} has no column "${name}": its first line must name the columns path and label, and names ${columns.join(', ')}.`,
      );
    }),
  ) as { path: number; label: number };
  if (rows.length === 0) throw new Failure(`${file} names no file: there is nothing under its first line.`);
  const seen = new Map<string, { label: string; line: number }>();
  let repeated = 0;
  const files: LabelledFile[] = [];
  for (const { line, cells } of rows) {
    const name = cells[place.path]!;
    const label = cells[place.label]!;
    const missing = name === '' ? 'path' : label === '' ? 'label' : undefined;
    if (missing !== undefined) throw new Failure(`${file}, line ${line}: the ${missing} is empty.`);
    const full = path.resolve(path.dirname(file), name);
    const before = seen.get(full);
    if (before === undefined) {
      seen.set(full, { label, line });
      files.push({ path: full, name, label });
    } else if (isSameLabel(before.label, label)) repeated += 1;
    else {
      throw new Failure(
        `${file}: ${name} is "${before.label}" in line ${before.line} and "${label}" in line ${line}; a file has one label.`,
      );
    }
  }
  return {
    files,
    rule: 'The labels are those of the CSV.',
    notes: repeated === 0 ? [] : [`${repeated} rows repeat an earlier one and are left out.`],
  };
}
