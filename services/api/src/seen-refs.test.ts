import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createSeenRefs } from './seen-refs.ts';

test('half a million refs that differ little are told apart, and each is found again with its line', () => {
  const refs = createSeenRefs();
  const count = 500_000;
  const ref = (line: number) => (line % 2 === 0 ? `GBAYE${line}` : `${line}-嘻哈`);
  for (let line = 1; line <= count; line += 1) assert.equal(refs.claim(ref(line), line), undefined);
  for (let line = 1; line <= count; line += 1) assert.equal(refs.claim(ref(line), count + line), line);
});

test('a ref is not taken for its beginning, its anagram or its other case', () => {
  const refs = createSeenRefs();
  for (const [index, ref] of ['', 'a', 'aa', 'ab', 'ba', 'A', 'a\u0000', '\u0000a'].entries()) {
    assert.equal(refs.claim(ref, index + 1), undefined, JSON.stringify(ref));
  }
});
