import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { parse } from 'yaml';
import { dashboard, rows } from './dashboard.ts';
import { toolsDirectory } from './render.ts';

const root = path.dirname(import.meta.dirname);
const read = (file: string) => readFileSync(path.join(root, file), 'utf8');
const glob = (pattern: string) => globSync(pattern, { cwd: root }).sort();
const ruleFiles = glob('deploy/prometheus/rules/*.yml');

interface Alert {
  readonly alert?: string;
  readonly labels: { severity: string };
  readonly annotations: { summary: string; description: string; runbook_url: string };
}
const alerts = ruleFiles.flatMap((file) =>
  (parse(read(file)) as { groups: { rules: Alert[] }[] }).groups.flatMap(({ rules }) =>
    rules.filter(({ alert }) => alert !== undefined),
  ),
);

const promtool = [path.join(toolsDirectory, 'bin/promtool'), '/usr/bin/promtool'].find(existsSync);
const skip = promtool === undefined && 'promtool is not here: deploy/tools.sh fetches it';

function check(...words: string[]): void {
  const { status, stdout, stderr } = spawnSync(promtool!, words, { cwd: root, encoding: 'utf8' });
  assert.equal(status, 0, `${stdout}${stderr}`);
}

const scratch = mkdtempSync(path.join(tmpdir(), 'as-rules-'));
after(() => rmSync(scratch, { recursive: true }));

test('promtool takes the rules', { skip }, () => check('check', 'rules', ...ruleFiles));

test('the rules do what their unit tests say', { skip }, () =>
  check('test', 'rules', ...glob('deploy/prometheus/tests/*.yml')),
);

test('promtool understands every expression of the dashboard', { skip }, () => {
  const exprs = rows.flatMap(({ panels }) =>
    panels.flatMap(({ queries }) => queries.map(({ expr }) => expr)),
  );
  // Grafana's own variables are filled in before Prometheus sees them.
  const filled = exprs.map((expr) =>
    expr.replaceAll('$__rate_interval', '5m').replaceAll('$namespace', '.*'),
  );
  const rules = filled.map((expr, at) => ({ record: `panel:${at}`, expr }));
  const file = path.join(scratch, 'panels.yml');
  writeFileSync(file, JSON.stringify({ groups: [{ name: 'panels', rules }] }));
  check('check', 'rules', file);
});

test('every alert is tried by a unit test: there is one in which it fires', () => {
  const tests = glob('deploy/prometheus/tests/*.yml').map(read).join('\n');
  const untried = alerts.filter(({ alert }) => !tests.includes(`{ labels: '{alertname="${alert}"}', value:`));
  assert.deepEqual(
    untried.map(({ alert }) => alert),
    [],
  );
});

test('every alert has a page that says what it means and what to do, and every page has its alert', () => {
  assert.deepEqual(
    glob('docs/runbooks/*.md').map((file) => path.basename(file, '.md')),
    alerts.map(({ alert }) => alert!).sort(),
  );
  for (const { alert, annotations, labels } of alerts) {
    assert.equal(annotations.runbook_url, `docs/runbooks/${alert}.md`);
    assert.match(labels.severity, /^(critical|warning|info)$/);
    const page = read(annotations.runbook_url);
    for (const part of [`# ${alert}`, '## Meaning', '## First look', '## What to do'])
      assert.ok(page.split('\n').includes(part), `${alert}: ${part}`);
  }
});

test('the panels of the dashboard lie side by side, none over another', () => {
  const { panels } = dashboard() as {
    panels: { id: number; gridPos: { x: number; y: number; w: number; h: number } }[];
  };
  assert.equal(new Set(panels.map(({ id }) => id)).size, panels.length);
  const taken = new Set<string>();
  for (const { gridPos } of panels) {
    for (let x = gridPos.x; x < gridPos.x + gridPos.w; x += 1) {
      assert.ok(x < 24);
      for (let y = gridPos.y; y < gridPos.y + gridPos.h; y += 1) {
        assert.ok(!taken.has(`${x},${y}`), `${x},${y}`);
        taken.add(`${x},${y}`);
      }
    }
  }
});
