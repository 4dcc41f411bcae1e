/** `acousticsense webhooks` as a user types it: the real program, a real API and webhook service, real receivers. */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { eventExamples } from '@acousticsense/shared/event-examples';
import { createEventLog } from '@acousticsense/shared/event-log';
import type { EventType, StoredEvent } from '@acousticsense/shared/events';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedis } from '@acousticsense/shared/redis';
import { pino } from 'pino';
import { Webhook } from 'svix';
import { type Received, startReceiver } from '../services/webhook/src/testing/receiver.ts';
import { type System, startSystem } from './system.ts';

const program = path.resolve(import.meta.dirname, '../packages/cli/bin/acousticsense.mjs');
let system: System;
const closers: (() => unknown)[] = [];
const programs = new Set<ChildProcess>();
let tell: (id: string, type: EventType) => Promise<string>;

before(async () => {
  system = await startSystem({
    without: ['decoder', 'inference', 'fetch', 'feeder'],
    env: { EGRESS_ALLOW: '127.0.0.0/8' },
  });
  closers.push(() => system.stop());
  const redis = connectRedis(system.redis.url);
  closers.push(() => redis.disconnect());
  await once(redis, 'ready');
  const storage = openStorage(pathToFileURL(path.join(system.directory, 'objects')).href);
  closers.push(() => storage.close());
  const log = createEventLog({ redis, storage, log: pino({ level: 'silent' }), kept: 1_000 });
  tell = (id, type) => {
    const { resultUrl: _, ...data } = eventExamples[type].data;
    return log.append('default', { id, event: { ...eventExamples[type], data } as StoredEvent });
  };
});
after(async () => {
  // Of a test that failed.
  for (const child of programs) child.kill('SIGKILL');
  for (const close of closers.reverse()) await close();
});

interface Run {
  readonly child: ChildProcess;
  stdout(): string;
  stderr(): string;
  readonly ended: Promise<{ code: number | null; stdout: string; stderr: string }>;
}

