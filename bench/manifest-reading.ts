/**
 * How many manifest rows a second does the API's reader take on one core, and does its memory grow with the manifest?
 * Each manifest is read by a process of its own: a row is checked, its ref looked up among all before it, and put
 * into the chunk that goes to storage.
 *
 *   npm run bench -- manifest-reading [rows ...]
 */
import { execFileSync } from 'node:child_process';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { cpus, loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { chunkRows, encodeChunk, type ManifestRow } from '@acousticsense/shared/manifest';
import { type ManifestOptions, readManifest } from '../services/api/src/manifest-reader.ts';

type Format = ManifestOptions['format'];

const [mode, file, format] = process.argv.slice(2);
if (mode === '--read') await read(file!, format as Format);
else await compare(process.argv.slice(2).map(Number));

async function compare(given: number[]): Promise<void> {
  const directory = await mkdtemp(path.join(tmpdir(), 'manifest-'));
  try {
    console.log(`${cpus().length} x ${cpus()[0]?.model}, load before: ${loadavg()[0]!.toFixed(1)}`);
    console.log('format       rows       MB   seconds    rows/s   peak RSS MiB   bytes/row stored');
    for (const format of ['jsonl', 'csv'] as const) {
      for (const rows of given.length > 0 ? given : [10_000, 100_000, 1_000_000]) {
        const manifest = path.join(directory, `${rows}.${format}`);
        await pipeline(Readable.from(write(rows, format)), createWriteStream(manifest));
        const run = [import.meta.filename, '--read', manifest, format];
        const { seconds, rss, stored } = JSON.parse(
          execFileSync(process.execPath, run, { encoding: 'utf8' }),
        );
        const megabytes = (await stat(manifest)).size / 1e6;
        const cells = [
          format,
          rows,
          megabytes.toFixed(1),
          seconds.toFixed(2),
          Math.round(rows / seconds),
          (rss / 1024).toFixed(0),
          (stored / rows).toFixed(0),
        ];
        console.log(cells.map((cell, i) => String(cell).padStart([6, 11, 9, 10, 10, 15, 19][i]!)).join(''));
        await rm(manifest);
      }
    }
    console.log(`load after: ${loadavg()[0]!.toFixed(1)}`);
  } finally {
    await rm(directory, { recursive: true });
  }
}

async function read(file: string, format: Format): Promise<void> {
  const began = performance.now();
  let chunk: ManifestRow[] = [];
  let stored = 0;
  const store = () => {
    stored += encodeChunk(chunk).length;
    chunk = [];
  };
  const options = { format, maxRows: 1e7, maxLineBytes: 65_536, isAllowed: () => true };
  for await (const item of readManifest(createReadStream(file), options)) {
    if (!('row' in item)) throw new Error(JSON.stringify(item));
    if (chunk.push(item.row) === chunkRows) store();
  }
  if (chunk.length > 0) store();
  const seconds = (performance.now() - began) / 1_000;
  console.log(JSON.stringify({ seconds, rss: process.resourceUsage().maxRSS, stored }));
}

function* write(rows: number, format: Format): Generator<string> {
  if (format === 'csv') yield 'audio,ref,declaredGenre,etag,size\n';
  for (let row = 0; row < rows; row += 1) {
    const fields = {
      audio: `s3://catalogue/2026/11/label-${row % 977}/track-${row}.flac`,
      ref: `GBAYE${String(row).padStart(7, '0')}`,
      declaredGenre: 'Hip-Hop; R&B',
      etag: '9e107d9d372bb6826bd81d3542a419d6',
      size: 30_000_000 + row,
    };
    yield format === 'csv' ? `${Object.values(fields).join(',')}\n` : `${JSON.stringify(fields)}\n`;
  }
}
