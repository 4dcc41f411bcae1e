/**
 * The finished images, each started as it is meant to run: no root, nothing writable but what is mounted, no network.
 * Runs where a Docker engine answers and holds images of this version (deploy/images/build.sh); names the others.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

const root = path.resolve(import.meta.dirname, '../..');
const run = promisify(execFile);
const docker = async (...args: string[]) => (await run('docker', args, { timeout: 60_000 })).stdout.trim();

const engine = await docker('version', '--format', '{{.Server.Version}}').catch(() => undefined);
const { version } = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8')) as { version: string };
const registry = process.env['REGISTRY'] ?? 'acousticsense';
const imageOf = (target: string) => `${registry}/${target}:${version}`;

/** Megabytes that the project's own layers may have, on top of Debian's. */
const ownMegabytes = {
  api: 160,
  fetch: 150,
  feeder: 150,
  decoder: 170,
  webhook: 150,
  'inference-cpu': 215,
  'inference-gpu': 2_250,
} as const;
type Target = keyof typeof ownMegabytes;
const targets = Object.keys(ownMegabytes) as Target[];

const there = new Set<string>();
for (const target of targets) {
  const found =
    engine && (await docker('image', 'inspect', imageOf(target), '--format', '{{.Id}}').catch(() => ''));
  if (found) there.add(target);
}
const reasonToSkip = (target: Target) =>
  engine === undefined
    ? 'no Docker engine answers'
    : !there.has(target) && `there is no image ${imageOf(target)}: deploy/images/build.sh ${target}`;

interface Config {
  readonly User: string;
  readonly Labels: Readonly<Record<string, string>>;
  readonly Healthcheck?: { readonly Test: readonly string[] };
}

for (const target of targets) {
  describe(`the image ${target}`, { concurrency: false }, () => {
    const skip = reasonToSkip(target);
    const started: string[] = [];
    after(async () => {
      for (const id of started) await docker('rm', '-f', '-v', id);
    });

    test('has a user that is not root, a healthcheck, labels, and no more than its size', {
      skip,
    }, async () => {
      const [config, layers] = await Promise.all([
        docker('image', 'inspect', imageOf(target), '--format', '{{json .Config}}'),
        docker('history', '--human=false', '--format', '{{.Size}}', imageOf(target)),
      ]);
      const { User, Labels, Healthcheck } = JSON.parse(config) as Config;
      assert.equal(User, '10001:10001');
      assert.match(Healthcheck?.Test.join(' ') ?? '', /readyz/);
      assert.equal(Labels['org.opencontainers.image.version'], version);
      assert.match(Labels['org.opencontainers.image.title'] ?? '', /^AcousticSense ./);
      // The last line is Debian's own layer, whose size is not ours.
      const own = layers.split('\n').slice(0, -1);
      const megabytes = own.reduce((sum, bytes) => sum + Number(bytes), 0) / 1e6;
      assert.ok(megabytes < ownMegabytes[target], `${Math.round(megabytes)} MB`);
    });

    test('holds no tests, no package manager of Node, no secrets', { skip }, async () => {
      const files = (
        await docker(
          'run',
          '--rm',
          '--network',
          'none',
          '--entrypoint',
          'find',
          imageOf(target),
          '/app',
          '-type',
          'f',
        )
      ).split('\n');
      const own = files.filter((file) => !file.includes('/node_modules/'));
      assert.ok(own.some((file) => file.endsWith('/src/main.ts')));
      assert.deepEqual(
        own.filter((file) => /\.test\.ts$|\/testing\/|\.env|\.git\/|\.py$/.test(file)),
        [],
      );
      const services = new Set(own.flatMap((file) => /\/services\/(\w+)\//.exec(file)?.[1] ?? []));
      const expected = [target.replace(/-.*/, ''), ...(target === 'api' ? ['web'] : [])];
      assert.deepEqual([...services].sort(), expected);
      await assert.rejects(
        docker('run', '--rm', '--network', 'none', '--entrypoint', 'npm', imageOf(target), '-v'),
      );
    });

    test('starts on a read-only root, is alive, and says at /readyz what it waits for', {
      skip,
    }, async () => {
      const id = await docker(
        ...['run', '-d', '--network', 'none', '--read-only', '--cap-drop', 'ALL'],
        ...[
          '--security-opt',
          'no-new-privileges',
          '--tmpfs',
          '/tmp',
          '-v',
          '/var/lib/acousticsense',
          '-v',
          '/scratch',
        ],
        ...['-e', 'API_KEY=a-key-for-this-test-alone', imageOf(target)],
      );
      started.push(id);
      const ask = async (what: string) => {
        const script = `fetch('http://127.0.0.1:'+process.env.METRICS_PORT+'/${what}').then(async (r)=>console.log(r.status, await r.text()))`;
        return docker('exec', id, 'node', '-e', script);
      };
      let alive = '';
      for (let tries = 0; tries < 60 && alive === ''; tries += 1) {
        alive = await ask('healthz').catch(() => sleep(500, ''));
      }
      assert.equal(alive, '200 ok', await docker('logs', '--tail', '5', id));
      const ready = await ask('readyz');
      assert.match(ready, /^503 .*"redis":/);
      // Storage is the directory in the mounted volume: it can be written.
      assert.doesNotMatch(ready, /"storage":/);
      // Without a GPU the GPU image is not ready and names it; nobody falls back to the CPU in silence.
      if (target === 'inference-gpu') assert.match(ready, /REQUIRE_GPU=1, and no GPU can be used/);
    });
  });
}

test('SIGTERM ends the container with 0, even while everything it needs is away', {
  skip: reasonToSkip('fetch'),
}, async () => {
  const id = await docker('run', '-d', '--network', 'none', '-e', 'DRAIN_SECONDS=1', imageOf('fetch'));
  try {
    const ready = async () => (await docker('logs', id)).includes('health and metrics');
    for (let tries = 0; tries < 60 && !(await ready()); tries += 1) await sleep(250);
    await docker('stop', '-t', '30', id);
    assert.equal(await docker('inspect', id, '--format', '{{.State.ExitCode}}'), '0');
  } finally {
    await docker('rm', '-f', '-v', id);
  }
});

test('a secret in a file of /run/secrets stands for its variable, and a given variable comes before it', {
  skip: reasonToSkip('fetch'),
}, async () => {
  const script =
    'const fs=require("node:fs");fs.mkdirSync("/tmp/given/redis",{recursive:true});' +
    'fs.writeFileSync("/tmp/given/redis/REDIS_URL","redis://of-a-file\\n");fs.writeFileSync("/tmp/given/API_KEY","file");' +
    'import("/app/deploy/images/given-files.mjs").then(()=>console.log(process.env.REDIS_URL,process.env.API_KEY))';
  const said = await docker(
    ...[
      'run',
      '--rm',
      '--network',
      'none',
      '--tmpfs',
      '/tmp',
      '-e',
      'SECRETS_DIR=/tmp/given',
      '-e',
      'API_KEY=given',
    ],
    ...['--entrypoint', 'node', imageOf('fetch'), '-e', script],
  );
  assert.equal(said, 'redis://of-a-file given');
});

test("the CUDA provider's release is read from the lockfile, and the wheels' majors are its own", async () => {
  const lock = JSON.parse(await readFile(path.join(root, 'package-lock.json'), 'utf8')) as {
    packages: Record<string, { version: string }>;
  };
  // What was looked into when cuda-requirements.txt was written. Another release may want another CUDA.
  assert.equal(lock.packages['node_modules/onnxruntime-node']?.version, '1.30.0');
});
