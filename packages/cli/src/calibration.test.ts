import assert from 'node:assert/strict';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { loadBundle } from '@acousticsense/shared/bundle';
import { fitCalibration, writeCalibration } from './calibration.ts';
import { Failure } from './failure.ts';
import { defaultBundle } from './private-system.ts';

test('a bundle that was replaced while its files were being answered is not written to', async () => {
  const directory = await mkdtemp(path.join(tmpdir(), 'as-calibration-'));
  try {
    await cp(defaultBundle, directory, { recursive: true });
    const measured = await loadBundle(directory);
    const { labels, aggregation } = measured.manifest;
    const clips = Array.from({ length: 60 }, (_, index) => ({
      name: `${index}.wav`,
      truth: index % labels.length,
      logits: [labels.map((_, label) => (label === (index * 2) % labels.length ? 2 : 0))],
    }));
    const fitted = fitCalibration(clips, { aggregation, data: 'test', labels });
    const file = path.join(directory, 'model.json');
    const other = (await readFile(file, 'utf8')).replace(/"version": "[^"]*"/, '"version": "another"');
    await writeFile(file, other);
    await assert.rejects(writeCalibration(measured, fitted), (error: Error) => {
      assert.ok(error instanceof Failure);
      assert.match(error.message, /has changed since .* nothing was written/);
      return true;
    });
    assert.equal(await readFile(file, 'utf8'), other);

    const now = await writeCalibration(await loadBundle(directory), fitted);
    assert.deepEqual(now.manifest.calibration, fitted.calibration);
    assert.equal(now.manifest.version, 'another');
  } finally {
    await rm(directory, { recursive: true });
  }
});
