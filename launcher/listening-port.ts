/** Whether a port can be listened on, and who has it when not. */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { createServer } from 'node:net';
import { StartupError } from '@acousticsense/shared/errors';

/** @throws {StartupError} a sentence that names the process, when that can be told, and the way out. */
export async function checkPortIsFree(host: string, port: number): Promise<void> {
  const probe = createServer();
  try {
    await new Promise<void>((resolve, reject) => {
      probe.once('error', reject);
      probe.listen({ host, port, exclusive: true }, resolve);
    });
  } catch (cause) {
    throw new StartupError(sentence(host, port, cause as NodeJS.ErrnoException), { cause });
  }
  await new Promise((resolve) => probe.close(resolve));
}

function sentence(host: string, port: number, error: NodeJS.ErrnoException): string {
  const another = port === 8000 ? 8001 : 8000;
  if (error.code === 'EADDRINUSE') {
    return `Port ${port} is taken${holderOf(port)}: stop that program, or take another port with PORT=${another} npm start.`;
  }
  if (error.code === 'EACCES') {
    return `Port ${port} may only be used by root: take another with PORT=${another} npm start.`;
  }
  return `HOST=${host} cannot be listened on (${error.code}): use 127.0.0.1 for this machine only, or 0.0.0.0 for the network.`;
}

/** ` by python3 (process 42)`, or nothing: other users' processes keep their descriptors to themselves. */
function holderOf(port: number): string {
  const inodes = new Set<string>();
  for (const table of ['/proc/net/tcp', '/proc/net/tcp6']) {
    for (const row of readOrEmpty(table).split('\n').slice(1)) {
      const [, local, , state, , , , , , inode] = row.trim().split(/\s+/);
      // State 0A is LISTEN; addresses are hexadecimal (proc(5)).
      if (state === '0A' && Number.parseInt(local?.split(':')[1] ?? '', 16) === port)
        inodes.add(`socket:[${inode}]`);
    }
  }
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      const holds = readdirSync(`/proc/${pid}/fd`).some((fd) => {
        try {
          return inodes.has(readlinkSync(`/proc/${pid}/fd/${fd}`));
        } catch {
          return false;
        }
      });
      if (holds) return ` by ${readOrEmpty(`/proc/${pid}/comm`).trim()} (process ${pid})`;
    } catch {
      // Another user's process, or one that has just ended.
    }
  }
  return '';
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return '';
  }
}
