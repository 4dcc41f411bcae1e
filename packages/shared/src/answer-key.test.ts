import assert from 'node:assert/strict';
import { test } from 'node:test';
import { answerKey, identityOf } from './answer-key.ts';

const object = { bucket: 'b', key: 'k', etag: '"e"', size: 3 };
const selection = { windows: 'middle', start: 0 } as const;
const question = { identity: 'i', modelDigest: 'm', selection };

test('an object without ETag and version cannot be recognised', () => {
  assert.equal(identityOf({ s3: { bucket: 'b', key: 'k', size: 3 } }), undefined);
  assert.notEqual(identityOf({ s3: { bucket: 'b', key: 'k', versionId: 'v' } }), undefined);
});

test('an object is another one when place or ETag differ', () => {
  const identities = [
    { s3: object },
    { s3: object, sourceEndpoint: 'https://s3.example' },
    { s3: { ...object, bucket: 'b2' } },
    { s3: { ...object, key: 'k2' } },
    { s3: { ...object, etag: 'e2' } },
    { s3: { bucket: 'b', key: 'k', versionId: 'e' } },
    // What is split otherwise must not read alike.
    { s3: { ...object, bucket: 'b","k', key: '' } },
    { contentId: 'e' },
    { sha256: 'e' },
  ].map(identityOf);
  assert.equal(new Set(identities).size, identities.length);
});

test('a listing, a HEAD and a manifest tell the same object in their own spelling', () => {
  const identity = identityOf({ s3: object, sourceEndpoint: 'https://S3.example/' });
  const other = { bucket: 'b', key: 'k', etag: 'e', size: 3, versionId: 'v' };
  assert.equal(identityOf({ s3: other, sourceEndpoint: 'https://s3.example' }), identity);
});

test('rows share an answer when model, selection and extras are the same, however they are written', () => {
  const key = answerKey(question);
  assert.match(key, /^[\w-]{22}$/);
  const alike = [
    { ...question, selection: { start: 0, windows: 'middle', duration: undefined } as never },
    { ...question, extras: undefined },
    { ...question, extras: { vectors: false, explain: false } },
  ];
  for (const same of alike) assert.equal(answerKey(same), key);
});

test('rows share no answer when anything that changes it differs', () => {
  const keys = [
    question,
    { ...question, identity: 'j' },
    { ...question, modelDigest: 'n' },
    { ...question, selection: { ...selection, windows: 'all' as const } },
    { ...question, selection: { ...selection, start: 1 } },
    { ...question, selection: { ...selection, duration: 1 } },
    { ...question, extras: { explain: true, vectors: false } },
    { ...question, extras: { explain: false, vectors: true } },
  ].map(answerKey);
  assert.equal(new Set(keys).size, keys.length);
});

test('an object is the same whether its size is told, as by a listing, or not, as by a manifest', () => {
  const { size: _, ...unsized } = object;
  assert.equal(identityOf({ s3: unsized }), identityOf({ s3: object }));
});
