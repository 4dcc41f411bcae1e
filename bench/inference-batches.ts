/**
 * How many windows a second does the default model classify, by batch size and threads, through the real child
 * process and its channel?
 *
 *   node bench/inference-batches.ts [bundle directory]
 */
import { readFile } from 'node:fs/promises';
import { cpus, loadavg } from 'node:os';
import path from 'node:path';
import { loadBundle } from '@acousticsense/shared/bundle';
import { pino } from 'pino';
import { createModelProcess } from '../services/inference/src/model-process.ts';

const bundle = await loadBundle(process.argv[2] ?? path.join(import.meta.dirname, '../models/default'));
const { melBands, windowFrames } = bundle.manifest.profile;
const { name, version } = bundle.manifest;
const load = () => loadavg()[0]!.toFixed(1);
console.log(`${name} ${version}, ${cpus().length} x ${cpus()[0]?.model}, load before: ${load()}`);
console.log('threads  batch  windows/s  ms/batch (median)  of that channel  CPU ms/window');

for (const threads of [1, 2]) {
  const log = pino({ level: 'silent' });
  const model = createModelProcess({ bundle, provider: 'cpu', requireGpu: false, threads, log });
  await model.start();
  for (const count of [1, 4, 8, 16]) {
    const windows = new Uint8Array(count * melBands * windowFrames).map((_, i) => (i * 7) % 256);
    await model.run(windows, count);
    const rounds: { total: number; run: number }[] = [];
    const cpuBefore = await cpuMs(model.pid!);
    const began = performance.now();
    while (performance.now() - began < 1_500) {
      const from = performance.now();
      const { runMs } = await model.run(windows, count);
      rounds.push({ total: performance.now() - from, run: runMs });
    }
    const seconds = (performance.now() - began) / 1_000;
    const classified = rounds.length * count;
    const cells = [
      threads,
      count,
      (classified / seconds).toFixed(1),
      median(rounds.map(({ total }) => total)).toFixed(1),
      median(rounds.map(({ total, run }) => total - run)).toFixed(2),
      (((await cpuMs(model.pid!)) - cpuBefore) / classified).toFixed(1),
    ];
    console.log(cells.map((cell, i) => String(cell).padStart([7, 6, 10, 18, 16, 14][i]!)).join(' '));
  }
  await model.close();
}
console.log(`load after: ${load()}`);

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}

/** User and system time of a process; proc(5), 100 ticks a second on every Linux that Node runs on. */
async function cpuMs(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}
