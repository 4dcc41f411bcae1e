/**
 * Connections to the outside world that cannot be turned inwards. What a tenant names (a URL, a redirect, an
 * endpoint) is judged where the connection is made: the address that was looked up and found public is the one
 * that is connected to, so a name that changes its mind between a check and a connect gains nothing.
 *
 *   const guard = createEgressGuard({ allow: EGRESS_ALLOW });
 *   request(url, { dispatcher: guard.dispatcher });                     // undici
 *   new NodeHttpHandler({ httpAgent: guard.httpAgent, httpsAgent: guard.httpsAgent });   // the AWS SDK
 *
 * The guard speaks for connections only. Redirects are new connections and so judged again; schemes, sizes and
 * times are their caller's.
 */

import type { LookupAddress, LookupOptions } from 'node:dns';
import { lookup as systemLookup } from 'node:dns/promises';
import { type ClientRequestArgs, Agent as HttpAgent } from 'node:http';
import { Agent as HttpsAgent } from 'node:https';
import { isIP, type LookupFunction } from 'node:net';
import type { Duplex } from 'node:stream';
import { StartupError } from '@acousticsense/shared/errors';
import { Agent, buildConnector, type Dispatcher } from 'undici';
import {
  isInside,
  isMetadataAddress,
  isMetadataName,
  type Network,
  parseAddress,
  parseNetwork,
  whyNotPublic,
} from './addresses.ts';

/** A connection that must not be made. The message names the address: for logs, not for those who asked. */
export class EgressRefused extends Error {
  override readonly name = 'EgressRefused';
  readonly code = 'EGRESS_REFUSED';
  readonly host: string;
  /** Absent when the name alone was enough. */
  readonly address: string | undefined;
  /** `metadata`, or the range that the address lies in: `loopback`, `private`, `uniqueLocal`, ... */
  readonly reason: string;

  constructor(host: string, address: string | undefined, reason: string) {
    super(`refused to connect to ${host}${address && address !== host ? ` (${address})` : ''}: ${reason}`);
    this.host = host;
    this.address = address;
    this.reason = reason;
  }
}

/** Every address of a name, as `dns.promises.lookup` with `all: true`. */
export type Resolve = (hostname: string, options: LookupOptions & { all: true }) => Promise<LookupAddress[]>;

export interface EgressOptions {
  /** EGRESS_ALLOW: `host`, `host:port`, address or CIDR, `CIDR:port`, `[IPv6]:port`, separated by commas. */
  readonly allow?: string | undefined;
  readonly resolve?: Resolve;
  /** How long one connection may take to come about, TLS included. */
  readonly connectTimeoutMs?: number;
}

export interface EgressGuard {
  /** For undici: HTTP/1.1, no proxy, no redirects of its own. */
  readonly dispatcher: Dispatcher;
  /** For `node:http` and what stands on it, as the AWS SDK's NodeHttpHandler. */
  readonly httpAgent: HttpAgent;
  readonly httpsAgent: HttpsAgent;
  /**
   * In the shape of `dns.lookup`. Refuses a name when ONE of its addresses is not public and not opened by EGRESS_ALLOW.
   * @param port to which the connection goes; without it, entries of EGRESS_ALLOW that name a port open nothing.
   */
  lookupFor(port?: number): LookupFunction;
  /**
   * What is wrong with a host that is an IP address, or the name of a metadata service; undefined for any other
   * name, which only its look-up can judge. `net.connect` asks no look-up about addresses.
   */
  refusalOf(host: string, port?: number): EgressRefused | undefined;
  /** Whether EGRESS_ALLOW opens this very name or address: there, plain http may be spoken. */
  opens(host: string, port: number): boolean;
  close(): Promise<void>;
}

