/**
 * Are 200 uploads at once all answered, and what memory does each process take for it?
 *
 *   npm run bench -- uploads-at-once [uploads]
 */
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { song, wav } from '../test/audio.ts';
import { followed, formOf, type Job, request } from '../test/client.ts';
import { childrenOf } from '../test/processes.ts';
import { startSystem } from '../test/system.ts';

const count = Number(process.argv[2] ?? 200);
await using system = await startSystem({ env: { LOG_LEVEL: 'info' } });
const base = wav([song({ seconds: 30, sampleRate: 22_050 })], { sampleRate: 22_050 });
const audio = Array.from({ length: count }, (_, n) => {
  const copy = Buffer.from(base);
  copy.writeInt16LE(n, 44);
  return copy;
});

const pids = {
  api: system.pid('api'),
  decoder: system.pid('decoder'),
  inference: system.pid('inference'),
  model: (await childrenOf(system.pid('inference')))[0]!,
  redis: system.redis.pid,
};
const peak: Record<string, number> = {};
const before = await memory();
let over = false;
const watching = (async () => {
  while (!over) {
    for (const [name, megabytes] of Object.entries(await memory()))
      peak[name] = Math.max(peak[name] ?? 0, megabytes);
    await sleep(100);
  }
})();

const from = performance.now();
const answers = await Promise.all(
  audio.map((bytes) =>
    request<Job>(`${system.url}/v1/jobs`, { method: 'POST', body: formOf(bytes, { name: 'song.wav' }) }),
  ),
);
const accepted = performance.now() - from;
const statuses = Map.groupBy(answers, ({ status }) => status);
const jobs = await Promise.all(
  answers.filter(({ status }) => status === 202).map(({ body }) => followed(system.url, body)),
);
const total = performance.now() - from;
await sleep(2_000);
over = true;
await watching;
const after = await memory();

console.log(`answers: ${[...statuses].map(([status, all]) => `${all.length} x ${status}`).join(', ')}`);
console.log(
  `ends: ${[...Map.groupBy(jobs, ({ state }) => state)].map(([state, all]) => `${all.length} x ${state}`).join(', ')}`,
);
console.log(`different results for different jobs: ${new Set(jobs.map(({ id }) => id)).size}`);
console.log(
  `all accepted after ${(accepted / 1_000).toFixed(1)} s, all done after ${(total / 1_000).toFixed(1)} s: ${((jobs.length / total) * 1_000).toFixed(1)} jobs/s\n`,
);
console.log('resident MB   before    peak   after');
for (const name of Object.keys(pids)) {
  const cells = [before[name]!, peak[name]!, after[name]!].map((value) => value.toFixed(0).padStart(8));
  console.log(`${name.padEnd(12)}${cells.join('')}`);
}
if (jobs.length !== count || jobs.some(({ state }) => state !== 'completed')) process.exitCode = 1;

async function memory(): Promise<Record<string, number>> {
  const entries = await Promise.all(
    Object.entries(pids).map(async ([name, pid]) => {
      const status = await readFile(`/proc/${pid}/status`, 'utf8');
      return [name, Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1_024] as const;
    }),
  );
  return Object.fromEntries(entries);
}
