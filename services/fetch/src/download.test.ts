import assert from 'node:assert/strict';
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { gzipSync } from 'node:zlib';
import { createEgressGuard, type EgressOptions, EgressRefused } from '@acousticsense/egress/guard';
import {
  InfrastructureFault,
  isRedisAway,
  type ProblemCode,
  ProblemError,
} from '@acousticsense/shared/errors';
import { openStorage } from '@acousticsense/shared/open-storage';
import type { Storage } from '@acousticsense/shared/storage';
import S3rver from 's3rver';
import { createDownload, type DownloadLimits } from './download.ts';
import { createPlaces } from './places.ts';
import { startWeb, trustTestCertificate, type Web } from './testing/web.ts';

trustTestCertificate();

const closers: (() => unknown)[] = [];
after(async () => {
  for (const close of closers.reverse()) await close();
});

const directory = await mkdtemp(path.join(tmpdir(), 'as-download-'));
closers.push(() => rm(directory, { recursive: true, force: true }));
const files = openStorage(pathToFileURL(path.join(directory, 'objects')).href);

process.env['AWS_ACCESS_KEY_ID'] ??= 'S3RVER';
process.env['AWS_SECRET_ACCESS_KEY'] ??= 'S3RVER';
const s3rver = new S3rver({
  port: 0,
  address: '127.0.0.1',
  silent: true,
  directory: path.join(directory, 's3'),
  configureBuckets: [{ name: 'music', configs: [] }],
});
const { port: s3Port } = await s3rver.run();
closers.push(() => s3rver.close());
const bucket = openStorage(`s3://music/p?endpoint=http://127.0.0.1:${s3Port}&region=us-east-1`);
closers.push(() => bucket.close());

const sound = randomBytes(300_000);
const sha256 = createHash('sha256').update(sound).digest('hex');

type Answer = (request: IncomingMessage, response: ServerResponse) => unknown;

async function web(
  answer: Answer,
  options: { secure?: boolean; host?: string; port?: number } = {},
): Promise<Web> {
  const started = await startWeb(answer, options);
  closers.push(() => started.close());
  return started;
}

interface Setting extends Partial<DownloadLimits>, EgressOptions {
  readonly storage?: Storage;
  readonly perHost?: number;
  readonly signal?: AbortSignal;
  readonly onProgress?: (fraction: number) => void;
}

/** Downloads under a key of its own, and looks at what is stored there afterwards. */
function setUp({ storage = files, allow = '127.0.0.1', resolve, perHost = 4, ...limits }: Setting = {}) {
  const guard = createEgressGuard({ allow, ...(resolve ? { resolve } : {}) });
  closers.push(() => guard.close());
  const download = createDownload({
    storage,
    guard,
    places: createPlaces({ total: 16, perHost }),
    limits: {
      maxBytes: 1_000_000,
      pauseMs: 5,
      idleMs: 5_000,
      budgetBaseMs: 20_000,
      budgetPerMegabyteMs: 1_000,
      ...limits,
    },
  });
  return {
    download,
    async fetched(
      url: string,
      signal = new AbortController().signal,
      onProgress?: (fraction: number) => void,
    ) {
      const key = `fetched/${randomUUID()}`;
      const downloaded = await download(url, key, signal, onProgress);
      return { ...downloaded, stored: await storage.read(key) };
    },
    /** The problem that a download ends with, having left no object and no unfinished write. */
    async problem(url: string): Promise<ProblemError> {
      const key = `refused/${randomUUID()}`;
      try {
        await download(url, key, new AbortController().signal);
      } catch (error) {
        assert.ok(error instanceof ProblemError, String((error as Error).stack));
        assert.equal(await storage.stat(key), undefined);
        if (storage === files) assert.deepEqual(await readdir(path.join(directory, 'objects/.parts')), []);
        return error;
      }
      assert.fail(`${url} was read`);
    },
  };
}

async function failsWith(code: ProblemCode, url: string, setting: Setting = {}): Promise<ProblemError> {
  const problem = await setUp(setting).problem(url);
  assert.equal(problem.code, code, problem.message);
  return problem;
}

const isRefusal = (reason: string) => (problem: ProblemError) => {
  assert.ok(problem.cause instanceof EgressRefused, String(problem.cause));
  assert.equal(problem.cause.reason, reason);
};