function start(args: readonly string[], env: Record<string, string> = {}): Run {
  const child = spawn(process.execPath, [program, 'webhooks', ...args], {
    env: { ...process.env, NO_COLOR: '1', ACOUSTICSENSE_KEY: '', DATA_DIR: '/nowhere', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  programs.add(child);
  child.once('close', () => programs.delete(child));
  const said = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const)
    child[name].setEncoding('utf8').on('data', (text: string) => {
      said[name] += text;
    });
  const ended = once(child, 'close').then(([code]) => ({ code: code as number | null, ...said }));
  return { child, stdout: () => said.stdout, stderr: () => said.stderr, ended };
}

const run = (args: readonly string[], env?: Record<string, string>) => start(args, env).ended;

async function refused(args: readonly string[], code: number, sentence: RegExp) {
  const { stderr, stdout, ...ended } = await run(args);
  assert.equal(ended.code, code, stderr);
  assert.match(stderr, sentence);
  assert.doesNotMatch(stderr, /\n\s+at /, 'a stack trace');
  assert.equal(stdout, '');
}

async function until(what: () => boolean, why: () => string): Promise<void> {
  for (const deadline = Date.now() + 60_000; !what(); await sleep(20))
    if (Date.now() > deadline) assert.fail(`it did not come about: ${why()}`);
}

async function api(at: string, body?: unknown) {
  const response = await fetch(`${system.url}${at}`, {
    method: 'POST',
    ...(body === undefined
      ? {}
      : { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }),
  });
  const answer = (await response.json()) as Record<string, string>;
  assert.ok(response.ok, JSON.stringify(answer));
  return answer;
}

describe('webhooks test', () => {
  test('tells what the endpoint answered; 0 only when it was delivered', async () => {
    let status = 200;
    await using receiver = await startReceiver(({ body }, response) => {
      const { type } = JSON.parse(body) as { type: string };
      response.writeHead(type === 'endpoint.verification' ? 404 : status).end('noted\u001b[31m');
    });
    const url = `${receiver.origin}/hook`;
    const { id, secret } = await api('/v1/webhooks/endpoints', { url });
    const good = await run(['test', id!, '--url', system.url]);
    assert.equal(good.code, 0, good.stderr);
    assert.match(good.stdout, /^\d{4}-\S+ {2}delivered {2}200 {2}\d+ ms\nnoted\ufffd\[31m\n$/);
    const message = receiver.received.at(-1)!;
    new Webhook(secret!).verify(message.body, message.headers as Record<string, string>);
    assert.match(message.headers['webhook-id'] as string, /^evt_test_/);

    status = 503;
    const bad = await run(['test', url, '--json'], { DATA_DIR: await runningOn() });
    assert.equal(bad.code, 1, bad.stderr);
    const { at: _, ms, ...outcome } = JSON.parse(bad.stdout) as Record<string, unknown>;
    assert.ok(typeof ms === 'number');
    assert.deepEqual(outcome, {
      outcome: 'failed',
      status: 503,
      problem: 'status',
      excerpt: 'noted\ufffd[31m',
    });

    await receiver[Symbol.asyncDispose]();
    const gone = await run(['test', url, '--url', system.url]);
    assert.equal(gone.code, 1);
    assert.match(gone.stdout, /^\S+ {2}failed {2}connection {2}\d+ ms\n$/);
  });

  test('what is not there is told in a sentence', async () => {
    const at = ['--url', system.url];
    await refused(['test', 'ep_none', ...at], 1, /no endpoint with this id/);
    await refused(['test', 'https://nobody.example.com/', ...at], 1, /No endpoint of .* has the URL https:/);
    await refused(['test', 'ep_none'], 1, /No AcousticSense runs on \/nowhere.*--url/s);
    await refused(['test', 'ep_none', '--url', 'http://127.0.0.1:1'], 1, /cannot be reached/);
    await refused(['test'], 2, /needs ENDPOINT/);
  });
});

/** As `npm start` leaves it. */
async function runningOn(): Promise<string> {
  await writeFile(path.join(system.directory, 'run.json'), JSON.stringify({ url: system.url }));
  return system.directory;
}

describe('webhooks listen', () => {
  const linesOf = (listening: Run) => listening.stdout().split('\n').filter(Boolean);
  /** It begins with the second in which it is started: what was told before lies behind it. */
  async function begin(args: readonly string[], env?: Record<string, string>): Promise<Run> {
    await sleep(1_100);
    const listening = start(args, env);
    await until(() => listening.stderr().includes('Ctrl-C stops'), listening.stderr);
    return listening;
  }
  async function stopped(listening: Run): Promise<string> {
    listening.child.kill('SIGINT');
    const { code, stderr } = await listening.ended;
    assert.equal(code, 130);
    assert.doesNotMatch(stderr, /\n\s+at /, 'a stack trace');
    return /Stopped\. With --after (\d+-\d+) it goes on from here\.\n$/.exec(stderr)![1]!;
  }
  const ids = (received: readonly Received[]) => received.map(({ headers }) => headers['webhook-id']);

  test('sends what happens from now on, signed; then, with the cursor that it told, what it missed', async () => {
    await tell('evt_before', 'job.completed');
    let status = 200;
    await using receiver = await startReceiver((_message, response) => response.writeHead(status).end());
    const to = ['listen', '--forward-to', `${receiver.origin}/hook`];
    const listening = await begin(to, { DATA_DIR: await runningOn() });
    const secret = /whsec_[\w+/=]+/.exec(listening.stderr())![0];
    await tell('evt_1', 'job.completed');
    await until(() => linesOf(listening).length === 1, listening.stderr);
    assert.match(linesOf(listening)[0]!, /^\d\d:\d\d:\d\d {2}job\.completed {6}evt_1 {2}200 {2}\d+ ms$/);
    const { path: at, headers, body } = receiver.received[0]!;
    assert.equal(at, '/hook');
    assert.equal(headers['content-type'], 'application/json');
    assert.equal(headers['user-agent'], 'AcousticSense');
    new Webhook(secret).verify(body, headers as Record<string, string>);
    const event = JSON.parse(body) as Record<string, Record<string, unknown>>;
    assert.deepEqual(Object.keys(event), ['type', 'timestamp', 'data']);
    assert.ok(String(event['data']!['resultUrl']).startsWith('http'));

    status = 500;
    await tell('evt_2', 'batch.completed');
    await tell('evt_3', 'batch.progress');
    await tell('evt_4', 'endpoint.disabled');
    await until(() => linesOf(listening).length === 3, listening.stdout);
    for (const line of linesOf(listening).slice(1)) assert.match(line, / {2}500 {2}/);
    const cursor = await stopped(listening);
    await tell('evt_5', 'job.failed');
    await tell('evt_6', 'job.completed');
    assert.deepEqual(ids(receiver.received), ['evt_1', 'evt_2', 'evt_4']);

    const own = `whsec_${randomBytes(24).toString('base64')}`;
    const more = ['--types', 'job.failed,job.cancelled', '--secret', own, '--url', system.url];
    const again = start([...to, '--after', cursor, ...more]);
    await until(() => receiver.received.length === 4, again.stderr);
    const last = receiver.received[3]!;
    assert.equal(last.headers['webhook-id'], 'evt_5');
    new Webhook(own).verify(last.body, last.headers as Record<string, string>);
    assert.ok(!again.stderr().includes(own), 'a secret that was given is not shown');
    await stopped(again);
    assert.equal(receiver.received.length, 4);
  });

  test('goes on when the service was away, and when nobody listens where it sends to', async () => {
    const receiver = await startReceiver((_message, response) => response.end());
    const to = ['listen', '--forward-to', receiver.origin, '--url', system.url];
    const listening = await begin(to);
    await system.kill('api');
    await until(() => listening.stderr().includes('is asked again'), listening.stderr);
    await tell('evt_away', 'job.completed');
    await system.start('api');
    await until(() => linesOf(listening).length === 1, listening.stderr);
    assert.deepEqual(ids(receiver.received), ['evt_away']);
    assert.equal(listening.stderr().match(/is asked again/g)!.length, 1, 'it is told once');
    assert.match(listening.stderr(), /is back/);

    await receiver[Symbol.asyncDispose]();
    await tell('evt_nobody', 'job.completed');
    await until(() => linesOf(listening).length === 2, listening.stderr);
    assert.match(linesOf(listening)[1]!, /evt_nobody {2}ECONNREFUSED {2}/);
    await stopped(listening);
  });

  test('stops at once while it waits for an answer, and tells that event again later', async () => {
    await using receiver = await startReceiver(() => {});
    const to = ['listen', '--forward-to', receiver.origin, '--url', system.url];
    const listening = await begin(to);
    await tell('evt_slow', 'job.completed');
    await until(() => receiver.received.length === 1, listening.stderr);
    const cursor = await stopped(listening);
    const again = start([...to, '--after', cursor]);
    await until(() => receiver.received.length === 2, again.stderr);
    assert.deepEqual(ids(receiver.received), ['evt_slow', 'evt_slow']);
    await stopped(again);
  });

  test('what cannot be used is told before anything is sent', async () => {
    const to = ['listen', '--forward-to', 'http://localhost:1/hook'];
    const at = ['--url', system.url];
    await refused(['listen', ...at], 2, /Say where to send them/);
    await refused(['listen', '--forward-to', 'localhost:3000', ...at], 2, /begins with http/);
    await refused([...to, '--types', 'job.completed,job.done', ...at], 2, /no type "job\.done".*job\.failed/);
    for (const secret of ['abc', 'whsec_', 'whsec_?'])
      await refused([...to, '--secret', secret, ...at], 2, /begins with whsec_/);
    await refused([...to, '--after', 'yesterday', ...at], 1, /refuses: .*after/);
    await refused(to, 1, /No AcousticSense runs on/);
  });
});
