/** Who may call, and for which tenant: the Host header, the Origin header, the API key. */
import { createHash, timingSafeEqual } from 'node:crypto';
import { ProblemError } from '@acousticsense/shared/errors';
import { type UrlSigner, withoutSignature } from '@acousticsense/shared/signed-url';
import { defaultTenant, type Tenants } from '@acousticsense/shared/tenants';
import type { Request, RequestHandler, Response } from 'express';
import { isLoopback } from './config.ts';

export interface AccessOptions {
  readonly host: string;
  readonly allowedHosts: readonly string[];
  /** The operator's. Without one (on a loopback address only) whoever can call is the operator. */
  readonly apiKey: string | undefined;
}

const cookieName = 'acousticsense_key';
const openPaths = new Set(['/healthz', '/readyz']);
/** They tell of all tenants: the operator's alone. */
const operatorPaths = new Set(['/metrics']);

interface Caller {
  readonly tenant: string;
  readonly operator: boolean;
}

/**
 * - A page elsewhere must not reach a service on this machine through the visitor's browser: with a name that it
 *   points at 127.0.0.1 (DNS rebinding: the Host header is checked) or with a form (the Origin header is).
 * - Every request but health is some tenant's ({@link tenantOf}). A key says whose: `Authorization: Bearer`,
 *   `X-Api-Key`, or the cookie that opening the page with `?key=` sets; the first of them counts. A key that is not
 *   known is refused, even where none is asked for: work would end up with the wrong tenant.
 * - The operator speaks for the tenant `default`, and for any other that `X-Tenant` names.
 * - A signed link needs no key and speaks for its tenant, for this one reading. One that is not good is refused,
 *   whatever else is sent with it. Routes see the address without the signature.
 */
export function guardAccess(
  options: AccessOptions,
  tenants: Tenants,
  signer: Pick<UrlSigner, 'verify'>,
): RequestHandler {
  const { host, allowedHosts, apiKey } = options;

  function checkOrigin(request: Request): void {
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
  }

  async function callerOf(key: string): Promise<Caller | undefined> {
    if (apiKey !== undefined && same(key, apiKey)) return { tenant: defaultTenant, operator: true };
    const found = await tenants.findKey(key);
    return found && { tenant: found.tenant, operator: false };
  }

  /** @throws {ProblemError} tenant_not_found */
  async function actingTenant({ tenant, operator }: Caller, wanted: string | undefined): Promise<string> {
    if (wanted === undefined || wanted === tenant) return tenant;
    if (operator && (await tenants.tenantExists(wanted))) return wanted;
    throw new ProblemError(
      'tenant_not_found',
      operator
        ? `There is no tenant "${wanted.slice(0, 70)}"; make it with \`acousticsense keys create\`.`
        : 'This key or link speaks for its own tenant only: leave X-Tenant away.',
      { field: 'X-Tenant' },
    );
  }

  async function admit(request: Request, response: Response, caller: Caller): Promise<void> {
    if (operatorPaths.has(request.path) && !caller.operator) {
      throw new ProblemError('not_found', `${request.path} is served to the operator's key only.`);
    }
    response.locals['tenant'] = await actingTenant(caller, request.get('x-tenant'));
  }

  return async (request, response, next) => {
    checkOrigin(request);
    if (openPaths.has(request.path)) return next();

    const linked = signer.verify(request.method, request.originalUrl, Date.now());
    if (linked !== undefined) {
      await admit(request, response, { tenant: linked, operator: false });
      request.url = withoutSignature(request.url);
      return next();
    }

    const inQuery = request.method === 'GET' && request.path === '/' ? request.query['key'] : undefined;
    if (typeof inQuery === 'string' && (await callerOf(inQuery))) {
      response.cookie(cookieName, inQuery, { httpOnly: true, sameSite: 'strict', path: '/' });
      // The key leaves the address bar and the history.
      return response.redirect(303, '/');
    }
    const sent = sentKey(request);
    let caller = sent && (await callerOf(sent.key));
    if (sent && !caller && sent.from === 'cookie') {
      response.clearCookie(cookieName, { httpOnly: true, sameSite: 'strict', path: '/' });
      // Browsers send a machine's cookies to all of its ports: this one may be of another service. The page opens
      // without it; a request of a page that is open is refused.
      if (apiKey === undefined && request.method === 'GET' && request.path === '/')
        return response.redirect(303, '/');
    }
    if (!sent && apiKey === undefined && inQuery === undefined)
      caller = { tenant: defaultTenant, operator: true };
    if (!caller) {
      throw new ProblemError(
        'unauthorized',
        sent || inQuery !== undefined
          ? 'This API key is not known here: it was never made, or is revoked.'
          : 'Send the API key as "Authorization: Bearer KEY", or open the page with ?key=KEY once.',
      );
    }
    await admit(request, response, caller);
    next();
  };
}

/** Whose the request is: everything that is read or made in it is this tenant's. */
export function tenantOf(response: Response): string {
  const { tenant } = response.locals as { tenant?: string };
  if (tenant === undefined) throw new Error('guardAccess has not run for this request');
  return tenant;
}

function sentKey({ headers }: Request): { key: string; from: 'header' | 'cookie' } | undefined {
  const header = /^Bearer (.+)$/i.exec(headers.authorization ?? '')?.[1] ?? headers['x-api-key'];
  if (typeof header === 'string' && header !== '') return { key: header, from: 'header' };
  const cookie = cookieValue(headers.cookie);
  return cookie ? { key: cookie, from: 'cookie' } : undefined;
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
