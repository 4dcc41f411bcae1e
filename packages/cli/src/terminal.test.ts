import assert from 'node:assert/strict';
import { Writable } from 'node:stream';
import { test } from 'node:test';
import { createTerminal, type Output } from './terminal.ts';

function output(more: { isTTY?: boolean; columns?: number } = {}): Output & { text: string } {
  const stream = Object.assign(
    new Writable({
      write(chunk, _encoding, done) {
        stream.text += String(chunk);
        done();
      },
    }),
    { text: '', ...more },
  );
  return stream;
}

test('results go to standard output, everything else to standard error', () => {
  const [stdout, stderr] = [output(), output()];
  const terminal = createTerminal({ stdout, stderr });
  terminal.print('result');
  terminal.note('by the way');
  assert.equal(stdout.text, 'result\n');
  assert.equal(stderr.text, 'by the way\n');
});

test('where standard error is no terminal, progress is a line every five seconds and one at the end', () => {
  const [stdout, stderr] = [output(), output()];
  let now = 0;
  const progress = createTerminal({ stdout, stderr }, () => now).progress('files', 20);
  for (let done = 0; done < 20; done += 1) {
    now += 1_000;
    progress.advance(done === 2 ? 'failed' : 'done');
  }
  progress.end();
  const lines = stderr.text.trimEnd().split('\n');
  assert.equal(lines.length, 4, stderr.text);
  assert.match(lines[0]!, /^5 of 20 files, 1 failed, 1\.0 files a second, about 15 s left$/);
  assert.match(lines[3]!, /^20 of 20 files, 1 failed/);
  assert.equal(stderr.text.includes('\r'), false);
});

test('on a terminal it is a bar that never is wider than the screen, and notes go above it', () => {
  const [stdout, stderr] = [output(), output({ isTTY: true, columns: 40 })];
  let now = 0;
  const terminal = createTerminal({ stdout, stderr }, () => now);
  const progress = terminal.progress('files', 4);
  now = 1_000;
  progress.advance('done');
  terminal.note('a note');
  const drawn = stderr.text.split('\r').map((part) => part.split('\n')[0]!);
  assert.ok(drawn.every((part) => part.length <= 40));
  assert.match(stderr.text, /\r\[#{6}\.{18}\] 1 of 4/);
  assert.match(stderr.text, /\r {39}\ra note\n\[#{6}/);
  progress.end();
  assert.match(stderr.text, /\r {39}\r1 of 4 files, 1\.0 files a second, about 3 s left\n$/);
});
