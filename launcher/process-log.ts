/** Log lines of a child process: all of them into a file, what a person should see onto the terminal. */
import { appendFileSync, renameSync, statSync } from 'node:fs';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';

const rotateBytes = 20 * 2 ** 20;

export interface ProcessLog {
  readonly file: string;
  follow(stream: Readable): void;
  /** The last line that tells of an error, else the last line: for the sentence about a process that died. */
  lastWords(): string;
}

/** @param show gets the lines for the terminal; `level` is pino's (40 = warn, 50 = error), 0 when not JSON. */
export function createProcessLog(file: string, show: (level: number, text: string) => void): ProcessLog {
  let size = statSync(file, { throwIfNoEntry: false })?.size ?? 0;
  let lastError: string | undefined;
  let lastLine = '';

  function write(line: string): void {
    if (size > rotateBytes) {
      renameSync(file, `${file}.1`);
      size = 0;
    }
    // Synchronous: the last lines before a death are the ones that matter, and a service logs a few per job.
    appendFileSync(file, `${line}\n`, { mode: 0o600 });
    size += Buffer.byteLength(line) + 1;
  }

  return {
    file,
    follow(stream) {
      createInterface({ input: stream }).on('line', (line) => {
        write(line);
        const { level, text } = readable(line);
        if (level >= 50 || (level === 0 && /^(\w*Error|fatal)\b.*:/i.test(text))) lastError = text;
        lastLine = text;
        show(level, text);
      });
    },
    lastWords: () => lastError ?? lastLine,
  };
}

/** `{"level":40,"msg":"slow","jobId":"1"}` as `slow (jobId 1)`; a line that is no JSON as it is. */
function readable(line: string): { level: number; text: string } {
  let entry: Record<string, unknown>;
  try {
    entry = JSON.parse(line);
  } catch {
    return { level: 0, text: line };
  }
  if (entry === null || typeof entry !== 'object') return { level: 0, text: line };
  const { level, time, pid, service, name, msg, err, ...rest } = entry;
  const reason = (err as { message?: unknown } | undefined)?.message;
  const facts = Object.entries(rest).map(
    ([key, value]) => `${key} ${typeof value === 'string' ? value : JSON.stringify(value)}`,
  );
  const text = [msg, reason].filter((part) => typeof part === 'string' && part !== '').join(': ');
  return {
    level: typeof level === 'number' ? level : 0,
    text: facts.length === 0 ? text : `${text} (${facts.join(', ')})`,
  };
}
