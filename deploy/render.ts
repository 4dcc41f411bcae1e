/**
 * Writes what is made out of other files of deploy/, so that it lies in the repository to be read and compared:
 * the dashboard, the chart's copies of rules and dashboard (a chart reads only its own folder), and the manifests under
 * kubernetes/, by the chart. `node deploy/render.ts` after a change; render.test.ts compares.
 */
import { spawnSync } from 'node:child_process';
import { globSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import path from 'node:path';
import { dashboard } from './dashboard.ts';

const deploy = import.meta.dirname;
const chart = path.join(deploy, 'helm/acousticsense');

/** The programs and schemas of tools.sh. */
export const toolsDirectory =
  process.env['ACOUSTICSENSE_DEPLOY_TOOLS'] ||
  path.join(process.env['XDG_CACHE_HOME'] || path.join(homedir(), '.cache'), 'acousticsense/deploy-tools');

/** The settings that manifests are kept of: by name, further files of values. */
export const renderings: Readonly<Record<string, readonly string[]>> = {
  default: [],
  gpu: ['gpu.yaml'],
  'two-models': ['two-models.yaml'],
};

/**
 * @returns the manifests.
 * @throws Error with helm's words.
 */
export function render(name: string, more: readonly string[] = []): string {
  const files = renderings[name]!.flatMap((file) => ['--values', path.join(deploy, 'helm/values', file)]);
  const { status, stdout, stderr, error } = spawnSync(
    path.join(toolsDirectory, 'bin/helm'),
    ['template', 'acousticsense', chart, '--namespace', 'acousticsense', ...files, ...more],
    { encoding: 'utf8', maxBuffer: 64 << 20 },
  );
  if (error) throw error;
  if (status !== 0) throw new Error(stderr);
  return stdout;
}

/** What is copied or made without any program: by path under deploy/. */
export function madeFiles(): Record<string, string> {
  const board = `${JSON.stringify(dashboard(), null, 2)}\n`;
  const rules = globSync('prometheus/rules/*.yml', { cwd: deploy }).map((file) => [
    `helm/acousticsense/files/rules/${path.basename(file)}`,
    readFileSync(path.join(deploy, file), 'utf8'),
  ]);
  return {
    'grafana/acousticsense.json': board,
    'helm/acousticsense/files/dashboard.json': board,
    ...Object.fromEntries(rules),
  };
}

if (import.meta.main) {
  rmSync(path.join(chart, 'files/rules'), { recursive: true, force: true });
  const write = (file: string, text: string) => {
    mkdirSync(path.dirname(path.join(deploy, file)), { recursive: true });
    writeFileSync(path.join(deploy, file), text);
  };
  for (const [file, text] of Object.entries(madeFiles())) write(file, text);
  for (const name of Object.keys(renderings)) write(`kubernetes/${name}.yaml`, render(name));
}
