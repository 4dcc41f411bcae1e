import assert from 'node:assert/strict';
import { test } from 'node:test';
import { eventExamples } from './event-examples.ts';
import { eventSchema, eventTypes, resultPath, type StoredEvent } from './events.ts';

test('there is an example of every event, and each is one that could be told', () => {
  assert.deepEqual(Object.keys(eventExamples), [...eventTypes]);
  for (const type of eventTypes) {
    const example = eventSchema.parse(eventExamples[type]);
    assert.equal(example.type, type);
    const { pathname, search } = new URL(example.data.resultUrl);
    assert.ok(`${pathname}${search}`.startsWith(resultPath(example as StoredEvent)), type);
  }
});

test('what an example counts adds up', () => {
  for (const { type, data } of Object.values(eventExamples)) {
    if (!('counts' in data)) continue;
    const { rows, completed, failed, cancelled, reused } = data.counts;
    const ended = completed + failed + cancelled;
    if (type === 'results.part' || type === 'batch.progress') assert.ok(ended < rows, type);
    else assert.equal(ended, rows, type);
    assert.ok(reused <= completed, type);
  }
});
