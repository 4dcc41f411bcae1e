import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

interface Running {
  child: ChildProcess;
  messages: { type: string; port?: number; message?: string; reasons?: Record<string, string> }[];
  lines(): { msg: string; level: number }[];
  url: string;
  exit: Promise<number | null>;
}

async function start(mode = ''): Promise<Running> {
  const child = spawn(process.execPath, [path.join(import.meta.dirname, 'testing/small-service.ts')], {
    env: { ...process.env, MODE: mode },
    stdio: ['ignore', 'pipe', 'inherit', 'ipc'],
  });
  let text = '';
  child.stdout!.on('data', (chunk) => {
    text += chunk;
  });
  const running: Running = {
    child,
    messages: [],
    lines: () =>
      text
        .split('\n')
        .filter(Boolean)
        .map((line) => JSON.parse(line)),
    url: '',
    // 'close' does not come after a disconnect: the exit, and the end of what was printed.
    exit: Promise.all([once(child, 'exit'), once(child.stdout!, 'end')]).then(([[code]]) => code),
  };
  child.on('message', (message) => {
    running.messages.push(message as Running['messages'][number]);
  });
  const settled = () => running.messages.some(({ type }) => type === 'listening' || type === 'failed');
  for (let n = 0; n < 500 && !settled() && child.exitCode === null; n += 1) await sleep(10);
  running.url = `http://127.0.0.1:${running.messages.find(({ type }) => type === 'listening')?.port}`;
  return running;
}
const closedInOrder = (running: Running) =>
  running
    .lines()
    .map(({ msg }) => msg)
    .filter((msg) => msg.startsWith('closed'));
const told = async (running: Running, type: string) => {
  for (let n = 0; n < 500 && !running.messages.some((message) => message.type === type); n += 1)
    await sleep(10);
  return running.messages.find((message) => message.type === type);
};

test('SIGTERM closes what was opened last-in first-out, and the exit code is 0', async () => {
  const running = await start();
  running.child.kill('SIGTERM');
  assert.equal(await running.exit, 0);
  assert.deepEqual(closedInOrder(running), ['closed third', 'closed second', 'closed first']);
});

test('a closer that fails does not keep the others from closing', async () => {
  const running = await start('failing-closer');
  running.child.kill('SIGTERM');
  assert.equal(await running.exit, 0);
  assert.equal(closedInOrder(running).length, 3);
});

test('a service whose parent is gone stops by itself', async () => {
  const running = await start();
  running.child.disconnect();
  assert.equal(await running.exit, 0);
  assert.equal(closedInOrder(running).length, 3);
});

test('work that does not end within the drain time is told to give back', async () => {
  const running = await start('slow-drain');
  const from = Date.now();
  running.child.kill('SIGTERM');
  assert.equal(await running.exit, 0);
  assert.ok(Date.now() - from >= 900);
  assert.ok(running.lines().some(({ msg }) => msg === 'work given back'));
});

test('a closer that never ends, as while Redis is away, does not keep the process', async () => {
  const running = await start('hanging-closer');
  running.child.kill('SIGTERM');
  const exit = await Promise.race([running.exit, sleep(10_000, 'still there', { ref: false })]);
  if (exit === 'still there') running.child.kill('SIGKILL');
  assert.equal(exit, 0);
});

test('readiness is 503 with the reason until every check passes, while health is 200', async () => {
  const running = await start('late');
  const early = await fetch(`${running.url}/readyz`);
  assert.equal(early.status, 503);
  assert.deepEqual(await early.json(), { ready: false, reasons: { model: 'still loading' } });
  assert.equal((await fetch(`${running.url}/healthz`)).status, 200);
  const metrics = async () => (await fetch(`${running.url}/metrics`)).text();
  assert.match(await metrics(), /acousticsense_ready\{part="model",service="small"\} 0/);
  await told(running, 'ready');
  assert.match(await metrics(), /acousticsense_ready\{part="model",service="small"\} 1/);
  assert.equal((await fetch(`${running.url}/readyz`)).status, 200);
  assert.match(
    await (await fetch(`${running.url}/metrics`)).text(),
    /process_resident_memory_bytes\{service="small"\}/,
  );
  assert.equal((await fetch(`${running.url}/other`)).status, 404);
  running.child.kill('SIGTERM');
  await running.exit;
});

test('a check that hangs is a reason, and does not hang the answer', async () => {
  const running = await start('hanging-check');
  const from = Date.now();
  const answer = await fetch(`${running.url}/readyz`);
  assert.equal(answer.status, 503);
  assert.match(
    ((await answer.json()) as { reasons: Record<string, string> }).reasons['storage']!,
    /no answer within/,
  );
  assert.ok(Date.now() - from < 5_000);
  running.child.kill('SIGTERM');
  await running.exit;
});

for (const [mode, sentence] of [
  ['bad-config', 'PORT: must be a number.'],
  ['unfit', 'This Redis runs in cluster mode.'],
] as const) {
  test(`a service that can never serve (${mode}) exits non-zero with one sentence, told to its parent too`, async () => {
    const running = await start(mode);
    assert.equal(await running.exit, 1);
    assert.equal((await told(running, 'failed'))?.message, sentence);
    assert.ok(running.lines().some(({ msg, level }) => msg === sentence && level === 60));
  });
}

test('a rejection that nobody handles ends the process: its state is unknown', async () => {
  const running = await start('bug');
  assert.equal(await running.exit, 1);
  assert.ok(running.lines().some(({ msg }) => msg === 'unhandled rejection'));
});
