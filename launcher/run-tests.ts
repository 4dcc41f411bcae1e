/**
 * `npm test`: every suite of the repository, each file in a process of its own; `npm test -- decoder api.test`
 * runs the files whose path holds one of the words.
 */
import { globSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { finished } from 'node:stream/promises';
import { run } from 'node:test';
import { spec } from 'node:test/reporters';

const root = path.dirname(import.meta.dirname);
const folders = ['test', 'services/*/src', 'packages/*/src', 'launcher'];
const words = process.argv.slice(2);

const files = folders
  .flatMap((folder) => globSync(`${folder}/**/*.test.ts`, { cwd: root }).sort())
  .filter((file) => words.length === 0 || words.some((word) => file.includes(word)));
if (files.length === 0) {
  console.error(`No test file's path holds ${words.join(' or ')}.`);
  process.exit(1);
}

// The whole product runs inside some of the files: more of them at once than cores make each other late.
const concurrency = Math.min(4, Math.max(2, availableParallelism() >> 1));
const tests = run({ files, cwd: root, concurrency });
let passed = 0;
let failed = 0;
let skipped = 0;
let ended = false;
tests.on('test:summary', ({ file, counts, success }) => {
  // The last summary, of no file in particular, is the one of the whole run.
  if (file !== undefined) return;
  ended = true;
  passed = counts.passed;
  skipped = counts.skipped + counts.todo;
  failed = counts.tests - passed - skipped;
  if (!success && failed === 0) failed = 1;
});
const report = tests.compose(new spec());
report.pipe(process.stdout, { end: false });
await finished(report);

console.log(`\n${passed} passed, ${failed} failed, ${skipped} skipped (${files.length} files)`);
process.exitCode = ended && failed === 0 && passed > 0 ? 0 : 1;
