/** Where words go: results to standard output, everything else to standard error, so that results can be piped. */
import type { Writable } from 'node:stream';
import { styleText } from 'node:util';

type Style = 'bold' | 'dim' | 'green' | 'red' | 'yellow';
export type Output = Writable & { isTTY?: boolean; columns?: number };

export interface Progress {
  /** Counts one more as done. */
  advance(outcome: 'done' | 'failed'): void;
  end(): void;
}

export interface Terminal {
  /** A result. */
  print(text: string): void;
  /** What goes on, and what went wrong. */
  note(text: string): void;
  /** For results; plain text where standard output is no terminal or NO_COLOR is set. */
  paint(style: Style, text: string): string;
  /** A bar on a terminal; else a line every few seconds. */
  progress(what: string, total: number): Progress;
}

const lineEveryMs = 5_000;
const barEveryMs = 100;
const barWidth = 24;

export function createTerminal(
  { stdout, stderr }: { stdout: Output; stderr: Output },
  now: () => number = Date.now,
): Terminal {
  /** The bar that stands on the terminal's last line: notes go above it. */
  let bar = '';
  const clear = () => bar !== '' && stderr.write(`\r${' '.repeat(bar.length)}\r`);

  return {
    print(text) {
      clear();
      stdout.write(`${text}\n`);
    },
    note(text) {
      clear();
      stderr.write(`${text}\n${bar}`);
    },
    paint(style, text) {
      return styleText(style, text, { stream: stdout });
    },
    progress(what, total) {
      const onTerminal = stderr.isTTY === true;
      const from = now();
      let done = 0;
      let failed = 0;
      let told = onTerminal ? 0 : from;
      let toldDone = 0;
      const draw = () => {
        told = now();
        toldDone = done;
        const text = describeProgress({ what, total, done, failed, ms: told - from, onTerminal });
        if (!onTerminal) return void stderr.write(`${text}\n`);
        const shown = text.slice(0, (stderr.columns ?? 80) - 1);
        stderr.write(`\r${shown.padEnd(bar.length)}`);
        bar = shown;
      };
      return {
        advance(outcome) {
          done += 1;
          if (outcome === 'failed') failed += 1;
          if (now() - told >= (onTerminal ? barEveryMs : lineEveryMs)) draw();
        },
        end() {
          if (onTerminal) clear();
          bar = '';
          if (done > (onTerminal ? 0 : toldDone)) {
            stderr.write(
              `${describeProgress({ what, total, done, failed, ms: now() - from, onTerminal: false })}\n`,
            );
          }
        },
      };
    },
  };
}

function describeProgress(at: {
  what: string;
  total: number;
  done: number;
  failed: number;
  ms: number;
  onTerminal: boolean;
}): string {
  const { what, total, done, failed, ms, onTerminal } = at;
  const filled = Math.round((barWidth * done) / total);
  const shape = onTerminal ? `[${'#'.repeat(filled)}${'.'.repeat(barWidth - filled)}] ` : '';
  const perSecond = ms > 0 ? (done * 1_000) / ms : 0;
  const left = perSecond > 0 && done < total ? `, about ${duration((total - done) / perSecond)} left` : '';
  const rate = perSecond > 0 ? `, ${perSecond.toPrecision(2)} ${what} a second` : '';
  const broken = failed > 0 ? `, ${failed} failed` : '';
  return `${shape}${done} of ${total} ${what}${broken}${rate}${left}`;
}

function duration(seconds: number): string {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5_400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3_600).toFixed(1)} h`;
}
