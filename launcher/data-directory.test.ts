import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { createSecrets } from '@acousticsense/shared/secrets';
import { keptApiKey, keptSecretsKey } from './data-directory.ts';

const directory = mkdtempSync(path.join(tmpdir(), 'as-data-'));
after(() => rmSync(directory, { recursive: true }));

test('the keys made for a data directory are its own, stay the same, and only their owner reads them', () => {
  const place = { tenant: 'default', name: 'x' };
  const sealed = createSecrets(keptSecretsKey(directory)).seal('secret', place);
  assert.equal(createSecrets(keptSecretsKey(directory)).open(sealed, place), 'secret');
  assert.equal(keptApiKey(directory), keptApiKey(directory));
  assert.ok(keptApiKey(directory).length >= 16);
  assert.deepEqual(readdirSync(directory).sort(), ['api-key', 'secrets-key']);
  for (const file of readdirSync(directory)) {
    assert.equal(statSync(path.join(directory, file)).mode & 0o777, 0o600, file);
  }
});
