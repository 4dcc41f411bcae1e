/**
 * The real child process, with moods: the first byte of a window can make it die, hang or take its time.
 * For tests only; the product's child knows nothing of it.
 */
import { existsSync } from 'node:fs';
import path from 'node:path';
import '../model-child.ts';
import type { Request } from '../model-child.ts';
import { diesOpening, moods } from './moods.ts';

const windowBytes = 128;
const sleepers = new Int32Array(new SharedArrayBuffer(4));
let directory = '';

// Runs before the real listener, which then sees the message as ever.
process.prependListener('message', (message: Request) => {
  if (message.type === 'load') directory = message.directory;
  if (message.type === 'open-explain' && existsSync(path.join(directory, diesOpening))) die();
  if (message.type !== 'run') return;
  const explains = message.graph === 'explain';
  for (let row = 0; row < message.count; row += 1) {
    const mood = message.windows[row * windowBytes];
    if (mood === moods.dies || (explains && mood === moods.diesExplaining)) die();
    if (mood === moods.hangs) Atomics.wait(sleepers, 0, 0);
    if (mood === moods.slow || (explains && mood === moods.slowExplaining)) Atomics.wait(sleepers, 0, 0, 400);
  }
});

function die(): void {
  process.kill(process.pid, 'SIGKILL');
}
