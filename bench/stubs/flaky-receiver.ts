/**
 * A receiver of webhooks that fails in every way that an honest one can: it refuses, it accepts and never says so, it
 * dies. What it accepts it writes down before it answers, so that the file knows more than the sender.
 *
 *   flaky-receiver.ts FILE PORT REFUSES HANGS     (shares of the messages, 0 to 1; port 0 takes a free one)
 *
 * A line of FILE: {"at": epoch ms, "id": webhook-id, "end": "refused" | "accepted" | "silent", "body": what was accepted}
 */
import { once } from 'node:events';
import { openSync, writeSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';

const [file, port, refuses, hangs] = process.argv.slice(2);
// A page that the kernel has outlives the process, and a line is one write: SIGKILL loses and tears none.
const lines = openSync(file!, 'a');

const server = createServer(async (request, response) => {
  const parts = await request.toArray().catch(() => undefined);
  if (parts === undefined) return;
  const dice = Math.random();
  const end =
    dice < Number(refuses)
      ? 'refused'
      : dice < Number(refuses) + (1 - Number(refuses)) * Number(hangs)
        ? 'silent'
        : 'accepted';
  const body = end === 'refused' ? undefined : Buffer.concat(parts).toString();
  const line = { at: Date.now(), id: request.headers['webhook-id'], end, body };
  writeSync(lines, `${JSON.stringify(line)}\n`);
  if (end !== 'silent') response.writeHead(end === 'refused' ? 500 : 204).end();
});
server.listen(Number(port), '127.0.0.1');
await once(server, 'listening');
process.send!((server.address() as AddressInfo).port);
process.on('disconnect', () => process.exit());
