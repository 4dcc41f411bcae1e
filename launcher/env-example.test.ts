import assert from 'node:assert/strict';
import { globSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { parseEnv } from 'node:util';

const root = path.dirname(import.meta.dirname);
const example = parseEnv(readFileSync(path.join(root, '.env.example'), 'utf8')) as Record<string, string>;
const configs = globSync(['services/*/src/config.ts', 'launcher/config.ts'], { cwd: root });
const common = 'packages/shared/src/common-config.ts';

/** The names of a config's variables: the keys in capitals of its schema. */
function variablesOf(file: string): string[] {
  const source = readFileSync(path.join(root, file), 'utf8');
  return [...source.matchAll(/^\s+([A-Z][A-Z0-9_]*):/gm)].map((match) => match[1]!);
}

test('every variable that a service reads is in .env.example, and nothing else is', () => {
  assert.ok(configs.length >= 4, configs.join());
  const read = new Set([...configs, common].flatMap(variablesOf));
  assert.deepEqual(Object.keys(example).sort(), [...read].sort());
});

for (const file of configs) {
  test(`the values in .env.example are the defaults of ${file}`, async () => {
    const { loadConfig } = (await import(path.join(root, file))) as { loadConfig: (env: object) => unknown };
    const documented = Object.fromEntries(
      Object.entries(example).filter(([name]) => [file, common].flatMap(variablesOf).includes(name)),
    );
    // A relative path means the project's folder, which only the launcher knows.
    if (file !== 'launcher/config.ts') delete documented.MODEL_URL;
    assert.deepEqual(loadConfig(documented), loadConfig({}));
  });
}
