/**
 * Links that open one resource without an API key: those that events name, for receivers that have no key.
 *
 * A link speaks for one tenant and for reading exactly this path with exactly this query, until it expires. The key of
 * the signature (HMAC-SHA-256) is derived from SECRETS_KEY (HKDF, RFC 5869), so it opens no sealed secret; with a
 * rotated SECRETS_KEY older links go on for as long as the old key is listed.
 */
import { createHmac, hkdfSync, timingSafeEqual } from 'node:crypto';
import { ProblemError } from './errors.ts';
import { parseSecretsKeys } from './secrets.ts';

export interface UrlSigner {
  /**
   * @param pathWithQuery as it is requested: `/v1/...`, encoded.
   * @param expiresAt epoch ms; whole seconds of it.
   * @returns the same with the parameters of the signature behind.
   * @throws {ProblemError} secrets_not_kept: this service has no key.
   */
  sign(tenant: string, pathWithQuery: string, expiresAt: number): string;
  /**
   * @param originalUrl path and query as they came.
   * @param now epoch ms.
   * @returns the tenant for whom the link speaks; undefined when it bears no signature.
   * @throws {ProblemError} unauthorized: it bears one that is not good, or not any more, or not for this.
   */
  verify(method: string, originalUrl: string, now: number): string | undefined;
}

const signatureNames: ReadonlySet<string> = new Set(['tenant', 'expires', 'signature']);
const info = 'acousticsense signed url v1';

/**
 * @param secretsKey SECRETS_KEY: the first signs, all verify.
 * @throws {StartupError} for what is no such key.
 */
export function createUrlSigner(secretsKey: string | undefined): UrlSigner {
  const keys = parseSecretsKeys(secretsKey ?? '').map(({ bytes }) =>
    Buffer.from(hkdfSync('sha256', bytes, Buffer.alloc(0), info, 32)),
  );
  const [current] = keys;
  return {
    sign(tenant, pathWithQuery, expiresAt) {
      if (current === undefined) {
        throw new ProblemError(
          'secrets_not_kept',
          'This service signs no links, because its operator has set no SECRETS_KEY.',
        );
      }
      const expires = String(Math.floor(expiresAt / 1_000));
      const signature = signatureOf(current, { pathWithQuery, tenant, expires }).toString('base64url');
      const query = new URLSearchParams({ tenant, expires, signature });
      return `${pathWithQuery}${pathWithQuery.includes('?') ? '&' : '?'}${query}`;
    },

    verify(method, originalUrl, now) {
      const given = signatureParameters(originalUrl);
      if (!given.has('signature')) return undefined;
      const [tenant, expires, signature] = ['tenant', 'expires', 'signature'].map((name) => {
        const values = given.getAll(name);
        return values.length === 1 ? values[0]! : '';
      }) as [string, string, string];
      const isRead = method === 'GET' || method === 'HEAD';
      const pathWithQuery = withoutSignature(originalUrl);
      const sent = Buffer.from(signature, 'base64url');
      const isOurs = keys
        .map((key) => signatureOf(key, { pathWithQuery, tenant, expires }))
        .map((own) => own.length === sent.length && timingSafeEqual(own, sent))
        .includes(true);
      if (!isRead || !isOurs || !/^\d{1,15}$/.test(expires)) {
        throw new ProblemError(
          'unauthorized',
          'This signed link was changed, or is used for something else than reading what it names.',
        );
      }
      if (Number(expires) * 1_000 <= now) {
        throw new ProblemError(
          'unauthorized',
          `This signed link expired at ${dateOf(Number(expires))}: read the same address with an API key.`,
        );
      }
      return tenant;
    },
  };
}

/** What the routes see: the rest of the query stays letter for letter. */
export function withoutSignature(pathWithQuery: string): string {
  const [path, query] = split(pathWithQuery);
  const rest = query.split('&').filter((pair) => pair !== '' && !signatureNames.has(nameOf(pair)));
  return rest.length === 0 ? path : `${path}?${rest.join('&')}`;
}

function signatureParameters(pathWithQuery: string): URLSearchParams {
  return new URLSearchParams(
    split(pathWithQuery)[1]
      .split('&')
      .filter((pair) => signatureNames.has(nameOf(pair)))
      .join('&'),
  );
}

/** As JSON, so that no two requests are written alike; the order of parameters means nothing. */
function signatureOf(
  key: Buffer,
  { pathWithQuery, tenant, expires }: { pathWithQuery: string; tenant: string; expires: string },
): Buffer {
  const [path, query] = split(pathWithQuery);
  const parameters = [...new URLSearchParams(query)].map((pair) => JSON.stringify(pair)).sort();
  return createHmac('sha256', key)
    .update(JSON.stringify([info, 'GET', path, parameters, tenant, expires]))
    .digest();
}

function split(pathWithQuery: string): [path: string, query: string] {
  const at = pathWithQuery.indexOf('?');
  return at === -1 ? [pathWithQuery, ''] : [pathWithQuery.slice(0, at), pathWithQuery.slice(at + 1)];
}

/** Decoded, as routes would read it. */
function nameOf(pair: string): string {
  return [...new URLSearchParams(pair).keys()][0] ?? '';
}

/** Of epoch seconds that were signed by us: always a date. */
const dateOf = (seconds: number) => new Date(seconds * 1_000).toISOString();
