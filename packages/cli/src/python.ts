/** The Python that training/ runs on. */
import { existsSync } from 'node:fs';
import path from 'node:path';
import type { CliConfig } from './config.ts';
import { Failure } from './failure.ts';

const root = path.resolve(import.meta.dirname, '../../..');

/** @throws {Failure} with the commands that make the environment. */
export function findPython({ python, env }: Pick<CliConfig, 'python' | 'env'>): string {
  if (python !== undefined) {
    const places = python.includes('/') ? [''] : (env['PATH'] ?? '').split(':');
    if (!places.some((place) => existsSync(path.join(place, python))))
      throw new Failure(`There is no Python at ${python} (ACOUSTICSENSE_PYTHON).`);
    return python;
  }
  const own = path.join(root, 'training/.venv/bin/python');
  if (existsSync(own)) return own;
  throw new Failure(
    [
      'Reading checkpoints needs Python 3.11 with the packages of training/requirements.txt (about 6 GB: PyTorch comes with its GPU libraries). Make its environment once, in the folder of the project:',
      '',
      '  python3 -m venv training/.venv && training/.venv/bin/pip install -r training/requirements.txt',
      '',
      'or name another Python that has them: ACOUSTICSENSE_PYTHON=/path/to/python.',
    ].join('\n'),
  );
}
