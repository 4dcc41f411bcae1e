/** A program of this repository, run to its end. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';

export interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Names inside a file that is not ours may hold codes that steer a terminal. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const controls = /[\0-\x08\x0b-\x1f\x7f-\x9f]/g;
const setpriv = '/usr/bin/setpriv';

/**
 * @param onLine called with every whole line of standard error as it comes.
 * @throws the signal's reason when it is stopped; the program has ended by then.
 */
export async function runProgram(
  command: readonly [string, ...string[]],
  {
    env,
    signal,
    onLine = () => {},
  }: { env: NodeJS.ProcessEnv; signal: AbortSignal; onLine?: (line: string) => void },
): Promise<Ended> {
  signal.throwIfAborted();
  const dieWithParent = existsSync(setpriv) ? [setpriv, '--pdeathsig', 'TERM'] : [];
  const [program, ...args] = [...dieWithParent, ...command] as [string, ...string[]];
  // A group of its own: Ctrl-C at the terminal reaches this command alone, which then stops the program.
  const child = spawn(program, args, {
    // ONNX Runtime's telemetry client stays off in Python too (see model-process.ts of the inference service).
    env: { ...env, ORT_DISABLE_TELEMETRY: '1' },
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  let rest = '';
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
    stdout += chunk;
  });
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    stderr = (stderr + chunk).slice(-20_000);
    const lines = (rest + chunk).replace(controls, '\ufffd').split('\n');
    rest = lines.pop()!;
    for (const line of lines) onLine(line);
  });
  const stop = () => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGTERM');
    } catch {
      // It has ended meanwhile.
    }
  };
  signal.addEventListener('abort', stop, { once: true });
  try {
    const code = await new Promise<number>((resolve, reject) => {
      child.once('error', reject);
      child.once('close', (exitCode) => resolve(exitCode ?? 1));
    });
    signal.throwIfAborted();
    if (rest !== '') onLine(rest);
    return { code, stdout, stderr };
  } finally {
    signal.removeEventListener('abort', stop);
  }
}
