/**
 * Promise: a file on which the model's process dies every time is set aside, and those that shared its batches are
 * answered as ever.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { isOver } from './catalogue.ts';
import { differences, type Heard } from './invariants.ts';
import { openStorm, shortTracks, toneOf } from './storm.ts';

test('poison is quarantined, and its neighbours are answered as without it', async () => {
  const poison = [440, 1_700].map((hz) => ({
    name: `poison-${hz}.wav`,
    way: 's3' as const,
    audio: toneOf(hz),
  }));
  const songs = shortTracks(24);
  const tracks = [...songs.slice(0, 5), poison[0]!, ...songs.slice(5, 12), poison[1]!, ...songs.slice(12)];
  await using storm = await openStorm({ tracks });
  const { system } = storm;
  await system.kill('inference');
  const poisonous = new URL('./poison-child.ts', import.meta.url).href;
  await system.start('inference', { NODE_OPTIONS: `--import ${poisonous}` });

  const caller = await storm.newCaller();
  const { id } = await caller.submit();
  const { counts } = await caller.when(id, isOver);
  await storm.assertNothingLeft(caller);
  const answers = await storm.answersFor(caller, id);
  for (const { name } of poison) {
    assert.equal(storm.expected.get(name)?.state, 'completed', 'it is good audio otherwise');
    assert.deepEqual([answers.get(name)?.state, answers.get(name)?.error], ['failed', 'quarantined']);
  }
  const names = new Set(poison.map(({ name }) => name));
  const others = (all: ReadonlyMap<string, Heard>) => new Map([...all].filter(([ref]) => !names.has(ref)));
  assert.deepEqual(differences(others(storm.expected), others(answers)), []);
  assert.equal(counts.failed, poison.length + 2, 'the two that are no audio, and the poison');
});
