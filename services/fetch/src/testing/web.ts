/** A web server on 127.0.0.1 for a test, which answers as the test says. */

import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type RequestListener, type ServerResponse } from 'node:http';
import { createServer as createSecureServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { setDefaultCACertificates } from 'node:tls';

export interface Web {
  readonly port: number;
  /** `http://127.0.0.1:PORT` or the https one. */
  readonly origin: string;
  /** What was asked for so far. */
  readonly requests: IncomingMessage[];
  close(): Promise<void>;
}

const pem = readFileSync(new URL('localhost.pem', import.meta.url));

/** Believes the tests' certificate, in this process. */
export function trustTestCertificate(): void {
  setDefaultCACertificates([pem.toString()]);
}

export async function startWeb(
  answer: (request: IncomingMessage, response: ServerResponse) => unknown,
  { secure = false, host = '127.0.0.1', port = 0 } = {},
): Promise<Web> {
  const requests: IncomingMessage[] = [];
  const listener: RequestListener = (request, response) => {
    requests.push(request);
    void answer(request, response);
  };
  const server = secure ? createSecureServer({ key: pem, cert: pem }, listener) : createServer(listener);
  server.listen(port, host);
  await once(server, 'listening');
  const { port: actual } = server.address() as AddressInfo;
  return {
    port: actual,
    origin: `${secure ? 'https' : 'http'}://${host}:${actual}`,
    requests,
    async close() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
