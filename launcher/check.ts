/** `npm run check`: format, lint and import cycles (Biome), types (tsc), unused code (knip). All of them, then the verdict. */
import { spawnSync } from 'node:child_process';
import path from 'node:path';

const root = path.dirname(import.meta.dirname);
// Biome colours even what goes into a file.
const plain = process.stdout.isTTY ? [] : ['--colors=off'];
const checks: { name: string; command: [string, ...string[]] }[] = [
  {
    name: 'format, lint, import cycles',
    command: ['biome', 'ci', '--diagnostic-level=warn', '--error-on-warnings', ...plain],
  },
  { name: 'types', command: ['tsc', '-p', 'tsconfig.json'] },
  { name: 'types of the page', command: ['tsc', '-p', 'services/web/tsconfig.json', '--noEmit'] },
  { name: 'unused files, exports and dependencies', command: ['knip', '--treat-config-hints-as-errors'] },
];

const failed = checks.filter(({ name, command: [program, ...args] }) => {
  console.log(`\n== ${name}`);
  const bin = path.join(root, 'node_modules', '.bin', program);
  const { status } = spawnSync(bin, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] });
  console.log(status === 0 ? 'passed' : 'FAILED');
  return status !== 0;
});
const verdict = failed.length === 0 ? 'all passed' : `failed: ${failed.map(({ name }) => name).join('; ')}`;
console.log(`\n${checks.length} checks, ${verdict}`);
process.exitCode = failed.length === 0 ? 0 : 1;