/** @throws {StartupError} for an entry of EGRESS_ALLOW that is none. */
export function createEgressGuard({
  allow = '',
  resolve = (hostname, options) => systemLookup(hostname, options),
  connectTimeoutMs = 10_000,
}: EgressOptions = {}): EgressGuard {
  const targets = parseTargets(allow);

  function opened(host: string, address: string | undefined, port: number | undefined): boolean {
    const parsed = address === undefined ? undefined : parseAddress(address);
    return targets.some(
      (target) =>
        (target.port === undefined || target.port === port) &&
        ('name' in target ? target.name === host : parsed !== undefined && isInside(target.network, parsed)),
    );
  }

  /** @param host normalised. */
  function judge(host: string, address: string, port: number | undefined): EgressRefused | undefined {
    const parsed = parseAddress(address);
    if (parsed === undefined) return new EgressRefused(host, address, 'not an IP address');
    if (isMetadataAddress(parsed)) return new EgressRefused(host, address, 'metadata');
    const reason = whyNotPublic(parsed);
    if (reason === undefined || opened(host, address, port)) return undefined;
    return new EgressRefused(host, address, reason);
  }

  function refusalOf(host: string, port?: number): EgressRefused | undefined {
    const name = normalised(host);
    if (isMetadataName(name)) return new EgressRefused(name, undefined, 'metadata');
    return isIP(name) === 0 ? undefined : judge(name, name, port);
  }

  async function addressesOf(
    hostname: string,
    options: LookupOptions,
    port: number | undefined,
  ): Promise<LookupAddress[]> {
    const refusal = refusalOf(hostname, port);
    if (refusal) throw refusal;
    const addresses = await resolve(hostname, { ...options, all: true });
    for (const { address } of addresses) {
      const refused = judge(normalised(hostname), address, port);
      if (refused) throw refused;
    }
    if (addresses.length === 0) {
      throw Object.assign(new Error(`no address for ${hostname}`), { code: 'ENOTFOUND' });
    }
    return addresses;
  }

  function lookupFor(port?: number): LookupFunction {
    return (hostname, options, callback) => {
      addressesOf(hostname, options, port).then(
        (addresses) => {
          if (options.all) callback(null, addresses);
          else callback(null, addresses[0]!.address, addresses[0]!.family);
        },
        // The empty address is what `dns.lookup` gives beside an error.
        (error: NodeJS.ErrnoException) => callback(error, options.all ? [] : '', 0),
      );
    };
  }

  // A look-up is not told the port, so there is one connector for each that EGRESS_ALLOW names, and one for the rest.
  const namedPorts = new Set(targets.map(({ port }) => port));
  const connectors = new Map<number | undefined, buildConnector.connector>();
  function connectorFor(port: number): buildConnector.connector {
    const key = namedPorts.has(port) ? port : undefined;
    let connector = connectors.get(key);
    if (connector === undefined) {
      connector = buildConnector({
        lookup: lookupFor(key),
        timeout: connectTimeoutMs,
        allowH2: false,
        // Whatever NODE_TLS_REJECT_UNAUTHORIZED says.
        rejectUnauthorized: true,
      } as buildConnector.BuildOptions);
      connectors.set(key, connector);
    }
    return connector;
  }

  const dispatcher = new Agent({
    allowH2: false,
    connect(options, callback) {
      const port = Number(options.port) || (options.protocol === 'https:' ? 443 : 80);
      const refusal = refusalOf(options.hostname, port);
      if (refusal === undefined) return connectorFor(port)(options, callback);
      process.nextTick(callback, refusal, null);
    },
  });

  /** Before node's own `createConnection`: literals are judged here, names by the look-up that goes with them. */
  function guarded(
    options: ClientRequestArgs,
    callback: ((error: Error | null, stream: Duplex) => void) | undefined,
    connect: (options: ClientRequestArgs) => Duplex | null | undefined,
  ): Duplex | null | undefined {
    const host = options.host ?? options.hostname ?? 'localhost';
    const port = Number(options.port);
    const refusal = options.socketPath
      ? new EgressRefused(options.socketPath, undefined, 'a socket of this machine')
      : refusalOf(host, port);
    if (refusal === undefined) return connect({ ...options, lookup: lookupFor(port) });
    process.nextTick(() => (callback as ((error: Error) => void) | undefined)?.(refusal));
    return undefined;
  }

  class GuardedHttpAgent extends HttpAgent {
    override createConnection(
      options: ClientRequestArgs,
      callback?: (error: Error | null, stream: Duplex) => void,
    ): Duplex | null | undefined {
      return guarded(options, callback, (safe) => super.createConnection(safe, callback));
    }
  }
  class GuardedHttpsAgent extends HttpsAgent {
    override createConnection(
      options: ClientRequestArgs,
      callback?: (error: Error | null, stream: Duplex) => void,
    ): Duplex | null | undefined {
      return guarded(options, callback, (safe) => super.createConnection(safe, callback));
    }
  }
  const httpAgent = new GuardedHttpAgent({ keepAlive: true });
  const httpsAgent = new GuardedHttpsAgent({ keepAlive: true, rejectUnauthorized: true });

  return {
    dispatcher,
    httpAgent,
    httpsAgent,
    lookupFor,
    refusalOf,
    opens(host, port) {
      const name = normalised(host);
      return refusalOf(name, port) === undefined && opened(name, isIP(name) ? name : undefined, port);
    },
    async close() {
      httpAgent.destroy();
      httpsAgent.destroy();
      await dispatcher.destroy();
    },
  };
}

type Target = { readonly port: number | undefined } & (
  | { readonly name: string }
  | { readonly network: Network }
);

/** Lower case, without the brackets of an IPv6 address and the dot that ends an absolute name. */
function normalised(host: string): string {
  return host
    .toLowerCase()
    .replace(/^\[(.*)\]$/, '$1')
    .replace(/\.$/, '');
}

function parseTargets(allow: string): Target[] {
  const entries = allow.split(',').map((entry) => entry.trim());
  return entries.filter((entry) => entry !== '').map(parseTarget);
}

function parseTarget(entry: string): Target {
  const refuse = (why: string) =>
    new StartupError(
      `EGRESS_ALLOW: ${JSON.stringify(entry)} ${why}; it takes host, host:port, CIDR and [IPv6]:port.`,
    );
  // More than one colon without brackets is an IPv6 address, which then has no port.
  const match =
    /^\[(?<host>[^\]]+)\](?::(?<digits>\d+))?$/.exec(entry) ??
    /^(?<host>[^:]+)(?::(?<digits>\d+))?$/.exec(entry) ??
    /^(?<host>[^[\]]*:[^[\]]*:[^[\]]*)$/.exec(entry);
  if (!match?.groups) throw refuse('is not understood');
  const { host, digits } = match.groups as { host: string; digits?: string };
  const port = digits === undefined ? undefined : Number(digits);
  if (port !== undefined && (port < 1 || port > 65_535)) throw refuse('has no possible port');
  const network = parseNetwork(host);
  if (network !== undefined) return { network, port };
  const url = `http://${host}/`;
  // The URL parser writes a name as it will be asked for: lower case, punycode.
  if (!/^[^/?#@:*\s]+$/.test(host) || !URL.canParse(url)) throw refuse('names no host');
  const name = normalised(new URL(url).hostname);
  if (isIP(name) !== 0) throw refuse(`is an odd spelling of ${name}`);
  return { name, port };
}
