import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { failsSome, objects, startCatalogue, type TestCatalogue } from './testing/catalogue.ts';

describe('the feeder', () => {
  let catalogue: TestCatalogue;
  before(async () => {
    catalogue = await startCatalogue();
    for (const tenant of ['acme', 'other']) await catalogue.registerSource(tenant, 'music');
  });
  after(() => catalogue[Symbol.asyncDispose]());

  test('takes a batch through its chunks to its end: every row once, in order, and nothing left in Redis', async () => {
    const feeder = await catalogue.startFeeder();
    const workers = catalogue.startWorkers({ decode: failsSome });
    const rows = [...objects(2_499), ...objects(1, { name: 'bad' })];
    const batch = await catalogue.submit(rows);
    const { state, completed, failed, faults, rate } = await catalogue.ended(batch);
    assert.deepEqual([state, completed, failed], ['completed', 2_499, 1]);
    assert.deepEqual(faults, [{ row: 2_499, error: { code: 'not_audio', message: 'This is no audio.' } }]);
    assert.ok(rate === undefined || rate > 0);
    const results = await catalogue.checkWhole(batch);
    assert.deepEqual(
      results.map(({ ref, line }) => [ref, line]),
      rows.map(({ ref, line }) => [ref, line]),
    );
    assert.ok(results.slice(0, 2_499).every(({ outcome, verdict }) => outcome && verdict === 'undeclared'));
    assert.equal(await catalogue.queued(), 0);
    await workers.stop();
    await catalogue.stopFeeder(feeder);
  });
});
