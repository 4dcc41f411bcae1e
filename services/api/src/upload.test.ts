import assert from 'node:assert/strict';
import { test } from 'node:test';
import { displayName } from './upload.ts';

test('a file name is shown without path and control characters, and never empty', () => {
  for (const [given, shown] of [
    ['song.mp3', 'song.mp3'],
    ['../../etc/passwd', 'passwd'],
    ['C:\\Users\\me\\song.mp3', 'song.mp3'],
    ['a\u0000b\u001b[31m.mp3', 'a b [31m.mp3'],
    ['left\u202eright.mp3', 'left right.mp3'],
    ['🎷.mp3', '🎷.mp3'],
    [`${'😀'.repeat(300)}`, '😀'.repeat(255)],
    ['', 'unnamed'],
    ['/', 'unnamed'],
    ['..', 'unnamed'],
    [undefined, 'unnamed'],
  ] as const) {
    assert.equal(displayName(given), shown);
  }
});
