import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { ProblemError, StartupError } from './errors.ts';
import { createUrlSigner, withoutSignature } from './signed-url.ts';

const newKey = () => randomBytes(32).toString('base64');
const key = newKey();
const signer = createUrlSigner(key);
const now = Date.parse('2026-11-22T10:00:00.500Z');
const in14Days = now + 14 * 86_400_000;
const path = '/v1/batches/0199/results.jsonl?from=1000&to=2000';

/** @returns the tenant, or what is wrong with the link. */
function verdictOf(url: string, { method = 'GET', at = now, by = signer } = {}): string | undefined {
  try {
    return by.verify(method, url, at);
  } catch (error) {
    assert.ok(error instanceof ProblemError && error.code === 'unauthorized', String(error));
    return /expired/.test(error.message) ? 'expired' : 'changed';
  }
}

test('a signed link speaks for its tenant, for GET and HEAD, until it expires', () => {
  const url = signer.sign('acme', path, in14Days);
  assert.ok(url.startsWith(`${path}&tenant=acme&expires=${Math.floor(in14Days / 1_000)}&signature=`));
  assert.equal(verdictOf(url), 'acme');
  assert.equal(verdictOf(url, { method: 'HEAD' }), 'acme');
  assert.equal(verdictOf(url, { at: in14Days - 1_000 }), 'acme');
  assert.equal(verdictOf(url, { at: in14Days }), 'expired');
  assert.equal(verdictOf(signer.sign('acme', '/v1/jobs/1', in14Days)), 'acme');
});

test('the order of parameters and how they are written mean nothing', () => {
  const url = signer.sign('acme', '/v1/results?ref=a%20b%2Fc&x=1', in14Days);
  const [at, query] = url.split('?') as [string, string];
  assert.equal(verdictOf(`${at}?${query.split('&').reverse().join('&')}`), 'acme');
  assert.equal(verdictOf(url.replace('a%20b%2Fc', 'a+b/c')), 'acme');
  assert.equal(verdictOf(url.replace('tenant=', '%74enant=')), 'acme');
});

test('with another method, path, parameter, tenant or time it is none', () => {
  const url = signer.sign('acme', path, in14Days);
  for (const method of ['POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'get'])
    assert.equal(verdictOf(url, { method }), 'changed', method);
  const expires = String(Math.floor(in14Days / 1_000));
  const signature = url.slice(url.indexOf('signature=') + 'signature='.length);
  for (const changed of [
    url.replace('0199', '0198'),
    url.replace('/v1/', '/V1/'),
    url.replace('results.jsonl', 'results.jsonl/'),
    url.replace('from=1000', 'from=0'),
    url.replace('from=1000&', ''),
    `${url}&cursor=x`,
    `${url}&from=1000`,
    url.replace('?', '?to=2000&'),
    url.replace('tenant=acme', 'tenant=evil'),
    url.replace('tenant=acme', 'tenant='),
    `${url}&tenant=acme`,
    `${url}&tenant=evil`,
    url.replace('&tenant=acme', ''),
    url.replace(expires, String(Number(expires) + 1)),
    url.replace(expires, `0${expires}`),
    url.replace(expires, 'never'),
    url.replace(`&expires=${expires}`, ''),
    `${url}&expires=${expires}`,
    `${url}&signature=${signature}`,
    url.slice(0, -2),
    url.replace(signature, ''),
    url.replace(signature, `${signature}AA`),
    url.replace(signature, randomBytes(32).toString('base64url')),
  ])
    assert.equal(verdictOf(changed), 'changed', changed);
});

test('a link without a signature is not judged', () => {
  for (const url of ['/v1/jobs/1', '/v1/jobs?x=1', '/v1/jobs?tenant=acme&expires=9', '/?', '/?signature_=1'])
    assert.equal(verdictOf(url), undefined, url);
});

test('the first key signs and all verify; a key that was dropped does not', () => {
  const newer = newKey();
  const rotated = createUrlSigner(`${newer}, ${key}`);
  const old = signer.sign('acme', path, in14Days);
  const fresh = rotated.sign('acme', path, in14Days);
  assert.equal(verdictOf(old, { by: rotated }), 'acme');
  assert.equal(verdictOf(fresh, { by: rotated }), 'acme');
  assert.equal(verdictOf(fresh), 'changed');
  assert.equal(verdictOf(old, { by: createUrlSigner(newer) }), 'changed');
});

test('without SECRETS_KEY nothing is signed and nothing is believed; what is no key is refused', () => {
  const keyless = createUrlSigner(undefined);
  assert.throws(
    () => keyless.sign('acme', path, in14Days),
    (error: unknown) => error instanceof ProblemError && error.code === 'secrets_not_kept',
  );
  assert.equal(verdictOf(signer.sign('acme', path, in14Days), { by: keyless }), 'changed');
  assert.equal(verdictOf('/v1/jobs', { by: keyless }), undefined);
  assert.throws(() => createUrlSigner('short'), StartupError);
});

test('the routes see the address as it was before it was signed', () => {
  for (const url of [path, '/v1/jobs/1', '/v1/results?ref=a%20b%2Fc&x', '/v1/x?a=1&a=2'])
    assert.equal(withoutSignature(signer.sign('acme', url, in14Days)), url);
});
