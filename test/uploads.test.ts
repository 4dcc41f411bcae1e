/** Uploads through real processes: what a caller sends is classified, or refused when it is no longer what was sent. */
import assert from 'node:assert/strict';
import { request as httpRequest } from 'node:http';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { UploadPart, UploadResource } from '../services/api/src/schemas.ts';
import { song, wav } from './audio.ts';
import { finished, request, upload } from './client.ts';
import { startS3 } from './s3.ts';
import { startSystem } from './system.ts';

const tus = { 'tus-resumable': '1.0.0' };
const octets = { ...tus, 'content-type': 'application/offset+octet-stream' };
const json = (body: unknown): RequestInit => ({
  method: 'POST',
  headers: { 'content-type': 'application/json' },
  body: JSON.stringify(body),
});

for (const kind of ['a directory', 'a bucket'] as const) {
  test(`an upload into ${kind} goes on after kill -9 of the API in mid-PATCH, and is classified as if sent at once`, async () => {
    await using s3 = kind === 'a bucket' ? await startS3() : undefined;
    await using system = await startSystem(s3 ? { storageUrl: s3.url } : {});
    const bytes = wav([song({ seconds: 150 })]);
    assert.ok(bytes.length > 12 << 20);
    const created = await fetch(`${system.url}/v1/uploads/tus`, {
      method: 'POST',
      headers: { ...tus, 'upload-length': String(bytes.length) },
    });
    assert.equal(created.status, 201, await created.text());
    const at = system.url + created.headers.get('location');
    const cut = httpRequest(at, {
      method: 'PATCH',
      headers: { ...octets, 'upload-offset': '0', 'content-length': bytes.length },
    });
    cut.on('error', () => {});
    cut.write(bytes.subarray(0, 7 << 20));
    await sleep(1_500);
    await system.kill('api');
    cut.destroy();
    await system.start('api');

    const id = at.split('/').at(-1)!;
    const unfinished = await request<{ code: string }>(`${system.url}/v1/jobs`, json({ upload: id }));
    assert.deepEqual([unfinished.status, unfinished.body.code], [409, 'upload_unfinished']);
    const head = await fetch(at, { method: 'HEAD', headers: tus });
    assert.equal(head.status, 200);
    const offset = Number(head.headers.get('upload-offset'));
    assert.ok(offset >= 5 << 20 && offset <= 7 << 20, `the store has ${offset} bytes`);
    const rest = await fetch(at, {
      method: 'PATCH',
      headers: { ...octets, 'upload-offset': String(offset) },
      body: bytes.subarray(offset) as Uint8Array<ArrayBuffer>,
    });
    assert.equal(rest.status, 204, await rest.text());

    const made = await request(`${system.url}/v1/jobs`, json({ upload: id, windows: 3 }));
    assert.equal(made.status, 202, JSON.stringify(made.body));
    const job = await finished(system.url, made.body.id);
    assert.equal(job.state, 'completed', JSON.stringify(job.error));
    const same = await upload(system.url, bytes, { fields: { windows: '3' } });
    assert.deepEqual((await finished(system.url, same.id)).result, job.result);
  });
}

describe('an upload by signed URLs', () => {
  test('is classified; replaced by one of them after it was completed, it fails its jobs as source_changed', async () => {
    await using s3 = await startS3();
    await using system = await startSystem({ storageUrl: s3.url });
    const bytes = wav([song({ seconds: 12 })]);
    const { body } = await request<UploadResource & { parts: UploadPart[] }>(
      `${system.url}/v1/uploads`,
      json({ size: bytes.length, filename: 'song.wav' }),
    );
    const put = async (content: Uint8Array) => {
      const url = body.parts[0]!.url;
      const answer = await fetch(url, { method: 'PUT', body: content as Uint8Array<ArrayBuffer> });
      assert.equal(answer.status, 200, await answer.text());
      return answer.headers.get('etag');
    };
    const parts = [{ number: 1, etag: await put(bytes) }];
    const completed = await request(system.url + body.links.complete, json({ parts }));
    assert.equal(completed.status, 200, JSON.stringify(completed.body));
    const jobOf = async (more: object) => {
      const made = await request(`${system.url}/v1/jobs`, json({ upload: body.id, ...more }));
      assert.equal(made.status, 202, JSON.stringify(made.body));
      return finished(system.url, made.body.id);
    };
    const job = await jobOf({});
    assert.deepEqual([job.state, job.filename], ['completed', 'song.wav'], JSON.stringify(job.error));

    await put(Buffer.from(bytes).reverse());
    const failed = await jobOf({ filename: 'again.wav' });
    assert.deepEqual(
      [failed.state, failed.error?.code, failed.error?.retryable],
      ['failed', 'source_changed', false],
    );
  });
});
