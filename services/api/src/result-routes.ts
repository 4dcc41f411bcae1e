/** Results of batches by HTTP: streamed, row by row, the latest of a ref; two runs compared; a catalogue audited. */
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setImmediate as turn } from 'node:timers/promises';
import express, { type Request, type Response, type Router } from 'express';
import { auditBatch } from './batch-audit.ts';
import type { Diff } from './batch-diff.ts';
import { type Cell, csvLine } from './csv-lines.ts';
import { extras } from './extras.ts';
import { refuseMethod } from './http-refusals.ts';
import { parseOptions } from './jobs.ts';
import {
  type Audit,
  auditCsvQuerySchema,
  auditQuerySchema,
  csvQuerySchema,
  diffQuerySchema,
  type ResultRow,
  refQuerySchema,
  resultsQuerySchema,
  viewSchema,
} from './result-schemas.ts';
import { type OpenBatch, present, type Results } from './results.ts';

export interface ResultRoutesDeps {
  readonly results: Results;
  readonly diff: Diff;
  readonly tenantOf: (response: Response) => string;
  /** Aborted when the service closes. */
  readonly closing: AbortSignal;
}

/** How long nothing may be sent: many rows are read before the first byte of an audit, or for few that are wanted. */
const idleMs = 5 * 60_000;
const sliceRows = 200;

export function createResultRoutes({ results, diff, tenantOf, closing }: ResultRoutesDeps): Router {
  const router = express.Router();

  router.get('/v1/batches/:id/results.jsonl', async (request, response) => {
    const query = parseOptions(resultsQuerySchema, request.query);
    const opened = await results.open(tenantOf(response), request.params.id, query);
    await send(request, response, opened, 'results.jsonl', async function* (signal) {
      for await (const rows of results.ended(opened, query, signal))
        yield jsonLines(rows.map((row) => present(opened, row)));
    });
  });

  router.get('/v1/batches/:id/results.csv', async (request, response) => {
    const { bom, ...query } = parseOptions(csvQuerySchema, request.query);
    const opened = await results.open(tenantOf(response), request.params.id, query);
    await send(request, response, opened, 'results.csv', async function* (signal) {
      yield csvHead(Object.keys(resultColumns), bom);
      for await (const rows of results.ended(opened, query, signal)) {
        yield rows
          .map((row) => present(opened, row))
          .map((row) => csvLine(Object.values(resultColumns).map((cell) => cell(row))))
          .join('');
      }
    });
  });

  router.get('/v1/batches/:id/rows/:row', async (request, response) => {
    const { opened, row } = await find(request, response);
    noStore(response).json(present(opened, row));
  });
  router.get('/v1/batches/:id/rows/:row/timeline', async (request, response) => {
    const { opened, row } = await find(request, response);
    noStore(response).json({ row: row.row, windows: await results.timeline(opened, row) });
  });
  for (const extra of extras) {
    router.get(`/v1/batches/:id/rows/:row/${extra}`, async (request, response) => {
      const { opened, row } = await find(request, response);
      const json = await results.extra(opened, row, extra);
      noStore(response).set('content-type', 'application/json').end(json);
    });
  }

  async function find(request: Request, response: Response) {
    const view = parseOptions(viewSchema, request.query);
    const opened = await results.open(tenantOf(response), String(request.params['id']), view);
    return { opened, row: await results.row(opened, String(request.params['row'])) };
  }

  router.get('/v1/results', async (request, response) => {
    const { ref, ...view } = parseOptions(refQuerySchema, request.query);
    noStore(response).json(await results.latest(tenantOf(response), ref, view));
  });

  router.get('/v1/batches/:id/diff', async (request, response) => {
    const { with: earlier, summary, threshold } = parseOptions(diffQuerySchema, request.query);
    const tenant = tenantOf(response);
    const to = await results.open(tenant, request.params.id, { threshold });
    const from = await results.open(tenant, earlier, { threshold });
    response.setTimeout(idleMs);
    if (summary) noStore(response).json(await diff.summary(from, to, until(response)));
    else
      await send(request, response, to, 'diff.jsonl', async function* (signal) {
        for await (const rows of diff.changes(from, to, signal)) yield jsonLines(rows);
      });
  });

  router.get('/v1/batches/:id/audit', async (request, response) => {
    const { limit, ...view } = parseOptions(auditQuerySchema, request.query);
    const opened = await results.open(tenantOf(response), request.params.id, view);
    await send(request, response, opened, 'audit.json', async function* (signal) {
      const { disagreements, ...figures } = await auditBatch(results, opened, limit, signal);
      yield `${JSON.stringify(figures).slice(0, -1)},"disagreements":[`;
      let separator = '';
      for await (const rows of slicesOf(disagreements)) {
        yield separator + rows.map((row) => JSON.stringify(row)).join(',');
        separator = ',';
      }
      yield ']}';
    });
  });

  router.get('/v1/batches/:id/audit.csv', async (request, response) => {
    const { limit, bom, ...view } = parseOptions(auditCsvQuerySchema, request.query);
    const opened = await results.open(tenantOf(response), request.params.id, view);
    await send(request, response, opened, 'audit.csv', async function* (signal) {
      const { disagreements } = await auditBatch(results, opened, limit, signal);
      yield csvHead(Object.keys(auditColumns), bom);
      for await (const rows of slicesOf(disagreements))
        yield rows.map((row) => csvLine(Object.values(auditColumns).map((cell) => cell(row)))).join('');
    });
  });

  function until(response: Response): AbortSignal {
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    return AbortSignal.any([gone.signal, closing]);
  }

  /** What goes wrong before the first text is told as a problem; after it the answer breaks off. */
  async function send(
    request: Request,
    response: Response,
    { batch }: OpenBatch,
    file: keyof typeof types,
    write: (signal: AbortSignal) => AsyncGenerator<string>,
  ): Promise<void> {
    const signal = until(response);
    noStore(response)
      .attachment(`${batch.name ?? batch.id}-${file}`)
      .set('content-type', types[file]);
    if (request.method === 'HEAD') return void response.end();
    response.setTimeout(idleMs);
    const texts = write(signal);
    try {
      const first = await texts.next();
      const all = (async function* () {
        if (!first.done) yield first.value;
        yield* texts;
      })();
      await pipeline(Readable.from(all, { highWaterMark: 1 }), response, { signal });
    } catch (error) {
      // Nobody is there any more to be told.
      if (!signal.aborted) throw error;
      response.destroy();
    } finally {
      await texts.return(undefined);
    }
  }

  const row = '/v1/batches/:id/rows/:row';
  const batchPaths = ['results.jsonl', 'results.csv', 'diff', 'audit', 'audit.csv'];
  router.all(
    [
      '/v1/results',
      ...batchPaths.map((name) => `/v1/batches/:id/${name}`),
      ...[row, `${row}/timeline`, ...extras.map((extra) => `${row}/${extra}`)],
    ],
    refuseMethod('GET, HEAD'),
  );
  return router;
}

