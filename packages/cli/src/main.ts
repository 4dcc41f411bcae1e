/** The program `acousticsense`: the table of commands, and how a command ends. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { StartupError } from '@acousticsense/shared/errors';
import { type Command, readCommandLine } from './command.ts';
import { evaluate } from './commands/evaluate.ts';
import { keysCreate, keysList, keysRevoke } from './commands/keys.ts';
import { modelCalibrate } from './commands/model-calibrate.ts';
import { modelCheck } from './commands/model-check.ts';
import { modelImport } from './commands/model-import.ts';
import { modelParity } from './commands/model-parity.ts';
import { tenantsList, tenantsSet } from './commands/tenants.ts';
import { webhooksListen } from './commands/webhooks-listen.ts';
import { webhooksTest } from './commands/webhooks-test.ts';
import { loadConfig } from './config.ts';
import { Failure, Stopped, UsageError } from './failure.ts';
import { createTerminal } from './terminal.ts';

const commands: readonly Command[] = [
  evaluate,
  modelImport,
  modelCalibrate,
  modelParity,
  modelCheck,
  keysCreate,
  keysList,
  keysRevoke,
  tenantsSet,
  tenantsList,
  webhooksTest,
  webhooksListen,
];

/** A terminal passes one Ctrl-C to the whole group and the starter passes it on: within this time it is one. */
const sameSignalMs = 1_000;

async function main(): Promise<number> {
  const terminal = createTerminal(process);
  const stop = new AbortController();
  let firstSignalAt: number | undefined;
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      if (firstSignalAt === undefined) {
        firstSignalAt = Date.now();
        stop.abort(new Stopped('Stopped.'));
      } else if (Date.now() - firstSignalAt > sameSignalMs) process.exit(130);
    });
  }
  // The reader has gone (`| head`): what is under way is brought to its end in silence.
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', () => stop.abort(new Stopped('Nobody reads the output any more.')));
  }
  try {
    const request = readCommandLine(process.argv.slice(2), commands);
    if (request.kind === 'help') terminal.print(request.text);
    else if (request.kind === 'version') terminal.print(version());
    else {
      const { command, operands, options } = request;
      const config = loadConfig(process.env);
      return await command.run({ operands, options, terminal, config, signal: stop.signal });
    }
    return 0;
  } catch (thrown) {
    const told = [UsageError, Failure, Stopped, StartupError].some((kind) => thrown instanceof kind);
    // Whatever broke because it was being stopped is no news.
    const error = !told && stop.signal.aborted ? stop.signal.reason : thrown;
    if (!told && error === thrown) {
      terminal.note(`This is a fault of acousticsense itself; please report it.\n${(error as Error).stack}`);
      return 1;
    }
    terminal.note((error as Error).message);
    return error instanceof UsageError ? 2 : error instanceof Stopped ? 130 : 1;
  }
}

function version(): string {
  const root = path.resolve(import.meta.dirname, '../../..');
  return (JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8')) as { version: string }).version;
}

process.exitCode = await main();
