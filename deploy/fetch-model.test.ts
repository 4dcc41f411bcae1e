import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { cp, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { loadBundle } from '../packages/shared/src/bundle.ts';
import { openStorage } from '../packages/shared/src/open-storage.ts';
import { startS3, testCredentials } from '../test/s3.ts';

const root = path.dirname(import.meta.dirname);
const program = path.join(root, 'deploy/helm/acousticsense/files/fetch-model.mjs');

describe('the init container that brings a model', () => {
  let scratch: string;
  let source: string;
  let digest: string;
  let size: number;

  before(async () => {
    scratch = await mkdtemp(path.join(tmpdir(), 'as-fetch-model-'));
    source = path.join(scratch, 'source');
    await cp(path.join(root, 'models/default'), source, { recursive: true });
    const manifest = await readFile(path.join(source, 'model.json'));
    digest = createHash('sha256').update(manifest).digest('hex');
    size = Object.keys(JSON.parse(manifest.toString()).files).length + 1;
  });
  after(() => rm(scratch, { recursive: true }));

  async function run(
    env: Record<string, string>,
  ): Promise<{ code: number | null; out: string; err: string }> {
    const child = spawn(process.execPath, [program], {
      env: {
        PATH: process.env['PATH'],
        APP_DIR: root,
        MODEL_DIGEST: digest,
        MODEL_SOURCE: pathToFileURL(source).href,
        ...env,
      },
    });
    let [out, err] = ['', ''];
    child.stdout.on('data', (chunk) => {
      out += chunk;
    });
    child.stderr.on('data', (chunk) => {
      err += chunk;
    });
    const code = await new Promise<number | null>((resolve) => child.once('close', resolve));
    return { code, out, err };
  }
  const target = () => mkdtemp(path.join(scratch, 'target-'));

  test('copies a bundle that the inference service then takes, and fetches nothing twice', async () => {
    const to = await target();
    assert.deepEqual(await run({ MODEL_TARGET: to }), { code: 0, out: `${digest} is in ${to}\n`, err: '' });
    assert.equal((await loadBundle(to)).digest, digest);
    assert.equal((await readdir(to)).length, size, 'no part is left');
    const written = (await stat(path.join(to, 'weights.bin'))).mtimeMs;
    assert.equal((await run({ MODEL_TARGET: to })).code, 0);
    assert.equal((await stat(path.join(to, 'weights.bin'))).mtimeMs, written);
  });

  test('takes it out of a bucket, with the storage of the services', async () => {
    await using s3 = await startS3();
    const credentials = {
      AWS_ACCESS_KEY_ID: testCredentials.accessKeyId,
      AWS_SECRET_ACCESS_KEY: testCredentials.secretAccessKey,
    };
    const url = new URL(s3.url);
    url.pathname += '/models/genres';
    const storage = openStorage(url.href);
    for (const name of await readdir(source))
      await storage.put(name, await readFile(path.join(source, name)));
    storage.close();
    const to = await target();
    const { code, err } = await run({ MODEL_SOURCE: url.href, MODEL_TARGET: to, ...credentials });
    assert.equal(code, 0, err);
    assert.equal((await loadBundle(to)).digest, digest);
  });

  test('for the decoder brings model.json alone', async () => {
    const to = await target();
    assert.equal((await run({ MODEL_TARGET: to, MODEL_FILES: 'manifest' })).code, 0);
    assert.deepEqual(await readdir(to), ['model.json']);
  });

  test('only looks where a bundle is mounted, and writes nothing there', async () => {
    const before = (await readdir(source)).sort();
    const { code, out } = await run({});
    assert.equal(code, 0);
    assert.match(out, new RegExp(`^${digest} is what is at `));
    assert.deepEqual((await readdir(source)).sort(), before);
  });

  test('another bundle than the one that was asked for is refused in one line, and not copied', async () => {
    const to = await target();
    const { code, err } = await run({ MODEL_DIGEST: 'f'.repeat(64), MODEL_TARGET: to });
    assert.equal(code, 1);
    assert.match(err, new RegExp(`^The model cannot be had: .* has SHA-256 ${digest}, expected f{64}\n$`));
    assert.deepEqual(await readdir(to), []);
  });

  test('a damaged file is refused by name and leaves no model.json, so nothing serves what is there', async () => {
    const damaged = path.join(scratch, 'damaged');
    await cp(source, damaged, { recursive: true });
    await writeFile(path.join(damaged, 'weights.bin'), 'not these');
    const to = await target();
    const { code, err } = await run({ MODEL_SOURCE: pathToFileURL(damaged).href, MODEL_TARGET: to });
    assert.equal(code, 1);
    assert.match(err, /^The model cannot be had: weights\.bin at .* has SHA-256 .*, model\.json says /);
    assert.equal(err.trim().split('\n').length, 1);
    assert.ok(!(await readdir(to)).some((name) => name === 'model.json' || name.endsWith('.part')));
  });

  test('a place without a bundle is told with its name', async () => {
    const nothing = path.join(scratch, 'nothing');
    const { code, err } = await run({ MODEL_SOURCE: pathToFileURL(nothing).href });
    assert.equal(code, 1);
    assert.match(err, /^The model cannot be had: model\.json cannot be read at .*nothing/);
  });
});
