/** What the operator's commands have in common: they work on the system's Redis itself, whether its API runs or not. */
import { setTimeout as sleep } from 'node:timers/promises';
import { InfrastructureFault, ProblemError } from '@acousticsense/shared/errors';
import { connectRedis, withoutCredentials } from '@acousticsense/shared/redis';
import { createTenants, type Tenants } from '@acousticsense/shared/tenants';
import type { CliConfig } from '../config.ts';
import { Failure } from '../failure.ts';
import { noSystem, runningSystem } from '../running-system.ts';

const patienceMs = 3_000;

/**
 * Calls `work` with the tenants of the system at REDIS_URL, or of the one that runs on DATA_DIR.
 * @throws {Failure} no system, a Redis that does not answer, what cannot be used.
 */
export async function withTenants<T>(
  config: CliConfig,
  signal: AbortSignal,
  work: (tenants: Tenants) => Promise<T>,
): Promise<T> {
  const url = config.redisUrl ?? runningSystem(config.dataDir).redisUrl;
  if (url === undefined) {
    throw noSystem(config.dataDir, 'name its Redis in REDIS_URL or its directory in DATA_DIR');
  }
  const redis = connectRedis(url, patienceMs);
  let reason = 'no answer';
  redis.on('error', (error) => {
    reason = error.message;
  });
  try {
    for (const deadline = Date.now() + patienceMs; redis.status !== 'ready'; ) {
      if (Date.now() > deadline) {
        throw new Failure(
          `Redis cannot be reached at ${withoutCredentials(url)} (${reason}): does the system run?`,
        );
      }
      await sleep(20, undefined, { signal });
    }
    return await work(createTenants(redis));
  } catch (error) {
    const told = error instanceof ProblemError || error instanceof InfrastructureFault;
    throw told ? new Failure(error.message) : error;
  } finally {
    redis.disconnect();
  }
}

/** Columns as wide as their widest cell, under a header. */
export function table(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = header.map((_, column) => Math.max(...[header, ...rows].map((row) => row[column]!.length)));
  return [header, ...rows]
    .map((row) =>
      row
        .map((cell, column) => cell.padEnd(widths[column]!))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}
