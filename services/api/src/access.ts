/** Who may call: the Host header, the Origin header, the API key. */
import { createHash, timingSafeEqual } from 'node:crypto';
import { ProblemError } from '@acousticsense/shared/errors';
import type { RequestHandler } from 'express';
import { isLoopback } from './config.ts';

export interface AccessOptions {
  readonly host: string;
  readonly allowedHosts: readonly string[];
  readonly apiKey: string | undefined;
}

const cookieName = 'acousticsense_key';
const openPaths = new Set(['/healthz', '/readyz']);

/**
 * - A page elsewhere must not reach a service on this machine through the visitor's browser: with a name that it
 *   points at 127.0.0.1 (DNS rebinding: the Host header is checked) or with a form (the Origin header is).
 * - With an API key, every request but health carries it: `Authorization: Bearer`, `X-Api-Key`, or the cookie
 *   that opening the page with `?key=` sets.
 */
export function guardAccess({ host, allowedHosts, apiKey }: AccessOptions): RequestHandler {
  return (request, response, next) => {
    const name = hostName(request.headers.host ?? '');
    const anyAddress = !isLoopback(host) && apiKey !== undefined && /^[\d.]+$|^\[?[0-9a-f:]+\]?$/i.test(name);
    if (!isLoopback(name) && name !== host.toLowerCase() && !allowedHosts.includes(name) && !anyAddress) {
      throw new ProblemError(
        'host_not_allowed',
        `This service is not served under the name "${name.slice(0, 100)}"; add it to ALLOWED_HOSTS if it should be.`,
      );
    }
    const { origin } = request.headers;
    const changes = request.method !== 'GET' && request.method !== 'HEAD';
    if (changes && origin !== undefined && originHost(origin) !== request.headers.host?.toLowerCase()) {
      throw new ProblemError(
        'host_not_allowed',
        'Pages of another origin may not send requests to this service.',
      );
    }
    if (apiKey === undefined || openPaths.has(request.path)) return next();

    const inQuery =
      request.method === 'GET' && typeof request.query['key'] === 'string' ? request.query['key'] : undefined;
    if (inQuery !== undefined && request.path === '/' && same(inQuery, apiKey)) {
      response.cookie(cookieName, apiKey, { httpOnly: true, sameSite: 'strict', path: '/' });
      // The key leaves the address bar and the history.
      return response.redirect(303, '/');
    }
    const bearer = /^Bearer (.+)$/i.exec(request.headers.authorization ?? '')?.[1];
    const header = request.headers['x-api-key'];
    const cookie = cookieValue(request.headers.cookie);
    if ([bearer, header, cookie].some((given) => typeof given === 'string' && same(given, apiKey)))
      return next();
    throw new ProblemError(
      'unauthorized',
      'Send the API key as "Authorization: Bearer KEY", or open the page with ?key=KEY once.',
    );
  };
}

function hostName(header: string): string {
  return header
    .toLowerCase()
    .replace(/:\d+$/, '')
    .replace(/^\[(.*)\]$/, '$1');
}

function originHost(origin: string): string | undefined {
  return URL.canParse(origin) ? new URL(origin).host : undefined;
}

/** Compared as digests: in constant time, whatever the lengths. */
function same(given: string, expected: string): boolean {
  const digest = (text: string) => createHash('sha256').update(text).digest();
  return timingSafeEqual(digest(given), digest(expected));
}

function cookieValue(header: string | undefined): string | undefined {
  const found = header
    ?.split(';')
    .map((pair) => pair.trim())
    .find((pair) => pair.startsWith(`${cookieName}=`));
  try {
    return found && decodeURIComponent(found.slice(cookieName.length + 1));
  } catch {
    return undefined;
  }
}
