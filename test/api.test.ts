/** The API as its callers meet it: uploads, options, errors, events, access. Real processes, real Redis. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { readdir } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import { connect } from 'node:net';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Explanation, explanationSchema, vectorsSchema } from '../packages/shared/src/job.ts';
import { jobSchema, modelSchema, predictionSchema, problemSchema } from '../services/api/src/schemas.ts';
import { writeMeansBundle } from '../services/inference/src/testing/means-model.ts';
import { sine, wav } from './audio.ts';
import { finished, formOf, type Job, type Problem, request, serverSentEvents, upload } from './client.ts';
import { type System, startSystem } from './system.ts';

const tone = (seconds: number, hz: number) =>
  wav([sine({ seconds, hz, sampleRate: 22_050 })], { sampleRate: 22_050 });
const song = tone(12, 440);

describe('the API', () => {
  let system: System;
  before(async () => {
    system = await startSystem({ env: { MAX_UPLOAD_BYTES: String(3 << 20) } });
  });
  after(() => system?.stop());

  const jobs = () => `${system.url}/v1/jobs`;
  const post = (body: FormData | string, headers: Record<string, string> = {}) =>
    request<Problem>(jobs(), { method: 'POST', body, headers });
  const storedFiles = async () => {
    const entries = await readdir(path.join(system.directory, 'objects'), {
      recursive: true,
      withFileTypes: true,
    }).catch(() => []);
    return entries.filter((entry) => entry.isFile()).map((entry) => path.join(entry.parentPath, entry.name));
  };

  async function assertProblem(
    answer: { status: number; body: Problem; headers: Headers },
    status: number,
    code: string,
    detail?: RegExp,
  ) {
    assert.deepEqual([answer.status, answer.body.code], [status, code], JSON.stringify(answer.body));
    assert.match(answer.headers.get('content-type') ?? '', /^application\/problem\+json/);
    problemSchema.parse(answer.body);
    if (detail) assert.match(answer.body.detail, detail);
  }

  test('a song is accepted with 202 and a Location, and gets its genres', async () => {
    const answer = await request(jobs(), { method: 'POST', body: formOf(song) });
    assert.equal(answer.status, 202);
    assert.equal(answer.headers.get('location'), `/v1/jobs/${answer.body.id}`);
    assert.equal(answer.body.state, 'queued');
    const job = await finished(system.url, answer.body.id);
    jobSchema.parse(job);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    assert.equal(job.result!.top.length, 5);
    const sum = Object.values(job.result!.probabilities).reduce((a, b) => a + b, 0);
    assert.ok(Math.abs(sum - 1) < 1e-3, `probabilities sum to ${sum}`);
    const confidences = job.result!.top.map(({ confidence }) => confidence);
    assert.deepEqual(
      confidences,
      confidences.toSorted((a, b) => b - a),
    );
    assert.equal(job.result!.lead, Math.round((confidences[0]! - confidences[1]!) * 1e6) / 1e6);
    assert.equal(job.result!.provider, 'cpu');
    assert.equal(job.input!.codec, 'pcm_s16le');
  });

  test('topK, threshold and windows shape the answer', async () => {
    const sent = await upload(system.url, tone(70, 330).subarray(0, 3 << 20), {
      fields: { topK: '3', threshold: '1', windows: 'all' },
    });
    const job = await finished(system.url, sent.id);
    assert.equal(job.result!.top.length, 3);
    assert.equal(job.result!.threshold, 1);
    assert.equal(job.result!.uncertain, true);
    assert.ok(job.result!.windows.length >= 2, `${job.result!.windows.length} windows`);
  });

  test('start and duration choose what is analysed', async () => {
    const sent = await upload(system.url, song, { fields: { start: '2', duration: '8.5' } });
    const job = await finished(system.url, sent.id);
    assert.ok(Math.abs(job.input!.analysedStart - 2) < 0.3, String(job.input!.analysedStart));
    assert.ok(Math.abs(job.input!.analysedEnd - 10.5) < 0.6, String(job.input!.analysedEnd));
  });

  test('options after the file count as well as before it', async () => {
    const form = formOf(song);
    form.append('topK', '2');
    const answer = await request(jobs(), { method: 'POST', body: form });
    assert.equal((await finished(system.url, answer.body.id)).result!.top.length, 2);
  });

  test('the same song twice gives the same numbers', async () => {
    const both = await Promise.all([upload(system.url, song), upload(system.url, song)]);
    const [a, b] = await Promise.all(both.map(({ id }) => finished(system.url, id)));
    assert.deepEqual(a!.result!.probabilities, b!.result!.probabilities);
  });

  for (const [fields, field] of [
    [{ topK: '0' }, 'topK'],
    [{ topK: 'many' }, 'topK'],
    [{ topK: '2.5' }, 'topK'],
    [{ threshold: '1.5' }, 'threshold'],
    [{ threshold: 'NaN' }, 'threshold'],
    [{ windows: 'some' }, 'windows'],
    [{ windows: '0' }, 'windows'],
    [{ windows: '65' }, 'windows'],
    [{ start: '-1' }, 'start'],
    [{ start: '1e309' }, 'start'],
    [{ duration: '0' }, 'duration'],
    [{ explain: 'yes' }, 'explain'],
    [{ vectors: '' }, 'vectors'],
    [{ colour: 'blue' }, 'colour'],
    [{ __proto__x: '1' }, '__proto__x'],
  ] as const) {
    test(`the option ${JSON.stringify(fields)} is refused with 400 that names ${field}`, async () => {
      const answer = await post(formOf(song, { fields }));
      await assertProblem(answer, 400, 'bad_option');
      assert.equal(answer.body.field, field);
    });
  }

  test('a refused upload leaves no object behind', async () => {
    const before = (await storedFiles()).length;
    await post(formOf(song, { fields: { topK: '0' } }));
    await post(formOf(new Uint8Array()));
    await post(formOf(song, { field: 'music' }));
    assert.equal((await storedFiles()).length, before);
  });

  test('an empty file is empty_file', async () => {
    await assertProblem(await post(formOf(new Uint8Array())), 422, 'empty_file');
  });

  test('no file is no_file, and a file in another field too, naming the field', async () => {
    const form = new FormData();
    form.append('topK', '5');
    await assertProblem(await post(form), 400, 'no_file', /"file"/);
    await assertProblem(await post(formOf(song, { field: 'music' })), 400, 'no_file', /"music".*"file"/);
    await assertProblem(await post(new FormData()), 400, 'no_file');
  });

  test('two files are too_many_files', async () => {
    const form = formOf(song);
    form.append('file', new Blob([song as Uint8Array<ArrayBuffer>]), 'second.wav');
    await assertProblem(await post(form), 400, 'too_many_files');
  });

  test('another content type is 415', async () => {
    await assertProblem(await post('hello', { 'content-type': 'text/plain' }), 415, 'wrong_content_type');
    await assertProblem(
      await post('{}', { 'content-type': 'application/json' }),
      400,
      'bad_option',
      /"upload"/,
    );
    await assertProblem(
      await post('x', { 'content-type': 'multipart/form-data' }),
      415,
      'wrong_content_type',
    );
  });

  test('a form that breaks off is a 400', async () => {
    const body = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\nabc';
    const answer = await post(body, { 'content-type': 'multipart/form-data; boundary=b' });
    assert.equal(answer.status, 400);
  });

  test('a body over the limit is 413, whether the length is announced or not', async () => {
    const large = new Uint8Array(4 << 20);
    await assertProblem(await post(formOf(large)), 413, 'file_too_large', /3 MiB/);
    const { body, type } = await encoded(formOf(large));
    const status = await new Promise<number>((resolve, reject) => {
      const sent = httpRequest(jobs(), {
        method: 'POST',
        headers: { 'content-type': type, 'transfer-encoding': 'chunked' },
      });
      sent.on('response', (response) => resolve(response.statusCode!));
      sent.on('error', reject);
      sent.end(body);
    });
    assert.equal(status, 413);
  });

  test('a file of exactly the limit is taken', async () => {
    const short = tone(10, 200);
    const full = Buffer.concat([short, Buffer.alloc((3 << 20) - short.length)]);
    assert.equal((await finished(system.url, (await upload(system.url, full)).id)).state, 'completed');
  });

  test('a connection cut in mid-upload leaves no job and no object', async () => {
    const before = await storedFiles();
    const { port } = new URL(system.url);
    const socket = connect(Number(port), '127.0.0.1');
    socket.write(
      `POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n` +
        `--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n`,
    );
    socket.write(randomBytes(200_000));
    await sleep(300);
    socket.destroy();
    const unexpected = async () => (await storedFiles()).filter((file) => !before.includes(file));
    // A readiness probe may be writing just now: what was uploaded must go, and soon.
    for (let n = 0; n < 50 && (await unexpected()).length > 0; n += 1) await sleep(50);
    assert.deepEqual(await unexpected(), []);
    assert.equal((await finished(system.url, (await upload(system.url, song)).id)).state, 'completed');
  });

  for (const [name, shown] of [
    ['../../etc/passwd', /^passwd$/],
    ['..\\..\\boot.ini', /boot\.ini$/],
    ['new\nline.mp3', /line/],
    ['🎷 jazz 爵士.mp3', /^🎷 jazz 爵士\.mp3$/],
    [`${'x'.repeat(300)}.mp3`, /^x{255}$/],
    ['', /./],
    ['..', /^unnamed$/],
  ] as const) {
    test(`the file name ${JSON.stringify(name).slice(0, 40)} is only ever shown`, async () => {
      const answer = await request(jobs(), { method: 'POST', body: formOf(song, { name: name || 'blob' }) });
      assert.equal(answer.status, 202);
      assert.match(answer.body.filename, shown);
      assert.doesNotMatch(answer.body.filename, /[\n\r/\\]/);
      const job = await finished(system.url, answer.body.id);
      assert.equal(job.state, 'completed');
      const picture = await fetch(system.url + job.links.spectrogram);
      assert.equal(picture.status, 200);
      await picture.arrayBuffer();
    });
  }

  test('an unknown job is 404 everywhere, and so is an id that is none', async () => {
    for (const id of ['01990000-0000-7000-8000-000000000000', 'nonsense', '..%2f..%2fx', '%00']) {
      await assertProblem(await request<Problem>(`${jobs()}/${id}`), 404, 'job_not_found');
      await assertProblem(
        await request<Problem>(`${jobs()}/${id}`, { method: 'DELETE' }),
        404,
        'job_not_found',
      );
      await assertProblem(await request<Problem>(`${jobs()}/${id}/events`), 404, 'job_not_found');
      for (const part of ['spectrogram.png', 'explanation', 'vectors'])
        await assertProblem(await request<Problem>(`${jobs()}/${id}/${part}`), 404, 'job_not_found');
    }
  });

  test('an address that is not served is a problem, as is a method', async () => {
    await assertProblem(await request<Problem>(`${system.url}/v2/jobs`), 404, 'not_found');
    await assertProblem(await request<Problem>(`${jobs()}/%E0%A4%A`), 400, 'bad_request');
    for (const [at, method, allowed] of [
      ['/v1/jobs', 'PUT', 'POST'],
      ['/v1/jobs/x', 'POST', 'GET, HEAD, DELETE'],
      ['/v1/jobs/x/events', 'DELETE', 'GET, HEAD'],
      ['/v1/jobs/x/explanation', 'POST', 'GET, HEAD'],
      ['/v1/jobs/x/vectors', 'PUT', 'GET, HEAD'],
      ['/v1/model', 'POST', 'GET, HEAD'],
      ['/v1/events', 'POST', 'GET, HEAD'],
      ['/v1/webhooks/deliveries', 'DELETE', 'GET, HEAD'],
      ['/openapi.json', 'POST', 'GET, HEAD'],
      ['/v1/uploads', 'GET', 'POST'],
      ['/v1/uploads/x', 'PUT', 'GET, HEAD, DELETE'],
      ['/v1/uploads/x/complete', 'GET', 'POST'],
      ['/api/predict/', 'GET', 'POST'],
    ] as const) {
      const answer = await request<Problem>(system.url + at, { method });
      await assertProblem(answer, 405, 'method_not_allowed');
      assert.equal(answer.headers.get('allow'), allowed, at);
    }
  });

  test('the spectrogram is a PNG of 224 by 224, the low tone at the bottom', async () => {
    const low = await finished(system.url, (await upload(system.url, tone(10, 150))).id);
    const { decode } = await import('fast-png');
    const response = await fetch(system.url + low.links.spectrogram);
    assert.equal(response.headers.get('content-type'), 'image/png');
    const image = decode(new Uint8Array(await response.arrayBuffer()));
    assert.deepEqual([image.width, image.height, image.channels], [224, 224, 3]);
    const brightness = (y: number) => {
      let sum = 0;
      for (let x = 0; x < 224; x += 1)
        for (let c = 0; c < 3; c += 1) sum += image.data[(y * 224 + x) * 3 + c]!;
      return sum;
    };
    const rows = Array.from({ length: 224 }, (_, y) => brightness(y));
    const brightest = rows.indexOf(Math.max(...rows));
    assert.ok(brightest > 200, `the brightest row is ${brightest}`);
    const large = await fetch(`${system.url}${low.links.spectrogram}?scale=4`);
    assert.equal(decode(new Uint8Array(await large.arrayBuffer())).width, 896);
    await assertProblem(
      await request<Problem>(`${system.url}${low.links.spectrogram}?scale=9`),
      400,
      'bad_option',
    );
  });

  const served = async () => modelSchema.parse((await request<unknown>(`${system.url}/v1/model`)).body);

  test("the model's own numbers are there for a job that asked for them", async () => {
    const model = await served();
    const sent = await upload(system.url, song, { fields: { vectors: 'true' } });
    assert.equal(sent.links.vectors, `${sent.links.self}/vectors`);
    const job = await finished(system.url, sent.id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    const { status, headers, body } = await request<unknown>(system.url + job.links.vectors);
    assert.equal(status, 200, JSON.stringify(body));
    assert.match(headers.get('content-type') ?? '', /^application\/json/);
    assert.equal(headers.get('cache-control'), 'private, max-age=3600');
    const vectors = vectorsSchema.parse(body);
    assert.deepEqual(vectors.labels, model.labels);
    assert.deepEqual(
      vectors.windows.map(({ start, end }) => [start, end]),
      job.result!.windows.map(({ start, end }) => [start, end]),
    );
    const { logits } = vectors.windows[0]!;
    assert.equal(model.labels[logits!.indexOf(Math.max(...logits!))], job.result!.windows[0]!.top[0]!.label);
    assert.equal(vectors.embedding !== undefined, model.embeds);
    const length = Math.hypot(...(vectors.embedding ?? [1]));
    assert.ok(Math.abs(length - 1) < 1e-3, `the embedding is ${length} long`);
  });

  test('what the model looked at is told where it can be, and refused with 400 where it cannot', async () => {
    const model = await served();
    const form = () => formOf(song, { fields: { explain: 'true', windows: '2' } });
    if (!model.explains) {
      const before = (await storedFiles()).length;
      const answer = await post(form());
      await assertProblem(answer, 400, 'model_cannot_explain', new RegExp(`${model.name}.*"explain"`));
      assert.equal(answer.body.field, 'explain');
      const predicted = await request<Problem>(`${system.url}/api/predict/`, {
        method: 'POST',
        body: formOf(song, { field: 'data', fields: { explain: 'true' } }),
      });
      await assertProblem(predicted, 400, 'model_cannot_explain');
      assert.equal((await storedFiles()).length, before);
      return;
    }
    const sent = await request(jobs(), { method: 'POST', body: form() });
    const job = await finished(system.url, sent.body.id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    const { windows } = await explanationOf(system, job);
    for (const { attention } of windows) {
      const sum = attention.flat().reduce((a, b) => a + b, 0);
      assert.ok(Math.abs(sum - 1) < 1e-2, `the shares sum to ${sum}`);
    }
  });

  test('what was not asked for, or is not there yet, is told apart', async () => {
    const plain = await finished(system.url, (await upload(system.url, song)).id);
    assert.deepEqual(Object.keys(plain.links), ['self', 'events', 'spectrogram']);
    for (const [part, code, option] of [
      ['explanation', 'no_explanation', /explain=true/],
      ['vectors', 'no_vectors', /vectors=true/],
    ] as const) {
      await assertProblem(await request<Problem>(`${jobs()}/${plain.id}/${part}`), 404, code, option);
    }
    process.kill(system.pid('decoder'), 'SIGSTOP');
    try {
      const sent = await upload(system.url, tone(9, 550), { fields: { vectors: 'true' } });
      const early = await request<Problem>(system.url + sent.links.vectors);
      await assertProblem(early, 409, 'job_not_finished', /is (queued|decoding)/);
      assert.ok(early.headers.get('retry-after'));
    } finally {
      process.kill(system.pid('decoder'), 'SIGCONT');
    }
  });

  test('the event stream tells every state in order and ends with the result', async () => {
    const sent = await upload(system.url, song);
    const states: string[] = [];
    const versions: number[] = [];
    for await (const { event, data, id } of serverSentEvents(system.url + sent.links.events)) {
      if (event !== 'job') continue;
      const job = jobSchema.parse(data);
      assert.equal(String(job.version), id);
      versions.push(job.version);
      states.push(job.state);
    }
    assert.equal(states.at(-1), 'completed');
    assert.deepEqual(
      versions,
      versions.toSorted((a, b) => a - b),
    );
    const order = ['queued', 'decoding', 'decoded', 'classifying', 'completed'];
    assert.deepEqual(
      states,
      order.filter((state) => states.includes(state)),
    );
  });

  test('HEAD of an event stream answers at once, though the job goes on', async () => {
    process.kill(system.pid('decoder'), 'SIGSTOP');
    try {
      const sent = await upload(system.url, song);
      const response = await fetch(system.url + sent.links.events, {
        method: 'HEAD',
        signal: AbortSignal.timeout(5_000),
      });
      assert.equal(response.status, 200);
      assert.match(response.headers.get('content-type') ?? '', /^text\/event-stream/);
    } finally {
      process.kill(system.pid('decoder'), 'SIGCONT');
    }
  });

  test('the event stream of a finished job is its snapshot, then the end', async () => {
    const job = await finished(system.url, (await upload(system.url, song)).id);
    const events = await Array.fromAsync(serverSentEvents(system.url + job.links.events));
    assert.deepEqual(
      events.map(({ event }) => event),
      ['job'],
    );
    assert.deepEqual(events[0]!.data, job);
    const again = await Array.fromAsync(
      serverSentEvents(system.url + job.links.events, { headers: { 'last-event-id': String(job.version) } }),
    );
    assert.equal(again.length, 1);
  });

  test('deleting a finished job deletes its objects, and it is gone', async () => {
    const own = tone(9, 700);
    const sent = await upload(system.url, own, { fields: { vectors: 'true' } });
    const job = await finished(system.url, sent.id);
    const mine = async () =>
      (await storedFiles()).filter((file) => file.includes(job.id) || file.includes(sha256(own)));
    assert.ok((await mine()).length >= 2);
    assert.ok((await mine()).some((file) => file.endsWith('vectors.json')));
    assert.equal((await request(`${jobs()}/${job.id}`, { method: 'DELETE' })).status, 204);
    assert.deepEqual(await mine(), []);
    await assertProblem(await request<Problem>(`${jobs()}/${job.id}`), 404, 'job_not_found');
  });

  test("the seed's call answers with exactly its shape", async () => {
    for (const at of ['/api/predict/', '/api/predict']) {
      const answer = await request<{
        prediction: { label: string; confidence: number }[];
        mel_spectrogram_url: string;
      }>(system.url + at, {
        method: 'POST',
        body: formOf(song, { field: 'data' }),
      });
      assert.equal(answer.status, 200, JSON.stringify(answer.body));
      predictionSchema.parse(answer.body);
      assert.deepEqual(Object.keys(answer.body), ['prediction', 'mel_spectrogram_url']);
      assert.equal(answer.body.prediction.length, 5);
      const picture = await fetch(answer.body.mel_spectrogram_url);
      assert.equal(picture.headers.get('content-type'), 'image/png');
      await picture.arrayBuffer();
    }
  });

  test("the seed's call tells a problem of the audio as the job would", async () => {
    const answer = await request<Problem>(`${system.url}/api/predict/`, {
      method: 'POST',
      body: formOf(Buffer.from('this is not music\n'.repeat(100)), { field: 'data' }),
    });
    await assertProblem(answer, 422, 'not_audio');
  });

  test('the model says what it is, what it was measured at, and how long things are kept', async () => {
    const { status, body } = await request<Record<string, unknown>>(`${system.url}/v1/model`);
    assert.equal(status, 200);
    const model = modelSchema.parse(body);
    assert.equal(model.provider, 'cpu');
    assert.equal(model.limits.maxBytes, 3 << 20);
    assert.ok(model.accuracy !== 'none' && model.accuracy.top1 > 0.4 && model.accuracy.top1 <= 1);
    assert.equal(model.reliability !== undefined, model.calibrated);
    assert.ok('windows' in body && 'embeds' in body && 'explains' in body);
  });

  test('the OpenAPI document names every path that is served and resolves its references', async () => {
    const { body } = await request<{
      paths: Record<string, unknown>;
      components: { schemas: Record<string, unknown> };
    }>(`${system.url}/openapi.json`);
    assert.deepEqual(Object.keys(body.paths).sort(), [
      '/api/predict/',
      '/v1/batches',
      '/v1/batches/{id}',
      '/v1/batches/{id}/audit',
      '/v1/batches/{id}/audit.csv',
      '/v1/batches/{id}/bad-rows.jsonl',
      '/v1/batches/{id}/cancel',
      '/v1/batches/{id}/diff',
      '/v1/batches/{id}/events',
      '/v1/batches/{id}/pause',
      '/v1/batches/{id}/results.csv',
      '/v1/batches/{id}/results.jsonl',
      '/v1/batches/{id}/resume',
      '/v1/batches/{id}/retry-failed',
      '/v1/batches/{id}/rows/{row}',
      '/v1/batches/{id}/rows/{row}/explanation',
      '/v1/batches/{id}/rows/{row}/timeline',
      '/v1/batches/{id}/rows/{row}/vectors',
      '/v1/events',
      '/v1/jobs',
      '/v1/jobs/{id}',
      '/v1/jobs/{id}/events',
      '/v1/jobs/{id}/explanation',
      '/v1/jobs/{id}/spectrogram.png',
      '/v1/jobs/{id}/vectors',
      '/v1/mappings',
      '/v1/mappings/{name}',
      '/v1/model',
      '/v1/results',
      '/v1/sources',
      '/v1/sources/{name}',
      '/v1/uploads',
      '/v1/uploads/tus',
      '/v1/uploads/tus/{id}',
      '/v1/uploads/{id}',
      '/v1/uploads/{id}/complete',
      '/v1/uploads/{id}/parts',
      '/v1/webhooks/deliveries',
      '/v1/webhooks/endpoints',
      '/v1/webhooks/endpoints/{id}',
      '/v1/webhooks/endpoints/{id}/dead-letters',
      '/v1/webhooks/endpoints/{id}/dead-letters/resend',
      '/v1/webhooks/endpoints/{id}/disable',
      '/v1/webhooks/endpoints/{id}/enable',
      '/v1/webhooks/endpoints/{id}/replay',
      '/v1/webhooks/endpoints/{id}/resend',
      '/v1/webhooks/endpoints/{id}/rotate',
      '/v1/webhooks/endpoints/{id}/test',
      '/v1/webhooks/endpoints/{id}/tests/{orderId}',
      '/v1/webhooks/endpoints/{id}/verify',
    ]);
    for (const operations of Object.values(body.paths)) {
      for (const operation of Object.values(operations as Record<string, { responses?: object }>)) {
        if (operation.responses)
          assert.ok('default' in operation.responses, 'problems that every path may answer with');
      }
    }
    for (const [, name] of JSON.stringify(body).matchAll(/#\/components\/schemas\/(\w+)/g))
      assert.ok(name !== undefined && name in body.components.schemas, String(name));
  });

  test('health, readiness and metrics are told by every service', async () => {
    for (const base of [system.url, system.healthUrl('decoder'), system.healthUrl('inference')]) {
      assert.equal((await fetch(`${base}/healthz`)).status, 200);
      assert.equal((await fetch(`${base}/readyz`)).status, 200);
    }
    const metrics = async (name: 'api' | 'decoder' | 'inference') =>
      (await fetch(`${system.healthUrl(name)}/metrics`)).text();
    assert.match(await metrics('api'), /acousticsense_http_request_seconds_count\{.*route="\/v1\/jobs"/);
    assert.match(await metrics('decoder'), /acousticsense_stage_jobs_total\{.*stage="decode",outcome="done"/);
    assert.match(
      await metrics('inference'),
      /acousticsense_stage_jobs_total\{.*stage="inference",outcome="done"/,
    );
    assert.match(await metrics('inference'), /provider="cpu"/);
  });

  test('every stage logs the job by its id', async () => {
    const { id } = await finished(system.url, (await upload(system.url, song)).id);
    for (const name of ['api', 'decoder', 'inference'] as const) {
      assert.ok(
        (await system.log(name)).some((line) => line['jobId'] === id),
        name,
      );
    }
  });

  test('a page elsewhere cannot call through a visitor: Host and Origin are checked', async () => {
    const get = (headers: Record<string, string>, method = 'GET') =>
      new Promise<number>((resolve, reject) => {
        const { hostname, port } = new URL(system.url);
        httpRequest({ hostname, port, path: '/v1/model', method, headers }, (response) =>
          resolve(response.resume().statusCode!),
        )
          .on('error', reject)
          .end();
      });
    const own = new URL(system.url).host;
    assert.equal(await get({ host: own }), 200);
    assert.equal(await get({ host: `localhost:${new URL(system.url).port}` }), 200);
    assert.equal(await get({ host: 'evil.example' }), 403);
    assert.equal(await get({ host: `127.0.0.1.evil.example` }), 403);
    assert.equal(await get({ host: own, origin: 'http://evil.example' }, 'POST'), 403);
    assert.equal(await get({ host: own, origin: 'null' }, 'POST'), 403);
    assert.equal(await get({ host: own, origin: system.url }, 'POST'), 405);
  });
});

describe('an API whose model explains itself and knows what is not music', () => {
  const reliability = [
    { from: 0, to: 0.5, clips: 20, right: 5 },
    { from: 0.5, to: 1, clips: 30, right: 28 },
  ];
  let bundle: Awaited<ReturnType<typeof writeMeansBundle>>;
  let system: System;
  before(async () => {
    bundle = await writeMeansBundle({
      full: true,
      change(manifest) {
        manifest.windows = 2;
        manifest.outlierThreshold = 2;
        manifest.accuracy = 'none';
        const fit = { temperature: 1, data: 'test', clips: 50, eceBefore: 0, ece: 0 };
        manifest.calibration = { method: 'temperature', ...fit, reliability };
      },
    });
    system = await startSystem({ env: { MODEL_URL: bundle.directory } });
  });
  after(async () => {
    await system?.stop();
    await bundle?.[Symbol.asyncDispose]();
  });
  const answered = async (fields: Record<string, string>) => {
    const job = await finished(system.url, (await upload(system.url, song, { fields })).id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    return jobSchema.parse(job);
  };

  test('says so in its description', async () => {
    const model = modelSchema.parse((await request<unknown>(`${system.url}/v1/model`)).body);
    assert.deepEqual(
      [model.explains, model.embeds, model.calibrated, model.windows, model.accuracy],
      [true, true, true, 2, 'none'],
    );
    assert.deepEqual([model.outlierThreshold, model.reliability], [2, reliability]);
  });

  test("analyses the model's own windows, and shows what it looked at in each", async () => {
    const job = await answered({ explain: 'true' });
    assert.equal(job.result!.windows.length, 2);
    assert.equal(job.links.vectors, undefined);
    const { windows } = await explanationOf(system, job);
    for (const { attention } of windows) {
      assert.deepEqual([attention.length, attention[0]!.length], [4, 2]);
      const lowest = attention[0]!.reduce((a, b) => a + b);
      assert.ok(lowest > attention[3]!.reduce((a, b) => a + b), 'the tone of 440 Hz lies low');
    }
    await request(system.url + job.links.self, { method: 'DELETE' });
    assert.equal((await request(system.url + job.links.explanation)).status, 404);
  });

  test('tells how often it was right at this confidence, of one window and not of two', async () => {
    const one = (await answered({ windows: 'middle' })).result!;
    const { from, to, clips, right } = reliability.find(({ to }) => one.top[0]!.confidence < to)!;
    const percent = Math.round((100 * right) / clips);
    assert.deepEqual(one.reliability, { right, clips, from, to, percent });
    assert.equal((await answered({})).result!.reliability, undefined);
  });

  test('is uncertain of what is unlike its music, and says that this is why', async () => {
    const usual = (await answered({ threshold: '0' })).result!;
    assert.equal(usual.uncertain, false);
    // The outlier score of this model is the mean brightness of the window, from 0 to 1: none passes 2, all pass -1.
    await using strict = await writeMeansBundle({
      full: true,
      change(manifest) {
        manifest.outlierThreshold = -1;
      },
    });
    await system.kill('inference', 'SIGTERM');
    await system.kill('decoder', 'SIGTERM');
    for (const name of ['decoder', 'inference'] as const)
      await system.start(name, { MODEL_URL: strict.directory });
    const odd = (await answered({ threshold: '0' })).result!;
    assert.deepEqual([odd.uncertain, odd.uncertainBecause], [true, 'not_music']);
    assert.ok(odd.windows.every(({ uncertain }) => uncertain));
  });
});

describe('an API with a key', () => {
  const key = 'a-key-of-some-length';
  let system: System;
  before(async () => {
    system = await startSystem({ env: { API_KEY: key }, without: ['decoder', 'inference'] });
  });
  after(() => system?.stop());

  test('answers nothing but health without the key', async () => {
    assert.equal((await fetch(`${system.url}/healthz`)).status, 200);
    for (const at of ['/', '/v1/model', '/openapi.json', '/metrics', '/v1/jobs/x']) {
      const refused = await fetch(system.url + at);
      assert.equal(refused.status, 401, at);
      assert.equal(refused.headers.get('www-authenticate'), 'Bearer');
      assert.equal(
        (await fetch(system.url + at, { headers: { authorization: 'Bearer wrong' } })).status,
        401,
        at,
      );
    }
  });

  test('takes the key as bearer, as header, or as the cookie that the page sets', async () => {
    assert.equal(
      (await fetch(`${system.url}/openapi.json`, { headers: { authorization: `Bearer ${key}` } })).status,
      200,
    );
    assert.equal((await fetch(`${system.url}/openapi.json`, { headers: { 'x-api-key': key } })).status, 200);
    const opened = await fetch(`${system.url}/?key=${key}`, { redirect: 'manual' });
    assert.deepEqual([opened.status, opened.headers.get('location')], [303, '/']);
    const cookie = opened.headers.get('set-cookie')!;
    assert.match(cookie, /HttpOnly/);
    assert.match(cookie, /SameSite=Strict/);
    assert.equal(
      (await fetch(`${system.url}/openapi.json`, { headers: { cookie: cookie.split(';')[0]! } })).status,
      200,
    );
  });

  test('takes a cookie that cannot be decoded for no key', async () => {
    const headers = { cookie: 'acousticsense_key=%' };
    assert.equal((await fetch(`${system.url}/openapi.json`, { headers })).status, 401);
    const both = { ...headers, 'x-api-key': key };
    assert.equal((await fetch(`${system.url}/openapi.json`, { headers: both })).status, 200);
  });

  test('refuses jobs while nobody serves a model, and says so', async () => {
    const answer = await request<Problem>(`${system.url}/v1/jobs`, {
      method: 'POST',
      body: formOf(song),
      headers: { 'x-api-key': key },
    });
    assert.deepEqual([answer.status, answer.body.code], [503, 'model_not_served']);
    assert.ok(answer.headers.get('retry-after'));
    const ready = await request<{ reasons: Record<string, string> }>(`${system.url}/readyz`);
    assert.equal(ready.status, 503);
    assert.ok(ready.body.reasons['model']);
  });
});

test('an API that others can reach refuses to start without a key', async () => {
  await assert.rejects(
    startSystem({ env: { HOST: '0.0.0.0' }, without: ['decoder', 'inference'] }),
    /HOST=0\.0\.0\.0.*API_KEY/,
  );
});

function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

/** The explanation of a job: served as it must be, one map for each of the job's windows. */
async function explanationOf(system: System, job: Job): Promise<Explanation> {
  const { status, headers, body } = await request<unknown>(system.url + job.links.explanation);
  assert.equal(status, 200, JSON.stringify(body));
  assert.equal(headers.get('cache-control'), 'private, max-age=3600');
  const explanation = explanationSchema.parse(body);
  assert.deepEqual(
    explanation.windows.map(({ start, end }) => [start, end]),
    job.result!.windows.map(({ start, end }) => [start, end]),
  );
  return explanation;
}

async function encoded(form: FormData): Promise<{ body: Buffer; type: string }> {
  const response = new Response(form);
  return { body: Buffer.from(await response.arrayBuffer()), type: response.headers.get('content-type')! };
}
