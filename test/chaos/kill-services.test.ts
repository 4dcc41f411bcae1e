/** Promise: `kill -9` of a service in the middle of a batch loses no row, and answers none twice or otherwise. */
import assert from 'node:assert/strict';
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isOver } from './catalogue.ts';
import { atWork, held, killAndStart, modelProcesses, openStorm, type Storm, until } from './storm.ts';

describe('a batch survives kill -9 of', () => {
  let storm: Storm;
  before(async () => {
    storm = await openStorm();
  });
  after(() => storm?.[Symbol.asyncDispose]());

  test('the API, while its rows are worked on', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const batch = await held(await modelProcesses(system), async () => {
      const accepted = await caller.submit();
      await until('rows are at the model', async () => (await atWork(caller, 'inference')) > 0);
      await killAndStart(system, 'api');
      return accepted;
    });
    await storm.assertUnharmed(caller, batch.id);
  });

  test('the fetch service, in the middle of downloads', async () => {
    const { system, catalogue } = storm;
    const caller = await storm.newCaller();
    catalogue.webDelayMs = 1_500;
    const { id } = await caller.submit();
    await until('downloads are under way', async () => (await atWork(caller, 'fetch')) > 0);
    await sleep(200);
    assert.ok((await atWork(caller, 'fetch')) > 0);
    await system.kill('fetch');
    catalogue.webDelayMs = 0;
    await system.start('fetch');
    await storm.assertUnharmed(caller, id);
  });

  test('the feeder, again and again while it feeds and writes', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    for (let n = 0; n < 3; n += 1) {
      await sleep(100 * n);
      await killAndStart(system, 'feeder');
    }
    await storm.assertUnharmed(caller, id);
  });

  test('the feeder, when every row has ended and the part is to be written', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const children = await modelProcesses(system);
    const { id } = await held(children, async () => {
      const accepted = await caller.submit();
      await until('rows are at the model', async () => (await atWork(caller, 'inference')) > 0);
      return accepted;
    });
    await until('a row was answered', async () => (await caller.read(id)).counts.completed > 0);
    // By then all rows are jobs: there are fewer than the feeder keeps in the queues at least, or nearly so.
    await until('the last rows are jobs', async () => (await caller.read(id)).counts.waiting === 0);
    await system.kill('feeder');
    await until('no row is left', async () => (await caller.read(id)).counts.running === 0);
    assert.ok(!isOver(await caller.read(id)), 'without the feeder no part is written and no batch ends');
    await system.start('feeder');
    await storm.assertUnharmed(caller, id);
  });

  test('the decoder, with files open, which leaves no scratch files', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const scratch = path.join(system.directory, 'scratch');
    const { id } = await caller.submit();
    await until('files are decoded', async () => (await readdir(scratch)).length > 0);
    await system.kill('decoder');
    await system.start('decoder');
    await storm.assertUnharmed(caller, id);
    assert.deepEqual(await readdir(scratch), []);
  });

  test('the inference service, with rows in its hands', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const batch = await held(await modelProcesses(system), async () => {
      const accepted = await caller.submit();
      await until('rows are at the model', async () => (await atWork(caller, 'inference')) > 2);
      await system.kill('inference');
      return accepted;
    });
    await system.start('inference');
    await storm.assertUnharmed(caller, batch.id);
  });

  test('all of them at once', async () => {
    const { system } = storm;
    const caller = await storm.newCaller();
    const { id } = await caller.submit();
    await until('some rows are answered', async () => (await caller.read(id)).counts.completed > 3);
    const names = ['api', 'fetch', 'feeder', 'decoder', 'inference', 'webhook'] as const;
    await Promise.all(names.map((name) => system.kill(name)));
    await Promise.all(names.map((name) => system.start(name)));
    await storm.assertUnharmed(caller, id);
  });
});
