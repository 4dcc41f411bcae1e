/**
 * How long from the upload of one 30 s MP3 to its result, and where does the time go?
 *
 *   npm run bench -- upload-to-result [file] [rounds]
 *
 * Each round sends other bytes (an ID3 comment is changed), so that no stage finds its work done. The stages are
 * the service's own timings; "rest" is what they leave of the time that the caller waited: HTTP, commits, queue.
 */
import { readFile, writeFile } from 'node:fs/promises';
import { cpus, loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { encode, song, wav } from '../test/audio.ts';
import { followed, upload } from '../test/client.ts';
import { startSystem } from '../test/system.ts';

const rounds = Number(process.argv[3] ?? 21);
const audio = process.argv[2] ? await readFile(process.argv[2]) : await madeSong();
const load = loadavg()[0]!.toFixed(1);

await using system = await startSystem({ env: { LOG_LEVEL: 'info' } });
const stages = [
  'upload',
  'decodeWait',
  'decodeFetch',
  'decode',
  'inferenceWait',
  'batchWait',
  'inference',
] as const;
const rows: Record<string, number>[] = [];
for (let round = 0; round < rounds + 3; round += 1) {
  const from = performance.now();
  const sent = await upload(system.url, Buffer.concat([id3Comment(round), audio]));
  const job = await followed(system.url, sent);
  const total = performance.now() - from;
  if (job.state !== 'completed') throw new Error(JSON.stringify(job));
  // The first rounds warm the just-in-time compiler and the file cache.
  if (round < 3) continue;
  const timings: Record<string, number> = Object.fromEntries(
    stages.map((stage) => [stage, job.timings?.[stage] ?? 0]),
  );
  const known = Object.values(timings).reduce((a, b) => a + b, 0);
  rows.push({ ...timings, rest: Math.max(0, total - known), total });
}

console.log(
  `${rounds} rounds after 3 to warm up, ${cpus().length} x ${cpus()[0]?.model}, load before: ${load}\n`,
);
console.log('stage          median ms    p90 ms');
const summary: Record<string, { median: number; p90: number }> = {};
for (const stage of [...stages, 'rest', 'total']) {
  const sorted = rows.map((row) => row[stage]!).sort((a, b) => a - b);
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]!;
  summary[stage] = { median: at(0.5), p90: at(0.9) };
  console.log(`${stage.padEnd(14)} ${at(0.5).toFixed(1).padStart(9)} ${at(0.9).toFixed(1).padStart(9)}`);
}
console.log(`\n${JSON.stringify(summary)}`);

async function madeSong(): Promise<Buffer> {
  const base = path.join(tmpdir(), `as-bench-${process.pid}`);
  await writeFile(`${base}.wav`, wav([song({ seconds: 30 }), song({ seconds: 30, seed: 2 })]));
  await encode(`${base}.wav`, `${base}.mp3`, '-b:a', '192k');
  return readFile(`${base}.mp3`);
}

/** An ID3v2.3 tag with one comment. */
function id3Comment(round: number): Buffer {
  const text = Buffer.from(`\0eng\0round ${round}`, 'latin1');
  const frame = Buffer.alloc(10);
  frame.write('COMM', 0, 'latin1');
  frame.writeUInt32BE(text.length, 4);
  const header = Buffer.from('ID3\x03\0\0\0\0\0', 'latin1');
  return Buffer.concat([header, Buffer.from([frame.length + text.length]), frame, text]);
}
