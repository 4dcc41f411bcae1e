import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { z } from 'zod';
import { defineCommand } from '../command.ts';
import { Failure, systemCode, UsageError } from '../failure.ts';
import { findPython } from '../python.ts';
import { runProgram } from '../run-program.ts';
import { checkBundle } from './model-check.ts';

const program = path.resolve(import.meta.dirname, '../../../../training/import_checkpoint.py');

/** What the importer prints when it is done; more of it is handed on by `--json`. */
const importedSchema = z.looseObject({
  bundle: z.string(),
  digest: z.string(),
  parameters: z.number(),
  architecture: z.string(),
  precision: z.string(),
  logitError: z.looseObject({ max: z.number(), shareOfStd: z.number() }).nullish(),
  warnings: z.array(z.string()).default([]),
});

/** Handed to the importer under the same names. */
const importOptions = {
  profile: {
    type: 'string',
    value: 'NAME|FILE',
    help: 'how sound becomes its picture: a profile of models/profiles (ccmusic-mel, default-mel), or a file like those',
  },
  out: { type: 'string', value: 'BUNDLE', help: 'the directory to make' },
  labels: {
    type: 'string',
    value: 'FILE',
    help: 'the labels in output order, where the profile has none',
  },
  precision: { type: 'string', value: 'P', help: 'fp32 (default), fp16 or int8' },
  name: { type: 'string', value: 'NAME', help: "the model's name (lower case, digits, . _ -)" },
  version: { type: 'string', value: 'VERSION', help: 'its version' },
  licence: { type: 'string', value: 'TEXT', help: 'under which terms it may be used' },
  provenance: { type: 'string', value: 'TEXT', help: 'where it comes from, what it was trained on' },
  heads: { type: 'string', value: 'N', help: 'attention heads, where the width does not tell' },
  input: { type: 'string', value: 'NAME', help: 'of an ONNX file: its input, where it has several' },
  output: { type: 'string', value: 'NAME', help: 'of an ONNX file: the output with the logits' },
  force: { type: 'boolean', help: 'replace BUNDLE when it exists' },
} as const;

export const modelImport = defineCommand({
  name: 'model import',
  summary: 'Make a model bundle from a Vision Transformer checkpoint or an ONNX file.',
  operands: [{ name: 'CHECKPOINT', help: 'a .pt, .pth or .safetensors file with weights, or a .onnx file' }],
  options: {
    ...importOptions,
    json: { type: 'boolean', help: 'print what was made as JSON' },
  },
  notes:
    "Takes the names of torchvision, timm and Hugging Face. The bundle's logits are compared with the checkpoint's own, then the bundle is checked as by `acousticsense model check`.\n" +
    'Code inside a checkpoint is never run. The bundle says `calibration: none` until `acousticsense model calibrate`. Nothing is left behind when it fails.',
  examples: [
    {
      line: 'model import save.pt --profile ccmusic-mel --out models/ccmusic',
      does: "the checkpoint of the seed's model",
    },
    {
      line: 'model import vit.pth --profile my-profile.json --labels labels.txt --precision int8 --out bundle',
      does: 'a checkpoint of your own, made small',
    },
  ],
  async run({ operands, options, terminal, config, signal }) {
    for (const needed of ['profile', 'out'] as const) {
      if (options[needed] === undefined) {
        const { value, help } = importOptions[needed];
        throw new UsageError(`acousticsense model import needs --${needed} ${value}: ${help}.`);
      }
    }
    const args = Object.entries(importOptions).flatMap(([name, { type }]) => {
      const given = options[name as keyof typeof importOptions];
      if (given === undefined) return [];
      return type === 'boolean' ? [`--${name}`] : [`--${name}=${given}`];
    });
    const python = findPython(config);
    const lines: string[] = [];
    /** A stack trace began, before the importer could catch anything. */
    let broken = false;
    // PyTorch makes folders for its compiler when it is imported.
    await using scratch = await scratchDirectory();
    const { code, stdout } = await runProgram([python, program, ...args, '--', operands[0]!], {
      env: { ...config.env, PYTHONUNBUFFERED: '1', TMPDIR: scratch.path },
      signal,
      onLine: (line) => {
        lines.push(line);
        broken ||= line.startsWith('Traceback ');
        if (!broken) terminal.note(line);
      },
    });
    if (code !== 0) {
      const missing = /^ModuleNotFoundError: No module named '([^']+)'/.exec(lines.at(-1) ?? '')?.[1];
      if (missing !== undefined) {
        throw new Failure(
          `The Python at ${python} has no package ${missing}: install training/requirements.txt there, or name another with ACOUSTICSENSE_PYTHON.`,
        );
      }
      if (broken) throw new Failure(`The importer could not run:\n${lines.join('\n')}`);
      // Its own sentence stands on the terminal already.
      if (lines.length > 0) return 1;
      throw new Failure(`The importer ended with exit code ${code} and said nothing.`);
    }
    const imported = importedSchema.parse(JSON.parse(stdout));
    for (const warning of imported.warnings) terminal.note(warning);
    const sound = await checkBundle(imported.bundle, [], { terminal, config, signal }, { quiet: true });
    if (options.json === true) terminal.print(JSON.stringify(imported, null, 2));
    else {
      const { bundle, digest, parameters, architecture, precision, logitError } = imported;
      terminal.print(
        [
          `${bundle}: ${architecture}, ${(parameters / 1e6).toFixed(1)} million parameters, ${precision}`,
          `digest ${digest}`,
          ...(logitError
            ? [
                `logits differ from the checkpoint's own by ${logitError.max.toExponential(1)} at most (${(logitError.shareOfStd * 100).toPrecision(2)} % of their standard deviation)`,
              ]
            : []),
          ...(sound === 0 ? ['checked: the service would serve it; it is not calibrated'] : []),
        ].join('\n'),
      );
    }
    return sound;
  },
});

async function scratchDirectory(): Promise<AsyncDisposable & { path: string }> {
  const directory = await mkdtemp(path.join(tmpdir(), 'acousticsense-import-')).catch((error: unknown) => {
    throw new Failure(
      `${tmpdir()} cannot be written (${systemCode(error)}): name another directory for temporary files in TMPDIR.`,
    );
  });
  return { path: directory, [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }) };
}
