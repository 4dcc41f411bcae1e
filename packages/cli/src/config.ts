import path from 'node:path';

const root = path.resolve(import.meta.dirname, '../../..');

/** What the command line reads from the environment. Colour (NO_COLOR, FORCE_COLOR) is Node's own `styleText`'s. */
export interface CliConfig {
  /** Python with the packages of training/requirements.txt; `undefined`: the one in training/.venv. */
  readonly python: string | undefined;
  /** The key of the service at `--url`, where no `--key` is given: other users of the machine see arguments. */
  readonly apiKey: string | undefined;
  /** The Redis of the system that an operator's command works on; `undefined`: that of the one that runs on `dataDir`. */
  readonly redisUrl: string | undefined;
  readonly dataDir: string;
  /** Handed on to the programs that are started. */
  readonly env: NodeJS.ProcessEnv;
}

export function loadConfig(env: NodeJS.ProcessEnv): CliConfig {
  return {
    /** ACOUSTICSENSE_PYTHON: a path or a name on the PATH. */
    python: env['ACOUSTICSENSE_PYTHON'] || undefined,
    /** ACOUSTICSENSE_KEY: what `--key` would say. */
    apiKey: env['ACOUSTICSENSE_KEY'] || undefined,
    /** REDIS_URL and DATA_DIR: as `npm start` reads them. */
    redisUrl: env['REDIS_URL'] || undefined,
    dataDir: path.resolve(root, env['DATA_DIR'] || 'data'),
    env,
  };
}