for (const [name, storage] of [
  ['a directory', files],
  ['a bucket', bucket],
] as const) {
  describe(`into ${name}`, () => {
    test('a file is stored as it came, with its size and SHA-256', async () => {
      const { origin, requests } = await web((_, response) => response.end(sound));
      const fractions: number[] = [];
      const { stored, ...facts } = await setUp({ storage }).fetched(
        `${origin}/a%20b/song.mp3?x=1&y=%2F#top`,
        undefined,
        (fraction) => fractions.push(fraction),
      );
      assert.ok(stored.equals(sound));
      assert.equal(facts.size, sound.length);
      assert.equal(facts.sha256, sha256);
      assert.equal(fractions.at(-1), 1);
      assert.equal(requests[0]?.url, '/a%20b/song.mp3?x=1&y=%2F');
      assert.equal(requests[0]?.headers['accept-encoding'], 'identity');
    });

    test('an endless body is cut at the limit and leaves no object', async () => {
      let sent = 0;
      const cut = Promise.withResolvers<void>();
      const { origin } = await web(async (_, response) => {
        response.on('close', cut.resolve);
        while (!response.destroyed) {
          sent += sound.length;
          if (!response.write(sound)) await sleep(1);
        }
      });
      await failsWith('file_too_large', `${origin}/endless`, { storage });
      await cut.promise;
      assert.ok(sent < 20_000_000, `${sent} bytes`);
    });

    test('a cancelled download ends at once, with its connection, and leaves no object', async () => {
      const closed = Promise.withResolvers<void>();
      const begun = Promise.withResolvers<void>();
      const { origin } = await web((_, response) => {
        response.on('close', closed.resolve);
        response.write(sound, () => begun.resolve());
      });
      const cancel = new AbortController();
      const key = `cancelled/${randomUUID()}`;
      const { download } = setUp({ storage });
      const downloading = download(`${origin}/`, key, cancel.signal);
      await begun.promise;
      cancel.abort(new Error('cancelled'));
      await assert.rejects(downloading, (error: Error) => !(error instanceof ProblemError));
      await closed.promise;
      assert.equal(await storage.stat(key), undefined);
    });
  });
}

test('a server that compresses unasked is not unpacked: no bomb goes off', async () => {
  const packed = gzipSync(Buffer.alloc(5_000_000));
  const { origin } = await web((_, response) => response.setHeader('content-encoding', 'gzip').end(packed));
  const { stored } = await setUp().fetched(`${origin}/bomb`);
  assert.ok(stored.equals(packed));
});

test('https:// is read; a certificate of somebody else is not', async () => {
  const { port } = await web((_, response) => response.end(sound), { secure: true });
  const resolve = async () => [{ address: '127.0.0.1', family: 4 }];
  const setting = { allow: '127.0.0.0/8', resolve };
  assert.equal((await setUp(setting).fetched(`https://music.example:${port}/`)).sha256, sha256);
  const problem = await failsWith('fetch_failed', `https://music.invalid:${port}/`, setting);
  assert.match(problem.message, /CERT_ALTNAME/);
});

