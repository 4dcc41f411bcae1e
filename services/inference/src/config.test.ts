import assert from 'node:assert/strict';
import { test } from 'node:test';
import { StartupError } from '@acousticsense/shared/errors';
import { loadConfig } from './config.ts';

test('nothing set means a CPU-or-better default with one thread for each core', () => {
  const config = loadConfig({ MAX_BATCH: '' }, 3);
  assert.equal(config.threads, 3);
  assert.equal(config.provider, 'auto');
  assert.equal(config.requireGpu, false);
  assert.equal(config.maxBatch, 4);
});

test('a value that cannot be used is refused by its name', () => {
  for (const [name, value] of [
    ['PROVIDER', 'gpu'],
    ['MAX_BATCH', '0'],
    ['INFERENCE_THREADS', 'many'],
    ['REQUIRE_GPU', 'yes'],
  ] as const) {
    assert.throws(
      () => loadConfig({ [name]: value }),
      (error) => error instanceof StartupError && error.message.startsWith(`${name}: `),
    );
  }
});

test('a GPU that is required on PROVIDER=cpu is a contradiction', () => {
  assert.throws(() => loadConfig({ PROVIDER: 'cpu', REQUIRE_GPU: '1' }), /contradicts/);
});
