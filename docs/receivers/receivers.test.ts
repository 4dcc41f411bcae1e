/**
 * The receivers that docs/webhooks.md shows, each as a program of its own, and messages signed by what signs the real
 * ones. What a machine has not got (Go, Python's library) is skipped and named.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { eventExamples } from '@acousticsense/shared/event-examples';
import { type SignatureHeaders, sign } from '@acousticsense/shared/webhook-signature';

const here = import.meta.dirname;
const scratch = mkdtempSync(path.join(tmpdir(), 'as-receivers-'));
after(() => rmSync(scratch, { recursive: true, force: true }));

const newSecret = () => `whsec_${randomBytes(32).toString('base64')}`;
const secret = newSecret();
const minuteMs = 60_000;

interface Message {
  readonly headers: SignatureHeaders;
  readonly body: string;
}

function message(
  event: object = eventExamples['job.completed'],
  {
    id = `evt_${randomUUID()}`,
    secrets = [secret],
    at = Date.now(),
  }: { id?: string; secrets?: readonly string[]; at?: number } = {},
): Message {
  const body = JSON.stringify(event);
  return { headers: sign({ id, body }, secrets, at), body };
}

const result = (ref: string, revision: number) => ({
  ...eventExamples['job.completed'],
  data: { ...eventExamples['job.completed'].data, ref, revision },
});

interface Kind {
  readonly name: string;
  /** Why it cannot run here. */
  readonly lacks: string | false;
  /** @returns what is started. */
  prepare(): readonly [command: string, ...args: string[]];
  /** The reason that it gives for a timestamp that is off. */
  readonly tooOld: RegExp;
  readonly tooNew: RegExp;
}

const python = process.env['ACOUSTICSENSE_RECEIVER_PYTHON'] ?? 'python3';
const goEnv = { ...process.env, GOTOOLCHAIN: 'local', GOFLAGS: '-mod=readonly' };

const kinds: readonly Kind[] = [
  {
    name: 'receiver.ts',
    lacks: false,
    prepare: () => [process.execPath, path.join(here, 'receiver.ts')],
    tooOld: /too old/,
    tooNew: /too new/,
  },
  {
    name: 'receiver.py',
    lacks:
      spawnSync(python, ['-c', 'import standardwebhooks']).status !== 0 &&
      'no Python with docs/receivers/requirements.txt (ACOUSTICSENSE_RECEIVER_PYTHON)',
    prepare: () => [python, path.join(here, 'receiver.py')],
    tooOld: /too old/,
    tooNew: /too new/,
  },
  {
    name: 'receiver.go',
    lacks: whatGoLacks(),
    prepare: () => {
      const program = path.join(scratch, 'receiver');
      execFileSync('go', ['vet', '.'], { cwd: here, env: goEnv, stdio: 'pipe' });
      execFileSync('go', ['build', '-o', program, '.'], { cwd: here, env: goEnv, stdio: 'pipe' });
      return [program];
    },
    tooOld: /too old/,
    tooNew: /too new/,
  },
];

function whatGoLacks(): string | false {
  if (spawnSync('go', ['version'], { env: goEnv }).status !== 0) return 'no Go';
  const { status, stderr } = spawnSync('go', ['mod', 'download'], {
    cwd: here,
    env: goEnv,
    timeout: 120_000,
  });
  return status !== 0 && `Go cannot get the modules of docs/receivers/go.mod: ${stderr}`;
}

interface Running {
  readonly child: ChildProcess;
  readonly url: string;
  /** What it has said of the messages that it took. */
  readonly lines: string[];
  /** Resolves once it has said this. */
  said(line: string): Promise<void>;
}