describe('the address', () => {
  test('a literal that is not public is refused before any byte is sent, in every spelling', async () => {
    const { port, requests } = await web((_, response) => response.end(sound));
    for (const host of ['127.0.0.1', '0x7f.1', '2130706433', '0177.1', '[::ffff:127.0.0.1]', '[::1]', '0']) {
      await failsWith('url_not_allowed', `https://${host}:${port}/`, { allow: '' });
    }
    assert.equal(requests.length, 0);
  });

  test('a name that resolves to 127.0.0.1 is refused in the connection', async () => {
    const { port, requests } = await web((_, response) => response.end(sound), { secure: true });
    const resolve = async () => [{ address: '127.0.0.1', family: 4 }];
    const problem = await failsWith('url_not_allowed', `https://music.example:${port}/`, {
      allow: '',
      resolve,
    });
    isRefusal('loopback')(problem);
    assert.doesNotMatch(problem.message, /127/);
    isRefusal('loopback')(await failsWith('url_not_allowed', `https://localhost:${port}/`, { allow: '' }));
    assert.equal(requests.length, 0);
  });

  test('a name that changes its mind is connected to where it was judged, or not at all', async () => {
    const good = await web((_, response) => response.setHeader('connection', 'close').end(sound), {
      secure: true,
    });
    const bad = await web((_, response) => response.end('secret'), {
      secure: true,
      host: '127.0.0.2',
      port: good.port,
    });
    let asked = 0;
    const { fetched, problem } = setUp({
      allow: '127.0.0.1',
      resolve: async () => [{ address: asked++ % 2 === 0 ? '127.0.0.1' : '127.0.0.2', family: 4 }],
    });
    const url = `https://music.example:${good.port}/`;
    for (let turn = 0; turn < 3; turn += 1) {
      assert.equal((await fetched(url)).sha256, sha256);
      isRefusal('loopback')(await problem(url));
    }
    assert.equal(asked, 6);
    assert.equal(bad.requests.length, 0);
  });

  test('metadata is never read, whatever EGRESS_ALLOW names', async () => {
    const allow =
      '169.254.169.254,169.254.169.254:80,169.254.0.0/16,0.0.0.0/0,::/0,metadata.google.internal,inside.example';
    const resolve = async () => [{ address: '169.254.169.254', family: 4 }];
    for (const host of [
      '169.254.169.254',
      '0xa9fea9fe',
      '[fd00:ec2::254]',
      '100.100.100.200',
      '168.63.129.16',
    ]) {
      for (const scheme of ['http', 'https']) {
        await failsWith('url_not_allowed', `${scheme}://${host}/latest/meta-data/`, { allow, resolve });
      }
    }
    for (const host of ['metadata.google.internal', 'inside.example']) {
      isRefusal('metadata')(await failsWith('url_not_allowed', `https://${host}/`, { allow, resolve }));
    }
  });
});

describe('the URL', () => {
  test('other schemes, credentials and what is no URL are refused', async () => {
    const { port, requests } = await web((_, response) => response.end(sound));
    const urls = [
      'not a url',
      '/song.mp3',
      'ftp://127.0.0.1/song.mp3',
      'file:///etc/passwd',
      'data:audio/wav;base64,UklGRg==',
      `https://user:secret@127.0.0.1:${port}/`,
      `https://user@127.0.0.1:${port}/`,
      `https://:secret@127.0.0.1:${port}/`,
      'https://',
    ];
    for (const url of urls) {
      const problem = await failsWith('url_not_allowed', url);
      assert.doesNotMatch(problem.message, /secret/);
    }
    assert.equal(requests.length, 0);
  });

  test('http:// is read only where EGRESS_ALLOW opens the very host and port', async () => {
    const { port, origin } = await web((_, response) => response.end(sound));
    await setUp({ allow: `127.0.0.1:${port}` }).fetched(`${origin}/`);
    await failsWith('url_not_allowed', `${origin}/`, { allow: '' });
    await failsWith('url_not_allowed', `${origin}/`, { allow: `127.0.0.1:${port + 1}` });
    await failsWith('url_not_allowed', 'http://music.example/', { allow: '127.0.0.1' });
  });
});

describe('redirects', () => {
  test('up to five are followed, relative ones too, and nothing is sent along', async () => {
    const { origin, requests } = await web((request, response) => {
      const hop = Number(request.url!.slice(1));
      if (hop === 5) response.end(sound);
      else {
        const location = hop % 2 === 0 ? `${origin}/${hop + 1}` : String(hop + 1);
        response.writeHead([301, 302, 303, 307, 308][hop]!, { location, 'set-cookie': 'a=b' }).end('moved');
      }
    });
    assert.equal((await setUp().fetched(`${origin}/0`)).sha256, sha256);
    assert.equal(requests.length, 6);
    for (const { headers } of requests) {
      assert.deepEqual(Object.keys(headers).sort(), [
        'accept',
        'accept-encoding',
        'connection',
        'host',
        'user-agent',
      ]);
    }
    // Read to their ends, they share connections.
    assert.ok(new Set(requests.map(({ socket }) => socket)).size < 4);
  });

  test('a sixth, and a loop, end as too_many_redirects', async () => {
    const { origin, requests } = await web((_, response) => response.writeHead(302, { location: '/' }).end());
    await failsWith('too_many_redirects', `${origin}/`);
    assert.equal(requests.length, 6);
  });

  test('one to the metadata service, or to anything that is not public, is refused', async () => {
    for (const [target, reason] of [
      ['http://169.254.169.254/latest/meta-data/', undefined],
      ['https://169.254.169.254/latest/meta-data/', 'metadata'],
      ['https://0xa9fea9fe/', 'metadata'],
      ['https://10.0.0.1/', 'private'],
      ['https://[::ffff:7f00:1]/', 'ipv4Mapped'],
      ['https://inner.example/', 'private'],
    ] as const) {
      const { origin } = await web((_, response) => response.writeHead(302, { location: target }).end());
      const resolve = async () => [{ address: '10.0.0.9', family: 4 }];
      const problem = await failsWith('url_not_allowed', `${origin}/`, { resolve });
      if (reason) isRefusal(reason)(problem);
    }
  });

  test('one to another scheme, to credentials or from https:// to http:// is refused', async () => {
    for (const target of [
      'file:///etc/passwd',
      'ftp://127.0.0.1/',
      'https://user:secret@127.0.0.1/',
      'http://[broken',
    ]) {
      const { origin } = await web((_, response) => response.writeHead(302, { location: target }).end());
      await failsWith('url_not_allowed', `${origin}/`);
    }
    const plain = await web((_, response) => response.end(sound));
    const secure = await web((_, response) => response.writeHead(302, { location: plain.origin }).end(), {
      secure: true,
    });
    await failsWith('url_not_allowed', `${secure.origin}/`);
    assert.equal(plain.requests.length, 0);
    const up = await web((_, response) => response.writeHead(302, { location: `${back.origin}/` }).end());
    const back = await web((_, response) => response.end(sound), { secure: true });
    assert.equal((await setUp().fetched(`${up.origin}/`)).sha256, sha256);
  });
});

