/** The Grafana dashboard: what is going on, from left to right through the pipeline. Written out by render.ts. */

interface Query {
  readonly expr: string;
  /** Of the series; `{{label}}` stands for a label's value. */
  readonly legend?: string;
}

interface Panel {
  readonly title: string;
  readonly description?: string;
  readonly unit?: string;
  readonly queries: readonly Query[];
  readonly kind?: 'timeseries' | 'stat' | 'table' | 'heatmap';
  readonly stacked?: boolean;
  /** Of 24. */
  readonly width?: number;
  /** Values from which on it is yellow, and red. */
  readonly thresholds?: readonly [number, number];
}

interface Row {
  readonly title: string;
  readonly panels: readonly Panel[];
}

const here = 'namespace=~"$namespace"';
const p = (quantile: number, metric: string, by: string) =>
  `histogram_quantile(${quantile}, sum by (${by}, le) (rate(${metric}_bucket{${here}}[$__rate_interval])))`;
const mean = (metric: string, by: string) =>
  `sum by (${by}) (rate(${metric}_sum{${here}}[$__rate_interval])) / sum by (${by}) (rate(${metric}_count{${here}}[$__rate_interval]))`;
const rate = (selector: string, by: string) => `sum by (${by}) (rate(${selector}[$__rate_interval]))`;

