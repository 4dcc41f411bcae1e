/** Results over real HTTP, from real Redis and a real storage, written as the feeder writes them. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { hash128 } from '@acousticsense/shared/answer-key';
import type { BatchRecord } from '@acousticsense/shared/batch';
import { parseMapping } from '@acousticsense/shared/house-genres';
import type { Decoded, Timeline } from '@acousticsense/shared/job';
import { firstGeneration, refOf } from '@acousticsense/shared/job-records';
import { batchPrefix, explanationKey, partKey, timelineKey } from '@acousticsense/shared/object-keys';
import { deletePrefix } from '@acousticsense/shared/storage';
import { parse } from 'csv-parse/sync';
import { latestResultSchema, resultRowSchema, rowTimelineSchema } from './result-schemas.ts';
import { problemSchema } from './schemas.ts';
import {
  badAudio,
  decoded,
  description,
  type Ending,
  heard,
  labels,
  serveResults,
  startCatalogue,
  storeBatch,
  type TestCatalogue,
  tracks,
} from './testing/catalogue.ts';

const mapping = parseMapping(
  JSON.stringify({ 'Hip-Hop': ['Urban'], Rap: ['Urban'], Pop: ['Pop', 'Pop/Rock'], Rock: ['Pop/Rock'] }),
  'application/json',
  labels,
);
const label = (name: string, confidence: number): Ending => ({ outcome: heard(name, confidence) });

let catalogue: TestCatalogue;
before(async () => {
  catalogue = await startCatalogue();
});
after(() => catalogue[Symbol.asyncDispose]());

const get = (...of: Parameters<TestCatalogue['get']>) => catalogue.get(...of);

async function assertProblem(at: string, status: number, code: string, more: RegExp | string = /./) {
  const answer = await get(at);
  const body = problemSchema.parse(answer.json());
  assert.deepEqual([answer.status, body.code], [status, code], answer.text);
  if (typeof more === 'string') assert.equal(body.field, more);
  else assert.match(body.detail, more);
  return body;
}

describe('the results of a batch', () => {
  let batch: BatchRecord;
  const endings: Ending[] = [
    label('Rap', 0.9),
    label('Rock', 0.7),
    label('Jazz', 0.45),
    { error: badAudio },
    { outcome: { probabilities: null, windows: [null], provider: 'cpu' } },
    'cancelled',
  ];
  before(async () => {
    const declared = [['Urban'], ['Jazz'], ['Jazz'], ['Pop'], ['Jazz'], undefined];
    const manifest = tracks(6, (n) => ({
      ...(declared[n] ? { declaredGenre: declared[n] } : {}),
      ...(n === 1 ? { audio: { url: 'https://cdn.example/a.mp3?sig=1' } } : {}),
      ...(n === 2 ? { audio: { upload: '018f2b6e-5c1d-7e2a-9b1c-0123456789ab' } } : {}),
    }));
    batch = await catalogue.finish(
      await catalogue.batch(manifest, { mapping, name: 'Café "2026"' }),
      (row) => endings[row]!,
    );
  });
  const at = (rest: string) => `/v1/batches/${batch.id}/${rest}`;

  test('are told with all that is known of each row', async () => {
    const answer = await get(at('results.jsonl'));
    assert.equal(answer.status, 200);
    assert.match(answer.headers.get('content-type')!, /^application\/x-ndjson/);
    assert.equal(answer.headers.get('cache-control'), 'no-store');
    assert.match(
      answer.headers.get('content-disposition')!,
      /^attachment; filename=".*"; filename\*=UTF-8''Caf%C3%A9%20%222026%22-results.jsonl$/,
    );
    const rows = answer.lines();
    assert.equal(rows.length, 6);
    for (const row of rows) resultRowSchema.parse(row);
    const [first] = rows;
    assert.deepEqual(first, {
      row: 0,
      line: 1,
      ref: 'track-0',
      audio: 's3://b/0.flac',
      state: 'completed',
      revision: batch.revision,
      jobId: first.jobId,
      top: [
        { label: 'Rap', confidence: 0.9 },
        { label: 'Blues', confidence: heard('Rap', 0.9).probabilities![0] },
        { label: 'Hip-Hop', confidence: heard('Rap', 0.9).probabilities![0] },
      ],
      probabilities: Object.fromEntries(labels.map((name, n) => [name, heard('Rap', 0.9).probabilities![n]])),
      uncertain: false,
      lead: 0.88,
      threshold: 0.5,
      provider: 'cpu',
      windows: [{ start: 10, end: 40, silent: false, uncertain: false, top: first.top }],
      house: first.house,
      declaredGenre: ['Urban'],
      predicted: 'Urban',
      predictedProbability: first.house[0].probability,
      verdict: 'agree',
      input: decoded.input,
      warnings: decoded.warnings,
      finishedAt: first.finishedAt,
      model: {
        name: description.name,
        version: description.version,
        digest: description.digest,
        profile: description.profileHash,
      },
      timings: { decode: 5 },
      links: { self: at('rows/0') },
    });
    assert.deepEqual(
      first.house.map(({ genre }: { genre: string }) => genre),
      ['Urban', 'Pop/Rock', 'Blues'],
    );
    assert.deepEqual(rows.map(({ audio }) => audio).slice(0, 3), [
      's3://b/0.flac',
      'https://cdn.example/a.mp3?sig=1',
      'upload:018f2b6e-5c1d-7e2a-9b1c-0123456789ab',
    ]);
    assert.deepEqual(
      rows.map(({ verdict, uncertainBecause, error }) => error?.code ?? uncertainBecause ?? verdict),
      ['agree', 'disagree', 'confidence', 'not_audio', 'silent', undefined],
    );
    assert.deepEqual([rows[4].top.length, rows[4].predicted], [0, undefined]);
  });

  test('topK and threshold are applied on reading, and the verdict follows', async () => {
    const [strict, lax] = await Promise.all(
      ['results.jsonl?threshold=0.8&topK=1', 'results.jsonl?threshold=0.4&topK=6'].map(async (query) =>
        (await get(at(query))).lines(),
      ),
    );
    assert.deepEqual(
      strict!.map(({ verdict }) => verdict),
      ['agree', 'uncertain', 'uncertain', undefined, 'uncertain', undefined],
    );
    assert.deepEqual(
      lax!.map(({ verdict }) => verdict),
      ['agree', 'disagree', 'agree', undefined, 'uncertain', undefined],
    );
    assert.deepEqual(
      [strict![1].disagreement, strict![0].house.length, strict![0].top.length],
      [undefined, 1, 1],
    );
    assert.deepEqual([lax![1].disagreement > 0.5, lax![0].top.length], [true, 6]);
  });

  test('can be narrowed by state, verdict and row', async () => {
    const numbers = async (query: string) =>
      (await get(at(`results.jsonl?${query}`))).lines().map(({ row }) => row);
    assert.deepEqual(await numbers('state=failed,cancelled'), [3, 5]);
    assert.deepEqual(await numbers('verdict=disagree'), [1]);
    assert.deepEqual(await numbers('verdict=disagree,uncertain&threshold=0.8'), [1, 2, 4]);
    assert.deepEqual(await numbers('from=2&to=4'), [2, 3]);
    assert.deepEqual(await numbers('from=6'), []);
    await assertProblem(at('results.jsonl?state=done'), 400, 'bad_option', 'state');
    await assertProblem(at('results.jsonl?verdict='), 400, 'bad_option', 'verdict');
    await assertProblem(at('results.jsonl?from=-1'), 400, 'bad_option', 'from');
    await assertProblem(at('results.jsonl?threshold=2'), 400, 'bad_option', 'threshold');
    await assertProblem(at('results.csv?order=asc'), 400, 'bad_option', 'order');
  });

  test('are the same as CSV', async () => {
    const answer = await get(at('results.csv?topK=2'));
    assert.match(answer.headers.get('content-type')!, /^text\/csv/);
    const records: Record<string, string>[] = parse(answer.text, { columns: true });
    const rows = (await get(at('results.jsonl?topK=2'))).lines();
    assert.equal(records.length, 6);
    for (const [n, record] of records.entries()) {
      const { row, ref, audio, state, top, verdict, predicted, error, finishedAt } = rows[n];
      assert.deepEqual(
        [record['row'], record['ref'], record['audio'], record['state'], record['finishedAt']],
        [String(row), ref, audio, state, finishedAt],
      );
      assert.equal(record['label'], top?.[0]?.label ?? '');
      assert.equal(record['confidence'], String(top?.[0]?.confidence ?? ''));
      assert.deepEqual([record['verdict'], record['predicted']], [verdict ?? '', predicted ?? '']);
      assert.equal(record['errorCode'], error?.code ?? '');
    }
    assert.match(records[0]!['top']!, /^Rap 0\.9; Blues 0\.0/);
    assert.equal(
      records[1]!['house'],
      rows[1].house
        .map(({ genre, probability }: { genre: string; probability: number }) => `${genre} ${probability}`)
        .join('; '),
    );
    assert.equal(records[0]!['warnings'], 'clipped');
    const other = await get(at('results.csv?topK=6&state=failed&bom=true'));
    const [head] = answer.text.split('\r\n');
    assert.equal(other.text.split('\r\n')[0], `\uFEFF${head}`, 'the header is the same, whatever is asked');
  });

  test('a HEAD is answered without reading anything', async () => {
    const answer = await fetch(catalogue.url + at('results.jsonl'), { method: 'HEAD' });
    assert.deepEqual([answer.status, await answer.text()], [200, '']);
  });

  test('are served to the tenant alone, and only read', async () => {
    for (const rest of [
      'results.jsonl',
      'results.csv',
      'rows/0',
      'audit',
      'audit.csv',
      `diff?with=${batch.id}`,
    ]) {
      const answer = await get(at(rest), { 'x-tenant': 'other' });
      assert.deepEqual([answer.status, answer.json().code], [404, 'batch_not_found'], rest);
    }
    const answer = await fetch(catalogue.url + at('results.jsonl'), { method: 'POST' });
    assert.deepEqual([answer.status, answer.headers.get('allow')], [405, 'GET, HEAD']);
    for (const id of ['x', '..%2F..', batch.id.toUpperCase(), '0'.repeat(36)])
      await assertProblem(`/v1/batches/${id}/results.jsonl`, 404, 'batch_not_found');
  });

  test('a row by its number', async () => {
    const rows = (await get(at('results.jsonl'))).lines();
    for (const row of [0, 3, 5]) assert.deepEqual((await get(at(`rows/${row}`))).json(), rows[row]);
    assert.equal((await get(at('rows/0?topK=1'))).json().top.length, 1);
    for (const row of ['6', '-1', '1e3', 'x', '99999999999'])
      await assertProblem(at(`rows/${row}`), 404, 'result_not_found', /it has 6, counted from 0/);
    assert.deepEqual((await get(at('rows/0/timeline'))).json(), { row: 0, windows: rows[0].windows });
    await assertProblem(at('rows/3/timeline'), 404, 'result_not_found', /ended as failed/);
    await assertProblem(at('rows/0/explanation'), 404, 'no_explanation', /without explain=true/);
  });
});

test('rows that have not ended say how far they are', async () => {
  const batch = await catalogue.batch(tracks(1_001));
  await catalogue.openChunk(batch, 0);
  await catalogue.end(batch, 0, 'running');
  const state = async (row: number) => {
    const answer = (await get(`/v1/batches/${batch.id}/rows/${row}`)).json();
    resultRowSchema.parse(answer);
    return [answer.ref, answer.state, answer.top, answer.finishedAt];
  };
  assert.deepEqual(await state(0), ['track-0', 'decoded', undefined, undefined]);
  assert.deepEqual(await state(1), ['track-1', 'waiting', undefined, undefined]);
  assert.deepEqual(await state(1_000), ['track-1000', 'waiting', undefined, undefined]);
  await assertProblem(`/v1/batches/${batch.id}/rows/0/timeline`, 409, 'job_not_finished', /is decoded/);
  await assertProblem(`/v1/batches/${batch.id}/rows/1/timeline`, 409, 'job_not_finished', /is waiting/);
  assert.equal((await get(`/v1/batches/${batch.id}/results.jsonl`)).text, '');
  assert.equal((await get(`/v1/batches/${batch.id}/results.csv`)).text.split('\r\n').length, 2, 'the header');
});

test('what lies beside a row is found by its number: a long timeline, an explanation', async () => {
  const batch = await catalogue.batch(tracks(1), { extras: { explain: true, vectors: false } });
  await catalogue.openChunk(batch, 0);
  await assertProblem(`/v1/batches/${batch.id}/rows/0/explanation`, 409, 'job_not_finished', /pending/);
  const { windows: [window] = [], ...rest } = decoded;
  const long: Decoded = rest;
  const { windows: _, ...outcome } = heard('Rock', 0.8);
  const { id } = await catalogue.end(batch, 0, { outcome, decoded: long });
  const place = { tenant: 'acme', id, batch: { id: batch.id, chunk: 0, row: 0 } };
  const timeline: Timeline = {
    v: 1,
    windows: Array.from({ length: 10 }, (_, n) => ({
      ...window!,
      start: n * 30,
      end: n * 30 + 30,
      silent: n === 9,
    })),
    probabilities: Array.from({ length: 10 }, (_, n) =>
      n === 9 ? null : heard('Rock', 0.4 + n / 20).probabilities,
    ),
  };
  await catalogue.storage.put(timelineKey(place), Buffer.from(JSON.stringify(timeline)));
  await catalogue.storage.put(explanationKey(place), Buffer.from('{"v":1,"windows":[]}'));
  for (const when of ['open', 'closed']) {
    if (when === 'closed') await catalogue.close(batch, 0);
    const row = (await get(`/v1/batches/${batch.id}/rows/0`)).json();
    resultRowSchema.parse(row);
    assert.deepEqual(
      [row.windows, row.links.timeline, row.links.explanation, row.links.vectors],
      [undefined, `${row.links.self}/timeline`, `${row.links.self}/explanation`, undefined],
    );
    const { windows } = rowTimelineSchema.parse((await get(`${row.links.timeline}?threshold=0.6`)).json());
    assert.deepEqual(
      windows.map(({ silent, uncertain }) => [silent, uncertain]),
      Array.from({ length: 10 }, (_, n) => [n === 9, n === 9 || 0.4 + n / 20 < 0.6]),
    );
    assert.equal((await get(row.links.explanation)).text, '{"v":1,"windows":[]}');
  }
  await catalogue.storage.delete(timelineKey(place));
  await assertProblem(`/v1/batches/${batch.id}/rows/0/timeline`, 404, 'result_not_found', /no longer stored/);
});

test('a spreadsheet that opens the results runs nothing of what callers wrote', async () => {
  const evil = '=cmd|"/C calc"!A0';
  const manifest = tracks(1, () => ({
    ref: evil,
    audio: { s3: { bucket: 'b', key: 'a,"b"\n=c.flac' } },
    declaredGenre: ['@x', '+y'],
  }));
  const batch = await catalogue.finish(await catalogue.batch(manifest), () => label('Rap', 0.9));
  const [row] = parse((await get(`/v1/batches/${batch.id}/results.csv`)).text, { columns: true }) as Record<
    string,
    string
  >[];
  assert.equal(row!['ref'], `'${evil}`);
  assert.equal(row!['audio'], 's3://b/a,"b"\n=c.flac');
  assert.equal(row!['declaredGenre'], "'@x; +y");
  assert.equal(
    (await get(`/v1/batches/${batch.id}/results.jsonl`)).lines()[0].ref,
    evil,
    'JSON says it as it is',
  );
});

test('a batch that Redis has forgotten, its model too, is read from the storage', async () => {
  const batch = await catalogue.finish(await catalogue.batch(tracks(3), { mapping }), () =>
    label('Rap', 0.9),
  );
  const before = await get(`/v1/batches/${batch.id}/results.jsonl`);
  await catalogue.redis.flushall();
  try {
    assert.equal((await get(`/v1/batches/${batch.id}/results.jsonl`)).text, before.text);
    assert.equal((await get(`/v1/batches/${batch.id}/rows/2`)).json().top[0].label, 'Rap');
  } finally {
    await catalogue.describeModel();
  }
});

test('what breaks in the middle breaks the answer off; nobody takes it for the whole', async () => {
  const id = await storeBatch(catalogue.storage, 5_000, () => ({ outcome: heard('Rap', 0.9) }));
  await catalogue.storage.delete(partKey('acme', id, 4));
  const answer = await fetch(`${catalogue.url}/v1/batches/${id}/results.jsonl`);
  assert.equal(answer.status, 200);
  await assert.rejects(answer.text(), TypeError);
  await catalogue.storage.delete(partKey('acme', id, 0));
  await assertProblem(`/v1/batches/${id}/results.jsonl`, 503, 'unavailable');
});

test('a caller who goes away in the middle stops nobody else', async () => {
  const id = await storeBatch(catalogue.storage, 20_000, () => ({ outcome: heard('Rap', 0.9) }));
  const outgoing = httpRequest(`${catalogue.url}/v1/batches/${id}/results.jsonl`).end();
  const [incoming] = await once(outgoing, 'response');
  await once(incoming, 'readable');
  incoming.on('error', () => {});
  outgoing.destroy();
  assert.equal((await get(`/v1/batches/${id}/results.jsonl`)).lines().length, 20_000);
});

describe('the latest result of a ref', () => {
  const latest = async (ref: string, query = '', tenant = 'acme') => {
    const answer = await get(`/v1/results?ref=${encodeURIComponent(ref)}${query}`, { 'x-tenant': tenant });
    return { status: answer.status, body: answer.json() };
  };
  const found = async (ref: string) => {
    const { status, body } = await latest(ref);
    assert.equal(status, 200, JSON.stringify(body));
    latestResultSchema.parse(body);
    return [body.batch?.id ?? body.jobId, body.top?.[0]?.label ?? body.error?.code ?? body.state];
  };
  const named = (...refs: string[]) => tracks(refs.length, (n) => ({ ref: refs[n]! }));

  async function upload(ref: string, ending: Ending, tenant = 'acme') {
    const id = crypto.randomUUID();
    const revision = await catalogue.uploadedRefs.claim(tenant, ref, id);
    const { modelDigest, modelName, modelVersion, profileHash, selection, presentation, traceparent } =
      await catalogue.batch(tracks(1));
    const job = {
      ...{ id, tenant, ref, revision, generation: firstGeneration(0), createdAt: Date.now() },
      ...{ modelDigest, modelName, modelVersion, profileHash, selection, presentation, traceparent },
      audio: { key: 'k', size: 1, filename: 'take 1.mp3' },
    };
    await catalogue.records.create({ ...job, state: 'decoded' });
    if (typeof ending === 'string') return id;
    const to = 'outcome' in ending ? 'completed' : 'failed';
    const set = 'outcome' in ending ? { decoded, ...ending } : ending;
    await catalogue.records.commit(refOf(job), { from: ['decoded'], to, set });
    return id;
  }

  test('is that of the last batch which holds it, as soon as its row has ended', async () => {
    const ref = 'ISRC/1 ü&=';
    assert.deepEqual((await latest(ref)).body.code, 'result_not_found');
    const first = await catalogue.finish(await catalogue.batch(named('a', ref)), () => label('Rap', 0.9));
    assert.deepEqual(await found(ref), [first.id, 'Rap']);
    assert.equal((await latest(ref, '&topK=1')).body.top.length, 1);
    assert.equal((await latest(ref, '', 'other')).status, 404);

    const second = await catalogue.batch(named(ref, 'b'));
    await catalogue.openChunk(second, 0);
    assert.deepEqual(await found(ref), [first.id, 'Rap'], 'while the new one waits');
    await catalogue.end(second, 0, 'running');
    assert.deepEqual(await found(ref), [first.id, 'Rap'], 'while it runs');
    await catalogue.records.commit(
      refOf((await catalogue.records.get('acme', (await rowOf(second, 0)).jobId))!),
      {
        from: ['decoded'],
        to: 'completed',
        set: { decoded, outcome: heard('Jazz', 0.9) },
      },
    );
    assert.deepEqual(await found(ref), [second.id, 'Jazz'], 'from an open chunk');
    await catalogue.end(second, 1, { error: badAudio });
    await catalogue.close(second, 0);
    assert.deepEqual(await found(ref), [second.id, 'Jazz'], 'just after the chunk was closed');
    assert.deepEqual(await found('b'), [second.id, 'not_audio']);
  });
  const rowOf = async ({ id }: BatchRecord, row: number) =>
    (await get(`/v1/batches/${id}/rows/${row}`)).json();

  test('is never missed while chunks are being closed', async () => {
    const batch = await catalogue.batch(tracks(3_000, (n) => ({ ref: `busy-${n}` })));
    for (const chunk of [0, 1, 2]) {
      await catalogue.openChunk(batch, chunk);
      for (const row of [chunk * 1_000, chunk * 1_000 + 999])
        await catalogue.end(batch, row, label('Rock', 0.9));
    }
    let closing = true;
    const asking = (async () => {
      let asked = 0;
      for (; closing; asked += 1) {
        const row = [0, 999, 1_000, 1_999, 2_000, 2_999][asked % 6]!;
        assert.deepEqual(await found(`busy-${row}`), [batch.id, 'Rock']);
      }
      return asked;
    })();
    for (const chunk of [1, 0, 2]) {
      // Two at a time, so that questions come in between.
      for (let row = chunk * 1_000 + 1; row < chunk * 1_000 + 999; row += 2)
        await Promise.all([0, 1].map((n) => catalogue.end(batch, row + n, label('Pop', 0.9))));
      await catalogue.close(batch, chunk);
    }
    closing = false;
    assert.ok((await asking) > 6);
  });

  test('of a failed row that is tried again is the failure until there is another', async () => {
    const batch = await catalogue.finish(await catalogue.batch(named('again')), () => ({ error: badAudio }));
    await catalogue.batches.retry(batch, await catalogue.batches.nextRevision('acme'));
    await catalogue.batches.reopen(batch, { chunk: 0, states: '.' });
    assert.deepEqual(await found('again'), [batch.id, 'not_audio']);
    await catalogue.end(batch, 0, label('Blues', 0.9));
    assert.deepEqual(await found('again'), [batch.id, 'Blues']);
    await catalogue.close(batch, 0);
    assert.deepEqual(await found('again'), [batch.id, 'Blues']);
  });

  test('of uploads and batches under one ref is the one of the higher revision', async () => {
    const first = await upload('both', label('Rock', 0.9));
    assert.deepEqual(await found('both'), [first, 'Rock']);
    const { body } = await latest('both', '&topK=2&threshold=0.95');
    assert.deepEqual(
      [body.filename, body.top.length, body.uncertain, body.links.self, body.audio],
      ['take 1.mp3', 2, true, `/v1/jobs/${first}`, undefined],
    );
    const batch = await catalogue.finish(await catalogue.batch(named('both')), () => label('Rap', 0.9));
    assert.deepEqual(await found('both'), [batch.id, 'Rap']);
    await upload('both', 'running');
    assert.deepEqual(await found('both'), [batch.id, 'Rap'], 'what is under way is no result');
    const last = await upload('both', { error: badAudio });
    assert.deepEqual(await found('both'), [last, 'not_audio']);
    assert.equal((await latest('both', '', 'other')).status, 404);
    assert.ok(
      (await catalogue.redis.ttl(`as:{acme}:ref:${hash128('both')}`)) > 3_600,
      'the pointer ends after the record',
    );
  });

  test('is found when Redis knows nothing of the batch any more', async () => {
    const batch = await catalogue.finish(await catalogue.batch(named('old')), () => label('Rap', 0.9));
    await catalogue.redis.flushall();
    try {
      assert.deepEqual(await found('old'), [batch.id, 'Rap']);
    } finally {
      await catalogue.describeModel();
    }
  });

  test('that was deleted is gone, and the answer says when', async () => {
    const batch = await catalogue.finish(await catalogue.batch(named('gone', 'kept')), () =>
      label('Rap', 0.9),
    );
    const newer = await catalogue.finish(await catalogue.batch(named('kept')), () => label('Jazz', 0.9));
    assert.deepEqual(await found('gone'), [batch.id, 'Rap']);
    const deletedAt = Date.now();
    // First Redis, as after a tombstone that this process has not seen yet. All of its objects are still there.
    await catalogue.batches.remove(batch, deletedAt);
    assert.equal((await latestOf(batch)).status, 410);
    await deletePrefix(catalogue.storage, batchPrefix('acme', batch.id));
    const date = new Date(deletedAt).toISOString();
    for (const when of ['before the tombstone', 'after it']) {
      const { status, body } = await latest('gone');
      assert.deepEqual([status, body.code, body.deletedAt], [410, 'result_gone', date], when);
      assert.match(body.detail, new RegExp(date));
      await catalogue.feederIndex.writeTombstone('acme', batch.id, deletedAt);
      await catalogue.index.refresh('acme');
    }
    assert.deepEqual(await found('kept'), [newer.id, 'Jazz']);
    const { status, body } = await latestOf(batch);
    assert.deepEqual([status, body.code, body.deletedAt], [410, 'batch_gone', date]);
  });
  const latestOf = async ({ id }: BatchRecord) => {
    const answer = await get(`/v1/batches/${id}/results.jsonl`);
    return { status: answer.status, body: answer.json() };
  };

  test('is not waited for while the index is far behind: a 503 comes in time, and the answer later', async (t) => {
    const batch = await catalogue.finish(await catalogue.batch(named('slow')), () => label('Rap', 0.9));
    const held = Promise.withResolvers<void>();
    const { redis, storage: real } = catalogue;
    const storage: typeof real = {
      ...real,
      async *list(prefix) {
        await held.promise;
        yield* real.list(prefix);
      },
    };
    const directory = await mkdtemp(path.join(tmpdir(), 'as-results-slow-'));
    const served = await serveResults({ redis, storage, directory });
    t.after(async () => {
      await served.close();
      await rm(directory, { recursive: true });
    });
    const ask = () => fetch(`${served.url}/v1/results?ref=slow`);
    const refused = await Promise.all([ask(), ask()]);
    for (const answer of refused) {
      const { code } = problemSchema.parse(await answer.json());
      assert.deepEqual([answer.status, code, answer.headers.get('retry-after')], [503, 'unavailable', '2']);
    }
    held.resolve();
    const answer = await ask();
    assert.equal(answer.status, 200);
    assert.equal(latestResultSchema.parse(await answer.json()).batch?.id, batch.id);
  });

  test('needs a ref', async () => {
    await assertProblem('/v1/results', 400, 'bad_option', 'ref');
    await assertProblem(`/v1/results?ref=${'x'.repeat(257)}`, 400, 'bad_option', 'ref');
  });
});
