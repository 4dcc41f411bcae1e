import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { ProblemError, StartupError } from './errors.ts';
import { createSecrets, SecretUnreadable } from './secrets.ts';

const key = () => randomBytes(32).toString('base64');
const place = { tenant: 'acme', name: 'source:catalogue' };

test('a secret is opened again, is not to be read in what is stored, and is never sealed the same way twice', () => {
  const secrets = createSecrets(key());
  const sealed = secrets.seal('wJalr/ü/🎵', place);
  assert.equal(secrets.open(sealed, place), 'wJalr/ü/🎵');
  assert.ok(!sealed.includes('wJalr') && !Buffer.from(sealed.split('.')[3]!, 'base64url').includes('wJalr'));
  assert.notEqual(secrets.seal('wJalr/ü/🎵', place), sealed);
});

test('a sealed text moved to another tenant or name does not open there', () => {
  const secrets = createSecrets(key());
  const sealed = secrets.seal('secret', place);
  for (const other of [
    { ...place, tenant: 'evil' },
    { ...place, name: 'source:other' },
    { tenant: 'acme","source', name: 'catalogue' },
  ])
    assert.throws(() => secrets.open(sealed, other), SecretUnreadable);
});

test('a sealed text that was changed anywhere, cut or made up does not open', () => {
  const secrets = createSecrets(key());
  const sealed = secrets.seal('secret', place);
  const [version, id, nonce, body] = sealed.split('.') as [string, string, string, string];
  const flipped = (text: string, at: number) => {
    const bytes = Buffer.from(text, 'base64url');
    bytes[at]! ^= 1;
    return bytes.toString('base64url');
  };
  const forged = [
    [version, id, flipped(nonce, 0), body],
    [version, id, nonce, flipped(body, 0)],
    [version, id, nonce, flipped(body, -1 + Buffer.from(body, 'base64url').length)],
    // A shorter tag would be easier to guess.
    [version, id, nonce, Buffer.from(body, 'base64url').subarray(0, -12).toString('base64url')],
    [version, id, nonce, ''],
    [version, id, '', body],
    ['v2', id, nonce, body],
    [version, id, nonce, body, 'x'],
    ['secret'],
  ];
  for (const parts of forged) assert.throws(() => secrets.open(parts.join('.'), place), SecretUnreadable);
});

test('keys are rotated: the first seals, all open, and a dropped one opens nothing', () => {
  const [old, fresh] = [key(), key()];
  const sealed = createSecrets(old).seal('secret', place);
  const both = createSecrets(`${fresh}, ${old}`);
  assert.equal(both.open(sealed, place), 'secret');
  assert.equal(both.isCurrent(sealed), false);
  const anew = both.seal('secret', place);
  assert.equal(both.isCurrent(anew), true);
  const after = createSecrets(fresh);
  assert.equal(after.open(anew, place), 'secret');
  assert.throws(() => after.open(sealed, place), SecretUnreadable);
});

test('without a key nothing is sealed, and the reason is told', () => {
  for (const none of [undefined, '', ' ']) {
    assert.throws(
      () => createSecrets(none).seal('secret', place),
      (error) =>
        error instanceof ProblemError &&
        error.code === 'secrets_not_kept' &&
        /SECRETS_KEY/.test(error.message),
    );
  }
});

test('what is no key of 32 bytes is refused at start, without being repeated; the URL alphabet is taken too', () => {
  for (const bad of ['short', randomBytes(31).toString('base64'), `${key().slice(0, -2)}!=`, `${key()},x`]) {
    assert.throws(
      () => createSecrets(bad),
      (error) =>
        error instanceof StartupError && !error.message.includes(bad) && /base64/.test(error.message),
    );
  }
  const bytes = Buffer.alloc(32, 0xfb);
  const sealed = createSecrets(bytes.toString('base64url')).seal('secret', place);
  assert.equal(createSecrets(bytes.toString('base64')).open(sealed, place), 'secret');
});
