/** Batches through the whole product: objects of a registered bucket, URLs and uploads, answered row by row. */
import assert from 'node:assert/strict';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { gzipSync } from 'node:zlib';
import { decodePart, type PartRow } from '../packages/shared/src/batch.ts';
import { partKey } from '../packages/shared/src/object-keys.ts';
import { openStorage } from '../packages/shared/src/open-storage.ts';
import { connectRedisForWorker } from '../packages/shared/src/redis.ts';
import type { Storage } from '../packages/shared/src/storage.ts';
import type { BatchResource } from '../services/api/src/schemas.ts';
import { startWeb, type Web } from '../services/fetch/src/testing/web.ts';
import { sine, wav } from './audio.ts';
import { type Problem, request, serverSentEvents } from './client.ts';
import { startS3, type TestS3, testCredentials } from './s3.ts';
import { type System, startSystem } from './system.ts';

const root = path.resolve(import.meta.dirname, '..');
let seed = 0;
/** Another sound each time: nothing comes from the tensor cache. */
const sound = (seconds = 3) =>
  wav([sine({ seconds, hz: 200 + 7 * seed++, sampleRate: 8_000 })], { sampleRate: 8_000 });

describe('a batch', () => {
  let system: System;
  let s3: TestS3;
  let bucket: Storage;
  let web: Web;
  const served = new Map<string, Buffer>();

  before(async () => {
    s3 = await startS3();
    bucket = openStorage(`s3://music/catalogue?endpoint=${s3.endpoint}&region=us-east-1`);
    web = await startWeb((incoming, response) => {
      const at = incoming.url ?? '/';
      if (at === '/metadata') response.writeHead(302, { location: 'http://169.254.169.254/latest/' }).end();
      else if (served.has(at)) response.writeHead(200).end(served.get(at));
      else response.writeHead(404).end();
    });
    system = await startSystem({ env: { EGRESS_ALLOW: '127.0.0.1', RECONCILE_AFTER_SECONDS: '5' } });
    const { status } = await request(`${system.url}/v1/sources/catalogue`, {
      method: 'PUT',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        bucket: 'music',
        prefix: 'catalogue/',
        endpoint: s3.endpoint,
        credentials: testCredentials,
      }),
    });
    assert.equal(status, 201);
  });
  after(async () => {
    await system?.stop();
    await web?.close();
    bucket?.close();
    await s3?.[Symbol.asyncDispose]();
  });

  const jsonl = (rows: readonly object[]) => rows.map((row) => `${JSON.stringify(row)}\n`).join('');

  async function send<T = BatchResource>(
    manifest: string | Uint8Array,
    {
      query = '',
      type = 'application/x-ndjson',
      headers = {} as Record<string, string>,
      to = system.url,
    } = {},
  ) {
    return request<T>(`${to}/v1/batches${query}`, {
      method: 'POST',
      headers: { 'content-type': type, ...headers },
      body: manifest as BodyInit,
    });
  }
  async function accepted(...args: Parameters<typeof send>): Promise<BatchResource> {
    const { status, body } = await send(...args);
    assert.equal(status, 202, JSON.stringify(body));
    return body;
  }
  async function refused(...args: Parameters<typeof send>): Promise<[number, string]> {
    const { status, body } = await send<Problem>(...args);
    return [status, body.code];
  }
  const read = async (id: string) => (await request<BatchResource>(`${system.url}/v1/batches/${id}`)).body;
  const post = (id: string, what: string) =>
    request<BatchResource>(`${system.url}/v1/batches/${id}/${what}`, { method: 'POST' });
  async function when(id: string, holds: (batch: BatchResource) => boolean): Promise<BatchResource> {
    let last: BatchResource | undefined;
    for (const until = Date.now() + 60_000; Date.now() < until; await sleep(50)) {
      last = await read(id);
      if (holds(last)) return last;
    }
    throw new Error(`batch did not get there: ${JSON.stringify(last)}`);
  }
  const ended = (id: string) => when(id, ({ state }) => ['completed', 'failed', 'cancelled'].includes(state));

  /** The rows as they are stored. */
  async function rowsOf(id: string): Promise<PartRow[]> {
    const objects = openStorage(pathToFileURL(path.join(system.directory, 'objects')).href);
    return decodePart(await objects.read(partKey('default', id, 0)));
  }
  async function objectAt(key: string, bytes: Uint8Array = sound()): Promise<string> {
    await bucket.put(key, bytes);
    return `s3://music/catalogue/${key}`;
  }
  async function upload(bytes: Uint8Array): Promise<string> {
    const response = await fetch(`${system.url}/v1/uploads/tus`, {
      method: 'POST',
      headers: {
        'tus-resumable': '1.0.0',
        'upload-length': String(bytes.length),
        'content-type': 'application/offset+octet-stream',
        'upload-metadata': `filename ${Buffer.from('song.wav').toString('base64')}`,
      },
      body: bytes as BodyInit,
    });
    assert.equal(response.status, 201);
    return `upload:${response.headers.get('location')!.split('/').at(-1)}`;
  }

  test('of objects, URLs and uploads answers every row, and says of each that cannot be why', async () => {
    served.set('/song.wav', sound());
    const rows = [
      { audio: await objectAt('one.wav'), ref: 'object' },
      { audio: `${web.origin}/song.wav`, ref: 'url' },
      { audio: await upload(sound()), ref: 'upload' },
      { audio: 's3://music/catalogue/missing.wav', ref: 'missing key' },
      { audio: `${web.origin}/nothing.wav`, ref: 'missing url' },
      { audio: `${web.origin}/metadata`, ref: 'redirected to metadata' },
      { audio: 'http://localhost.localdomain:1/song.wav', ref: 'a name that points inwards' },
      { audio: await objectAt('text.wav', Buffer.from('this is no audio at all, only text')), ref: 'text' },
      { audio: 's3://foreign/song.wav', ref: 'foreign bucket' },
    ];
    const batch = await accepted(jsonl(rows), { query: '?name=first' });
    assert.deepEqual([batch.counts.rows, batch.counts.bad], [8, 1]);
    assert.deepEqual(
      batch.firstErrors.bad.map(({ line, code }) => [line, code]),
      [[9, 'source_not_allowed']],
    );
    const { counts, firstErrors, state } = await ended(batch.id);
    assert.equal(state, 'completed');
    const codes = Object.fromEntries(
      (await rowsOf(batch.id)).map((row) => [row.ref, row.error?.code ?? row.state]),
    );
    assert.deepEqual(codes, {
      object: 'completed',
      url: 'completed',
      upload: 'completed',
      'missing key': 'source_not_found',
      'missing url': 'url_not_found',
      'redirected to metadata': 'url_not_allowed',
      'a name that points inwards': codes['a name that points inwards'],
      text: 'not_audio',
    });
    assert.match(codes['a name that points inwards']!, /^(url_not_allowed|fetch_failed)$/);
    assert.deepEqual([counts.completed, counts.failed, counts.waiting, counts.running], [3, 5, 0, 0]);
    assert.equal(firstErrors.failed.length, 5);
    const bad = await (await fetch(system.url + batch.links.badRows)).text();
    assert.match(bad, /"line":9,"code":"source_not_allowed"/);
  });

  test('sent again is answered without a single read of an object', async () => {
    const rows = [];
    for (let n = 0; n < 5; n += 1) rows.push({ audio: await objectAt(`again/${n}.wav`), ref: `again-${n}` });
    const first = await ended((await accepted(jsonl(rows))).id);
    assert.deepEqual([first.counts.completed, first.counts.reused], [5, 0]);
    const from = s3.requests.length;
    const second = await ended((await accepted(jsonl(rows))).id);
    assert.deepEqual([second.counts.completed, second.counts.reused], [5, 5]);
    assert.deepEqual(
      s3.requests.slice(from).filter((line) => line.startsWith('GET')),
      [],
      'nothing is read',
    );
    const answers = async (id: string) => (await rowsOf(id)).map(({ outcome }) => outcome?.probabilities);
    assert.deepEqual(await answers(second.id), await answers(first.id));
    const forced = await ended((await accepted(jsonl(rows), { query: '?force=true' })).id);
    assert.deepEqual([forced.counts.completed, forced.counts.reused], [5, 0]);
    assert.deepEqual(await answers(forced.id), await answers(first.id));
  });

  test('of an object that changed since its ETag was named says so', async () => {
    const audio = await objectAt('changed.wav');
    const batch = await accepted(jsonl([{ audio, etag: '00000000000000000000000000000000' }]));
    await ended(batch.id);
    assert.equal((await rowsOf(batch.id))[0]?.error?.code, 'source_changed');
  });

  test('of a prefix finds the audio under it', async () => {
    for (const key of ['walk/a.wav', 'walk/b.wav', 'walk/cover.jpg', 'walk/deep/c.wav']) await objectAt(key);
    const { status, body } = await request<BatchResource>(`${system.url}/v1/batches`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ prefix: 's3://music/catalogue/walk/', class: 'release' }),
    });
    assert.equal(status, 202, JSON.stringify(body));
    const { counts, complete } = await ended(body.id);
    assert.deepEqual([complete, counts.rows, counts.completed], [true, 3, 3]);
    assert.deepEqual(
      (await rowsOf(body.id)).map(({ ref }) => ref),
      ['catalogue/walk/a.wav', 'catalogue/walk/b.wav', 'catalogue/walk/deep/c.wav'],
    );
  });

  test('that is paused hands out nothing more, and goes on when it is resumed', async () => {
    const rows = [];
    for (let n = 0; n < 3; n += 1) rows.push({ audio: await objectAt(`paused/${n}.wav`) });
    await system.kill('feeder');
    const { id } = await accepted(jsonl(rows));
    assert.equal((await post(id, 'pause')).body.state, 'paused');
    await system.start('feeder');
    await sleep(1_500);
    assert.equal((await read(id)).counts.waiting, 3);
    assert.equal((await post(id, 'resume')).body.state, 'running');
    assert.equal((await ended(id)).counts.completed, 3);
    assert.equal((await post(id, 'pause')).status, 409);
    assert.equal((await post(id, 'cancel')).status, 409);
  });

  test('that is cancelled ends, and then can be deleted: 410 from then on', async () => {
    const rows = [];
    for (let n = 0; n < 40; n += 1) rows.push({ audio: await objectAt(`cancelled/${n}.wav`), ref: `c${n}` });
    const { id } = await accepted(jsonl(rows));
    assert.match((await post(id, 'cancel')).body.state, /^cancell/);
    const { counts, state } = await ended(id);
    assert.equal(state, 'cancelled');
    assert.equal(counts.cancelled + counts.completed, 40);
    const gone = async () => request<Problem>(`${system.url}/v1/batches/${id}`);
    assert.equal((await request(`${system.url}/v1/batches/${id}`, { method: 'DELETE' })).status, 204);
    const { status, body } = await gone();
    assert.deepEqual([status, body.code], [410, 'batch_gone']);
    assert.match(body.detail, new RegExp(new Date().toISOString().slice(0, 10)));
  });

  test('tries its failed rows again, and only they', async () => {
    const rows = [
      { audio: await objectAt('retry/there.wav') },
      { audio: 's3://music/catalogue/retry/late.wav' },
    ];
    const first = await ended((await accepted(jsonl(rows))).id);
    assert.deepEqual([first.counts.completed, first.counts.failed], [1, 1]);
    const [kept] = await rowsOf(first.id);
    await objectAt('retry/late.wav');
    assert.equal((await post(first.id, 'retry-failed')).status, 200);
    const again = await when(
      first.id,
      ({ counts, state }) => state === 'completed' && counts.completed === 2,
    );
    assert.equal(again.counts.failed, 0);
    assert.ok(again.revision > first.revision);
    const [same, late] = await rowsOf(first.id);
    assert.deepEqual(same, kept);
    assert.equal(late?.state, 'completed');
    assert.ok((late?.generation ?? 0) > 1, 'its queue jobs have ids of their own');
  });

  test('compares what is declared with what is heard, in the words of the house', async () => {
    const put = await request<{ house: string[][] }>(`${system.url}/v1/mappings/ours`, {
      method: 'PUT',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(
        Object.fromEntries(
          (await request<{ labels: string[] }>(`${system.url}/v1/model`)).body.labels.map((label) => [
            label,
            ['Everything'],
          ]),
        ),
      ),
    });
    assert.equal(put.status, 200);
    const audio = await objectAt('declared.wav');
    const rows = [{ audio, declaredGenre: 'everything' }, { audio, declaredGenre: 'Polka' }, { audio }];
    const { verdicts } = await ended(
      (await accepted(jsonl(rows), { query: '?mapping=ours&threshold=0' })).id,
    );
    const { agree, uncertain, unknown_genre, undeclared } = verdicts;
    // A sine wave is unlike music: the answer may be marked as none to rely on.
    assert.deepEqual([agree + uncertain, unknown_genre, undeclared], [1, 1, 1]);
    const [status, code] = await refused(jsonl(rows), { query: '?mapping=theirs' });
    assert.deepEqual([status, code], [404, 'mapping_not_found']);
  });

  test('is repeated by another model of the same profile from what was decoded', async () => {
    const rows = [];
    for (let n = 0; n < 3; n += 1) rows.push({ audio: await objectAt(`rerun/${n}.wav`), ref: `rerun-${n}` });
    const first = await ended((await accepted(jsonl(rows))).id);
    const directory = await mkdtemp(path.join(tmpdir(), 'as-candidate-'));
    const bundle = path.join(directory, 'model');
    await cp(path.join(root, 'models/default'), bundle, { recursive: true });
    const manifest = JSON.parse(await readFile(path.join(bundle, 'model.json'), 'utf8'));
    await writeFile(path.join(bundle, 'model.json'), JSON.stringify({ ...manifest, version: '9.9.9' }));
    const candidate = await startSystem({
      redisUrl: system.redis.url,
      storageUrl: pathToFileURL(path.join(system.directory, 'objects')).href,
      without: ['api', 'decoder', 'fetch', 'feeder', 'webhook'],
      env: { MODEL_URL: bundle, MODEL_CANDIDATE: '1' },
    });
    try {
      const served = async () => (await request<{ version: string }>(`${system.url}/v1/model`)).body.version;
      assert.notEqual(await served(), '9.9.9', 'a model on trial is nobody’s default');
      const [log] = await candidate.log('inference');
      assert.ok(log);
      const digest = await digestOf('9.9.9');
      const from = s3.requests.length;
      const { status, body } = await request<BatchResource>(`${system.url}/v1/batches`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ rerunOf: first.id, model: digest }),
      });
      assert.equal(status, 202, JSON.stringify(body));
      assert.equal(body.model.version, '9.9.9');
      const again = await ended(body.id);
      assert.deepEqual([again.counts.rows, again.counts.completed], [3, 3]);
      assert.deepEqual(
        s3.requests.slice(from).filter((line) => line.startsWith('GET')),
        [],
        'nothing is read again',
      );
      const probabilities = async (id: string) =>
        (await rowsOf(id)).map(({ outcome }) => outcome?.probabilities);
      assert.deepEqual(await probabilities(again.id), await probabilities(first.id), 'the same weights');
      assert.ok((await rowsOf(again.id)).every(({ timings }) => timings?.decode === undefined));
    } finally {
      await candidate.stop();
      await rm(directory, { recursive: true });
    }

    async function digestOf(version: string): Promise<string> {
      const redis = connectRedisForWorker(system.redis.url);
      try {
        for (;;) {
          const workers = Object.values(await redis.hgetall('as:workers')).map((json) => JSON.parse(json));
          for (const { modelDigest, kind } of workers) {
            const model = JSON.parse((await redis.get(`as:model:${modelDigest}`)) ?? '{}');
            if (kind === 'inference' && model.version === version) return modelDigest;
          }
          await sleep(100);
        }
      } finally {
        redis.disconnect();
      }
    }
  });

  test('sent twice under one Idempotency-Key is one batch; another manifest under it is refused', async () => {
    const manifest = jsonl([{ audio: await objectAt('once.wav') }]);
    const headers = { 'idempotency-key': 'friday' };
    const first = await accepted(manifest, { headers });
    const second = await accepted(manifest, { headers });
    assert.equal(second.id, first.id);
    assert.deepEqual(await refused(`${manifest}\n{}`, { headers }), [422, 'idempotency_key_reused']);
    const list = await request<{ batches: BatchResource[] }>(`${system.url}/v1/batches?limit=100`);
    assert.equal(list.body.batches.filter(({ id }) => id === first.id).length, 1);
    await ended(first.id);
  });

  test('tells its progress as server-sent events, the last one when it ends', async () => {
    const { id, links } = await accepted(jsonl([{ audio: await objectAt('events.wav') }]));
    const states: string[] = [];
    for await (const { event, data } of serverSentEvents(system.url + links.events)) {
      assert.equal(event, 'batch');
      states.push((data as BatchResource).state);
    }
    assert.equal(states.at(-1), 'completed');
    assert.equal((await read(id)).counts.completed, 1);
  });

  test('can come compressed, and as CSV', async () => {
    const audio = await objectAt('csv.wav');
    const csv = `ref,audio,declaredGenre\r\none,${audio},"Jazz; Blues"\r\n`;
    const options = { type: 'text/csv; charset=utf-8', headers: { 'content-encoding': 'gzip' } };
    const { id } = await accepted(gzipSync(csv), options);
    await ended(id);
    assert.deepEqual((await rowsOf(id))[0]?.declaredGenre, ['Jazz', 'Blues']);
  });

  describe('is refused as a whole', () => {
    test('when its manifest cannot be read', async () => {
      const row = JSON.stringify({ audio: 's3://music/catalogue/x.wav' });
      const cases: [string, string | Uint8Array, { type?: string; query?: string }, [number, string]][] = [
        ['UTF-16', Buffer.from(`\ufeff${row}\n`, 'utf16le'), {}, [422, 'manifest_invalid']],
        ['empty', '', {}, [422, 'manifest_invalid']],
        ['a CSV without the column', 'ref,file\na,b\n', { type: 'text/csv' }, [422, 'manifest_invalid']],
        ['another type', row, { type: 'application/zip' }, [415, 'wrong_content_type']],
        ['an unknown option', `${row}\n`, { query: '?speed=fast' }, [400, 'bad_option']],
        ['an unknown model', `${row}\n`, { query: `?model=${'a'.repeat(64)}` }, [503, 'model_not_served']],
      ];
      for (const [what, manifest, options, expected] of cases)
        assert.deepEqual(await refused(manifest, options), expected, what);
    });

    test('when the prefix is not registered, or the batch to repeat is not there', async () => {
      const ask = async (body: object) => {
        const { status, body: problem } = await request<Problem>(`${system.url}/v1/batches`, {
          method: 'POST',
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify(body),
        });
        return [status, problem.code];
      };
      assert.deepEqual(await ask({ prefix: 's3://foreign/' }), [403, 'source_not_allowed']);
      assert.deepEqual(await ask({ prefix: 's3://music/' }), [403, 'source_not_allowed']);
      const unknown = '01890000-0000-7000-8000-000000000000';
      assert.deepEqual(await ask({ rerunOf: unknown }), [404, 'batch_not_found']);
      assert.deepEqual(await ask({ prefix: 's3://music/catalogue/', rerunOf: unknown }), [400, 'bad_option']);
      assert.deepEqual(await ask({}), [400, 'bad_option']);
    });

    test('when its connection is cut, and nothing of it is left', async () => {
      const before = await request<{ batches: BatchResource[] }>(`${system.url}/v1/batches?limit=100`);
      const { hostname, port } = new URL(system.url);
      await new Promise<void>((resolve) => {
        const cut = httpRequest({ hostname, port, path: '/v1/batches', method: 'POST' });
        cut.setHeader('content-type', 'application/x-ndjson');
        cut.on('error', () => resolve());
        cut.write(`${JSON.stringify({ audio: 's3://music/catalogue/x.wav' })}\n`.repeat(3_000));
        setTimeout(() => cut.destroy(), 300);
        cut.on('close', () => resolve());
      });
      const known = new Set(before.body.batches.map(({ id }) => id));
      for (let n = 0; ; n += 1) {
        const { body } = await request<{ batches: BatchResource[] }>(`${system.url}/v1/batches?limit=100`);
        if (body.batches.every(({ id }) => known.has(id))) break;
        assert.ok(n < 100, 'a batch that broke off stays');
        await sleep(50);
      }
    });
  });

  test('reports bad rows by their line and runs the good ones', async () => {
    const audio = await objectAt('good.wav');
    const good = (ref: string) => JSON.stringify({ audio, ref });
    const lines: (string | Buffer)[] = [
      good('a'),
      '{"audio": ',
      Buffer.concat([
        Buffer.from('{"audio":"s3://music/catalogue/'),
        Buffer.from([0xff, 0xfe]),
        Buffer.from('"}'),
      ]),
      good('a'),
      JSON.stringify({ audio, ref: 'x'.repeat(10_000_000) }),
      JSON.stringify({ ref: 'no audio' }),
      JSON.stringify({ audio: 'ftp://example.com/a.mp3' }),
      JSON.stringify({ audio: 's3://music/private/a.mp3' }),
      good('b'),
    ];
    const manifest = Buffer.concat(
      lines.map((line) => Buffer.concat([Buffer.from(line), Buffer.from('\n')])),
    );
    const batch = await accepted(manifest);
    assert.deepEqual(
      batch.firstErrors.bad.map(({ line, code }) => [line, code]),
      [
        [2, 'row_not_json'],
        [3, 'row_not_utf8'],
        [4, 'duplicate_ref'],
        [5, 'row_too_long'],
        [6, 'row_invalid'],
        [7, 'row_invalid'],
        [8, 'source_not_allowed'],
      ],
    );
    const { counts } = await ended(batch.id);
    assert.deepEqual([counts.rows, counts.bad, counts.completed], [2, 7, 2]);
  });
});
