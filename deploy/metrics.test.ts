/**
 * A name that nothing exports reads as "no data", which looks like "nothing is wrong": so every metric that a rule, a
 * panel or an autoscaler reads must be one that the code defines, a rule records, or a named exporter of others has.
 */
import assert from 'node:assert/strict';
import { globSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { collectDefaultMetrics, Registry } from 'prom-client';
import { parse, parseAllDocuments } from 'yaml';
import { rows } from './dashboard.ts';

const root = path.dirname(import.meta.dirname);
const read = (file: string) => readFileSync(path.join(root, file), 'utf8');
const glob = (pattern: string) => globSync(pattern, { cwd: root }).sort();

/** Of programs that are not ours; each name was looked up in its exporter. */
const others = [
  'ALERTS', // Prometheus itself
  'DCGM_FI_DEV_FB_USED', // NVIDIA's dcgm-exporter
  'DCGM_FI_DEV_GPU_UTIL',
  'keda_scaler_detail_errors_total', // KEDA 2.12 and later
  'redis_memory_max_bytes', // redis_exporter
  'redis_memory_used_bytes',
];

interface Rule {
  readonly record?: string;
  readonly alert?: string;
  readonly expr: string;
}
const rules = glob('deploy/prometheus/rules/*.yml').flatMap((file) =>
  (parse(read(file)) as { groups: { rules: Rule[] }[] }).groups.flatMap((group) => group.rules),
);

/** The series that the services export, from their sources: a histogram is three of them. */
function exported(): Set<string> {
  const names = new Set<string>();
  const files = glob('{packages,services}/*/src/**/*.ts').filter(
    (file) => !/\.test\.ts$|\/testing\//.test(file),
  );
  for (const file of files) {
    const source = read(file);
    for (const { 0: literal, index } of source.matchAll(/'acousticsense_\w+'/g)) {
      const kind = source
        .slice(0, index)
        .match(/new (Counter|Gauge|Histogram|Summary)\b/g)
        ?.at(-1);
      // The cookie of the page has such a name too.
      if (kind === undefined) continue;
      const name = literal.slice(1, -1);
      if (kind.endsWith('Histogram'))
        for (const part of ['bucket', 'sum', 'count']) names.add(`${name}_${part}`);
      else names.add(name);
    }
  }
  return names;
}

/** The names of the metrics in an expression of PromQL. */
function metricsOf(expr: string): string[] {
  const bare = expr
    .replace(/"(?:[^"\\]|\\.)*"/g, '""')
    .replace(/\{[^}]*\}/g, '')
    .replace(/\[[^\]]*\]/g, '')
    .replace(/\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)/g, '');
  const words = new Set(['and', 'or', 'unless', 'bool', 'offset']);
  return [...bare.matchAll(/(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])/g)]
    .map(([name]) => name)
    .filter((name) => !words.has(name));
}

const standard = new Registry();
collectDefaultMetrics({ register: standard });
const known = new Set([
  ...exported(),
  ...rules.flatMap(({ record }) => (record === undefined ? [] : [record])),
  ...standard.getMetricsAsArray().map(({ name }) => name),
  ...others,
]);
const unknownIn = (expr: string) => metricsOf(expr).filter((name) => !known.has(name));

test('the reader of expressions finds every metric and nothing else, and a misspelt name is unknown', () => {
  const expr = `sum by (queue, le) (rate(acousticsense_stage_seconds_bucket{outcome=~"done|x"}[5m])) > bool 0.2
    unless on (queue) label_replace(acousticsense_ready, "a", "$1", "b", "(.+)") and process_cpu_seconds_total offset 5m`;
  assert.deepEqual(metricsOf(expr), [
    'acousticsense_stage_seconds_bucket',
    'acousticsense_ready',
    'process_cpu_seconds_total',
  ]);
  assert.deepEqual(unknownIn(expr), []);
  assert.deepEqual(unknownIn(expr.replace('_ready', '_redy')), ['acousticsense_redy']);
  assert.deepEqual(
    unknownIn('acousticsense_stage_seconds'),
    ['acousticsense_stage_seconds'],
    'a histogram has parts',
  );
  assert.deepEqual(unknownIn('max(acousticsense:queue_wating:max)'), ['acousticsense:queue_wating:max']);
});

for (const { record, alert, expr } of rules)
  test(`the metrics of ${alert ?? record} exist`, () => assert.deepEqual(unknownIn(expr), []));

test('the metrics of the dashboard exist', () => {
  const queries = rows.flatMap(({ panels }) => panels.flatMap((panel) => panel.queries));
  assert.ok(queries.length > 30);
  for (const { expr } of queries) assert.deepEqual(unknownIn(expr), [], expr);
});

test('the metrics that autoscalers go by exist, and a missing one is an error to KEDA, not 0', () => {
  interface Scaled {
    kind: string;
    spec: { triggers: { metadata: { query: string; ignoreNullValues: string } }[]; fallback: object };
  }
  for (const file of glob('deploy/kubernetes/*.yaml')) {
    const scaled = parseAllDocuments(read(file))
      .map((document) => document.toJS() as Scaled | null)
      .filter((object) => object?.kind === 'ScaledObject') as Scaled[];
    assert.ok(scaled.length >= 3, file);
    for (const { spec } of scaled) {
      assert.ok(spec.fallback);
      for (const { metadata } of spec.triggers) {
        assert.ok(metricsOf(metadata.query).length > 0);
        assert.deepEqual(unknownIn(metadata.query), []);
        assert.equal(metadata.ignoreNullValues, 'false');
      }
    }
  }
});

test('every metric of ours is looked at by somebody: a panel, a rule or an autoscaler', () => {
  const looked = [
    ...rules.map(({ expr }) => expr),
    ...rows.flatMap(({ panels }) => panels.flatMap(({ queries }) => queries.map(({ expr }) => expr))),
  ].flatMap(metricsOf);
  const base = (name: string) => name.replace(/_(bucket|sum|count)$/, '');
  const seen = new Set(looked.map(base));
  const unseen = [...new Set([...exported()].map(base))].filter((name) => !seen.has(name));
  // Attention maps are few, and cost what their windows cost.
  assert.deepEqual(
    unseen.filter((name) => !name.startsWith('acousticsense_inference_explain_')),
    [],
  );
});
