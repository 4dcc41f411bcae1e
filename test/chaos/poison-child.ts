/**
 * Loaded into the model's process (NODE_OPTIONS=--import): it dies on every batch that holds a window of the poison, a
 * tone that never changes, as a bug in the runtime would make it die. The product knows nothing of it.
 */
import type { Request } from '../../services/inference/src/model-child.ts';

if (process.argv[1]?.endsWith('model-child.ts')) {
  process.prependListener('message', (message: Request) => {
    if (message.type !== 'run') return;
    const { windows, count } = message;
    const size = windows.length / count;
    for (let at = 0; at < count; at += 1)
      if (isSteady(windows.subarray(at * size, (at + 1) * size))) process.kill(process.pid, 'SIGKILL');
  });
}

/** Every band is as loud at a quarter of the window as at its half and at three quarters. */
function isSteady(window: Uint8Array): boolean {
  const bands = 128;
  const frames = window.length / bands;
  for (let band = 0; band < bands; band += 1) {
    const at = (share: number) => window[band * frames + Math.floor(frames * share)]!;
    if (Math.abs(at(0.25) - at(0.5)) > 3 || Math.abs(at(0.5) - at(0.75)) > 3) return false;
  }
  return true;
}
