import assert from 'node:assert/strict';
import { createHmac, randomBytes } from 'node:crypto';
import type { LookupAddress } from 'node:dns';
import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises';
import { createEgressGuard, type EgressOptions } from '@acousticsense/egress/guard';
import { Webhook } from 'svix';
import { type Clock, fastClock, systemClock } from './clock.ts';
import { createDeliver, explain, type Outcome } from './deliver.ts';
import { makeCertificates } from './testing/certificates.ts';
import { type Receiver, startRawReceiver, startReceiver } from './testing/receiver.ts';

const certificates = makeCertificates();
const secret = `whsec_${randomBytes(24).toString('base64')}`;
const body = '{"type":"job.completed","data":{"genre":"Chanson française – „Été“ 🎶"}}';
const never = new AbortController().signal;

const guards: { close(): Promise<void> }[] = [];
after(() => Promise.all(guards.map((guard) => guard.close())));

function delivering(egress: EgressOptions = {}, timeoutMs = 15_000, clock: Clock = systemClock) {
  const guard = createEgressGuard({ allow: '127.0.0.0/8', ...egress });
  guards.push(guard);
  const deliver = createDeliver({ guard, clock, timeoutMs });
  const send = (url: string, secrets: readonly string[] = [secret], signal = never) =>
    deliver({ id: 'evt_1', url, body }, secrets, signal);
  return { guard, deliver, send };
}
const { send } = delivering();

/** It failed, and for this reason if one is given; its sentence names no address. */
function assertFailed(outcome: Outcome, problem?: string) {
  assert.ok(outcome.kind === 'failed', JSON.stringify(outcome));
  if (problem !== undefined) assert.equal(outcome.problem, problem);
  assert.doesNotMatch(explain(outcome) + JSON.stringify(outcome), /\d+\.\d+\.\d+\.\d+|undefined/);
  return outcome;
}

/** However it comes about: a reset is as good. */
async function closed(socket: Socket): Promise<void> {
  while (!socket.closed) await sleep(5);
}

/** By plain arithmetic, as the specification has it. */
const signatureOf = (key: string, { id, timestamp }: { id: string; timestamp: string }) =>
  `v1,${createHmac('sha256', Buffer.from(key.slice('whsec_'.length), 'base64'))
    .update(`${id}.${timestamp}.${body}`)
    .digest('base64')}`;

describe('what is sent', () => {
  test('is the message byte for byte, with the headers of a standard webhook', async () => {
    await using receiver = await startReceiver((_message, response) => response.writeHead(204).end());
    const before = Math.floor(Date.now() / 1_000);
    const outcome = await send(`${receiver.origin}/hooks?a=1#part`);
    assert.equal(outcome.kind, 'delivered');
    const [message] = receiver.received;
    assert.equal(message!.method, 'POST');
    assert.equal(message!.path, '/hooks?a=1');
    assert.equal(message!.body, body);
    const { headers } = message!;
    assert.equal(headers['content-type'], 'application/json');
    assert.equal(headers['user-agent'], 'AcousticSense');
    assert.equal(headers['webhook-id'], 'evt_1');
    const timestamp = headers['webhook-timestamp'] as string;
    assert.match(timestamp, /^\d+$/);
    assert.ok(Number(timestamp) >= before && Number(timestamp) <= Date.now() / 1_000);
    assert.equal(headers['webhook-signature'], signatureOf(secret, { id: 'evt_1', timestamp }));
  });

  test('is signed with every secret: each of them alone verifies it, another does not', async () => {
    await using receiver = await startReceiver((_message, response) => response.end());
    const secrets = [secret, `whsec_${randomBytes(32).toString('base64')}`];
    await send(receiver.origin, secrets);
    const { headers, body: sent } = receiver.received[0]!;
    const [timestamp, signatures] = [headers['webhook-timestamp'], headers['webhook-signature']] as string[];
    assert.equal(
      signatures,
      secrets.map((one) => signatureOf(one, { id: 'evt_1', timestamp: timestamp! })).join(' '),
    );
    const verify = (one: string, text: string) =>
      new Webhook(one).verify(text, headers as Record<string, string>);
    for (const one of secrets) verify(one, sent);
    assert.throws(() => verify(`whsec_${randomBytes(24).toString('base64')}`, sent), /No matching signature/);
    assert.throws(() => verify(secret, `${sent} `), /No matching signature/);
  });

  test('bears the time of the clock', async () => {
    await using receiver = await startReceiver((_message, response) => response.end());
    const clock: Clock = { now: () => 1_900_000_000_999, realMs: (ms) => ms };
    await delivering({}, 15_000, clock).send(receiver.origin);
    assert.equal(receiver.received[0]!.headers['webhook-timestamp'], '1900000000');
  });

  test('is nothing at all without a secret', async () => {
    await using receiver = await startReceiver((_message, response) => response.end());
    await assert.rejects(send(receiver.origin, []), /no secret/);
    await assert.rejects(send(receiver.origin, ['whsec_???']));
    assert.equal(receiver.connections.length, 0);
  });
});

