/** `npm run bench`: the questions that bench/ answers; `npm run bench -- NAME [arguments]` asks one of them. */
import { spawnSync } from 'node:child_process';
import { globSync } from 'node:fs';
import path from 'node:path';

const directory = path.join(path.dirname(import.meta.dirname), 'bench');
const names = globSync('*.ts', { cwd: directory })
  .map((file) => path.basename(file, '.ts'))
  .sort();
const [name, ...args] = process.argv.slice(2);

if (name === undefined || !names.includes(name)) {
  console.log(
    `npm run bench -- NAME [arguments], where NAME is one of:\n${names.map((one) => `  ${one}`).join('\n')}`,
  );
  process.exitCode = name === undefined ? 0 : 1;
} else {
  const { status } = spawnSync(process.execPath, [path.join(directory, `${name}.ts`), ...args], {
    stdio: 'inherit',
  });
  process.exitCode = status ?? 1;
}
