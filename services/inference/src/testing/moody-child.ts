/**
 * The real child process, with moods: the first byte of a window can make it die, hang or take its time.
 * For tests only; the product's child knows nothing of it.
 */
import '../model-child.ts';
import type { LoadRequest, RunRequest } from '../model-child.ts';
import { moods } from './moods.ts';

const windowBytes = 128;
const sleepers = new Int32Array(new SharedArrayBuffer(4));

// Runs before the real listener, which then sees the message as ever.
process.prependListener('message', (message: LoadRequest | RunRequest) => {
  if (message.type !== 'run') return;
  for (let row = 0; row < message.count; row += 1) {
    const mood = message.windows[row * windowBytes];
    if (mood === moods.dies) process.kill(process.pid, 'SIGKILL');
    if (mood === moods.hangs) Atomics.wait(sleepers, 0, 0);
    if (mood === moods.slow) Atomics.wait(sleepers, 0, 0, 400);
  }
});
