/** What the commands that ask a running service have in common. */

import { type Caller, createCaller } from '../caller.ts';
import type { Option } from '../command.ts';
import type { CliConfig } from '../config.ts';
import { noSystem, runningSystem } from '../running-system.ts';

export const callerOptions = {
  url: {
    type: 'string',
    value: 'URL',
    help: 'the service (default: the one that runs on DATA_DIR)',
  },
  key: { type: 'string', value: 'KEY', help: 'its API key; better in the variable ACOUSTICSENSE_KEY' },
} as const satisfies Record<string, Option>;

/** @throws {Failure} no service is named and none runs here; an address or a key that is none. */
export function callerOf(
  options: { readonly url?: string; readonly key?: string },
  config: Pick<CliConfig, 'apiKey' | 'dataDir'>,
): Caller {
  const url = options.url ?? runningSystem(config.dataDir).url;
  if (url === undefined) throw noSystem(config.dataDir, 'name a service with --url');
  return createCaller({ url, apiKey: options.key ?? config.apiKey });
}
