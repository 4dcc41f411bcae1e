/** What the commands that send audio have in common: their options, and the service that answers. */
import { availableParallelism } from 'node:os';
import { loadBundle } from '@acousticsense/shared/bundle';
import { numberOption, type Option, type Values } from '../command.ts';
import type { CliConfig } from '../config.ts';
import { UsageError } from '../failure.ts';
import { defaultBundle, findBundle, startPrivateSystem } from '../private-system.ts';
import { type Analysis, connect, type Service } from '../service.ts';
import type { Terminal } from '../terminal.ts';

export const analysisOptions = {
  windows: {
    type: 'string',
    value: 'middle|all|N',
    help: "which windows of a file to analyse: one in the middle, every one, or N evenly spaced (default: the model's own choice)",
  },
  start: { type: 'string', value: 'SECONDS', help: 'analyse from here (default: the beginning)' },
  duration: { type: 'string', value: 'SECONDS', help: 'analyse this much (default: to the end)' },
  concurrency: { type: 'string', value: 'N', help: 'how many files are under way at a time' },
} as const satisfies Record<string, Option>;

type AnalysisOptions = Values<typeof analysisOptions>;

/** @throws {UsageError} */
export function analysisOf({ windows, start, duration }: AnalysisOptions): Analysis {
  if (windows !== undefined && !/^(middle|all|\d+)$/.test(windows)) {
    throw new UsageError(`--windows ${windows} cannot be used: it must be middle, all or a whole number.`);
  }
  if (windows !== undefined && /^\d/.test(windows))
    numberOption('windows', windows, { least: 1, most: 64, whole: true });
  const from = numberOption('start', start, { least: 0 });
  const seconds = numberOption('duration', duration, { least: 0.001 });
  return {
    ...(windows === undefined ? {} : { windows }),
    ...(from === undefined ? {} : { start: from }),
    ...(seconds === undefined ? {} : { duration: seconds }),
  };
}

/** @returns enough files to keep every stage busy, unless told. */
export function concurrencyOf({ concurrency }: AnalysisOptions): number {
  const given = numberOption('concurrency', concurrency, { least: 1, most: 1_000, whole: true });
  return given ?? Math.max(8, 2 * availableParallelism());
}

/**
 * Calls `work` with the service at `--url`, or with a private system on `--bundle` that is stopped afterwards,
 * whatever happens.
 *
 * @param work its second argument is aborted when the user stops the command or the private system dies.
 */
export async function withService<T>(
  {
    options,
    config,
    terminal,
    signal,
  }: {
    options: { readonly url?: string; readonly key?: string; readonly bundle?: string };
    config: CliConfig;
    terminal: Terminal;
    signal: AbortSignal;
  },
  work: (service: Service, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  if (options.url !== undefined) {
    const service = await connect({ url: options.url, apiKey: options.key ?? config.apiKey }, signal);
    return work(service, signal);
  }
  const directory = findBundle(options.bundle ?? defaultBundle);
  // A manifest that cannot be used is told before anything is started.
  const { manifest } = await loadBundle(directory, { verifyFiles: false });
  terminal.note(`Starting a private system with ${manifest.name} ${manifest.version}...`);
  await using system = await startPrivateSystem(directory, config.env, signal);
  const running = AbortSignal.any([signal, system.ended]);
  const service = await connect({ url: system.url, apiKey: undefined }, running);
  return await work(service, running);
}
