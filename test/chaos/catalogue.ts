/**
 * A catalogue as callers have it, and what they do with it: tracks in a source bucket, on a web server and sent
 * before as uploads; a manifest over all of them; patience while the service is being killed.
 */
import { randomUUID } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3';
import type { Redis } from 'ioredis';
import { connectRedisForWorker } from '../../packages/shared/src/redis.ts';
import type { Storage } from '../../packages/shared/src/storage.ts';
import { createTenants } from '../../packages/shared/src/tenants.ts';
import type { BatchResource } from '../../services/api/src/schemas.ts';
import { startS3, type TestS3, testCredentials } from '../s3.ts';
import type { System } from '../system.ts';
import type { Accepted } from './invariants.ts';

/** How a row names its track. */
export type Way = 's3' | 'http' | 'upload';

export interface Track {
  /** Name of the file, and `ref` of its row. */
  readonly name: string;
  readonly way: Way;
  readonly declaredGenre?: string;
  /** The file itself, or where it lies. */
  readonly audio: Buffer | string;
}

export interface Catalogue extends AsyncDisposable {
  readonly tracks: readonly Track[];
  readonly s3: TestS3;
  readonly webUrl: string;
  /** The web server answers no sooner than this. */
  webDelayMs: number;
}

/** Lets the services under test read from this machine. */
export const openEgress = { EGRESS_ALLOW: '127.0.0.1' };

export async function openCatalogue(tracks: readonly Track[]): Promise<Catalogue> {
  const s3 = await startS3();
  const client = new S3Client({
    endpoint: s3.endpoint,
    region: 'us-east-1',
    forcePathStyle: true,
    // The SDK writes into what it is given.
    credentials: { ...testCredentials },
  });
  await eachOf(tracks, 16, async ({ name, way, audio }) => {
    if (way !== 's3') return;
    const Body = typeof audio === 'string' ? await readFile(audio) : audio;
    await client.send(new PutObjectCommand({ Bucket: 'music', Key: name, Body }));
  });
  client.destroy();

  const byName = new Map(tracks.map((track) => [track.name, track.audio]));
  const web = createServer(async (request, response) => {
    const audio = byName.get(decodeURIComponent(request.url!.slice(1)));
    await sleep(self.webDelayMs);
    if (audio === undefined) return void response.writeHead(404).end();
    const size = typeof audio === 'string' ? (await stat(audio)).size : audio.length;
    response.writeHead(200, { 'content-type': 'audio/mpeg', 'content-length': size });
    if (typeof audio === 'string') createReadStream(audio).pipe(response);
    else response.end(audio);
  });
  await new Promise<void>((resolve) => web.listen(0, '127.0.0.1', resolve));
  const self: Catalogue = {
    tracks,
    s3,
    webDelayMs: 0,
    webUrl: `http://127.0.0.1:${(web.address() as AddressInfo).port}`,
    async [Symbol.asyncDispose]() {
      web.closeAllConnections();
      await new Promise((resolve) => web.close(resolve));
      await s3[Symbol.asyncDispose]();
    },
  };
  return self;
}

export interface Caller extends AsyncDisposable {
  readonly tenant: string;
  /** Speaks for the tenant. */
  readonly key: string;
  readonly redis: Redis;
  readonly storage: Storage;
  /** All that was accepted of this caller so far. */
  readonly accepted: Accepted;
  /** Sends a manifest over the catalogue until it is accepted, whatever dies meanwhile; under one Idempotency-Key. */
  submit(query?: string): Promise<BatchResource>;
  read(id: string): Promise<BatchResource>;
  post(id: string, what: 'cancel' | 'pause' | 'resume' | 'retry-failed'): Promise<BatchResource>;
  /** Reads the batch until `done` holds; a service that is away is asked again. */
  when(id: string, done: (batch: BatchResource) => boolean, ms?: number): Promise<BatchResource>;
}

export const isOver = ({ state }: Pick<BatchResource, 'state'>) =>
  ['completed', 'cancelled', 'failed'].includes(state);