describe('the verdict', () => {
  async function answering(status: number, headers: Record<string, string> = {}, clock?: Clock) {
    await using receiver = await startReceiver((_message, response) =>
      response.writeHead(status, headers).end('so it is'),
    );
    return await delivering({}, 15_000, clock).send(receiver.origin);
  }

  test('any 2xx is delivered, 410 is gone, everything else failed', async () => {
    for (const status of [200, 201, 202, 299]) {
      const { ms, ...outcome } = await answering(status);
      assert.deepEqual(outcome, { kind: 'delivered', status, excerpt: 'so it is' });
      assert.ok(ms >= 0 && Number.isInteger(ms));
    }
    assert.equal((await answering(410)).kind, 'gone');
    for (const status of [400, 401, 404, 409, 429, 500, 503, 599]) {
      const failed = assertFailed(await answering(status), 'status');
      assert.equal(failed.status, status);
      assert.equal(failed.excerpt, 'so it is');
      assert.match(explain(failed), new RegExp(`${status}`));
    }
  });

  test('a redirect is not followed: where it leads to hears nothing', async () => {
    await using target = await startReceiver((_message, response) => response.end());
    for (const status of [301, 302, 303, 304, 307, 308]) {
      const failed = assertFailed(await answering(status, { location: target.origin }), 'redirect');
      assert.equal(failed.status, status);
    }
    assert.equal(target.connections.length, 0);
  });

  test('a failure brings along how long the receiver wants to be left alone', async () => {
    const now = Date.UTC(2027, 0, 1);
    const clock: Clock = { now: () => now, realMs: (ms) => ms };
    const asked = async (status: number, header: string) =>
      assertFailed(await answering(status, { 'retry-after': header }, clock), 'status').retryAfterMs;
    for (const status of [429, 503, 500]) assert.equal(await asked(status, '120'), 120_000);
    assert.equal(await asked(503, 'Fri, 01 Jan 2027 00:10:00 GMT'), 600_000);
    assert.equal(await asked(503, 'Fri, 08 Jan 2027 00:00:00 GMT'), 86_400_000, 'a day at most');
    for (const far of ['99999999', '9'.repeat(400)]) assert.equal(await asked(503, far), 86_400_000);
    for (const none of ['0', '-5', 'soon', '1.5', '', 'Thu, 31 Dec 2026 00:00:00 GMT'])
      assert.equal(await asked(503, none), undefined, none);
  });

  test('a clock that runs fast says what its time takes', async () => {
    const clock = fastClock(2);
    const at = new Date(clock.now() + 3_600_000).toUTCString();
    const { retryAfterMs } = assertFailed(await answering(503, { 'retry-after': at }, clock), 'status');
    assert.ok(retryAfterMs! > 0 && retryAfterMs! <= 3_600_000);
    assert.equal(clock.realMs(3_600_000), 1_800_000);
  });
});