async function start([command, ...args]: readonly [string, ...string[]]): Promise<Running> {
  const child = spawn(command, args, {
    env: { ...process.env, WEBHOOK_SECRET: secret, PORT: '0' },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const lines: string[] = [];
  let errors = '';
  let rest = '';
  let heard = () => {};
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    errors += text;
  });
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    const parts = (rest + text).split('\n');
    rest = parts.pop()!;
    lines.push(...parts);
    heard();
  });
  child.once('close', () => heard());
  const find = async <T>(look: () => T | undefined, what: string): Promise<T> => {
    for (;;) {
      const found = look();
      if (found !== undefined) return found;
      if (child.exitCode !== null) throw new Error(`it ended instead of ${what}: ${errors}`);
      const { promise, resolve } = Promise.withResolvers<void>();
      heard = resolve;
      await promise;
    }
  };
  const url = await find(() => /^Listening on (\S+)/.exec(lines[0] ?? '')?.[1], 'listening');
  const said = (line: string) =>
    find(() => (lines.includes(line) ? true : undefined), `saying ${line}`).then(() => {});
  return { child, url, lines, said };
}

for (const kind of kinds) {
  describe(kind.name, { skip: kind.lacks, timeout: 240_000 }, () => {
    let running: Running;
    before(async () => {
      running = await start(kind.prepare());
    });
    after(async () => {
      const child = running?.child;
      if (!child || child.exitCode !== null) return;
      child.kill('SIGKILL');
      await once(child, 'close');
    });

    async function send({ headers, body }: Message): Promise<{ status: number; text: string }> {
      const response = await fetch(`${running.url}/hook`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', ...headers },
        body,
      });
      return { status: response.status, text: await response.text() };
    }

    for (const event of Object.values(eventExamples)) {
      test(`takes ${event.type}`, async () => {
        const sent = message(event);
        assert.equal((await send(sent)).status, 204);
        const said = event.type === 'job.completed' || event.type === 'job.failed' ? 'latest' : 'noted';
        await running.said(`${sent.headers['webhook-id']} ${event.type} ${said}`);
      });
    }

    test('refuses a wrong signature, another body, and what is not signed at all', async () => {
      const good = message();
      for (const { headers, body } of [
        message(undefined, { secrets: [newSecret()] }),
        { ...good, body: good.body.replace('jazz', 'rock') },
        { ...good, headers: { ...good.headers, 'webhook-id': 'evt_another' } },
        { ...good, headers: { ...good.headers, 'webhook-signature': 'v1' } },
        { ...good, headers: { ...good.headers, 'webhook-signature': 'v1,!' } },
        { ...good, headers: {} as SignatureHeaders },
      ]) {
        const { status } = await send({ headers, body });
        assert.equal(status, 401, JSON.stringify(headers));
      }
      assert.equal((await send(good)).status, 204, 'it goes on');
    });

    test('refuses a right signature whose timestamp is 10 minutes off, says so, and takes the next attempt', async () => {
      const id = `evt_${randomUUID()}`;
      const old = await send(message(undefined, { id, at: Date.now() - 10 * minuteMs }));
      assert.equal(old.status, 401);
      assert.match(old.text, kind.tooOld);
      const early = await send(message(undefined, { id, at: Date.now() + 10 * minuteMs }));
      assert.equal(early.status, 401);
      assert.match(early.text, kind.tooNew);
      assert.equal((await send(message(undefined, { id }))).status, 204);
      await running.said(`${id} job.completed latest`);
    });

    test('takes what the old and the new secret have signed, in either order', async () => {
      const other = newSecret();
      assert.equal((await send(message(undefined, { secrets: [other, secret] }))).status, 204);
      assert.equal((await send(message(undefined, { secrets: [secret, other] }))).status, 204);
    });

    test('says the challenge back, and only a signed one', async () => {
      const challenge = randomBytes(24).toString('base64url');
      const event = {
        type: 'endpoint.verification',
        timestamp: '2026-11-24T16:40:05.123Z',
        data: { challenge },
      };
      const { status, text } = await send(message(event));
      assert.equal(status, 200);
      assert.deepEqual(JSON.parse(text), { challenge });
      const stranger = await send(message(event, { secrets: [newSecret()] }));
      assert.equal(stranger.status, 401);
      assert.ok(!stranger.text.includes(challenge));
    });

    test('works on what it was sent twice once', async () => {
      const sent = message(result(`twice-${kind.name}`, 1));
      const again = message(result(`twice-${kind.name}`, 1), {
        id: sent.headers['webhook-id'],
        at: Date.now() + 1_000,
      });
      for (const one of [sent, again]) assert.equal((await send(one)).status, 204);
      const id = sent.headers['webhook-id'];
      await running.said(`${id} job.completed latest`);
      await running.said(`${id} job.completed known`);
      assert.equal(running.lines.filter((line) => line.startsWith(id)).length, 2);
    });

    test('of several results under one ref keeps the one of the highest revision, whatever comes last', async () => {
      const ref = `GBAYE${kind.name}`;
      for (const [revision, what] of [
        [7, 'latest'],
        [9, 'latest'],
        [8, 'outdated'],
        [10, 'latest'],
      ] as const) {
        const sent = message(result(ref, revision));
        assert.equal((await send(sent)).status, 204);
        await running.said(`${sent.headers['webhook-id']} job.completed ${what}`);
      }
    });

    test('answers a test message, and takes it for no result', async () => {
      const sent = message(result('of-a-test', 99), { id: `evt_test_${randomUUID()}` });
      assert.equal((await send(sent)).status, 204);
      await running.said(`${sent.headers['webhook-id']} job.completed test`);
    });

    test('goes on when a sender hangs up', async () => {
      const { hostname, port } = new URL(running.url);
      const socket = connect(Number(port), hostname);
      await once(socket, 'connect');
      socket.write('POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{');
      socket.end();
      await once(socket.resume(), 'close');
      assert.equal((await send(message())).status, 204);
    });

    test('does not read a body that no event has', async () => {
      const body = 'x'.repeat(1_000_000);
      const status = await send({ ...message(), body }).then(
        (answer) => answer.status,
        // It may have hung up while it was still being sent to.
        () => 413,
      );
      assert.equal(status, 413);
      assert.equal((await send(message())).status, 204, 'it goes on');
    });
  });
}

