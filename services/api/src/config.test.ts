import assert from 'node:assert/strict';
import { test } from 'node:test';
import { StartupError } from '@acousticsense/shared/errors';
import { loadConfig, urlOf } from './config.ts';

test('PUBLIC_URL is an address under which paths can stand; anything else is refused by name', () => {
  for (const [given, expected] of [
    [undefined, undefined],
    ['', undefined],
    ['https://music.example.com', 'https://music.example.com'],
    ['https://music.example.com/', 'https://music.example.com'],
    ['http://10.0.0.5:8000/as/', 'http://10.0.0.5:8000/as'],
    ['http://[::1]:8000', 'http://[::1]:8000'],
  ] as const)
    assert.equal(loadConfig(given === undefined ? {} : { PUBLIC_URL: given }).publicUrl, expected);
  for (const wrong of [
    'music.example.com',
    'ftp://music.example.com',
    'https://',
    'https://me:secret@music.example.com',
    'https://music.example.com/?x=1',
    'https://music.example.com/#top',
    'https://music.example.com /',
  ]) {
    assert.throws(
      () => loadConfig({ PUBLIC_URL: wrong }),
      (error: unknown) => error instanceof StartupError && /^PUBLIC_URL: /.test(error.message),
      wrong,
    );
  }
});

test('without PUBLIC_URL the service is told to be where it listens', () => {
  assert.equal(urlOf('127.0.0.1', 8_000), 'http://127.0.0.1:8000');
  assert.equal(urlOf('music.local', 80), 'http://music.local:80');
  assert.equal(urlOf('0.0.0.0', 8_000), 'http://127.0.0.1:8000');
  assert.equal(urlOf('::', 8_000), 'http://[::1]:8000');
});
