/**
 * Python's own tests of how models are made and brought in. They need the libraries of training/requirements.txt: in
 * `training/.venv`, or where ACOUSTICSENSE_PYTHON points to. Without them the services run all the same, and so do
 * the other tests.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { promisify } from 'node:util';

const root = path.dirname(import.meta.dirname);
const python = process.env['ACOUSTICSENSE_PYTHON'] ?? path.join(root, 'training/.venv/bin/python');

test('everything under training/ passes its own tests', {
  skip: existsSync(python) ? false : 'no Python with training/requirements.txt',
  // Importing torch alone takes ten seconds on a busy machine.
  timeout: 900_000,
}, async () => {
  const { stderr } = await promisify(execFile)(
    python,
    ['-m', 'unittest', 'discover', '-s', 'training/tests', '-t', 'training/tests'],
    { cwd: root, maxBuffer: 1 << 26, env: { ...process.env, PYTHONPATH: path.join(root, 'training') } },
  );
  const ran = Number(/^Ran (\d+) tests/m.exec(stderr)?.[1]);
  assert.ok(ran > 10, stderr);
});
