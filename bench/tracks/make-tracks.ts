/**
 * Many tracks out of few: excerpts of 8 to 12 s of real recordings in the formats that catalogues hold, and one in a
 * hundred that is no good. The same for the same recordings and numbers; made once, kept in a directory.
 */
import { execFile } from 'node:child_process';
import { globSync } from 'node:fs';
import { mkdir, open, readFile, rename, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { promisify } from 'node:util';
import { eachOf, type Track } from '../../test/chaos/catalogue.ts';

const formats = [
  ['mp3', '-c:a', 'libmp3lame', '-b:a', '128k'],
  ['mp3', '-c:a', 'libmp3lame', '-b:a', '320k', '-ar', '44100'],
  ['mp3', '-c:a', 'libmp3lame', '-q:a', '7', '-ar', '22050', '-ac', '1'],
  ['ogg', '-c:a', 'libvorbis', '-q:a', '3'],
  ['flac', '-c:a', 'flac', '-compression_level', '0'],
  ['wav', '-c:a', 'pcm_s16le', '-ar', '22050'],
  ['wav', '-c:a', 'pcm_s24le', '-ar', '48000', '-ac', '1'],
  ['m4a', '-c:a', 'aac', '-b:a', '96k'],
] as const;

const damages = ['truncated', 'garbage', 'empty', 'text', 'silent', 'short'] as const;

/** A number from 0 to 1 for each seed: mulberry32. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * @param recordings directory of audio files; what stands before the first dot or underscore is their genre.
 * @param cache directory of the tracks.
 */
export async function makeTracks(recordings: string, cache: string, count: number): Promise<Track[]> {
  const sources = globSync('**/*.{mp3,flac,wav,ogg,m4a}', { cwd: recordings }).sort();
  if (sources.length === 0) throw new Error(`There is no audio in ${recordings}.`);
  await mkdir(cache, { recursive: true });
  const lengths = new Map<string, number>();
  await eachOf(sources, 4, async (source) => {
    lengths.set(source, await secondsOf(path.join(recordings, source)));
  });
  const tracks: Track[] = new Array(count);
  await eachOf(new Array<undefined>(count).fill(undefined), 8, async (_, n) => {
    const random = seeded(n + 1);
    const source = sources[n % sources.length]!;
    const [ending, ...encoder] = formats[Math.floor(random() * formats.length)]!;
    const bad = n % 100 === 57 ? damages[Math.floor(n / 100) % damages.length] : undefined;
    const name = `${String(n).padStart(5, '0')}${bad ? `-${bad}` : ''}.${ending}`;
    const file = path.join(cache, name);
    const length = bad === 'short' ? 0.3 : 8 + 4 * random();
    const start = random() * Math.max(0, lengths.get(source)! - length);
    if (!(await exists(file)))
      await make(path.join(recordings, source), file, { start, length, encoder, bad, random });
    const way = n % 10 === 3 ? 'http' : n % 20 === 6 ? 'upload' : 's3';
    const declaredGenre = path.basename(source).split(/[._]/)[0]!;
    // An upload holds at least a byte.
    tracks[n] = { name, way: bad === 'empty' ? 's3' : way, declaredGenre, audio: file };
  });
  return tracks;
}

interface Cut {
  readonly start: number;
  readonly length: number;
  readonly encoder: readonly string[];
  readonly bad: (typeof damages)[number] | undefined;
  readonly random: () => number;
}

async function make(
  source: string,
  file: string,
  { start, length, encoder, bad, random }: Cut,
): Promise<void> {
  const part = `${file}.part${path.extname(file)}`;
  if (bad === 'garbage')
    await writeFile(part, Buffer.from(Array.from({ length: 50_000 }, () => random() * 256)));
  else if (bad === 'empty') await writeFile(part, '');
  else if (bad === 'text')
    await writeFile(part, 'This is not the music that you are looking for.\n'.repeat(100));
  else {
    const cut = ['-ss', start.toFixed(3), '-t', length.toFixed(3), '-i', source];
    const filter = bad === 'silent' ? ['-af', 'volume=0'] : [];
    const options = ['-vn', '-map_metadata', '-1', '-fflags', '+bitexact', '-flags:a', '+bitexact'];
    await ffmpeg('ffmpeg', [...cut, ...options, ...filter, ...encoder, '-threads', '1', part]);
    if (bad === 'truncated') {
      await using handle = await open(part, 'r+');
      await handle.truncate(Math.floor((await readFile(part)).length * 0.02));
    }
  }
  await rename(part, file);
}

async function ffmpeg(program: 'ffmpeg' | 'ffprobe', args: readonly string[]): Promise<string> {
  const common = program === 'ffmpeg' ? ['-nostdin', '-y', '-v', 'error'] : ['-v', 'error'];
  return (await promisify(execFile)(program, [...common, ...args])).stdout;
}

async function secondsOf(file: string): Promise<number> {
  return Number(await ffmpeg('ffprobe', ['-show_entries', 'format=duration', '-of', 'csv=p=0', file]));
}

const exists = (file: string) =>
  stat(file).then(
    () => true,
    () => false,
  );
