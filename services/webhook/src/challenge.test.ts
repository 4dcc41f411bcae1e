import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import { after, test } from 'node:test';
import { createEgressGuard } from '@acousticsense/egress/guard';
import { Webhook } from 'svix';
import { verifyOwnership } from './challenge.ts';
import { systemClock } from './clock.ts';
import { createDeliver } from './deliver.ts';
import { startReceiver } from './testing/receiver.ts';

const secret = `whsec_${randomBytes(24).toString('base64')}`;
const never = new AbortController().signal;
const guard = createEgressGuard({ allow: '127.0.0.0/8' });
after(() => guard.close());
const deliver = createDeliver({ guard, clock: systemClock, timeoutMs: 2_000 });

async function verifying(answer: (challenge: string, response: ServerResponse, body: string) => unknown) {
  await using receiver = await startReceiver((message, response) => {
    const { data } = JSON.parse(message.body) as { data: { challenge: string } };
    return answer(data.challenge, response, message.body);
  });
  const endpoint = { id: 'ep_1', url: `${receiver.origin}/hook` };
  const verification = await verifyOwnership(deliver, endpoint, [secret], never);
  return { verification, received: receiver.received };
}

test('an endpoint that says the challenge back is verified, as text or as JSON', async () => {
  const answers: ((challenge: string) => string)[] = [
    (challenge) => challenge,
    (challenge) => `${challenge}\r\n`,
    (challenge) => JSON.stringify({ challenge }),
    (challenge) => `\ufeff${JSON.stringify({ ok: true, challenge, notes: 'é'.repeat(1_500) }, null, 2)}\n`,
  ];
  for (const answer of answers) {
    const { verification } = await verifying((challenge, response) => response.end(answer(challenge)));
    assert.deepEqual(verification, { ok: true, status: 200 });
  }
});

test('the challenge is an event like others, signed, and another one each time', async () => {
  const seen = new Set<string>();
  for (let i = 0; i < 2; i += 1) {
    const { received } = await verifying((challenge, response) => response.end(challenge));
    const [message] = received;
    new Webhook(secret).verify(message!.body, message!.headers as Record<string, string>);
    const event = JSON.parse(message!.body) as Record<string, never>;
    assert.deepEqual(Object.keys(event), ['type', 'timestamp', 'data']);
    assert.equal(event['type'], 'endpoint.verification');
    assert.ok(Math.abs(Date.parse(event['timestamp']!) - Date.now()) < 60_000);
    assert.deepEqual(Object.keys(event['data']!), ['endpointId', 'challenge']);
    assert.match(message!.headers['webhook-id'] as string, /^evt_verify_[0-9a-f]{32}$/);
    seen.add(event['data']!['challenge']).add(message!.headers['webhook-id'] as string);
  }
  assert.equal(seen.size, 4);
});

test('an endpoint that says yes to anything, or sends back what came, proves nothing', async () => {
  const answers: ((challenge: string, body: string) => string)[] = [
    () => '',
    () => 'ok',
    () => 'null',
    () => '[]',
    () => '{"challenge": "another one of the same length"}',
    (_challenge, body) => body,
    (challenge) => `you said ${challenge}`,
    (challenge) => JSON.stringify([challenge]),
    (challenge) => `${' '.repeat(4_096)}${challenge}`,
  ];
  for (const answer of answers) {
    const { verification } = await verifying((challenge, response, body) =>
      response.end(answer(challenge, body)),
    );
    assert.equal(verification.ok, false);
    assert.match(verification.problem!, /^It answered 200 without the challenge/);
  }
});

test('an answer that is no 2xx is told, challenge or not', async () => {
  for (const [status, sentence] of [
    [404, /answered 404/],
    [410, /answered 410/],
    [302, /redirects are not followed/],
  ] as const) {
    const { verification } = await verifying((challenge, response) =>
      response.writeHead(status).end(challenge),
    );
    assert.equal(verification.status, status);
    assert.match(verification.problem!, sentence);
    assert.equal(verification.ok, false);
  }
});

test('an endpoint that cannot be reached has no status, and no address in its sentence', async () => {
  const closed = createEgressGuard({ resolve: async () => [{ address: '10.1.2.3', family: 4 }] });
  const inside = createDeliver({ guard: closed, clock: systemClock });
  const verification = await verifyOwnership(
    inside,
    { id: 'e', url: 'https://receiver.test/' },
    [secret],
    never,
  );
  await closed.close();
  assert.deepEqual(Object.keys(verification), ['ok', 'problem']);
  assert.match(verification.problem!, /not on the public internet/);
  assert.doesNotMatch(verification.problem!, /10\.1/);
});

test('what a receiver says when it refuses is told: its clock or its secret may be at fault', async () => {
  const { verification } = await verifying((_challenge, response) =>
    response.writeHead(401).end(`Message timestamp too old${'.'.repeat(500)}`),
  );
  assert.match(verification.problem!, /answered 401.* It said: Message timestamp too old\.+$/);
  assert.ok(verification.problem!.length < 300);
});
