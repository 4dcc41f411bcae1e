/**
 * What a service is pointed at is wrong: it says so in one sentence, without credentials in it, and stays up and not
 * ready until the fault is gone; or it ends, where nothing could ever make it right.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { CreateBucketCommand, S3Client } from '@aws-sdk/client-s3';
import { connectRedis, connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { startRedis, type TestRedis } from './redis.ts';
import { startS3, type TestS3, testCredentials } from './s3.ts';

const root = path.resolve(import.meta.dirname, '..');
const services = ['api', 'decoder', 'inference', 'webhook'] as const;
const secret = 'open-sesame-4711';

interface Service {
  readonly name: string;
  readonly child: ChildProcess;
  output(): string;
  lines(): { msg: string; level: number; reasons?: Record<string, string> }[];
  /** What /readyz says; its reasons are empty when it is ready. */
  readiness(): Promise<{ status: number; reasons: Record<string, string> }>;
  stop(): Promise<void>;
}

let directory: string;
before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'as-faults-'));
});
after(() => rm(directory, { recursive: true, force: true }));

function start(name: string, env: Record<string, string>): Service {
  const child = spawn(process.execPath, [path.join(root, 'services', name, 'src/main.ts')], {
    env: {
      ...process.env,
      MODEL_URL: path.join(root, 'models/default'),
      DATA_DIR: directory,
      SCRATCH_DIR: directory,
      STORAGE_URL: pathToFileURL(path.join(directory, 'objects')).href,
      PORT: '0',
      METRICS_PORT: '0',
      INFERENCE_THREADS: '1',
      SECRETS_KEY: Buffer.alloc(32, 'test').toString('base64'),
      ...env,
    },
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
  });
  let text = '';
  let port: number | undefined;
  for (const stream of [child.stdout!, child.stderr!]) stream.on('data', (chunk) => (text += chunk));
  child.on('message', (message: { type: string; port?: number }) => {
    if (message.type === 'listening') port = message.port;
  });
  const exited = once(child, 'close');
  return {
    name,
    child,
    output: () => text,
    lines: () =>
      text
        .split('\n')
        .filter((line) => line.startsWith('{') && line.endsWith('}'))
        .map((line) => JSON.parse(line)),
    async readiness() {
      if (port === undefined) return { status: 0, reasons: { service: 'does not listen yet' } };
      const response = await fetch(`http://127.0.0.1:${port}/readyz`);
      const body = (await response.json()) as { reasons?: Record<string, string> };
      return { status: response.status, reasons: body.reasons ?? {} };
    },
    async stop() {
      child.kill('SIGKILL');
      await exited;
    },
  };
}

async function until(what: string, holds: () => Promise<boolean>, ms = 40_000): Promise<void> {
  for (const deadline = Date.now() + ms; !(await holds()); await sleep(50)) {
    if (Date.now() > deadline) assert.fail(`not within ${ms} ms: ${what}`);
  }
}

/** Starts every service under a fault; each must say so, stay up, and be without it after `mend` as it stands. */
async function assertToldAndMended(
  part: string,
  sentence: RegExp,
  env: Record<string, string>,
  mend?: () => Promise<unknown>,
): Promise<void> {
  const running = services.map((name) => start(name, env));
  try {
    await Promise.all(
      running.map(async (service) => {
        await until(`${service.name} says what is wrong with ${part}`, async () => {
          assert.equal(service.child.exitCode, null, service.output());
          const { status, reasons } = await service.readiness();
          return status === 503 && sentence.test(reasons[part] ?? '');
        }).catch(async (error) => {
          const { reasons } = await service.readiness();
          throw new Error(`${error.message}: ${JSON.stringify(reasons)}\n${service.output()}`);
        });
      }),
    );
    // Long enough for what repeats: connections and checks are tried anew every two seconds at most.
    await sleep(5_000);
    for (const { name, child, lines, output } of running) {
      assert.equal(child.exitCode ?? child.signalCode, null, `${name} stays up: ${output()}`);
      const told = lines().filter(({ reasons }) => sentence.test(reasons?.[part] ?? ''));
      assert.ok(told.length > 0, `${name} logs it`);
      const warnings = lines().filter(({ level }) => level >= 40);
      assert.ok(told.length < 8 && warnings.length < 60, `${name} goes on about it: ${output()}`);
      assert.ok(!output().includes(secret), `${name} tells the password`);
    }
    if (!mend) return;
    await mend();
    for (const { name, readiness, output } of running) {
      await until(`${name} is ready`, async () => (await readiness()).status === 200).catch((error) => {
        throw new Error(`${error.message}\n${output()}`);
      });
    }
  } finally {
    await Promise.all(running.map((service) => service.stop()));
  }
}