describe('the size', () => {
  test('a declared 50 GB is refused at once, and no byte of it is read', async () => {
    const { origin, requests } = await web((_, response) => {
      response.writeHead(200, { 'content-length': 50_000_000_000 }).write(sound);
    });
    const from = performance.now();
    await failsWith('file_too_large', `${origin}/`);
    assert.ok(performance.now() - from < 3_000);
    assert.equal(requests.length, 1);
  });

  test('a file of just the limit is read, one byte more is not, declared or not', async () => {
    for (const declared of [true, false]) {
      const { origin } = await web((_, response) => {
        if (declared) response.setHeader('content-length', sound.length);
        response.write(sound.subarray(0, 1_000));
        response.end(sound.subarray(1_000));
      });
      assert.equal((await setUp({ maxBytes: sound.length }).fetched(`${origin}/`)).size, sound.length);
      await failsWith('file_too_large', `${origin}/`, { maxBytes: sound.length - 1 });
    }
  });

  test('an empty answer is empty_file', async () => {
    const { origin } = await web((request, response) => {
      response.writeHead(request.url === '/204' ? 204 : 200).end();
    });
    await failsWith('empty_file', `${origin}/`);
    await failsWith('empty_file', `${origin}/204`);
  });
});

describe('the answer', () => {
  const statuses: [number, ProblemCode, boolean][] = [
    [404, 'url_not_found', false],
    [410, 'url_not_found', false],
    [401, 'url_forbidden', false],
    [403, 'url_forbidden', false],
    [451, 'url_forbidden', false],
    [408, 'fetch_failed', true],
    [429, 'fetch_failed', true],
    [500, 'fetch_failed', true],
    [503, 'fetch_failed', true],
    [300, 'fetch_failed', true],
    [206, 'fetch_failed', true],
  ];
  for (const [status, code, retryable] of statuses) {
    test(`${status} is ${code}`, async () => {
      const { origin } = await web((_, response) => response.writeHead(status).end('no sound'));
      const problem = await failsWith(code, `${origin}/`);
      assert.equal(problem.retryable, retryable);
      assert.match(problem.message, new RegExp(String(status)));
    });
  }

  test('a server that is away, or speaks something else, is fetch_failed, and Redis is not suspected', async () => {
    const gone = await startWeb(() => {});
    await gone.close();
    const rude = await web((_, response) => response.socket!.end('SSH-2.0-x\r\n'));
    const silent = await web((_, response) => response.socket!.destroy());
    for (const { origin } of [gone, rude, silent]) {
      const problem = await failsWith('fetch_failed', `${origin}/`);
      assert.equal(isRedisAway(problem), false);
    }
    const resolve = () => Promise.reject(Object.assign(new Error('no'), { code: 'ENOTFOUND' }));
    await failsWith('fetch_failed', 'https://nobody.example/', { resolve });
  });

  test('a host that says when to come again is left alone until then, by everybody', async () => {
    const times: number[] = [];
    const { origin } = await web((_, response) => {
      times.push(performance.now());
      if (times.length === 1) response.writeHead(429, { 'retry-after': '1' }).end();
      else response.end(sound);
    });
    const { problem, fetched } = setUp();
    assert.equal((await problem(`${origin}/1`)).code, 'fetch_failed');
    await fetched(`${origin}/2`);
    assert.ok(times[1]! - times[0]! > 950, `${times}`);
  });

  test('storage that is away is no fault of the URL', async () => {
    const { origin } = await web((_, response) => response.end(sound));
    const away = new InfrastructureFault('storage', 'away');
    const storage = { ...files, put: () => Promise.reject(away) };
    await assert.rejects(setUp({ storage }).fetched(`${origin}/`), away);
  });
});

