/** Certificates for a test, good and bad, made by openssl under an authority that this process then believes. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setDefaultCACertificates } from 'node:tls';

export interface Certificate {
  readonly key: string;
  readonly cert: string;
}

/** What a server can be wrong about; `good` is for 127.0.0.1, localhost and receiver.test. */
export type Kind = 'good' | 'of another host' | 'expired' | 'signed by itself';

const authority = `
[ca]
default_ca = here
[here]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = supplied
`;

export function makeCertificates(): Record<Kind, Certificate> {
  const directory = mkdtempSync(path.join(tmpdir(), 'as-certificates-'));
  const openssl = (...args: string[]) =>
    execFileSync('openssl', args, { cwd: directory, stdio: ['ignore', 'ignore', 'pipe'] });
  const read = (name: string) => readFileSync(path.join(directory, name), 'utf8');
  const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout'];
  const here = 'subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:receiver.test';

  function signed(names: string, start: string, end: string): Certificate {
    openssl('req', ...newKey, 'key', '-out', 'request', '-subj', `/CN=${start}`, '-addext', names);
    const by = ['-config', 'authority', '-cert', 'ca', '-keyfile', 'ca-key'];
    const dates = ['-startdate', start, '-enddate', end];
    openssl('ca', '-batch', '-notext', '-in', 'request', '-out', 'cert', ...by, ...dates);
    writeFileSync(path.join(directory, 'index'), '');
    return { key: read('key'), cert: read('cert') };
  }

  try {
    for (const [name, text] of [
      ['authority', authority],
      ['index', ''],
      ['serial', '01\n'],
    ] as const)
      writeFileSync(path.join(directory, name), text);
    openssl('req', '-x509', ...newKey, 'ca-key', '-out', 'ca', '-days', '2', '-subj', '/CN=authority');
    setDefaultCACertificates([read('ca')]);
    const own = ['-out', 'own', '-days', '2', '-subj', '/CN=own', '-addext', here];
    openssl('req', '-x509', ...newKey, 'own-key', ...own);
    return {
      good: signed(here, '20200101000000Z', '20491231000000Z'),
      'of another host': signed('subjectAltName=DNS:other.test', '20200101000000Z', '20491231000000Z'),
      expired: signed(here, '20200101000000Z', '20200201000000Z'),
      'signed by itself': { key: read('own-key'), cert: read('own') },
    };
  } finally {
    rmSync(directory, { recursive: true });
  }
}
