/**
 * Checks a model bundle as the inference service does at its start, and says what it found:
 *
 *   node services/inference/src/check.ts BUNDLE [--provider cpu|cuda|webgpu|auto] [--threads N] [--json]
 *
 * The same `loadBundle`, the same child process, the same self-test: what passes here starts there. Beyond that it
 * opens the explain graph, which the service does at the first wish for it only. Exit code 0 when every check is
 * well, 1 when one failed (its line says why), 2 when it was called wrongly.
 */
import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { type Bundle, loadBundle } from '@acousticsense/shared/bundle';
import { StartupError } from '@acousticsense/shared/errors';
import { pino } from 'pino';
import type { ExplainReport, SessionReport } from './model-child.ts';
import { CannotExplain, createModelProcess, loadWaitMs } from './model-process.ts';
import type { GraphReport, ProviderChoice } from './model-session.ts';

interface Check {
  readonly name: string;
  readonly ok: boolean;
  readonly detail: string;
}

interface CheckReport {
  readonly ok: boolean;
  readonly bundle?: { readonly name: string; readonly version: string; readonly digest: string };
  readonly checks: readonly Check[];
  readonly classifier?: SessionReport;
  readonly explain?: ExplainReport;
}

const providers = ['auto', 'cpu', 'cuda', 'webgpu'] as const satisfies ProviderChoice[];

/** @param tell hears of every check as soon as it is done. */
async function checkModel(
  location: string,
  { provider, threads }: { provider: ProviderChoice; threads: number },
  tell: (check: Check) => void,
): Promise<CheckReport> {
  const checks: Check[] = [];
  const add = (name: string, ok: boolean, detail: string) => {
    checks.push({ name, ok, detail });
    tell(checks.at(-1)!);
  };
  const well = () => checks.every(({ ok }) => ok);

  let bundle: Bundle;
  try {
    bundle = await loadBundle(location);
  } catch (error) {
    if (!(error instanceof StartupError)) throw error;
    add('bundle', false, error.message);
    return { ok: false, checks };
  }
  const { manifest, digest } = bundle;
  const { name, version } = manifest;
  for (const [what, detail] of Object.entries(await factsOf(bundle))) add(what, true, detail);

  const log = pino({ level: 'silent' });
  const model = createModelProcess({ bundle, provider, requireGpu: false, threads, log });
  let classifier: SessionReport | undefined;
  let explain: ExplainReport | undefined;
  try {
    await model.start();
    const { status } = model;
    if (!status.ready) throw new StartupError(status.reason);
    classifier = status.ready;
    addSession(classifier);
    if (manifest.graph.explain) {
      explain = await model.openExplainer(loadWaitMs);
      addExplain(explain);
    }
  } catch (error) {
    if (error instanceof StartupError) add('model', false, error.message);
    else if (error instanceof CannotExplain) add('explain', false, error.message);
    else throw error;
  } finally {
    await model.close();
  }
  return {
    ok: well(),
    bundle: { name, version, digest },
    checks,
    ...(classifier ? { classifier } : {}),
    ...(explain ? { explain } : {}),
  };

  function addSession(report: SessionReport): void {
    const { fallback, selfTestError, msPerWindow, loadMs } = report;
    const asked = provider === 'auto' || provider === report.provider;
    const why = fallback === undefined ? '' : ` (${fallback})`;
    add('provider', asked, `${report.provider}, asked for ${provider}${why}`);
    add('self-test', true, `differs by ${digits(selfTestError)}, ${manifest.selfTest.tolerance} is allowed`);
    add('nodes', true, nodesOf(report));
    const time = `${digits(msPerWindow)} ms a window with ${threads} threads, loaded in ${digits(loadMs)} ms`;
    add('speed', true, time);
  }

  function addExplain(report: ExplainReport): void {
    const [, rows, columns] = manifest.graph.explain!.output.shape;
    const [least, greatest] = report.sums.map((total) => total.toFixed(4));
    const time = `${digits(report.msPerWindow)} ms a window, opened in ${digits(report.loadMs)} ms`;
    add('explain', true, `maps of ${rows} x ${columns}, sums ${least} to ${greatest}, ${time}`);
    add('explain nodes', true, nodesOf(report));
  }
}

