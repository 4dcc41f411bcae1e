/** docker-compose.yml and the secrets that its first service makes; the containers themselves: images.test.ts. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { promisify } from 'node:util';

const root = path.resolve(import.meta.dirname, '../..');
const run = promisify(execFile);

/** Compose is a plugin of Docker's client, or a program of its own. */
async function compose(...args: string[]): Promise<string> {
  const options = { cwd: root, env: { PATH: process.env['PATH'] ?? '' } };
  const plugin = await run('docker', ['compose', 'version'], options).then(
    () => true,
    () => false,
  );
  const [program, ...before] = plugin ? ['docker', 'compose'] : ['docker-compose'];
  return (await run(program!, [...before, ...args], options)).stdout;
}

const composed = await compose('version').then(
  () => true,
  () => false,
);

test('the compose file is valid with every profile, and no service goes without limits or restarts by chance', {
  skip: composed ? false : 'Docker Compose is not installed',
}, async () => {
  await compose('--profile', 'gpu', '--profile', 'observability', 'config', '-q');
  const names = (await compose('--profile', 'gpu', '--profile', 'observability', 'config', '--services'))
    .trim()
    .split('\n');
  assert.deepEqual(
    names.sort(),
    [
      ...[
        'api',
        'decoder',
        'feeder',
        'fetch',
        'grafana',
        'inference',
        'inference-gpu',
        'prometheus',
        'redis',
      ],
      ...['setup', 'storage', 'webhook'],
    ].sort(),
  );
  const rendered = await compose('--profile', 'gpu', '--profile', 'observability', 'config');
  for (const [word, count] of [
    ['mem_limit:', names.length],
    ['restart:', names.length],
    ['no-new-privileges:true', names.length],
    ['cap_drop:', names.length],
  ] as const) {
    assert.equal(rendered.split(word).length - 1, count, word);
  }
});

test('the first start makes every secret, the second changes none, and what was there before stays', async () => {
  const volumes = await mkdtemp(path.join(tmpdir(), 'compose-setup-'));
  try {
    const setup = async () =>
      (await run(process.execPath, [path.join(root, 'deploy/compose/setup.mjs'), volumes])).stdout;
    const read = (name: string) => readFile(path.join(volumes, name), 'utf8');
    const names = [
      ...['secrets-api/API_KEY', 'secrets-sealing/SECRETS_KEY', 'secrets-redis/REDIS_URL'],
      ...['secrets-redis/redis.conf', 'secrets-store/s3.json', 'secrets-storage/AWS_SECRET_ACCESS_KEY'],
    ];
    assert.match(await setup(), /^Made: /);
    const first = await Promise.all(names.map(read));
    assert.ok(first[0]!.trim().length >= 16);
    assert.equal(Buffer.from(first[1]!, 'base64').length, 32);
    const password = /^redis:\/\/:([^@]+)@redis:6379\n$/.exec(first[2]!)?.[1];
    assert.match(first[3]!, new RegExp(`^requirepass ${password}$`, 'm'));
    assert.match(first[3]!, /^maxmemory-policy noeviction$/m);
    assert.match(first[3]!, /^appendonly yes$/m);
    assert.equal(JSON.parse(first[4]!).identities[0].credentials[0].secretKey, first[5]!.trim());
    // Services run as users of their own, none of which owns them.
    assert.equal((await stat(path.join(volumes, names[0]!))).mode & 0o777, 0o444);

    assert.equal(await setup(), 'Every secret is there.\n');
    assert.deepEqual(await Promise.all(names.map(read)), first);

    await rm(path.join(volumes, 'secrets-api/API_KEY'));
    await writeFile(path.join(volumes, 'secrets-api/API_KEY'), 'a key of the operator\n');
    await setup();
    assert.equal(await read('secrets-api/API_KEY'), 'a key of the operator\n');
  } finally {
    await rm(volumes, { recursive: true });
  }
});