describe('verify.sh', {
  skip: spawnSync('openssl', ['version']).status !== 0 && 'no openssl',
}, () => {
  function verify({ headers, body }: Message, received?: number) {
    const [headersFile, bodyFile] = ['headers', 'body'].map((name) => path.join(scratch, name)) as [
      string,
      string,
    ];
    const lines = Object.entries(headers).map(
      ([name, value]) => `${name.replace('webhook', 'Webhook')}: ${value}\r\n`,
    );
    writeFileSync(headersFile, ['HTTP-Something: else\r\n', ...lines].join(''));
    writeFileSync(bodyFile, body);
    const { status, stdout, stderr } = spawnSync(
      'sh',
      [
        path.join(here, 'verify.sh'),
        headersFile,
        bodyFile,
        ...(received === undefined ? [] : [String(Math.floor(received / 1_000))]),
      ],
      { env: { ...process.env, WEBHOOK_SECRET: secret }, encoding: 'utf8' },
    );
    return { status, stdout, stderr };
  }

  test('finds a message good, one signed with old and new secret, and a saved one when it is told when it came', () => {
    const sent = message();
    assert.deepEqual(verify(sent), {
      status: 0,
      stdout: `good: ${sent.headers['webhook-id']}\n`,
      stderr: '',
    });
    assert.equal(verify(message(undefined, { secrets: [newSecret(), secret] })).status, 0);
    const at = Date.now() - 30 * minuteMs;
    assert.equal(verify(message(undefined, { at }), at + 1_000).status, 0);
  });

  test('finds fault with a wrong signature and a changed body', () => {
    const good = message();
    for (const bad of [
      message(undefined, { secrets: [newSecret()] }),
      { ...good, body: `${good.body}\n` },
      { ...good, headers: { ...good.headers, 'webhook-signature': 'v1,*' } },
    ]) {
      const { status, stderr } = verify(bad);
      assert.equal(status, 1);
      assert.match(stderr, /No matching signature/);
    }
    assert.match(verify({ ...good, headers: {} as SignatureHeaders }).stderr, /Missing required headers/);
  });

  test('tells a timestamp that is 10 minutes off from a wrong signature', () => {
    const old = verify(message(undefined, { at: Date.now() - 10 * minuteMs }));
    assert.equal(old.status, 1);
    assert.match(old.stderr, /signature is right.*60\d s too old/);
    const early = verify(message(undefined, { at: Date.now() + 10 * minuteMs }));
    assert.equal(early.status, 1);
    assert.match(early.stderr, /signature is right.*(600|59\d) s ahead/);
  });
});