/** A tenant with a key; its source is registered and its uploads are sent. */
export async function openCaller(
  system: System,
  catalogue: Catalogue,
  tenant: string,
  storage: Storage,
): Promise<Caller> {
  const redis = connectRedisForWorker(system.redis.url);
  const { key } = await createTenants(redis).createKey(tenant, 'test');
  const batches: string[] = [];
  const uploads: string[] = [];
  const uploadOf = new Map<string, string>();

  async function call<T = BatchResource>(method: string, at: string, init: RequestInit = {}): Promise<T> {
    const headers = { authorization: `Bearer ${key}`, ...(init.headers as Record<string, string>) };
    const response = await fetch(system.url + at, { ...init, method, headers });
    const text = await response.text();
    if (!response.ok) throw new CallFailed(`${method} ${at}: ${response.status} ${text}`, response.status);
    return (text === '' ? { location: response.headers.get('location') } : JSON.parse(text)) as T;
  }

  async function when(id: string, done: (batch: BatchResource) => boolean, ms = 120_000) {
    let last: BatchResource | undefined;
    for (const end = Date.now() + ms; Date.now() < end; await sleep(100)) {
      last = await call('GET', `/v1/batches/${id}`).catch(unlessAway);
      if (last && done(last)) return last;
    }
    throw new Error(`batch ${id} did not get there in ${ms} ms: ${JSON.stringify(last)}`);
  }

  await call('PUT', '/v1/sources/music?verify=false', {
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      bucket: 'music',
      endpoint: catalogue.s3.endpoint,
      region: 'us-east-1',
      pathStyle: true,
      credentials: testCredentials,
    }),
  });
  await eachOf(catalogue.tracks, 4, async ({ name, way, audio }) => {
    if (way !== 'upload') return;
    const body = typeof audio === 'string' ? await readFile(audio) : audio;
    const { location } = await call<{ location: string }>('POST', '/v1/uploads/tus', {
      headers: {
        'tus-resumable': '1.0.0',
        'upload-length': String(body.length),
        ...(body.length > 0 ? { 'content-type': 'application/offset+octet-stream' } : {}),
      },
      ...(body.length > 0 ? { body: body as Uint8Array<ArrayBuffer> } : {}),
    });
    const id = location.split('/').at(-1)!;
    uploads.push(id);
    uploadOf.set(name, id);
  });

  const manifest = catalogue.tracks
    .map(({ name, way, declaredGenre }) => {
      const places = { s3: `s3://music/${name}`, http: `${catalogue.webUrl}/${encodeURIComponent(name)}` };
      const audio = way === 'upload' ? `upload:${uploadOf.get(name)}` : places[way];
      return `${JSON.stringify({ audio, ref: name, declaredGenre })}\n`;
    })
    .join('');

  return {
    tenant,
    key,
    redis,
    storage,
    accepted: { tenant, batches, uploads },
    /** Told of are the rows too: the invariants look at them. */
    async submit(query = '') {
      const headers = { 'content-type': 'application/x-ndjson', 'idempotency-key': randomUUID() };
      for (const end = Date.now() + 60_000; ; await sleep(200)) {
        try {
          const batch = await call('POST', `/v1/batches?notify=rows&${query}`, { headers, body: manifest });
          batches.push(batch.id);
          return batch;
        } catch (error) {
          if (Date.now() > end) throw error;
          unlessAway(error);
        }
      }
    },
    read: (id) => call('GET', `/v1/batches/${id}`),
    post: (id, what) => call('POST', `/v1/batches/${id}/${what}`),
    when,
    async [Symbol.asyncDispose]() {
      redis.disconnect();
    },
  };
}

class CallFailed extends Error {
  readonly status: number;
  constructor(message: string, status: number) {
    super(message);
    this.status = status;
  }
}

/** The API itself may be dead, a connection cut, Redis away (503), or the first try still be under way (409). */
function unlessAway(error: unknown): undefined {
  if (error instanceof CallFailed && ![409, 503].includes(error.status)) throw error;
}

export async function eachOf<T>(
  items: readonly T[],
  atOnce: number,
  work: (item: T, index: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const index = next++;
      await work(items[index]!, index);
    }
  };
  await Promise.all(Array.from({ length: Math.min(atOnce, items.length) }, worker));
}
