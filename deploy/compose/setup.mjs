/**
 * The first service of docker-compose.yml: makes the secrets that are not there yet, one volume for each circle of
 * readers, and hands the data volumes to the users that write there. Run again it changes nothing; a secret that was
 * put there by hand stays. Secrets are readable to whoever has the volume: its mount is the permission.
 */

import { randomBytes } from 'node:crypto';
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';

const volumes = process.argv[2] ?? '/volumes';
const random = (bytes, as = 'base64url') => randomBytes(bytes).toString(as);
const made = [];

/** What the file holds; `make` says it where there is none yet. Written whole or not at all. */
function secret(volume, name, make) {
  const file = path.join(volumes, volume, name);
  if (existsSync(file)) return readFileSync(file, 'utf8').trimEnd();
  const text = make();
  mkdirSync(path.dirname(file), { recursive: true });
  writeFileSync(`${file}.new`, `${text}\n`);
  chmodSync(`${file}.new`, 0o444);
  renameSync(`${file}.new`, file);
  made.push(`${volume}/${name}`);
  return text;
}

secret('secrets-api', 'API_KEY', () => random(24));
secret('secrets-sealing', 'SECRETS_KEY', () => random(32, 'base64'));

const password = secret('secrets-redis', 'REDIS_PASSWORD', () => random(24));
secret('secrets-redis', 'REDIS_URL', () => `redis://:${password}@redis:6379`);
secret('secrets-redis', 'redis.conf', () =>
  [
    'bind * -::*',
    'dir /data',
    `requirepass ${password}`,
    '# After a 202 nothing is lost: at most the last second when the host itself dies.',
    'appendonly yes',
    'appendfsync everysec',
    'save ""',
    '# Full: refuse writes, readiness says so. Evicting would lose jobs.',
    'maxmemory 1gb',
    'maxmemory-policy noeviction',
  ].join('\n'),
);

const accessKey = secret(
  'secrets-storage',
  'AWS_ACCESS_KEY_ID',
  () => `AS${random(12, 'hex').toUpperCase()}`,
);
const secretKey = secret('secrets-storage', 'AWS_SECRET_ACCESS_KEY', () => random(30));
secret('secrets-store', 's3.json', () =>
  JSON.stringify({
    identities: [
      {
        name: 'acousticsense',
        credentials: [{ accessKey, secretKey }],
        actions: ['Admin', 'Read', 'Write', 'List', 'Tagging'],
      },
    ],
  }),
);

for (const [volume, user] of [
  ['redis', 999],
  ['objects', 1000],
  ['prometheus', 65534],
]) {
  const directory = path.join(volumes, volume);
  if (existsSync(directory)) chownSync(directory, user, user);
}
console.log(made.length === 0 ? 'Every secret is there.' : `Made: ${made.join(', ')}.`);
