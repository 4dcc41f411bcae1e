/**
 * What a command is, and from words to a command: parsing, help, suggestions.
 *
 * A command is an object in the table of main.ts; `defineCommand` gives its `run` the options with their types.
 */
import { type ParseArgsConfig, parseArgs } from 'node:util';
import type { CliConfig } from './config.ts';
import { UsageError } from './failure.ts';
import type { Terminal } from './terminal.ts';

export interface Option {
  readonly type: 'string' | 'boolean';
  /** What stands for the value in the help: `N`, `FILE`. */
  readonly value?: string;
  readonly help: string;
}

type Options = Readonly<Record<string, Option>>;
export type Values<O extends Options> = {
  readonly [K in keyof O]?: O[K]['type'] extends 'boolean' ? boolean : string;
};

export interface Invocation<O extends Options> {
  readonly operands: readonly string[];
  readonly options: Values<O>;
  readonly terminal: Terminal;
  readonly config: CliConfig;
  /** Aborted when the user stops the command. */
  readonly signal: AbortSignal;
}

export interface Command<O extends Options = Options> {
  /** The words that call it: `evaluate`, `model check`. */
  readonly name: string;
  /** One line, for the list of commands. */
  readonly summary: string;
  /** In order; all of them are needed. */
  readonly operands: readonly { readonly name: string; readonly help: string }[];
  readonly options: O;
  /** What the options do not say by themselves. */
  readonly notes?: string;
  readonly examples: readonly { readonly line: string; readonly does: string }[];
  /** @returns the exit code: 0, or 1 when what was checked is not as it should be. */
  run(invocation: Invocation<O>): Promise<number>;
}

/** Keeps the options' types for `run`, and forgets them for the table. */
export function defineCommand<const O extends Options>(command: Command<O>): Command {
  return command as unknown as Command;
}

export type Request =
  | { readonly kind: 'help'; readonly text: string }
  | { readonly kind: 'version' }
  | {
      readonly kind: 'run';
      readonly command: Command;
      readonly operands: readonly string[];
      readonly options: Values<Options>;
    };

/**
 * @param args the words after the program's name.
 * @throws {UsageError}
 */
export function readCommandLine(args: readonly string[], commands: readonly Command[]): Request {
  const [first] = args;
  if (first === undefined) throw new UsageError(`Say what to do.\n\n${overview(commands)}`);
  if (first === '--version' || first === '-V') return { kind: 'version' };
  if (first === '--help' || first === '-h') return { kind: 'help', text: overview(commands) };
  if (first === 'help') return readHelp(args.slice(1), commands);
  const command = commands.find(({ name }) => startsWith(args, name));
  if (command === undefined) {
    const group = commands.filter(({ name }) => name.startsWith(`${first} `));
    if (group.length > 0 && (args[1] === undefined || args[1] === '--help' || args[1] === '-h')) {
      if (args[1] !== undefined) return { kind: 'help', text: overview(group) };
      throw new UsageError(`Say what to do with the ${first}.\n\n${overview(group)}`);
    }
    const words = args.slice(0, group.length > 0 ? 2 : 1).join(' ');
    throw new UsageError(`There is no command ${words}.${didYouMean(words, candidates(commands))}`);
  }
  return readArguments(args.slice(command.name.split(' ').length), command);
}

function readHelp(words: readonly string[], commands: readonly Command[]): Request {
  const found = commands.filter(({ name }) => startsWith(words, name) || startsWith(name.split(' '), words));
  if (found.length === 0) {
    const name = words.join(' ');
    throw new UsageError(`There is no command ${name}.${didYouMean(name, candidates(commands))}`);
  }
  const [only, ...others] = found;
  return { kind: 'help', text: others.length === 0 ? describe(only!) : overview(found) };
}

/** Whole names, and the first words of names of two: `modle` is `model`. */
const candidates = (commands: readonly Command[]) => [
  ...new Set(commands.flatMap(({ name }) => [name, name.split(' ')[0]!])),
];

function startsWith(words: readonly string[], beginning: string | readonly string[]): boolean {
  const wanted = typeof beginning === 'string' ? beginning.split(' ') : beginning;
  return wanted.every((word, index) => words[index] === word);
}