describe('the pace', () => {
  test('a server that says nothing is given up after the idle time', async () => {
    const { origin } = await web(() => {});
    const from = performance.now();
    await failsWith('fetch_timeout', `${origin}/`, { idleMs: 200 });
    assert.ok(performance.now() - from < 2_000);
  });

  test('a look-up that never ends is given up too', async () => {
    await failsWith('fetch_timeout', 'https://slow.example/', {
      idleMs: 200,
      resolve: () => new Promise(() => {}),
    });
  });

  test('a body that trickles is given up when its time is over, whatever size was declared', async () => {
    const { origin } = await web(async (_, response) => {
      response.writeHead(200, { 'content-length': 900_000, etag: '"slow"' });
      while (!response.destroyed) {
        response.write('.');
        await sleep(50);
      }
    });
    const from = performance.now();
    const problem = await failsWith('fetch_timeout', `${origin}/`, {
      idleMs: 400,
      budgetBaseMs: 600,
      budgetPerMegabyteMs: 60_000,
    });
    assert.match(problem.message, /too slow/);
    const took = performance.now() - from;
    assert.ok(took > 550 && took < 3_000, `${took} ms`);
  });

  test('what comes buys time: a steady server may take longer than the base', async () => {
    const { origin } = await web(async (_, response) => {
      for (let at = 0; at < sound.length; at += 30_000) {
        response.write(sound.subarray(at, at + 30_000));
        await sleep(60);
      }
      response.end();
    });
    const { fetched } = setUp({ budgetBaseMs: 300, budgetPerMegabyteMs: 10_000 });
    const from = performance.now();
    assert.equal((await fetched(`${origin}/`)).sha256, sha256);
    assert.ok(performance.now() - from > 500);
  });

  test('a host gets so many connections at a time, and another host is not held up', async () => {
    let open = 0;
    let most = 0;
    const slow = await web(async (_, response) => {
      most = Math.max(most, ++open);
      await sleep(100);
      open -= 1;
      response.end(sound);
    });
    const quick = await web((_, response) => response.end(sound), { host: '127.0.0.3' });
    const { fetched } = setUp({ allow: '127.0.0.0/8', perHost: 2 });
    const order: string[] = [];
    await Promise.all([
      ...Array.from({ length: 6 }, () => fetched(`${slow.origin}/`).then(() => order.push('slow'))),
      fetched(`${quick.origin}/`).then(() => order.push('quick')),
    ]);
    assert.equal(most, 2);
    assert.equal(order[0], 'quick');
  });
});