describe('the excerpt', () => {
  async function excerptOf(body: string | Buffer, excerptBytes?: number) {
    await using receiver = await startReceiver((_message, response) => response.end(body));
    const { deliver } = delivering();
    const options = excerptBytes === undefined ? {} : { excerptBytes };
    const outcome = await deliver({ id: 'e', url: receiver.origin, body: '{}' }, [secret], never, options);
    assert.ok(outcome.kind === 'delivered');
    return outcome.excerpt;
  }

  test('is the first 256 bytes, or as many as were asked for', async () => {
    assert.equal(await excerptOf(''), '');
    assert.equal(await excerptOf('x'.repeat(1_000)), 'x'.repeat(256));
    assert.equal(await excerptOf('x'.repeat(256)), 'x'.repeat(256));
    assert.equal(await excerptOf('x'.repeat(10_000), 4_096), 'x'.repeat(4_096));
  });

  test('is never cut inside a character', async () => {
    assert.equal(await excerptOf(`x${'é'.repeat(300)}`), `x${'é'.repeat(127)}`);
    assert.equal(await excerptOf('🎶'.repeat(100)), '🎶'.repeat(64));
    assert.equal(await excerptOf(`abc${'🎶'.repeat(100)}`), `abc${'🎶'.repeat(63)}`);
  });

  test('holds nothing that moves a terminal, and is one line', async () => {
    assert.equal(await excerptOf('a\u001b[31m\u0000b\r\n\tc\u202ed'), 'a\ufffd[31m\ufffdb c\ufffdd');
    assert.equal(await excerptOf(Buffer.from([0x61, 0xff, 0xfe, 0xc3])), 'a\ufffd\ufffd\ufffd');
  });
});

describe('a receiver that is hostile, or broken', () => {
  const head = 'HTTP/1.1 200 OK\r\n';
  /** Sends its answer after the first bytes of a message. */
  const raw = (answer: (socket: Socket) => void) =>
    startRawReceiver((socket) => socket.once('data', () => answer(socket)));

  test('an endless body is cut: it was delivered, and its connection is closed', async () => {
    for (const length of [undefined, '1000000000000']) {
      await using receiver = await startReceiver((_message, response) => {
        if (length !== undefined) response.setHeader('content-length', length);
        const more = () => {
          while (!response.destroyed && response.write('x'.repeat(16_384)));
        };
        response.on('drain', more);
        more();
      });
      const outcome = await send(receiver.origin);
      assert.ok(outcome.kind === 'delivered');
      assert.equal(outcome.excerpt, 'x'.repeat(256));
      const [connection] = receiver.connections;
      await closed(connection!);
      assert.ok(connection!.bytesWritten < 8_000_000, `${connection!.bytesWritten} bytes were taken`);
      assert.equal((await send(receiver.origin)).kind, 'delivered');
      assert.equal(receiver.connections.length, 2, 'the connection of a cut body serves nothing more');
    }
  });

  test('a body that stalls after 256 bytes is not waited for', async () => {
    await using receiver = await startReceiver((_message, response) => {
      response.setHeader('content-length', 10_000);
      response.write('x'.repeat(256));
    });
    assert.equal((await send(receiver.origin)).kind, 'delivered');
  });

  test('a body that drips, or breaks off, does not take back its status line', async () => {
    const { send } = delivering({}, 300);
    await using dripping = await raw((socket) => socket.write(`${head}content-length: 100\r\n\r\nabc`));
    await using breaking = await raw((socket) => {
      socket.write(`${head}content-length: 100\r\n\r\nabc`);
      socket.end();
    });
    for (const { origin } of [dripping, breaking]) {
      const outcome = await send(origin);
      assert.ok(outcome.kind === 'delivered', JSON.stringify(outcome));
      assert.equal(outcome.excerpt, 'abc');
    }
  });

  test('accepts and never answers, drips its headers, or floods interim answers: it ends in time', async () => {
    const { send } = delivering({}, 300);
    const drip = (socket: Socket, start: string, piece: () => string) => {
      socket.write(start);
      const timer = setInterval(() => socket.write(piece()), 20);
      socket.once('close', () => clearInterval(timer));
    };
    const silent = await raw(() => {});
    const slow = await raw((socket) => drip(socket, head, () => 'x'));
    const slowInterim = await raw((socket) => drip(socket, '', () => 'HTTP/1.1 103 Early Hints\r\n\r\n'));
    for (const [receiver, problems] of [
      [silent, ['timeout']],
      [slow, ['timeout']],
      [slowInterim, ['timeout', 'protocol']],
    ] as const) {
      await using _ = receiver;
      const failed = await send(receiver.origin);
      assert.ok(failed.kind === 'failed' && problems.some((one) => one === failed.problem));
      assert.equal(failed.status, undefined);
      const [connection] = receiver.connections;
      await closed(connection!);
    }
  });

  test('what is no HTTP, headers without end and a flood of interim answers are cut short', async () => {
    const answers = {
      'no HTTP': (socket: Socket) => void socket.write('SSH-2.0-OpenSSH_9.7\r\n'),
      'a header bomb': (socket: Socket) => {
        socket.write(head);
        const more = () => {
          while (!socket.destroyed && socket.write(`x-${'y'.repeat(1_000)}: z\r\n`));
        };
        socket.on('drain', more);
        more();
      },
      'interim answers': (socket: Socket) => {
        const more = () => {
          while (
            !socket.destroyed &&
            socket.write('HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n'.repeat(100))
          );
        };
        socket.on('drain', more);
        more();
      },
      'an upgrade': (socket: Socket) =>
        void socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n'),
      'a lasting 100': (socket: Socket) => void socket.write('HTTP/1.1 100 Continue\r\n\r\n'),
      'two lengths': (socket: Socket) =>
        void socket.write(`${head}content-length: 3\r\ncontent-length: 4\r\n\r\nabcd`),
    };
    for (const [name, answer] of Object.entries(answers)) {
      await using receiver = await raw(answer);
      const { status, problem } = assertFailed(await send(receiver.origin));
      assert.deepEqual([name, problem, status], [name, 'protocol', undefined]);
    }
  });

  test('a few interim answers before the real one are fine', async () => {
    await using receiver = await startReceiver((_message, response) => {
      response.writeEarlyHints({ link: '</x>; rel=preload' });
      response.writeProcessing();
      response.end('done');
    });
    assert.equal((await send(receiver.origin)).kind, 'delivered');
  });

  test('resets or closes after having accepted, or is not there', async () => {
    await using resetting = await raw((socket) => socket.resetAndDestroy());
    await using closing = await raw((socket) => socket.end());
    await using cutting = await raw((socket) => socket.end(`${head}content-len`));
    for (const { origin } of [resetting, closing, cutting]) {
      assertFailed(await send(origin), 'connection');
    }
    const gone = createServer().listen(0, '127.0.0.1');
    await once(gone, 'listening');
    const { port } = gone.address() as { port: number };
    await new Promise((resolve) => gone.close(resolve));
    assertFailed(await send(`http://127.0.0.1:${port}`), 'connection');
  });

  test('a connection that is closed just when it is used again is a failed attempt, not repeated', async () => {
    let requests = 0;
    await using receiver = await startRawReceiver((socket) =>
      socket.on('data', (part) => {
        if (!part.includes('POST')) return;
        requests += 1;
        if (requests > 1) return socket.resetAndDestroy();
        socket.write(`${head}content-length: 2\r\n\r\nok`);
      }),
    );
    assert.equal((await send(receiver.origin)).kind, 'delivered');
    assertFailed(await send(receiver.origin), 'connection');
    assert.equal(requests, 2);
  });
});

