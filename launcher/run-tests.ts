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
const folders = ['test', 'services/*/src', 'packages/*/src', 'launcher', 'docs', 'deploy'];
const words = process.argv.slice(2);
/**
 * Files that fail are run once more, in quiet: some hold real processes to moments of a few milliseconds, on machines
 * that others use too. What fails twice has failed; that many at once is no coincidence.
 */
const mostAgain = 3;

const files = folders
  .flatMap((folder) => globSync(`${folder}/**/*.test.ts`, { cwd: root }).sort())
  .filter((file) => words.length === 0 || words.some((word) => file.includes(word)));
if (files.length === 0) {
  console.error(`No test file's path holds ${words.join(' or ')}.`);
  process.exit(1);
}

// The whole product runs inside some of the files: more of them at once than cores make each other late.
const concurrency = Math.min(4, Math.max(2, availableParallelism() >> 1));
const first = await runFiles(files, concurrency);
let { failed } = first;
if (first.failedFiles.length > 0 && first.failedFiles.length <= mostAgain) {
  console.log(`\nFailed, and run once more, each by itself:\n  ${first.failedFiles.join('\n  ')}\n`);
  const again = await runFiles(first.failedFiles, 1);
  failed = again.failed;
  console.log(`\nFailed the first time: ${first.failed} tests. Failed again: ${again.failed}.`);
}
const passed = first.tests - first.skipped - failed;
console.log(`\n${passed} passed, ${failed} failed, ${first.skipped} skipped (${files.length} files)`);
process.exitCode = first.ended && failed === 0 && passed > 0 ? 0 : 1;

async function runFiles(some: string[], atOnce: number) {
  const tests = run({ files: some, cwd: root, concurrency: atOnce });
  const result = { tests: 0, skipped: 0, failed: 0, ended: false, failedFiles: [] as string[] };
  tests.on('test:summary', ({ file, counts, success }) => {
    if (file !== undefined) {
      if (!success) result.failedFiles.push(path.relative(root, file));
      return;
    }
    // The last summary, of no file in particular, is the one of the whole run.
    result.ended = true;
    result.tests = counts.tests;
    result.skipped = counts.skipped + counts.todo;
    result.failed = counts.tests - counts.passed - result.skipped;
    if (!success && result.failed === 0) result.failed = 1;
  });
  const report = tests.compose(new spec());
  report.pipe(process.stdout, { end: false });
  await finished(report);
  if (!result.ended) result.failed += 1;
  return result;
}