export const rows: readonly Row[] = [
  {
    title: 'Now',
    panels: [
      {
        title: 'Jobs that end, a second',
        kind: 'stat',
        width: 4,
        queries: [
          {
            expr: `sum(rate(acousticsense_stage_jobs_total{${here},stage="inference",outcome="done"}[5m]))`,
          },
        ],
      },
      {
        title: 'Failed, last hour',
        kind: 'stat',
        width: 4,
        queries: [
          {
            expr: `sum(increase(acousticsense_stage_jobs_total{${here},outcome="failed"}[1h])) or vector(0)`,
          },
        ],
      },
      {
        title: 'Oldest job that waits',
        kind: 'stat',
        width: 4,
        unit: 's',
        thresholds: [60, 300],
        queries: [{ expr: `max(acousticsense:queue_oldest_seconds:max{${here}})` }],
      },
      {
        title: 'Rows outside the queues',
        kind: 'stat',
        width: 4,
        queries: [{ expr: `sum(acousticsense_feeder_rows_waiting{${here}}) or vector(0)` }],
      },
      {
        title: 'Alerts',
        kind: 'stat',
        width: 4,
        thresholds: [1, 3],
        queries: [{ expr: 'count(ALERTS{alertstate="firing",alertname=~"AcousticSense.*"}) or vector(0)' }],
      },
      {
        title: 'Processes with a part away',
        kind: 'stat',
        width: 4,
        thresholds: [1, 2],
        queries: [{ expr: `sum(acousticsense_ready{${here}} == bool 0)` }],
      },
    ],
  },
  {
    title: 'Rate and waiting',
    panels: [
      {
        title: 'Jobs by stage and outcome',
        unit: 'ops',
        queries: [
          {
            expr: rate(`acousticsense_stage_jobs_total{${here}}`, 'stage, outcome'),
            legend: '{{stage}} {{outcome}}',
          },
        ],
      },
      {
        title: 'Waiting jobs',
        description: 'Rows of batches wait outside the queues: they are fed as there is room.',
        queries: [
          { expr: `acousticsense:queue_waiting:max{${here}}`, legend: '{{queue}}' },
          {
            expr: `sum by (inference_queue) (acousticsense_feeder_rows_waiting{${here}})`,
            legend: 'rows for {{inference_queue}}',
          },
        ],
      },
      {
        title: 'Age of the oldest job',
        unit: 's',
        thresholds: [60, 300],
        queries: [{ expr: `acousticsense:queue_oldest_seconds:max{${here}}`, legend: '{{queue}}' }],
      },
      {
        title: 'Workers',
        queries: [{ expr: `acousticsense:queue_workers:max{${here}}`, legend: '{{queue}}' }],
      },
      {
        title: 'Work that waits: CPU-seconds to decode',
        description: 'What the decoders are scaled by.',
        unit: 's',
        queries: [{ expr: `acousticsense:decode_cpu_seconds_outstanding{${here}}`, legend: '{{queue}}' }],
      },
      {
        title: 'Work that waits: windows to classify',
        description: 'What inference is scaled by.',
        queries: [{ expr: `acousticsense:inference_windows_outstanding{${here}}`, legend: '{{queue}}' }],
      },
    ],
  },
  {
    title: 'Stages',
    panels: [
      {
        title: 'Time in a stage, p50',
        unit: 's',
        queries: [{ expr: p(0.5, 'acousticsense_stage_seconds', 'stage'), legend: '{{stage}}' }],
      },
      {
        title: 'Time in a stage, p95',
        unit: 's',
        queries: [{ expr: `acousticsense:stage_seconds:p95_5m{${here}}`, legend: '{{stage}}' }],
      },
      {
        title: 'CPU-seconds a decoded job',
        unit: 's',
        queries: [{ expr: `acousticsense:decode_cpu_seconds_per_job:mean30m{${here}}`, legend: '{{queue}}' }],
      },
      {
        title: 'Errors by code',
        unit: 'ops',
        stacked: true,
        queries: [
          {
            expr: rate(`acousticsense_stage_jobs_total{${here},outcome="failed"}`, 'stage, code'),
            legend: '{{stage}} {{code}}',
          },
        ],
      },
      {
        title: 'Fetched bytes',
        unit: 'Bps',
        queries: [
          {
            expr: `sum(rate(acousticsense_fetched_bytes_total{${here}}[$__rate_interval]))`,
            legend: 'fetched',
          },
        ],
      },
      {
        title: 'Requests to source buckets',
        unit: 'ops',
        queries: [
          {
            expr: rate(`acousticsense_source_reads_total{${here}}`, 'service, operation'),
            legend: '{{service}} {{operation}}',
          },
        ],
      },
    ],
  },
  {
    title: 'Inference',
    panels: [
      {
        title: 'Windows a second',
        queries: [
          {
            expr: rate(`acousticsense_inference_windows_total{${here}}`, 'queue, provider'),
            legend: '{{queue}} {{provider}}',
          },
        ],
      },
      {
        title: 'Windows in a batch',
        queries: [{ expr: mean('acousticsense_inference_batch_windows', 'queue'), legend: '{{queue}}' }],
      },
      {
        title: 'Wait for a batch, p95',
        unit: 's',
        queries: [
          { expr: p(0.95, 'acousticsense_inference_batch_wait_seconds', 'queue'), legend: '{{queue}}' },
        ],
      },
      {
        title: 'Time of a batch, p95',
        unit: 's',
        queries: [{ expr: p(0.95, 'acousticsense_inference_run_seconds', 'queue'), legend: '{{queue}}' }],
      },
      {
        title: 'What it runs on',
        kind: 'table',
        queries: [
          { expr: `sum by (provider, fallback, queue) (acousticsense_inference_provider_info{${here}})` },
        ],
      },
      {
        title: "Restarts of the model's process",
        queries: [
          {
            expr: `sum by (queue) (increase(acousticsense_inference_child_restarts_total{${here}}[$__rate_interval]))`,
            legend: '{{queue}}',
          },
        ],
      },
      {
        title: 'GPU: utilisation',
        description: "From NVIDIA's DCGM exporter, where there is one.",
        unit: 'percent',
        queries: [{ expr: 'avg by (Hostname, gpu) (DCGM_FI_DEV_GPU_UTIL)', legend: '{{Hostname}} {{gpu}}' }],
      },
      {
        title: 'GPU: memory in use',
        unit: 'decmbytes',
        queries: [{ expr: 'max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED)', legend: '{{Hostname}} {{gpu}}' }],
      },
      {
        title: 'Bytes of windows in memory',
        unit: 'bytes',
        queries: [
          { expr: `sum by (queue) (acousticsense_inference_admitted_bytes{${here}})`, legend: '{{queue}}' },
        ],
      },
    ],
  },
  {
    title: 'API',
    panels: [
      {
        title: 'Requests by status',
        unit: 'reqps',
        stacked: true,
        queries: [
          { expr: rate(`acousticsense_http_request_seconds_count{${here}}`, 'status'), legend: '{{status}}' },
        ],
      },
      {
        title: 'Time to answer, p95',
        unit: 's',
        queries: [{ expr: p(0.95, 'acousticsense_http_request_seconds', 'route'), legend: '{{route}}' }],
      },
      {
        title: 'Round of the feeder, p95',
        unit: 's',
        queries: [{ expr: p(0.95, 'acousticsense_feeder_round_seconds', 'namespace'), legend: 'round' }],
      },
    ],
  },
  {
    title: 'Webhooks',
    panels: [
      {
        title: 'Attempts by outcome',
        unit: 'ops',
        stacked: true,
        queries: [
          {
            expr: rate(`acousticsense_webhook_attempts_total{${here}}`, 'outcome, problem'),
            legend: '{{outcome}} {{problem}}',
          },
        ],
      },
      {
        title: 'From the event to its delivery, p95',
        unit: 's',
        queries: [{ expr: p(0.95, 'acousticsense_webhook_delivery_seconds', 'namespace'), legend: 'p95' }],
      },
      {
        title: 'Age of the oldest event not handed out',
        unit: 's',
        queries: [{ expr: `max(acousticsense_webhook_lag_seconds{${here}})`, legend: 'lag' }],
      },
      {
        title: 'Messages under way, and events in Redis only',
        queries: [
          { expr: `sum(acousticsense_webhook_outstanding{${here}})`, legend: 'under way' },
          { expr: `sum(acousticsense_events_unarchived{${here}})`, legend: 'not archived' },
        ],
      },
      {
        title: 'Endpoints',
        stacked: true,
        queries: [
          {
            expr: `max by (status) (acousticsense_webhook_endpoints{${here}})`,
            legend: '{{status}}',
          },
        ],
      },
      {
        title: 'Dead letters, an hour',
        queries: [
          {
            expr: `sum(increase(acousticsense_webhook_dead_letters_total{${here}}[1h]))`,
            legend: 'given up',
          },
        ],
      },
    ],
  },
  {
    title: 'Processes',
    panels: [
      {
        title: 'Processor',
        description: 'Of the decoder with the ffmpeg processes that have ended.',
        unit: 'cores',
        queries: [
          {
            expr: rate(`process_cpu_seconds_total{${here},service!="decoder"}`, 'service'),
            legend: '{{service}}',
          },
          {
            expr: `sum(rate(acousticsense_decode_cpu_seconds_total{${here}}[$__rate_interval]))`,
            legend: 'decoder',
          },
        ],
      },
      {
        title: 'Memory',
        unit: 'bytes',
        queries: [
          {
            expr: `max by (service) (process_resident_memory_bytes{${here}})`,
            legend: '{{service}}, largest',
          },
        ],
      },
      {
        title: 'Event loop, p99',
        unit: 's',
        queries: [
          { expr: `max by (service) (nodejs_eventloop_lag_p99_seconds{${here}})`, legend: '{{service}}' },
        ],
      },
      {
        title: 'Redis: memory',
        description: 'From redis_exporter, where there is one.',
        unit: 'bytes',
        queries: [
          { expr: 'redis_memory_used_bytes', legend: 'used {{instance}}' },
          { expr: 'redis_memory_max_bytes', legend: 'limit {{instance}}' },
        ],
      },
    ],
  },
];

