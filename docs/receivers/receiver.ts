/**
 * A receiver of AcousticSense's webhooks: Node 22.18 or later (which runs TypeScript) and `npm install standardwebhooks`.
 *
 *   WEBHOOK_SECRET=whsec_... PORT=3000 node receiver.ts
 *
 * What it remembers, it remembers in memory. In earnest that is a table of a database, written in one transaction
 * with what an event changes.
 */
import { createServer, type IncomingMessage } from 'node:http';
import { Webhook } from 'standardwebhooks';

interface Event {
  type: string;
  timestamp: string;
  // biome-ignore lint/suspicious/noExplicitAny: the fields of each type are in /openapi.json
  data: Record<string, any>;
}

const webhook = new Webhook(process.env['WEBHOOK_SECRET'] ?? '');

/** Every event is smaller than 20 kB. */
const mostBytes = 64 * 1024;
/** Longer than an event is tried. */
const rememberedMs = 7 * 24 * 3_600_000;
/** webhook-id -> when it came. */
const seen = new Map<string, number>();
/** ref -> the latest result. */
const latest = new Map<string, { revision: number; state: string; genre?: string }>();

const server = createServer(async (request, response) => {
  // Undefined also when the sender hung up.
  const body = await bodyOf(request).catch(() => undefined);
  if (body === undefined) return void response.writeHead(413, { connection: 'close' }).end();
  let event: Event;
  try {
    // What was signed is these very bytes: verify first, parse then.
    event = webhook.verify(body, request.headers as Record<string, string>) as Event;
  } catch (error) {
    // The reason is shown with the attempt to whoever registered the endpoint.
    return void response.writeHead(401).end((error as Error).message);
  }
  if (event.type === 'endpoint.verification') {
    response.setHeader('content-type', 'application/json');
    return void response.end(JSON.stringify({ challenge: event.data['challenge'] }));
  }
  const id = request.headers['webhook-id'] as string;
  const isNew = remember(id);
  // First remembered, then answered, then worked on: the sender waits 15 s, and what was answered never comes again.
  response.writeHead(204).end();
  console.log(`${id} ${event.type} ${isNew ? work(id, event) : 'known'}`);
});

function remember(id: string): boolean {
  const now = Date.now();
  for (const [old, at] of seen) {
    if (now - at < rememberedMs) break;
    seen.delete(old);
  }
  if (seen.has(id)) return false;
  seen.set(id, now);
  return true;
}

function work(id: string, { type, data }: Event): string {
  if (id.startsWith('evt_test_')) return 'test';
  if (type !== 'job.completed' && type !== 'job.failed') return 'noted';
  const { ref, revision, state, genres } = data;
  if (ref === null) return 'noted';
  const known = latest.get(ref);
  if (known !== undefined && known.revision > revision) return 'outdated';
  latest.set(ref, { revision, state, genre: genres[0]?.label });
  return 'latest';
}

async function bodyOf(request: IncomingMessage): Promise<Buffer | undefined> {
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of request) {
    bytes += part.length;
    if (bytes > mostBytes) return undefined;
    parts.push(part);
  }
  return Buffer.concat(parts);
}

server.listen(Number(process.env['PORT'] ?? 3000), '127.0.0.1', () => {
  const address = server.address();
  if (address !== null && typeof address === 'object')
    console.log(`Listening on http://127.0.0.1:${address.port}`);
});