/** Starts services on something that can never serve: each ends with one line that says so. */
async function assertRefused(
  names: readonly string[],
  sentence: RegExp,
  env: Record<string, string>,
): Promise<void> {
  const running = names.map((name) => start(name, env));
  try {
    await Promise.all(
      running.map(async ({ name, child, lines, output }) => {
        await until(`${name} ends`, async () => child.exitCode !== null || child.signalCode !== null);
        assert.equal(child.exitCode, 1, output());
        const fatal = lines().filter(({ level }) => level === 60);
        assert.deepEqual(fatal.length, 1, output());
        assert.match(fatal[0]!.msg, sentence);
        assert.ok(!output().includes(secret), `${name} tells the password`);
      }),
    );
  } finally {
    await Promise.all(running.map((service) => service.stop()));
  }
}

/** Below the ports that the system lends, and with room for a cluster's second one (10000 above). */
async function freePort(): Promise<number> {
  for (let port = 20_000 + Math.floor(Math.random() * 10_000); ; port += 1) {
    const server = createServer().listen(port, '127.0.0.1');
    const free = await Promise.race([
      once(server, 'listening').then(() => true),
      once(server, 'error').then(() => false),
    ]);
    if (!free) continue;
    server.close();
    await once(server, 'close');
    return port;
  }
}

describe('object storage', () => {
  let redis: TestRedis;
  let s3: TestS3;
  before(async () => {
    redis = await startRedis();
    s3 = await startS3();
  });
  after(async () => {
    await s3?.[Symbol.asyncDispose]();
    await redis?.[Symbol.asyncDispose]();
  });

  // s3rver looks at the key's name only; a wrong secret is refused with another code, which storage-s3.ts knows alike.
  test('that does not know the credentials is told, and services stay up', () =>
    assertToldAndMended(
      'storage',
      /^Object storage refuses the credentials \(InvalidAccessKeyId\): put AWS_ACCESS_KEY_ID and AWS_SECRET/,
      {
        REDIS_URL: redis.url,
        STORAGE_URL: s3.url,
        AWS_ACCESS_KEY_ID: 'NOBODY',
        AWS_SECRET_ACCESS_KEY: secret,
      },
    ));

  test('without the bucket: services are ready when it is made', async () => {
    const client = new S3Client({
      endpoint: s3.endpoint,
      region: 'us-east-1',
      forcePathStyle: true,
      credentials: testCredentials,
    });
    await assertToldAndMended(
      'storage',
      /^Object storage has no such bucket \(NoSuchBucket\): create it/,
      { REDIS_URL: redis.url, STORAGE_URL: s3.url.replace('//music/', '//nobody-made-it/') },
      () => client.send(new CreateBucketCommand({ Bucket: 'nobody-made-it' })),
    );
    client.destroy();
  });

  test('on a full volume: services are ready when there is room', async (context) => {
    const mounted = path.join(directory, 'mounted');
    await mkdir(mounted);
    const { status } = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mounted]);
    if (status !== 0) return context.skip('only root may mount');
    try {
      await mkdir(path.join(mounted, 'objects'));
      const ballast = path.join(mounted, 'ballast');
      await writeFile(ballast, Buffer.alloc(2 << 20)).catch(({ code }) => assert.equal(code, 'ENOSPC'));
      await assertToldAndMended(
        'storage',
        /^The storage directory cannot be used: its disk is full, make room there/,
        { REDIS_URL: redis.url, STORAGE_URL: pathToFileURL(path.join(mounted, 'objects')).href },
        () => rm(ballast),
      );
    } finally {
      execFileSync('umount', ['-l', mounted]);
    }
  });
});

