import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createTurns } from './turns.ts';

/** Hands over rows one room at a time; @returns how many each has handed over. */
function handOut(
  turns: ReturnType<typeof createTurns>,
  rows: Record<string, number>,
  rooms: readonly number[],
  canTake: (name: string) => boolean = () => true,
): Record<string, number> {
  const handed: Record<string, number> = Object.fromEntries(Object.keys(rows).map((name) => [name, 0]));
  for (let room of rooms) {
    while (room > 0) {
      const waiting = new Set(Object.keys(rows).filter((name) => rows[name]! > 0));
      const turn = turns.next(waiting, canTake);
      if (turn === undefined) break;
      const taken = Math.min(turn.most, room, rows[turn.name]!);
      turns.took(turn.name, taken);
      rows[turn.name]! -= taken;
      handed[turn.name]! += taken;
      room -= taken;
    }
  }
  return handed;
}
const weights: Record<string, number> = { heavy: 3, medium: 2, light: 1 };
const create = () => createTurns(8, (name) => weights[name] ?? 1);

for (const [what, room] of [
  ['one row', 1],
  ['fewer rows than a turn', 5],
  ['many rows', 500],
] as const) {
  test(`shares are as the weights, when there is room for ${what} at a time`, () => {
    const rows = { heavy: 1e6, medium: 1e6, light: 1e6 };
    const handed = handOut(
      create(),
      rows,
      Array.from({ length: 6_000 / room }, () => room),
    );
    assert.ok(Math.abs(handed['heavy']! - 3_000) <= 24, JSON.stringify(handed));
    assert.ok(Math.abs(handed['medium']! - 2_000) <= 24, JSON.stringify(handed));
    assert.ok(Math.abs(handed['light']! - 1_000) <= 24, JSON.stringify(handed));
  });
}

test('who comes anew does not get what it missed', () => {
  const turns = create();
  handOut(turns, { light: 1e6 }, [1_000]);
  const handed = handOut(turns, { light: 1e6, other: 1e6 }, [200]);
  assert.ok(Math.abs(handed['light']! - handed['other']!) <= 8, JSON.stringify(handed));
});

test('who has run out keeps no credit', () => {
  const turns = create();
  handOut(turns, { heavy: 1, light: 1e6 }, [100]);
  const handed = handOut(turns, { heavy: 1e6, light: 1e6 }, [32]);
  assert.ok(handed['heavy']! <= 24 && handed['light']! >= 8, JSON.stringify(handed));
});

test('who has no room now is passed over, and stands where it stood when it has', () => {
  const turns = create();
  const rows = { heavy: 1e6, light: 1e6 };
  const alone = handOut(turns, rows, [100], (name) => name === 'light');
  assert.deepEqual(alone, { heavy: 0, light: 100 });
  const both = handOut(turns, rows, [400]);
  assert.ok(Math.abs(both['heavy']! - 300) <= 24, JSON.stringify(both));
});

test('when nobody can, it is nobody’s turn', () => {
  const turns = create();
  assert.equal(
    turns.next(new Set(), () => true),
    undefined,
  );
  assert.equal(
    turns.next(new Set(['light']), () => false),
    undefined,
  );
  assert.deepEqual(
    turns.next(new Set(['light']), () => true),
    { name: 'light', most: 8 },
  );
});
