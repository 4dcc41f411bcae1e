/**
 * Redis behind three Sentinels: the primary dies in mid-batch, the replica takes over, and every job that was accepted
 * ends. Replication is asynchronous: what the replica had not heard is lost, and counted here.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type connectRedis, connectRedisForWorker } from '../packages/shared/src/redis.ts';
import { sine, wav } from './audio.ts';
import { finished, formOf, type Job, request } from './client.ts';
import { type System, startSystem } from './system.ts';

const password = 'replicated';
const name = 'music';
const canWatch = spawnSync('redis-server', ['--version']).status === 0;

let seed = 0;
const song = () =>
  wav([sine({ seconds: 3, hz: 300 + 5 * seed++, sampleRate: 8_000 })], { sampleRate: 8_000 });

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  server.close();
  await once(server, 'close');
  return port;
}

describe('Redis behind Sentinels', { skip: !canWatch && 'redis-server --sentinel cannot be started' }, () => {
  let directory: string;
  let url: string;
  let primary: ChildProcess;
  let replicaPort: number;
  let system: System;
  const servers: ChildProcess[] = [];

  async function serve(args: string[]): Promise<ChildProcess> {
    const server = spawn('redis-server', args, { stdio: 'ignore' });
    servers.push(server);
    await once(server, 'spawn');
    return server;
  }

  async function startServer(port: number, more: string[]): Promise<ChildProcess> {
    const home = path.join(directory, String(port));
    await mkdir(home);
    const of = (values: Record<string, string>) =>
      Object.entries(values).flatMap(([key, v]) => [`--${key}`, v]);
    const settings = { bind: '127.0.0.1', port: String(port), dir: home, appendonly: 'yes', save: '' };
    const server = await serve([
      ...of({ ...settings, requirepass: password, masterauth: password }),
      ...more,
    ]);
    const redis = connectRedisForWorker(`redis://:${password}@127.0.0.1:${port}`);
    await redis.ping().finally(() => redis.disconnect());
    return server;
  }

  const inReplica = async <T>(ask: (redis: ReturnType<typeof connectRedis>) => Promise<T>): Promise<T> => {
    const redis = connectRedisForWorker(`redis://:${password}@127.0.0.1:${replicaPort}`);
    return ask(redis).finally(() => redis.disconnect());
  };

  before(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'as-sentinel-'));
    const primaryPort = await freePort();
    replicaPort = await freePort();
    primary = await startServer(primaryPort, []);
    await startServer(replicaPort, ['--replicaof', '127.0.0.1', String(primaryPort)]);
    while (!/master_link_status:up/.test(await inReplica((redis) => redis.info('replication'))))
      await sleep(50);
    const ports: number[] = [];
    for (let n = 0; n < 3; n += 1) {
      const port = await freePort();
      const file = path.join(directory, `sentinel-${port}.conf`);
      await writeFile(
        file,
        [
          `port ${port}`,
          'bind 127.0.0.1',
          `dir ${directory}`,
          `sentinel monitor ${name} 127.0.0.1 ${primaryPort} 2`,
          `sentinel auth-pass ${name} ${password}`,
          `sentinel down-after-milliseconds ${name} 1000`,
          `sentinel failover-timeout ${name} 5000`,
        ].join('\n'),
      );
      await serve([file, '--sentinel']);
      ports.push(port);
    }
    // A vote needs Sentinels that know of each other and of the replica.
    for (const port of ports) {
      const sentinel = connectRedisForWorker(`redis://127.0.0.1:${port}`);
      try {
        for (let known = false; !known; await sleep(100)) {
          const flat = (await sentinel.call('SENTINEL', 'MASTER', name)) as string[];
          const value = (field: string) => Number(flat[flat.indexOf(field) + 1]);
          known = value('num-other-sentinels') === 2 && value('num-slaves') === 1;
        }
      } finally {
        sentinel.disconnect();
      }
    }
    // The first is away: any of the others has to do.
    const dead = await freePort();
    url = `redis+sentinel://:${password}@${[dead, ...ports].map((port) => `127.0.0.1:${port}`).join(',')}/${name}`;
    system = await startSystem({
      redisUrl: url,
      env: { RECONCILE_SECONDS: '0.5', RECONCILE_AFTER_SECONDS: '3' },
    });
  });

  after(async () => {
    await system?.stop();
    for (const server of servers) {
      if (server.exitCode !== null || server.signalCode !== null) continue;
      server.kill('SIGKILL');
      await once(server, 'exit');
    }
    await rm(directory, { recursive: true, force: true });
  });

  const send = () =>
    request(`${system.url}/v1/jobs`, { method: 'POST', body: formOf(song()) }).catch(() => undefined);

  test('every job that was accepted ends, though the primary is killed in mid-work', async (context) => {
    const accepted: { id: string; at: number }[] = [];
    let refused = 0;
    let stopping = false;
    const one = async () => {
      while (!stopping) {
        const answer = await send();
        if (answer?.status === 202) {
          accepted.push({ id: answer.body.id, at: performance.now() });
          await sleep(100);
        } else {
          // Nothing but "not now" while there is no primary.
          assert.ok(answer === undefined || answer.status === 503, JSON.stringify(answer));
          refused += 1;
          await sleep(100);
        }
      }
    };
    const senders = [one(), one(), one()];
    while (accepted.length < 12) await sleep(5);
    const killedAt = performance.now();
    primary.kill('SIGKILL');
    let again = 0;
    while (again === 0) {
      await sleep(20);
      again = accepted.find(({ at }) => at > killedAt + 500)?.at ?? 0;
      assert.ok(performance.now() - killedAt < 30_000, 'nobody took over');
    }
    stopping = true;
    await Promise.all(senders);

    const keys = new Set<string>();
    for (const { id } of accepted) {
      const answer = await request<Job>(`${system.url}/v1/jobs/${id}`);
      if (answer.status === 404) keys.add(id);
    }
    const lost = [...keys];
    const ended = await Promise.all(
      accepted.filter(({ id }) => !keys.has(id)).map(({ id }) => finished(system.url, id, 40_000)),
    );
    assert.deepEqual(
      ended
        .filter(({ state }) => state !== 'completed')
        .map(({ id, state, error }) => ({ id, state, error })),
      [],
    );
    assert.ok(await inReplica((redis) => redis.info('replication')).then((info) => /role:master/.test(info)));
    const lostAgo = accepted.filter(({ id }) => keys.has(id)).map(({ at }) => Math.round(killedAt - at));
    context.diagnostic(
      `accepted ${accepted.length}, lost ${lost.length} (ms before the kill: ${lostAgo.join(' ') || 'none'}), ` +
        `refused ${refused}, accepting again after ${Math.round(again - killedAt)} ms`,
    );
    // Over loopback the replica is less than this behind.
    assert.ok(
      lostAgo.every((ms) => ms < 1_000),
      'only what was accepted in the last moment may be lost',
    );
  });

  test('services were never restarted, are ready, and take work as before', async () => {
    for (const service of ['decoder', 'inference', 'webhook', 'fetch', 'feeder'] as const) {
      for (let status = 0; status !== 200; await sleep(50))
        ({ status } = await fetch(`${system.healthUrl(service)}/readyz`));
    }
    const answer = await send();
    assert.equal(answer?.status, 202);
    assert.equal((await finished(system.url, answer.body.id)).state, 'completed');
  });
});