describe('Redis', () => {
  test('that asks for a password: services are ready when it is the one that they were given', async () => {
    const port = await freePort();
    await using redis = await startRedis({ args: ['--port', String(port), '--bind', '127.0.0.1'] });
    const operator = connectRedisForWorker(redis.url);
    try {
      await operator.config('SET', 'requirepass', 'of-another');
      await assertToldAndMended(
        'redis',
        /^Redis asks for a password and REDIS_URL gives none/,
        { REDIS_URL: `redis://127.0.0.1:${port}` },
        () => operator.config('SET', 'requirepass', ''),
      );
      await operator.config('SET', 'requirepass', 'of-another');
      await assertToldAndMended(
        'redis',
        /^Redis refuses the user or the password in REDIS_URL/,
        { REDIS_URL: `redis://:${secret}@127.0.0.1:${port}` },
        () => operator.config('SET', 'requirepass', secret),
      );
    } finally {
      operator.disconnect();
    }
  });

  test('that is full: services are ready when it has room', async () => {
    await using redis = await startRedis({ args: ['--maxmemory', '1', '--maxmemory-policy', 'noeviction'] });
    const operator = connectRedis(redis.url);
    try {
      await assertToldAndMended(
        'redis',
        /^Redis is full \(maxmemory\): give it more memory/,
        { REDIS_URL: redis.url },
        async () => {
          await operator.config('SET', 'maxmemory', '0');
        },
      );
    } finally {
      operator.disconnect();
    }
  });

  test('that is a replica says where to point services instead', async () => {
    await using redis = await startRedis({ args: ['--replicaof', '127.0.0.1', '1'] });
    const operator = connectRedis(redis.url);
    try {
      await assertToldAndMended(
        'redis',
        /^This Redis is a replica.*redis\+sentinel/,
        { REDIS_URL: redis.url },
        async () => {
          await operator.replicaof('NO', 'ONE');
        },
      );
    } finally {
      operator.disconnect();
    }
  });

  test('that evicts keys is refused, and so is a cluster', async () => {
    await using evicting = await startRedis({
      args: ['--maxmemory', '100mb', '--maxmemory-policy', 'allkeys-lru'],
    });
    const evicts =
      /^This Redis evicts keys \(maxmemory-policy allkeys-lru\), which would lose jobs: set it to/;
    await assertRefused(services, evicts, { REDIS_URL: evicting.url });
    await using cluster = await startRedis({
      args: ['--cluster-enabled', 'yes', '--port', String(await freePort()), '--bind', '127.0.0.1'],
    });
    await assertRefused(services, /^This Redis runs in cluster mode/, { REDIS_URL: cluster.url });
  });

  test('whose URL cannot be read is refused without a word of it', async () => {
    for (const url of [`redis:://:${secret}@host`, `redis+sentinel://:${secret}@a:1,:2`, `http://${secret}`])
      await assertRefused(['webhook'], /^REDIS_URL must be redis:\/\//, { REDIS_URL: url });
  });
});

describe('a model', () => {
  let redis: TestRedis;
  before(async () => {
    redis = await startRedis();
  });
  after(() => redis?.[Symbol.asyncDispose]());

  test('whose file has another hash is refused by the inference service, which names the file', async () => {
    const copy = path.join(directory, 'model');
    await cp(path.join(root, 'models/default'), copy, { recursive: true });
    const { graph } = JSON.parse(await readFile(path.join(copy, 'model.json'), 'utf8'));
    await writeFile(path.join(copy, graph.file), 'another graph');
    await assertRefused(['inference'], /SHA-256 \w+, model\.json says \w+: it is damaged or was changed/, {
      REDIS_URL: redis.url,
      MODEL_URL: copy,
    });
  });

  test('that lies elsewhere is refused with the way to bring it', async () => {
    await assertRefused(['inference', 'decoder'], /^MODEL_URL is a https: URL: .* from a directory/, {
      REDIS_URL: redis.url,
      MODEL_URL: `https://me:${secret}@models.example/genres/`,
    });
  });

  test('that wants a GPU where none is: the inference service stays up and is not ready', async (context) => {
    if (spawnSync('nvidia-smi', ['-L']).status === 0) return context.skip('there is one');
    const service = start('inference', { REDIS_URL: redis.url, REQUIRE_GPU: '1', PROVIDER: 'cuda' });
    try {
      await until('it says so', async () => {
        const { status, reasons } = await service.readiness();
        return status === 503 && /^REQUIRE_GPU=1, and no GPU can be used/.test(reasons['model'] ?? '');
      });
      await sleep(5_000);
      assert.equal(service.child.exitCode, null, service.output());
      assert.ok(service.lines().filter(({ level }) => level >= 40).length < 12, service.output());
    } finally {
      await service.stop();
    }
  });
});
