import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { hashProfile, loadBundle, type Manifest } from './bundle.ts';
import { StartupError } from './errors.ts';

const shipped = path.resolve(import.meta.dirname, '../../../models/default');

describe('a model bundle', () => {
  let manifest: Manifest;
  let directory: string;
  before(async () => {
    manifest = JSON.parse(await readFile(path.join(shipped, 'model.json'), 'utf8'));
    directory = await mkdtemp(path.join(tmpdir(), 'as-bundle-'));
  });
  after(() => rm(directory, { recursive: true }));

  /** Writes a bundle with small files whose hashes fit, then lets the test spoil it. */
  async function write(spoil: (manifest: Manifest) => unknown = () => {}): Promise<void> {
    const copy = structuredClone(manifest);
    for (const file of Object.keys(copy.files)) {
      await writeFile(path.join(directory, file), file);
      copy.files[file] = createHash('sha256').update(file).digest('hex');
    }
    const text = spoil(copy);
    await writeFile(
      path.join(directory, 'model.json'),
      typeof text === 'string' ? text : JSON.stringify(copy),
    );
  }
  const refused = (sentence: RegExp) =>
    assert.rejects(
      loadBundle(directory),
      (error) => error instanceof StartupError && sentence.test(error.message),
    );

  test('that is shipped is whole, and says what it was measured at', async () => {
    const { manifest, digest, profileHash } = await loadBundle(shipped);
    assert.match(digest, /^[0-9a-f]{64}$/);
    assert.match(profileHash, /^[0-9a-f]{16}$/);
    assert.ok(manifest.accuracy !== 'none' && manifest.accuracy.clips > 500);
    assert.ok(!manifest.labels.some((label) => /r ?& ?b/i.test(label)), 'no label without training data');
  });

  test('is found by path and by file URL alike, and its digest is the hash of model.json', async () => {
    await write();
    const byPath = await loadBundle(directory);
    const byUrl = await loadBundle(new URL(`file://${directory}`).href);
    assert.deepEqual(byPath, byUrl);
    const text = await readFile(path.join(directory, 'model.json'));
    assert.equal(byPath.digest, createHash('sha256').update(text).digest('hex'));
  });

  test('with one flipped byte is refused, naming the file', async () => {
    await write();
    await writeFile(path.join(directory, 'model.onnx'), 'model.onnX');
    await refused(/model\.onnx has SHA-256 [0-9a-f]{64}, model\.json says [0-9a-f]{64}/);
    // The decoder reads the profile alone.
    await loadBundle(directory, { verifyFiles: false });
  });

  test('that does not exist, or lacks a file, is refused, naming the path', async () => {
    await assert.rejects(loadBundle('/nowhere/at/all'), /No model bundle at \/nowhere\/at\/all/);
    await write();
    await rm(path.join(directory, 'self-test.npy'));
    await refused(/self-test\.npy cannot be read/);
  });

  for (const [what, spoil, sentence] of [
    ['that is not JSON', () => '{', /is not JSON/],
    [
      'with labels that repeat',
      (m) => {
        m.labels[1] = m.labels[0]!;
      },
      /labels/,
    ],
    ['with one label too few', (m) => void m.labels.pop(), /14 labels for logits of shape \["batch",15\]/],
    [
      'with another input shape than its profile makes',
      (m) => {
        m.profile.melBands = 64;
      },
      /graph\.input\.shape.*64/,
    ],
    [
      'with bands above half the sample rate',
      (m) => {
        m.profile.sampleRate = 16_000;
      },
      /maxHz/,
    ],
    [
      'with a step longer than its window',
      (m) => {
        m.profile.stepFrames = 129;
      },
      /stepFrames/,
    ],
    ['with an unknown field', (m) => Object.assign(m, { colour: 'blue' }), /colour|Unrecognized/],
    ['without a hash for its graph', (m) => void delete m.files['model.onnx'], /no SHA-256 for model\.onnx/],
    ['of another format', (m) => Object.assign(m, { format: 2 }), /format/],
    [
      'with a file outside its directory',
      (m) => {
        m.files['../x'] = 'a'.repeat(64);
      },
      /outside/,
    ],
  ] as [string, (manifest: Manifest) => unknown, RegExp][])
    test(`${what} is refused with a sentence`, async () => {
      await write(spoil);
      await refused(sentence);
    });

  test('has a profile hash that every number changes and the order of fields does not', () => {
    const { profile } = manifest;
    const reversed = Object.fromEntries(Object.entries(profile).reverse()) as typeof profile;
    assert.equal(hashProfile(reversed), hashProfile(profile));
    assert.notEqual(hashProfile({ ...profile, hopLength: profile.hopLength + 1 }), hashProfile(profile));
    assert.notEqual(hashProfile({ ...profile, floorDb: -80 }), hashProfile(profile));
  });
});
