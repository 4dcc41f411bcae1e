/** A receiver of webhooks on 127.0.0.1 for a test: it reads each message whole, then answers as the test says. */
import { once } from 'node:events';
import { createServer, type IncomingHttpHeaders, type ServerResponse } from 'node:http';
import { createServer as createSecureServer } from 'node:https';
import { type AddressInfo, createServer as createTcpServer, type Server, type Socket } from 'node:net';
import type { Certificate } from './certificates.ts';

export interface Received {
  readonly method: string;
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: string;
}

export interface Receiver extends AsyncDisposable {
  readonly port: number;
  /** `http://127.0.0.1:PORT`, or the https one. */
  readonly origin: string;
  /** Whole messages, in the order of their arrival. */
  readonly received: Received[];
  /** All that were ever made. */
  readonly connections: Socket[];
}

export async function startReceiver(
  answer: (message: Received, response: ServerResponse) => unknown,
  certificate?: Certificate,
): Promise<Receiver> {
  const received: Received[] = [];
  const server = certificate === undefined ? createServer() : createSecureServer(certificate);
  server.on('request', async (request, response: ServerResponse) => {
    // Broken off by the sender, or by a test that ends.
    const parts = await request.toArray().catch(() => undefined);
    if (parts === undefined) return;
    const { method = '', url = '', headers } = request;
    const message = { method, path: url, headers, body: Buffer.concat(parts).toString() };
    received.push(message);
    await answer(message, response);
  });
  const { port, connections, close } = await listen(server);
  const origin = `${certificate === undefined ? 'http' : 'https'}://127.0.0.1:${port}`;
  return { port, origin, received, connections, [Symbol.asyncDispose]: close };
}

/** What no HTTP server does: `serve` gets the bare connections. */
export async function startRawReceiver(
  serve: (socket: Socket) => void,
): Promise<Pick<Receiver, 'port' | 'origin' | 'connections' | typeof Symbol.asyncDispose>> {
  const server = createTcpServer((socket) => {
    socket.on('error', () => {});
    serve(socket);
  });
  const { port, connections, close } = await listen(server);
  return { port, origin: `http://127.0.0.1:${port}`, connections, [Symbol.asyncDispose]: close };
}

async function listen(server: Server) {
  const connections: Socket[] = [];
  server.on('connection', (socket) => connections.push(socket));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    port: (server.address() as AddressInfo).port,
    connections,
    async close() {
      for (const socket of connections) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