function readArguments(args: readonly string[], command: Command): Request {
  const options: NonNullable<ParseArgsConfig['options']> = { help: { type: 'boolean', short: 'h' } };
  for (const [name, { type }] of Object.entries(command.options)) options[name] = { type };
  let parsed: ReturnType<typeof parseArgs>;
  try {
    parsed = parseArgs({ args: [...args], options, allowPositionals: true, strict: true });
  } catch (error) {
    throw new UsageError(`${explain(error as Error, command)} See acousticsense ${command.name} --help.`);
  }
  const { help, ...values } = parsed.values;
  if (help === true) return { kind: 'help', text: describe(command) };
  const { positionals } = parsed;
  const missing = command.operands[positionals.length];
  if (missing !== undefined) {
    throw new UsageError(
      `acousticsense ${command.name} needs ${missing.name}: ${missing.help}. See acousticsense ${command.name} --help.`,
    );
  }
  if (positionals.length > command.operands.length) {
    throw new UsageError(
      `"${positionals[command.operands.length]}" is one word too many: acousticsense ${command.name} takes ${command.operands.map(({ name }) => name).join(' ') || 'options only'}. Put names with spaces into quotes.`,
    );
  }
  return { kind: 'run', command, operands: positionals, options: values as Values<Options> };
}

/** parseArgs's own words, without its advice about `--`. */
function explain(error: Error, command: Command): string {
  const unknown = /^Unknown option '(-[^']*)'/.exec(error.message)?.[1];
  if (unknown === undefined) return `${error.message.split('\n')[0]!.replace(/\.$/, '')}.`;
  const names = Object.keys(command.options).map((name) => `--${name}`);
  return `acousticsense ${command.name} has no option ${unknown}.${didYouMean(unknown, names)}`;
}

function overview(commands: readonly Command[]): string {
  const width = Math.max(...commands.map(({ name }) => name.length)) + 2;
  return [
    'Usage: acousticsense COMMAND [options]',
    '',
    ...commands.map(({ name, summary }) => `  ${name.padEnd(width)}${summary}`),
    '',
    'acousticsense COMMAND --help tells more; acousticsense --version tells the version.',
    'Exit codes: 0 done, 1 an input is at fault or a check failed, 2 typed wrongly, 130 stopped.',
  ].join('\n');
}

function describe({ name, summary, operands, options, notes, examples }: Command): string {
  const rows = [
    ...operands.map((operand) => [operand.name, operand.help] as const),
    ...Object.entries(options).map(
      ([option, { value, help }]) => [`--${option}${value === undefined ? '' : ` ${value}`}`, help] as const,
    ),
  ];
  const width = Math.min(26, Math.max(...rows.map(([left]) => left.length)) + 2);
  return [
    `Usage: acousticsense ${[name, ...operands.map((operand) => operand.name)].join(' ')} [options]`,
    '',
    wrap(summary, 0),
    '',
    ...rows.map(([left, right]) => {
      const gap = left.length + 2 > width ? `\n${' '.repeat(width + 2)}` : ' '.repeat(width - left.length);
      return `  ${left}${gap}${wrap(right, width + 2)}`;
    }),
    ...(notes === undefined ? [] : ['', ...notes.split('\n').map((line) => wrap(line, 0))]),
    '',
    'Examples:',
    ...examples.flatMap(({ line, does }) => [`  # ${does}`, `  npx acousticsense ${line}`]),
  ].join('\n');
}

/** Lines of at most 100 characters; those after the first begin with `indent` spaces. */
function wrap(text: string, indent: number): string {
  const lines = [''];
  for (const word of text.split(' ')) {
    const last = lines.at(-1)!;
    if (last !== '' && last.length + word.length + 1 + indent > 100) lines.push(word);
    else lines[lines.length - 1] = last === '' ? word : `${last} ${word}`;
  }
  return lines.join(`\n${' '.repeat(indent)}`);
}

function didYouMean(given: string, names: readonly string[]): string {
  const [best] = names
    .map((name) => ({ name, distance: editDistance(given.toLowerCase(), name) }))
    .sort((a, b) => a.distance - b.distance);
  if (best === undefined || best.distance > Math.max(2, best.name.length / 3)) {
    return ` There are: ${names.join(', ')}.`;
  }
  return ` Did you mean ${best.name}?`;
}

/** Levenshtein's distance: how many letters to insert, remove or change. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, column) => column);
  for (let i = 1; i <= a.length; i += 1) {
    const next = [i];
    for (let j = 1; j <= b.length; j += 1) {
      const change = row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(change, row[j]! + 1, next[j - 1]! + 1));
    }
    row = next;
  }
  return row[b.length]!;
}

/** @throws {UsageError} unless it is absent or a number within the bounds. */
export function numberOption(
  name: string,
  given: string | undefined,
  {
    least = -Infinity,
    most = Infinity,
    whole = false,
  }: { least?: number; most?: number; whole?: boolean } = {},
): number | undefined {
  if (given === undefined) return undefined;
  const value = given.trim() === '' ? Number.NaN : Number(given);
  if (Number.isFinite(value) && value >= least && value <= most && (!whole || Number.isInteger(value)))
    return value;
  const kind = whole ? 'a whole number' : 'a number';
  const bounds =
    most === Infinity ? (least === -Infinity ? '' : ` from ${least}`) : ` from ${least} to ${most}`;
  throw new UsageError(`--${name} ${given} cannot be used: it must be ${kind}${bounds}.`);
}