describe('a connection that is cut in mid-body', () => {
  interface Version {
    readonly etag?: string;
    readonly content: Buffer;
    readonly lastModified?: string;
  }

  /** Serves ranges as RFC 9110 says; cuts the first `cuts` answers after 100,000 bytes. */
  async function cutting(
    versionAt: (request: number) => Version,
    { cuts = 1, ranges = true, chunked = false } = {},
  ) {
    let count = 0;
    return web(async (request, response) => {
      const turn = count++;
      const { etag, content, lastModified } = versionAt(turn);
      const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? '')?.[1] ?? Number.NaN);
      const partial = ranges && !Number.isNaN(from) && request.headers['if-range'] === etag;
      const body = partial ? content.subarray(from) : content;
      response.writeHead(partial ? 206 : 200, {
        ...(chunked ? {} : { 'content-length': body.length }),
        ...(etag ? { etag } : {}),
        ...(lastModified ? { 'last-modified': lastModified } : {}),
        ...(partial ? { 'content-range': `bytes ${from}-${content.length - 1}/${content.length}` } : {}),
      });
      if (turn < cuts)
        response.write(body.subarray(0, 100_000), () => setTimeout(() => response.destroy(), 20));
      else response.end(body);
    });
  }

  for (const chunked of [false, true]) {
    test(`goes on where it stopped (${chunked ? 'chunked' : 'declared size'}), and the bytes are the same`, async () => {
      const { origin, requests } = await cutting(() => ({ etag: '"v1"', content: sound }), {
        cuts: 2,
        chunked,
      });
      for (const storage of [files, bucket]) {
        const { stored, ...facts } = await setUp({ storage }).fetched(`${origin}/`);
        assert.ok(stored.equals(sound));
        assert.equal(facts.sha256, sha256);
      }
      assert.deepEqual(
        requests.slice(0, 3).map(({ headers }) => [headers.range, headers['if-range']]),
        [
          [undefined, undefined],
          ['bytes=100000-', '"v1"'],
          ['bytes=200000-', '"v1"'],
        ],
      );
    });
  }

  test('idle in mid-body is a cut like another', async () => {
    let first = true;
    const { origin } = await web((request, response) => {
      if (first) {
        first = false;
        response
          .writeHead(200, { etag: '"v1"', 'content-length': sound.length })
          .write(sound.subarray(0, 1_000));
      } else {
        assert.equal(request.headers.range, 'bytes=1000-');
        const range = `bytes 1000-${sound.length - 1}/${sound.length}`;
        response.writeHead(206, { etag: '"v1"', 'content-range': range }).end(sound.subarray(1_000));
      }
    });
    assert.equal((await setUp({ idleMs: 200 }).fetched(`${origin}/`)).sha256, sha256);
  });

  test('with another file behind the URL meanwhile is source_changed', async () => {
    const other = randomBytes(sound.length);
    const { origin } = await cutting((turn) => ({ etag: `"v${turn}"`, content: turn === 0 ? sound : other }));
    await failsWith('source_changed', `${origin}/`);
  });

  test('with another file of another size under the same validator is source_changed', async () => {
    const longer = Buffer.concat([sound, sound]);
    const { origin } = await cutting((turn) => ({ etag: '"v1"', content: turn === 0 ? sound : longer }));
    await failsWith('source_changed', `${origin}/`);
  });

  test('is not patched together without a strong validator: it is tried again from the start', async () => {
    for (const etag of [undefined, 'W/"v1"']) {
      const version = { content: sound, lastModified: new Date(0).toUTCString(), ...(etag ? { etag } : {}) };
      const { origin, requests } = await cutting(() => version);
      const { problem, fetched } = setUp();
      const cut = await problem(`${origin}/`);
      assert.equal(cut.code, 'fetch_failed');
      assert.ok(cut.retryable);
      assert.equal((await fetched(`${origin}/`)).sha256, sha256);
      assert.equal(requests.length, 2);
      assert.equal(requests[1]?.headers.range, undefined);
    }
  });

  test('of a server without ranges is tried again from the start', async () => {
    const { origin } = await cutting(() => ({ etag: '"v1"', content: sound }), { ranges: false });
    const problem = await failsWith('fetch_failed', `${origin}/`);
    assert.match(problem.message, /cannot go on/);
  });

  test('that ends before the declared size never becomes an object', async () => {
    const { origin } = await web((_, response) => {
      response.writeHead(200, { 'content-length': sound.length });
      response.write(sound.subarray(0, 1_000), () => response.socket!.end());
    });
    await failsWith('fetch_failed', `${origin}/`);
  });

  test('is not resumed for ever', async () => {
    let count = 0;
    const { origin } = await web((request, response) => {
      count += 1;
      const from = Number(/\d+/.exec(request.headers.range ?? '0')![0]);
      const range = `bytes ${from}-899999/900000`;
      response.writeHead(from ? 206 : 200, {
        etag: '"v1"',
        ...(from ? { 'content-range': range } : { 'content-length': 900_000 }),
      });
      response.write('.', () => response.destroy());
    });
    await failsWith('fetch_timeout', `${origin}/`, { budgetBaseMs: 1 });
    count = 0;
    const { problem } = setUp();
    assert.equal((await problem(`${origin}/`)).code, 'fetch_failed');
    assert.equal(count, 9);
  });
});