const types = {
  'results.jsonl': 'application/x-ndjson; charset=utf-8',
  'results.csv': 'text/csv; charset=utf-8; header=present',
  'diff.jsonl': 'application/x-ndjson; charset=utf-8',
  'audit.json': 'application/json; charset=utf-8',
  'audit.csv': 'text/csv; charset=utf-8; header=present',
} as const;

const noStore = (response: Response) => response.set('cache-control', 'no-store');
const jsonLines = (rows: readonly object[]) => rows.map((row) => `${JSON.stringify(row)}\n`).join('');
const csvHead = (names: readonly string[], bom: boolean) => `${bom ? '\uFEFF' : ''}${csvLine(names)}`;

/** Some at a time, between which the process does other things. */
async function* slicesOf<T>(rows: readonly T[]): AsyncGenerator<T[]> {
  for (let at = 0; at < rows.length; at += sliceRows) {
    yield rows.slice(at, at + sliceRows);
    await turn();
  }
}

const scored = (pairs: readonly (readonly [name: string, score: number])[] | undefined): Cell =>
  pairs?.map(([name, score]) => `${name} ${score}`).join('; ');

/** In this order, whatever is asked: a column that says nothing is empty. Further ones may come at the end. */
const resultColumns: Readonly<Record<string, (row: ResultRow) => Cell>> = {
  row: ({ row }) => row,
  line: ({ line }) => line,
  ref: ({ ref }) => ref,
  audio: ({ audio }) => audio,
  state: ({ state }) => state,
  label: ({ top }) => top?.[0]?.label,
  confidence: ({ top }) => top?.[0]?.confidence,
  uncertain: ({ uncertain }) => uncertain,
  uncertainBecause: ({ uncertainBecause }) => uncertainBecause,
  lead: ({ lead }) => lead,
  top: ({ top }) => scored(top?.map(({ label, confidence }) => [label, confidence])),
  declaredGenre: ({ declaredGenre }) => declaredGenre?.join('; '),
  predicted: ({ predicted }) => predicted,
  predictedProbability: ({ predictedProbability }) => predictedProbability,
  verdict: ({ verdict }) => verdict,
  disagreement: ({ disagreement }) => disagreement,
  house: ({ house }) => scored(house?.map(({ genre, probability }) => [genre, probability])),
  codec: ({ input }) => input?.codec,
  sampleRate: ({ input }) => input?.sampleRate,
  channels: ({ input }) => input?.channels,
  duration: ({ input }) => input?.duration,
  analysedStart: ({ input }) => input?.analysedStart,
  analysedEnd: ({ input }) => input?.analysedEnd,
  bandwidth: ({ input }) => input?.bandwidth,
  warnings: ({ warnings }) => warnings.map(({ code }) => code).join('; '),
  errorCode: ({ error }) => error?.code,
  errorMessage: ({ error }) => error?.message,
  reused: ({ reused, state }) => (state === 'completed' ? reused === true : undefined),
  revision: ({ revision }) => revision,
  finishedAt: ({ finishedAt }) => finishedAt,
  jobId: ({ jobId }) => jobId,
  model: ({ model }) => model.name,
  modelVersion: ({ model }) => model.version,
  modelDigest: ({ model }) => model.digest,
  profile: ({ model }) => model.profile,
  provider: ({ provider }) => provider,
  fetchMs: ({ timings }) => timings?.fetch,
  decodeMs: ({ timings }) => timings?.decode,
  inferenceMs: ({ timings }) => timings?.inference,
};

const auditColumns: Readonly<Record<string, (row: Audit['disagreements'][number]) => Cell>> = {
  row: ({ row }) => row,
  line: ({ line }) => line,
  ref: ({ ref }) => ref,
  audio: ({ audio }) => audio,
  declaredGenre: ({ declaredGenre }) => declaredGenre.join('; '),
  predicted: ({ predicted }) => predicted,
  predictedProbability: ({ predictedProbability }) => predictedProbability,
  disagreement: ({ disagreement }) => disagreement,
  label: ({ label }) => label,
  confidence: ({ confidence }) => confidence,
};