test('a connection whose answer was read to its end serves the next message', async () => {
  await using receiver = await startReceiver((_message, response) => response.end('x'.repeat(1_000)));
  for (let i = 0; i < 5; i += 1) {
    assert.equal((await send(receiver.origin)).kind, 'delivered');
    await turn();
    await turn();
  }
  assert.equal(receiver.received.length, 5);
  assert.ok(receiver.connections.length < 5, `${receiver.connections.length} connections`);
});

describe('TLS', () => {
  test('a valid certificate of its host, by address or by name', async () => {
    await using receiver = await startReceiver((_message, response) => response.end(), certificates.good);
    const resolve = async () => [{ address: '127.0.0.1', family: 4 }];
    const { send } = delivering({ resolve });
    for (const host of ['127.0.0.1', 'receiver.test'])
      assert.equal((await send(`https://${host}:${receiver.port}/`)).kind, 'delivered', host);
    assert.equal(receiver.received.length, 2);
  });

  for (const kind of ['of another host', 'expired', 'signed by itself'] as const) {
    test(`a certificate ${kind}: nothing is sent`, async () => {
      await using receiver = await startReceiver((_message, response) => response.end(), certificates[kind]);
      assertFailed(await send(receiver.origin), 'tls');
      assert.deepEqual(receiver.received, []);
    });
  }

  test('a server that speaks plain HTTP where https was registered', async () => {
    await using receiver = await startReceiver((_message, response) => response.end());
    assertFailed(await send(receiver.origin.replace('http:', 'https:')), 'tls');
    assert.deepEqual(receiver.received, []);
  });
});

