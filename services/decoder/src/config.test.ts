import assert from 'node:assert/strict';
import { test } from 'node:test';
import { loadConfig } from './config.ts';

test('an empty environment gives a decoder per core on this machine', () => {
  const config = loadConfig({}, 6);
  assert.equal(config.concurrency, 6);
  assert.match(config.storageUrl, /^file:\/\/\/.*\/data\/objects$/);
  assert.equal(config.ffmpeg.stallMs, 20_000);
});

test('a variable set to nothing means its default, a bad one is named', () => {
  assert.equal(loadConfig({ DECODE_CONCURRENCY: '' }, 3).concurrency, 3);
  assert.throws(() => loadConfig({ DECODE_CONCURRENCY: '0' }), {
    name: 'StartupError',
    message: /DECODE_CONCURRENCY/,
  });
  assert.throws(() => loadConfig({ MAX_DURATION_SECONDS: 'long' }), { message: /MAX_DURATION_SECONDS/ });
});
