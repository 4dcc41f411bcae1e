/** Configuration of the webhook service, from the environment. */
import { healthConfig, healthVariables, readVariables } from '@acousticsense/shared/common-config';
import { z } from 'zod';

const schema = z.object({
  ...healthVariables,
  /** Events of a tenant that stay in Redis once they lie in storage. */
  EVENTS_KEPT: z.coerce.number().int().min(1).default(10_000),
  /** Messages of an endpoint that are under way or wait to be tried again; what is behind them waits in the log. */
  WEBHOOK_BACKLOG: z.coerce.number().int().min(1).max(100_000).default(2_000),
  /** Seconds that a receiver has to answer. */
  WEBHOOK_TIMEOUT_SECONDS: z.coerce.number().positive().max(60).default(15),
  /** How many times as fast the clock of retries runs: for trying out what takes days. Never in production. */
  WEBHOOK_CLOCK_SPEED: z.coerce.number().min(1).max(1_000_000).default(1),
});

/** @throws {StartupError} naming the variable. */
export function loadConfig(env: NodeJS.ProcessEnv) {
  const v = readVariables(schema, env);
  return {
    ...healthConfig(v),
    eventsKept: v.EVENTS_KEPT,
    backlog: v.WEBHOOK_BACKLOG,
    timeoutMs: v.WEBHOOK_TIMEOUT_SECONDS * 1_000,
    clockSpeed: v.WEBHOOK_CLOCK_SPEED,
    retentionMs: v.RESULT_RETENTION_DAYS * 24 * 3_600_000,
  };
}

export type WebhookConfig = ReturnType<typeof loadConfig>;