describe('addresses', () => {
  const at = (address: string): LookupAddress => ({ address, family: 4 });

  test('a name that is public when it is checked and private when it is connected to', async () => {
    await using receiver = await startReceiver((_message, response) => response.end(), certificates.good);
    const answers = [[at('93.184.215.14')]];
    const resolve = async () => answers.shift() ?? [at('127.0.0.1')];
    const { guard, send } = delivering({ allow: '', resolve });
    await new Promise<void>((done, fail) =>
      guard.lookupFor(443)('receiver.test', {}, (error) => (error ? fail(error) : done())),
    );
    assertFailed(await send(`https://receiver.test:${receiver.port}/`), 'not_public');
    assert.equal(receiver.connections.length, 0);
  });

  test('one private address among public ones is enough', async () => {
    const { send } = delivering({ allow: '', resolve: async () => [at('93.184.215.14'), at('10.0.0.7')] });
    assertFailed(await send('https://receiver.test/'), 'not_public');
  });

  test('addresses inside, metadata services, plain http to what is not opened, what is no web address', async () => {
    await using receiver = await startReceiver((_message, response) => response.end());
    const { send } = delivering({ allow: '', resolve: async () => [at('93.184.215.14')] });
    for (const url of [
      receiver.origin,
      `https://127.0.0.1:${receiver.port}/`,
      'https://169.254.169.254/latest',
      'https://[::ffff:127.0.0.1]/',
      'https://metadata.google.internal/',
      'http://receiver.test/',
      'ftp://receiver.test/',
      'file:///etc/passwd',
      'no url',
    ])
      assertFailed(await send(url), 'not_public');
    assert.equal(receiver.connections.length, 0);
  });

  test('a name that is not known, and a name server that does not answer', async () => {
    const unknown = delivering({
      resolve: () => Promise.reject(Object.assign(new Error('no such name'), { code: 'ENOTFOUND' })),
    });
    assertFailed(await unknown.send('https://receiver.test/'), 'connection');
    const silent = delivering({ resolve: () => new Promise(() => {}) }, 200);
    assertFailed(await silent.send('https://receiver.test/'), 'timeout');
    const impatient = delivering({ resolve: () => new Promise(() => {}), connectTimeoutMs: 100 });
    assertFailed(await impatient.send('https://receiver.test/'), 'timeout');
  });
});

describe('when the service closes', () => {
  const closing = new Error('the service closes');

  async function whileClosing(
    deliver: (url: string, signal: AbortSignal) => Promise<Outcome>,
    receiver: Receiver,
  ) {
    const service = new AbortController();
    const sent = deliver(receiver.origin, service.signal);
    while (receiver.received.length === 0) await sleep(5);
    service.abort(closing);
    return sent;
  }
  const { send } = delivering({}, 3_600_000);
  const deliverTo = (url: string, signal: AbortSignal) => send(url, [secret], signal);

  test('an attempt that has no answer is broken off with its reason', { timeout: 30_000 }, async () => {
    await using receiver = await startReceiver(() => {});
    await assert.rejects(whileClosing(deliverTo, receiver), (error) => error === closing);
    await assert.rejects(
      send(receiver.origin, [secret], AbortSignal.abort(closing)),
      (error) => error === closing,
    );
    assert.equal(receiver.received.length, 1);
  });

  test('an answer whose status is known is told, whatever is missing of its body', async () => {
    const service = new AbortController();
    await using receiver = await startReceiver(
      (_message, response) => void response.writeHead(200).write('a'),
    );
    const { guard } = delivering();
    // The moment in which the status line is there and the body is awaited.
    const dispatcher = guard.dispatcher.compose(
      (dispatch) => (options, handler) =>
        dispatch(options, {
          onRequestStart: (...args) => handler.onRequestStart?.(...args),
          onResponseStart: (...args) => handler.onResponseStart?.(...args),
          onResponseEnd: (...args) => handler.onResponseEnd?.(...args),
          onResponseError: (...args) => handler.onResponseError?.(...args),
          onResponseData(...args) {
            handler.onResponseData?.(...args);
            setImmediate(() => service.abort(closing));
          },
        }),
    );
    const deliver = createDeliver({ guard: { ...guard, dispatcher }, clock: systemClock });
    const outcome = await deliver({ id: 'e', url: receiver.origin, body }, [secret], service.signal);
    assert.ok(outcome.kind === 'delivered');
    assert.equal(outcome.excerpt, 'a');
  });
});
