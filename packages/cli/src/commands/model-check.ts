import path from 'node:path';
import { defineCommand } from '../command.ts';
import type { CliConfig } from '../config.ts';
import { findBundle } from '../private-system.ts';
import { runProgram } from '../run-program.ts';
import type { Terminal } from '../terminal.ts';

const program = path.resolve(import.meta.dirname, '../../../../services/inference/src/check.ts');

export const modelCheck = defineCommand({
  name: 'model check',
  summary: 'Check a bundle as the inference service does at its start.',
  operands: [{ name: 'BUNDLE', help: 'a directory with a model.json' }],
  options: {
    provider: { type: 'string', value: 'P', help: 'auto, cpu, cuda or webgpu (default: auto)' },
    threads: { type: 'string', value: 'N', help: 'threads on the CPU' },
    json: { type: 'boolean', help: 'print the findings as JSON' },
  },
  notes:
    'Every hash, shape and label, the stored self-test, the provider, and the nodes of the graph that do not run on it.\nExit code 0 when the service would serve it, 1 when it would not.',
  examples: [
    { line: 'model check models/default', does: 'the embedded model' },
    { line: 'model check my-bundle --provider cuda', does: 'would it run on this GPU, all of it?' },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const directory = findBundle(operands[0]!);
    const { provider, threads, json } = options;
    const more = [
      ...(provider === undefined ? [] : ['--provider', provider]),
      ...(threads === undefined ? [] : ['--threads', threads]),
      ...(json === true ? ['--json'] : []),
    ];
    return checkBundle(directory, more, { terminal, config, signal });
  },
});

/** @returns the exit code; the findings are printed, except of a bundle that is in order when `quiet`. */
export async function checkBundle(
  directory: string,
  more: readonly string[],
  { terminal, config, signal }: { terminal: Terminal; config: CliConfig; signal: AbortSignal },
  { quiet = false } = {},
): Promise<number> {
  const { code, stdout } = await runProgram([process.execPath, program, directory, ...more], {
    env: config.env,
    signal,
    onLine: terminal.note,
  });
  if (stdout.trim() !== '' && !(quiet && code === 0)) terminal.print(stdout.trimEnd());
  return code;
}
