#!/usr/bin/env node
/**
 * The command `acousticsense`, as old a Node as Debian's 18 can begin it: plain JavaScript without dependencies
 * that runs src/main.ts under the Node that the project pins. It installs nothing: it says what to type.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const cli = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const root = path.dirname(path.dirname(cli));
const pinnedNode = path.join(root, 'node_modules', `node-linux-${process.arch}`, 'bin', 'node');
const setpriv = '/usr/bin/setpriv';

if (existsSync(pinnedNode) && existsSync(path.join(root, 'node_modules', 'zod'))) run();
else {
  console.error(
    `AcousticSense is not installed yet: run \`npm start\` once in ${root} (it installs all that is needed; Ctrl-C stops it), or \`npm ci\` for the npm packages alone.`,
  );
  process.exitCode = 1;
}

function run() {
  // setpriv: killed outright, this process takes the other one with it, and that one what it has started.
  const dieWithParent = existsSync(setpriv) ? [setpriv, '--pdeathsig', 'TERM'] : [];
  const [program, ...args] = [
    ...dieWithParent,
    pinnedNode,
    path.join(cli, 'src', 'main.ts'),
    ...process.argv.slice(2),
  ];
  const child = spawn(program, args, { stdio: 'inherit' });
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  child.on('error', (error) => {
    console.error(`${program} could not be started: ${error.message}`);
    process.exitCode = 1;
  });
  child.on('exit', (code, signal) => {
    process.exitCode = signal === null ? code : 1;
  });
}
