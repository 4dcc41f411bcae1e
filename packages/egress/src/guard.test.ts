import assert from 'node:assert/strict';
import type { LookupAddress } from 'node:dns';
import { once } from 'node:events';
import { createServer, get } from 'node:http';
import { get as httpsGet } from 'node:https';
import { type AddressInfo, isIPv6 } from 'node:net';
import { after, describe, test } from 'node:test';
import { StartupError } from '@acousticsense/shared/errors';
import { request } from 'undici';
import { createEgressGuard, type EgressGuard, type EgressOptions, EgressRefused } from './guard.ts';

const closers: (() => unknown)[] = [];
after(async () => {
  for (const close of closers.reverse()) await close();
});

/** A server that counts who reaches it. */
async function serve(host = '127.0.0.1', port = 0): Promise<{ port: number; hits(): number }> {
  let hits = 0;
  const server = createServer((_request, response) => {
    hits += 1;
    // No connection is used twice: each request is a connection, and so a look-up.
    response.setHeader('connection', 'close').end(`hello from ${host}`);
  });
  server.listen(port, host);
  await once(server, 'listening');
  closers.push(() => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  return { port: (server.address() as AddressInfo).port, hits: () => hits };
}

function guardOf(options: EgressOptions): EgressGuard {
  const guard = createEgressGuard(options);
  closers.push(() => guard.close());
  return guard;
}

const asAnswers = (...addresses: string[]): LookupAddress[] =>
  addresses.map((address) => ({ address, family: isIPv6(address) ? 6 : 4 }));

const viaUndici = async (guard: EgressGuard, url: string) => {
  const { body } = await request(url, { dispatcher: guard.dispatcher });
  return body.text();
};

/** As the AWS SDK does it: node's client with the guard's agent. */
const viaAgent = (guard: EgressGuard, url: string) =>
  new Promise<string>((resolve, reject) => {
    const secure = url.startsWith('https:');
    (secure ? httpsGet(url, { agent: guard.httpsAgent }) : get(url, { agent: guard.httpAgent }))
      .once('error', reject)
      .once('response', async (response) => {
        resolve(Buffer.concat(await response.toArray()).toString());
      });
  });

const ways = [
  ['undici', viaUndici],
  ["node's agents", viaAgent],
] as const;

const refusedFor = (reason: string) => (error: unknown) => {
  assert.ok(error instanceof EgressRefused, String(error));
  assert.equal(error.reason, reason);
  return true;
};

const { port } = await serve();

/** Spellings of addresses that are not public, and the range they are in. */
const refused: [string, string][] = [
  ['127.0.0.1', 'loopback'],
  ['127.255.0.9', 'loopback'],
  // What the URL parser makes one of: each arrives as 127.0.0.1, or as ::ffff:7f00:1.
  ['0x7f.1', 'loopback'],
  ['2130706433', 'loopback'],
  ['0177.0.0.1', 'loopback'],
  ['127.1', 'loopback'],
  ['127.0.0.1.', 'loopback'],
  ['１２７.0.0.1', 'loopback'],
  ['[::1]', 'loopback'],
  ['[::ffff:127.0.0.1]', 'ipv4Mapped'],
  ['[::ffff:8.8.8.8]', 'ipv4Mapped'],
  ['[0:0:0:0:0:ffff:7f00:1]', 'ipv4Mapped'],
  ['[::127.0.0.1]', 'reserved'],
  ['[::ffff:0:7f00:1]', 'rfc6145'],
  ['[64:ff9b::127.0.0.1]', 'NAT64 of loopback'],
  ['[64:ff9b::10.0.0.1]', 'NAT64 of private'],
  ['[64:ff9b:1::7f00:1]', 'rfc6052'],
  ['[64:ff9b:1:808:8:800::]', 'rfc6052'],
  ['[2002:7f00:1::]', '6to4'],
  ['[2001:0:5ef5:79fd::80ff:fffe]', 'teredo'],
  ['[2a01:4f8::5efe:7f00:1]', 'isatap'],
  ['0.0.0.0', 'unspecified'],
  ['[::]', 'unspecified'],
  ['10.1.2.3', 'private'],
  ['172.16.0.1', 'private'],
  ['192.168.1.1', 'private'],
  ['100.64.0.1', 'carrierGradeNat'],
  ['[fc00::1]', 'uniqueLocal'],
  ['[fdff:1::1]', 'uniqueLocal'],
  ['[fec0::1]', 'deprecatedSiteLocal'],
  ['224.0.0.1', 'multicast'],
  ['[ff02::1]', 'multicast'],
  ['255.255.255.255', 'broadcast'],
  ['240.0.0.1', 'reserved'],
  ['192.0.2.1', 'reserved'],
  ['198.51.100.7', 'reserved'],
  ['203.0.113.7', 'reserved'],
  ['198.18.0.1', 'reserved'],
  ['198.19.255.1', 'reserved'],
  ['[2001:db8::1]', 'reserved'],
  ['[3fff::1]', 'reserved'],
  ['[2001:2::1]', 'benchmarking'],
  ['[100::1]', 'discard'],
  ['[4000::1]', 'reserved'],
];

/** Metadata services, in every coat. */
const metadata = [
  '169.254.169.254',
  '0xa9fea9fe',
  '2852039166',
  '169.254.170.2',
  '169.254.170.23',
  '169.254.0.23',
  '100.100.100.200',
  '168.63.129.16',
  '192.0.0.192',
  '[fd00:ec2::254]',
  '[fd00:ec2::23]',
  '[fd20:ce::254]',
  '[fe80::a9fe:a9fe]',
  '[::ffff:169.254.169.254]',
  '[::ffff:168.63.129.16]',
  '[::169.254.169.254]',
  '[64:ff9b::a9fe:a9fe]',
  '[64:ff9b::168.63.129.16]',
  '[64:ff9b:1:a9fe:a9:fe00::]',
  '[64:ff9b:1::a9fe:a9fe]',
  '[2002:a9fe:a9fe::1]',
  '[2001:0:a9fe:a9fe::1]',
  '[2001:0:808:808::5601:5601]',
  'metadata.google.internal',
  'METADATA.google.internal.',
  'metadata',
  'instance-data.ec2.internal',
];

const everything = '0.0.0.0/0,::/0,metadata.google.internal,metadata,169.254.169.254,[fd00:ec2::254]:80';

for (const [way, fetchText] of ways) {
  describe(`through ${way}`, () => {
    test('an address that is not public is refused however it is spelled', async () => {
      const { port, hits } = await serve();
      const guard = guardOf({});
      for (const [host, reason] of refused) {
        await assert.rejects(fetchText(guard, `http://${host}:${port}/`), refusedFor(reason), host);
        await assert.rejects(fetchText(guard, `https://${host}:${port}/`), refusedFor(reason), host);
      }
      assert.equal(hits(), 0);
    });

    test('a name is refused for the same addresses when its look-up gives them', async () => {
      const { port, hits } = await serve();
      const answers = new Map<string, LookupAddress[]>();
      const guard = guardOf({ resolve: async (name) => answers.get(name)! });
      for (const [index, [spelling, reason]] of refused.entries()) {
        const name = `name-${index}.example`;
        const { hostname } = new URL(`http://${spelling}/`);
        answers.set(name, asAnswers(hostname.replace(/^\[|\]$|\.$/g, '')));
        await assert.rejects(fetchText(guard, `http://${name}:${port}/`), refusedFor(reason), spelling);
      }
      assert.equal(hits(), 0);
    });

    test('the real look-up of localhost ends in a refusal', async () => {
      await assert.rejects(fetchText(guardOf({}), `http://localhost:${port}/`), refusedFor('loopback'));
    });

    test('one address that is not public among good ones is enough to refuse the name', async () => {
      for (const answers of [
        ['127.0.0.1', '8.8.8.8'],
        ['8.8.8.8', '2001:4860:4860::8888', '127.0.0.1'],
      ]) {
        const guard = guardOf({ resolve: async () => asAnswers(...answers) });
        await assert.rejects(fetchText(guard, `http://mixed.example:${port}/`), refusedFor('loopback'));
      }
    });

    test('metadata services stay closed whatever EGRESS_ALLOW says', async () => {
      const guard = guardOf({ allow: everything });
      for (const host of metadata) {
        await assert.rejects(fetchText(guard, `http://${host}/latest/`), refusedFor('metadata'), host);
      }
      const named = guardOf({ allow: 'inside.example', resolve: async () => asAnswers('169.254.169.254') });
      await assert.rejects(fetchText(named, 'http://inside.example/'), refusedFor('metadata'));
    });

    test('EGRESS_ALLOW opens an address, a network, a name, each with its port alone if it names one', async () => {
      const resolve = async () => asAnswers('127.0.0.1');
      const open = [
        ['127.0.0.1', '127.0.0.1'],
        [`127.0.0.1:${port}`, '127.0.0.1'],
        ['127.0.0.0/8', '127.0.0.1'],
        [`10.0.0.0/8, 127.0.0.0/8:${port}`, '127.0.0.1'],
        ['127.0.0.0/8', 'inside.example'],
        ['inside.example', 'inside.example'],
        [`Inside.Example:${port}`, 'INSIDE.example.'],
      ] as const;
      for (const [allow, host] of open) {
        const guard = guardOf({ allow, resolve });
        assert.equal(await fetchText(guard, `http://${host}:${port}/`), 'hello from 127.0.0.1', allow);
      }
      const closed = [
        ['127.0.0.1:1', '127.0.0.1'],
        ['127.0.0.2', '127.0.0.1'],
        ['126.0.0.0/8', '127.0.0.1'],
        ['inside.example:1', 'inside.example'],
        ['inside.example', 'other.example'],
        ['inside.example', 'sub.inside.example'],
        ['inside.example', '127.0.0.1'],
      ] as const;
      for (const [allow, host] of closed) {
        const guard = guardOf({ allow, resolve });
        await assert.rejects(fetchText(guard, `http://${host}:${port}/`), refusedFor('loopback'), allow);
      }
    });

    test('a name that changes its mind: the connection goes to the address that was judged', async () => {
      const good = await serve('127.0.0.1');
      const bad = await serve('127.0.0.2', good.port);
      let asked = 0;
      const guard = guardOf({
        allow: '127.0.0.1',
        resolve: async () => {
          asked += 1;
          return asAnswers(asked === 1 ? '127.0.0.1' : '127.0.0.2');
        },
      });
      const url = `http://rebinding.example:${good.port}/`;
      assert.equal(await fetchText(guard, url), 'hello from 127.0.0.1');
      assert.equal(asked, 1);
      // A second connection is a second look-up, judged anew.
      await assert.rejects(fetchText(guard, url), refusedFor('loopback'));
      assert.equal(asked, 2);
      assert.equal(bad.hits(), 0);
    });

    test('a name that has no address fails as it does without a guard', async () => {
      const code = (expected: string) => (error: NodeJS.ErrnoException) => error.code === expected;
      await assert.rejects(
        fetchText(guardOf({ resolve: async () => [] }), 'http://none.example/'),
        code('ENOTFOUND'),
      );
      const away = Object.assign(new Error('no resolver'), { code: 'EAI_AGAIN' });
      const guard = guardOf({ resolve: () => Promise.reject(away) });
      await assert.rejects(fetchText(guard, 'http://none.example/'), code('EAI_AGAIN'));
    });
  });
}

test('a look-up gives one address or all, as it is asked', async () => {
  const families: unknown[] = [];
  const { lookupFor } = guardOf({
    resolve: async (_name, { family }) => {
      families.push(family);
      return family === 6 ? asAnswers('2606:4700::1111') : asAnswers('1.1.1.1', '2606:4700::1111');
    },
  });
  const ask = (options: object) =>
    new Promise<unknown[]>((resolve) => {
      lookupFor(443)('music.example', options, (...answer) => resolve(answer));
    });
  assert.deepEqual(await ask({}), [null, '1.1.1.1', 4]);
  assert.deepEqual(await ask({ family: 6 }), [null, '2606:4700::1111', 6]);
  assert.deepEqual(await ask({ all: true }), [null, asAnswers('1.1.1.1', '2606:4700::1111')]);
  assert.deepEqual(families, [undefined, 6, undefined]);
});

test('an IPv4 host that is reached through NAT64 is as public as it is', () => {
  const { refusalOf } = guardOf({});
  for (const host of ['64:ff9b::8.8.8.8', '8.8.8.8', '2a00:1450:4001::1', 'music.example']) {
    assert.equal(refusalOf(host, 443), undefined, host);
  }
});

test('a socket of this machine is no way out', async () => {
  const guard = guardOf({ allow: everything });
  const asked = get({ socketPath: '/run/docker.sock', path: '/', agent: guard.httpAgent });
  const [error] = await once(asked, 'error');
  assert.ok(error instanceof EgressRefused);
});

test('plain http is for what EGRESS_ALLOW names, and no metadata service', () => {
  const { opens } = guardOf({ allow: 'minio:9000, 10.0.0.0/8, 169.254.169.254, ::1, münchen.example' });
  assert.ok(opens('minio', 9000));
  assert.ok(opens('10.9.9.9', 80));
  assert.ok(opens('[::1]', 80));
  assert.ok(opens('xn--mnchen-3ya.example', 80));
  assert.ok(!opens('minio', 80));
  assert.ok(!opens('8.8.8.8', 80));
  assert.ok(!opens('169.254.169.254', 80));
  assert.ok(!opens('music.example', 80));
});

test('an EGRESS_ALLOW that cannot be understood is said at the start', () => {
  const bad = [
    'http://minio',
    'minio:0',
    'minio:70000',
    'min io',
    '10.0.0.0/33',
    '[::1',
    '*.internal',
    'u@minio',
    '0x7f.1',
  ];
  for (const allow of bad) {
    assert.throws(
      () => createEgressGuard({ allow }),
      (error) => error instanceof StartupError,
      allow,
    );
  }
  for (const allow of ['', ' , ', 'fd00::/8', '[fd00::/8]:9000', 'minio', 'a.b,c.d:1'])
    createEgressGuard({ allow });
});
