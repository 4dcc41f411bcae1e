import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { test } from 'node:test';
import { isRedisAway, ProblemError, problemCodes, toProblemJson } from './errors.ts';

test('every problem is explained in docs/errors.md, with its status, title and whether to try again', async () => {
  const page = await readFile(new URL('../../../docs/errors.md', import.meta.url), 'utf8');
  const rows = page.split('\n').filter((line) => line.startsWith('| `'));
  for (const code of problemCodes) {
    const { status, title, retryable } = new ProblemError(code, '');
    const start = `| \`${code}\` | ${status} | ${title} | ${retryable ? 'yes' : 'no'} | `;
    assert.ok(
      rows.some((row) => row.startsWith(start) && row.length > start.length + 5),
      start,
    );
  }
  assert.equal(rows.length, problemCodes.length);
});

test('a problem becomes RFC 9457 JSON that names the field and nothing of the cause', () => {
  const error = new ProblemError('bad_option', 'Say it so.', { field: 'topK' }, new Error('secret'));
  assert.deepEqual(toProblemJson(error, '/v1/jobs'), {
    type: 'urn:acousticsense:problem:bad_option',
    title: 'An option has a value that cannot be used',
    status: 400,
    detail: 'Say it so.',
    code: 'bad_option',
    retryable: false,
    field: 'topK',
    instance: '/v1/jobs',
  });
});

test('an error of the caller is not taken for an absence of Redis', () => {
  assert.equal(isRedisAway(new Error('ERR value is not an integer')), false);
  assert.equal(isRedisAway(new Error('WRONGTYPE Operation against a key')), false);
  assert.equal(isRedisAway(Object.assign(new Error('connect'), { code: 'ECONNREFUSED' })), true);
  const missing = Object.assign(new Error('no such file'), { code: 'ENOENT' });
  assert.equal(isRedisAway(Object.assign(missing, { syscall: 'open' })), false);
  assert.equal(isRedisAway(Object.assign(missing, { syscall: 'connect' })), true);
  assert.equal(isRedisAway(new Error('Command aborted due to connection close')), true);
  assert.equal(isRedisAway(new Error("OOM command not allowed when used memory > 'maxmemory'.")), true);
});