/** What model.json says of the model, and that nobody but a reader can judge. */
async function factsOf({ directory, digest, manifest }: Bundle): Promise<Record<string, string>> {
  const { name, version, labels, taxonomy, missing = [], graph, calibration, accuracy } = manifest;
  const files = Object.keys(manifest.files);
  const sizes = await Promise.all(files.map(async (file) => (await stat(path.join(directory, file))).size));
  const megabytes = sizes.reduce((a, b) => a + b, 0) / 1e6;
  const families = taxonomy ? ` in ${Object.keys(taxonomy).length} families` : '';
  const without = missing.map(({ label, reason }) => `${label} (${reason})`).join('; ');
  const absent = [
    graph.outputs.embedding ? [] : 'embedding',
    graph.outputs.outlier ? [] : 'outlier score',
    graph.explain ? [] : 'explain graph',
    taxonomy ? [] : 'taxonomy',
    calibration === 'none' ? 'calibration' : [],
    accuracy === 'none' ? 'measured accuracy' : [],
  ].flat();
  return {
    bundle: `${name} ${version}, digest ${digest.slice(0, 16)}`,
    files: `${files.length} files, ${megabytes.toFixed(1)} MB, every SHA-256 fits`,
    labels: `${labels.length}${families}${without ? `, missing: ${without}` : ''}`,
    precision: graph.precision,
    calibration:
      calibration === 'none'
        ? 'none'
        : `temperature ${calibration.temperature}, expected calibration error ${calibration.eceBefore} before, ${calibration.ece} after (${calibration.clips} clips)`,
    accuracy:
      accuracy === 'none'
        ? 'none'
        : `top-1 ${accuracy.top1}, top-3 ${accuracy.top3}, mean recall ${accuracy.meanRecall} (${accuracy.split}, ${accuracy.clips} clips)`,
    absent: absent.join(', ') || 'nothing',
  };
}

function nodesOf({ nodes, strayNodes: { count, names } }: GraphReport): string {
  const counts = Object.entries(nodes).map(([provider, ran]) => `${ran} on ${provider}`);
  if (count === 0) return counts.join(', ');
  const more = count > names.length ? ` and ${count - names.length} more` : '';
  return `${counts.join(', ')}; ${count} not on the asked provider: ${names.join(', ')}${more}`;
}

const digits = (value: number) => String(Number(value.toPrecision(3)));

function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      provider: { type: 'string', default: 'auto' },
      threads: { type: 'string', default: String(availableParallelism()) },
      json: { type: 'boolean', default: false },
    },
  });
  const [location, ...more] = positionals;
  const provider = providers.find((known) => known === values.provider);
  const threads = Number(values.threads);
  if (location === undefined || more.length > 0) throw new TypeError('exactly one bundle is needed.');
  if (provider === undefined) throw new TypeError(`--provider is one of ${providers.join(', ')}.`);
  if (!Number.isInteger(threads) || threads < 1 || threads > 256)
    throw new TypeError('--threads is a whole number from 1 to 256.');
  return { location, provider, threads, json: values.json };
}

async function main(): Promise<void> {
  let options: ReturnType<typeof readArguments>;
  try {
    options = readArguments();
  } catch (error) {
    process.stderr.write(`check: ${(error as Error).message}\n`);
    process.exitCode = 2;
    return;
  }
  const { location, json } = options;
  const line = ({ name, ok, detail }: Check) =>
    process.stdout.write(`${ok ? 'ok    ' : 'failed'}  ${name.padEnd(13)}  ${detail}\n`);
  const report = await checkModel(location, options, json ? () => {} : line);
  if (json) process.stdout.write(`${JSON.stringify(report, null, 2)}\n`);
  process.exitCode = report.ok ? 0 : 1;
}

await main();