const height = 8;
const datasource = { type: 'prometheus', uid: `\${datasource}` };

function panelOf(panel: Panel, id: number, x: number, y: number, w: number, h: number) {
  const { title, description, unit, queries, kind = 'timeseries', stacked = false, thresholds } = panel;
  const steps = [
    { color: 'green', value: null },
    ...(thresholds
      ? [
          { color: 'yellow', value: thresholds[0] },
          { color: 'red', value: thresholds[1] },
        ]
      : []),
  ];
  return {
    id,
    type: kind,
    title,
    ...(description ? { description } : {}),
    datasource,
    gridPos: { x, y, w, h },
    fieldConfig: {
      defaults: {
        ...(unit ? { unit } : {}),
        min: 0,
        thresholds: { mode: 'absolute', steps },
        ...(kind === 'timeseries'
          ? {
              custom: {
                lineWidth: 1,
                fillOpacity: stacked ? 30 : 5,
                showPoints: 'never',
                stacking: { mode: stacked ? 'normal' : 'none' },
                thresholdsStyle: { mode: thresholds ? 'line' : 'off' },
              },
            }
          : {}),
      },
      overrides: [],
    },
    options:
      kind === 'stat'
        ? { reduceOptions: { calcs: ['lastNotNull'] }, colorMode: thresholds ? 'background' : 'value' }
        : kind === 'table'
          ? { showHeader: true }
          : {
              legend: { displayMode: 'list', placement: 'bottom' },
              tooltip: { mode: 'multi', sort: 'desc' },
            },
    targets: queries.map(({ expr, legend }, at) => ({
      refId: String.fromCharCode(65 + at),
      datasource,
      expr,
      ...(legend ? { legendFormat: legend } : {}),
      ...(kind === 'table' ? { format: 'table', instant: true } : {}),
    })),
  };
}

/** @returns the dashboard as Grafana imports it. */
export function dashboard(): object {
  const panels: object[] = [];
  let y = 0;
  for (const { title, panels: own } of rows) {
    panels.push({
      id: panels.length + 1,
      type: 'row',
      title,
      collapsed: false,
      gridPos: { x: 0, y, w: 24, h: 1 },
      panels: [],
    });
    y += 1;
    let x = 0;
    const h = own.every(({ kind }) => kind === 'stat') ? 4 : height;
    for (const panel of own) {
      const width = panel.width ?? 8;
      if (x + width > 24) {
        x = 0;
        y += h;
      }
      panels.push(panelOf(panel, panels.length + 1, x, y, width, h));
      x += width;
    }
    y += h;
  }
  return {
    uid: 'acousticsense',
    title: 'AcousticSense',
    tags: ['acousticsense'],
    schemaVersion: 39,
    version: 1,
    editable: true,
    graphTooltip: 1,
    refresh: '30s',
    time: { from: 'now-3h', to: 'now' },
    timezone: 'browser',
    annotations: {
      list: [
        {
          name: 'Alerts',
          enable: true,
          datasource,
          expr: 'ALERTS{alertstate="firing",alertname=~"AcousticSense.*"}',
          titleFormat: '{{alertname}}',
          iconColor: 'red',
          step: '1m',
        },
      ],
    },
    templating: {
      list: [
        { name: 'datasource', type: 'datasource', query: 'prometheus', label: 'Source', current: {} },
        {
          // Outside Kubernetes there is no such label: `.*` is also what has none.
          name: 'namespace',
          type: 'query',
          label: 'Namespace',
          datasource,
          query: { query: 'label_values(acousticsense_ready, namespace)', refId: 'namespace' },
          refresh: 2,
          includeAll: true,
          allValue: '.*',
          multi: true,
          current: { selected: true, text: 'All', value: '$__all' },
        },
      ],
    },
    panels,
  };
}
