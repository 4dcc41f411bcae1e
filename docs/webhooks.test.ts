/** What docs/webhooks.md says in tables is what the code does. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { eventExamples } from '@acousticsense/shared/event-examples';
import { eventTypes } from '@acousticsense/shared/events';
import { maxAttempts, waitAfter } from '../services/webhook/src/messages.ts';

const page = readFileSync(path.join(import.meta.dirname, 'webhooks.md'), 'utf8');

function inMilliseconds(text: string): number {
  const units: Record<string, number> = { s: 1_000, min: 60_000, h: 3_600_000 };
  return [...text.matchAll(/(\d+) (s|min|h)/g)].reduce(
    (sum, [, count, unit]) => sum + Number(count) * units[unit!]!,
    0,
  );
}

test('the table of attempts has every attempt and its wait', () => {
  const rows = [...page.matchAll(/^\| (\d{1,2}) \| ([^|]+) \| ([^|]*) ?\|$/gm)];
  assert.equal(rows.length, maxAttempts);
  let sum = 0;
  for (const [, attempt, wait, since] of rows.slice(1)) {
    const expected = waitAfter(Number(attempt) - 1, 0, 0.5);
    sum += expected;
    assert.equal(inMilliseconds(wait!), expected, `before attempt ${attempt}`);
    assert.ok(Math.abs(inMilliseconds(since!) - sum) < 60_000, `attempt ${attempt}: ${since}`);
  }
});

test('every type of event is described, with every field that it has', () => {
  for (const type of eventTypes) {
    assert.ok(page.includes(`\`${type}\``), type);
    for (const field of Object.keys(eventExamples[type].data))
      assert.match(page, new RegExp(`[\`"]${field}[\`"]`), `${field} of ${type}`);
  }
});
