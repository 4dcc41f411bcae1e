import assert from 'node:assert/strict';
import { test } from 'node:test';
import { defineCommand, numberOption, readCommandLine } from './command.ts';
import { UsageError } from './failure.ts';

const make = (name: string) =>
  defineCommand({
    name,
    summary: `Does ${name}.`,
    operands: [{ name: 'DIR', help: 'a directory' }],
    options: {
      out: { type: 'string', value: 'DIR', help: 'where to' },
      json: { type: 'boolean', help: 'as JSON' },
    },
    examples: [{ line: `${name} here`, does: 'an example' }],
    run: async () => 0,
  });
const commands = [make('evaluate'), make('model check'), make('model import')];
const read = (...args: string[]) => readCommandLine(args, commands);
const refused = (args: string[], sentence: RegExp) =>
  assert.throws(
    () => read(...args),
    (error) => error instanceof UsageError && sentence.test(error.message),
  );

test('a command of two words gets its operands and options', () => {
  const request = read('model', 'check', 'bundle', '--out=x', '--json');
  assert.ok(request.kind === 'run');
  assert.equal(request.command.name, 'model check');
  assert.deepEqual(request.operands, ['bundle']);
  assert.deepEqual({ ...request.options }, { out: 'x', json: true });
});

test('a command that is not there: the nearest is named, or all when none is near', () => {
  refused(['evalutae', 'x'], /no command evalutae\. Did you mean evaluate\?/);
  refused(['modle'], /Did you mean model\?/);
  refused(['model', 'chek', 'x'], /no command model chek\. Did you mean model check\?/);
  refused(['transmogrify'], /There are: evaluate, model check/);
});

test('an option that is not there, a value that is missing, too many words', () => {
  refused(['evaluate', 'x', '--ot', 'y'], /no option --ot\. Did you mean --out\?/);
  refused(['evaluate', 'x', '--out'], /--out.*argument missing.*--help/);
  refused(['evaluate', 'x', '--json=yes'], /--json.*does not take an argument/);
  refused(['evaluate'], /needs DIR: a directory/);
  refused(['evaluate', 'my', 'music'], /"music" is one word too many.*quotes/);
  refused([], /Say what to do/);
  refused(['model'], /Say what to do with the model.*model check/s);
});

test('help is there for everything, with an example', () => {
  for (const args of [['--help'], ['help'], ['model', '--help'], ['help', 'model']]) {
    const request = read(...args);
    assert.ok(request.kind === 'help');
    assert.match(request.text, /model check {2,}Does model check\./);
  }
  for (const args of [
    ['evaluate', '--help'],
    ['help', 'evaluate'],
    ['evaluate', '-h'],
  ]) {
    const request = read(...args);
    assert.ok(request.kind === 'help');
    assert.match(request.text, /--out DIR {2,}where to.*# an example\n {2}npx acousticsense evaluate here/s);
  }
  assert.equal(read('--version').kind, 'version');
});

test('numbers are within their bounds or refused by name', () => {
  assert.equal(numberOption('threshold', '0.5', { least: 0, most: 1 }), 0.5);
  assert.equal(numberOption('threshold', undefined), undefined);
  for (const wrong of ['2', '-1', 'half', '', ' ', 'NaN', 'Infinity'])
    assert.throws(() => numberOption('threshold', wrong, { least: 0, most: 1 }), /--threshold .*from 0 to 1/);
  assert.throws(() => numberOption('n', '1.5', { whole: true, least: 1 }), /a whole number from 1/);
});
