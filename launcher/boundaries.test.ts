import assert from 'node:assert/strict';
import { globSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';

const root = path.dirname(import.meta.dirname);

/** `services/api` of `services/api/src/app.ts`. */
const workspaceOf = (file: string) => file.split(path.sep).slice(0, 2).join('/');

function importsOf(file: string): string[] {
  const source = readFileSync(path.join(root, file), 'utf8');
  return [...source.matchAll(/(?:from|import|import\()\s*'([^']+)'/g)].map((match) => match[1]!);
}

test('a service imports only itself and packages, a package no service', () => {
  const files = globSync('{services,packages}/*/src/**/*.ts', { cwd: root });
  assert.ok(files.length > 20, `${files.length} files`);
  const offences: string[] = [];
  for (const file of files.filter((name) => !name.endsWith('.test.ts') && !name.includes('/testing/'))) {
    for (const specifier of importsOf(file)) {
      const own = workspaceOf(file);
      const target = specifier.startsWith('.')
        ? workspaceOf(path.join(path.dirname(file), specifier))
        : specifier.replace(
            /^@acousticsense\/(api|decoder|inference|web|fetch|feeder|webhook)\b.*/,
            'services/$1',
          );
      const leavesItself = specifier.startsWith('.') && target !== own;
      const entersService = target.startsWith('services/') && target !== own;
      if (leavesItself || entersService) offences.push(`${file} imports ${specifier}`);
    }
  }
  assert.deepEqual(offences, []);
});
