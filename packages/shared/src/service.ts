/**
 * The life of a service process: start, health, readiness, metrics, logs, drain.
 *
 *   startService('decoder', config, async (service) => { ...wire, register closers and checks... })
 *
 * Exits non-zero only for a {@link StartupError} (invalid configuration, a bundle that fails its checks). For
 * Redis, storage, model download and GPU it stays up and says 503 with the reason at /readyz.
 */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { type Logger, pino } from 'pino';
import { collectDefaultMetrics, Gauge, Registry } from 'prom-client';
import { StartupError } from './errors.ts';

export interface ServiceConfig {
  readonly logLevel: string;
  readonly metricsHost: string;
  /** 0 takes a free port; undefined: the service serves its health itself (the API does). */
  readonly metricsPort: number | undefined;
  /** Seconds that running work may take after SIGTERM before it is given back. */
  readonly drainSeconds: number;
}

export interface Service {
  readonly name: string;
  readonly log: Logger;
  readonly registry: Registry;
  /** Aborted when draining has taken its time: what runs is given back. */
  readonly closing: AbortSignal;
  /** Registered where a resource opens; run last-in first-out. */
  onClose(what: string, close: () => unknown): void;
  /**
   * A readiness check: throws with the reason while the part is away.
   * @param trustMs how long a success is believed: for checks that cost something.
   */
  addCheck(part: string, check: () => Promise<void>, trustMs?: number): void;
  /** Reasons why the service is not ready; empty when it is. Runs the checks, at most four times a second. */
  notReady(): Promise<Record<string, string>>;
  /** Something was away: every check runs again, whatever it said before. */
  distrust(): void;
  /** Answers /healthz, /readyz and /metrics; false when the path is another. */
  handleHealth(request: IncomingMessage, response: ServerResponse): Promise<boolean>;
  /** Tells the parent process, if there is one, on which port the service listens. */
  announcePort(port: number): void;
}

const checkTimeoutMs = 2_000;
/** After the drain time: for giving back what runs. A part that is away, Redis above all, could keep it for ever. */
const giveBackMs = 5_000;
const checkEveryMs = 250;

export async function startService(
  name: string,
  loadConfig: () => ServiceConfig,
  wire: (service: Service) => Promise<void>,
): Promise<void> {
  let config: ServiceConfig;
  try {
    config = loadConfig();
  } catch (error) {
    return refuse(pino({ name }, logDestination()), error);
  }
  const base = { service: name, pid: process.pid };
  const log = pino(
    { name, level: config.logLevel, base, serializers: { err: withoutArguments } },
    logDestination(),
  );
  const registry = new Registry();
  registry.setDefaultLabels({ service: name });
  collectDefaultMetrics({ register: registry });

  const closers: { what: string; close: () => unknown }[] = [];
  const checks = new Map<string, { check: () => Promise<void>; trustMs: number; passedAt: number }>();
  const abort = new AbortController();
  let draining = false;
  /** Times on the clock that never jumps: one set back must not make old news last. */
  let lastCheck = { at: -Infinity, result: undefined as Promise<Record<string, string>> | undefined };

  async function runChecks(): Promise<Record<string, string>> {
    const reasons: Record<string, string> = {};
    if (draining) reasons['service'] = 'shutting down';
    await Promise.all(
      [...checks].map(async ([part, known]) => {
        if (performance.now() - known.passedAt < known.trustMs) return;
        try {
          await withTimeout(known.check(), checkTimeoutMs);
          known.passedAt = performance.now();
        } catch (error) {
          // Not something that passes: what the service was pointed at can never serve it.
          if (error instanceof StartupError) refuse(log, error);
          reasons[part] = error instanceof Error ? error.message : String(error);
        }
      }),
    );
    return reasons;
  }

  const service: Service = {
    name,
    log,
    registry,
    closing: abort.signal,
    onClose: (what, close) => closers.push({ what, close }),
    addCheck: (part, check, trustMs = 0) => checks.set(part, { check, trustMs, passedAt: -Infinity }),
    notReady() {
      if (lastCheck.result === undefined || performance.now() - lastCheck.at > checkEveryMs) {
        lastCheck = { at: performance.now(), result: runChecks() };
      }
      return lastCheck.result!;
    },
    distrust() {
      for (const known of checks.values()) known.passedAt = -Infinity;
      lastCheck.at = -Infinity;
    },
    async handleHealth(request, response) {
      const path = request.url?.split('?')[0];
      if (path === '/healthz') {
        response.writeHead(200, { 'content-type': 'text/plain' }).end('ok\n');
      } else if (path === '/readyz') {
        const reasons = await service.notReady();
        const ready = Object.keys(reasons).length === 0;
        response
          .writeHead(ready ? 200 : 503, { 'content-type': 'application/json', 'cache-control': 'no-store' })
          .end(`${JSON.stringify(ready ? { ready } : { ready, reasons })}\n`);
      } else if (path === '/metrics') {
        response.writeHead(200, { 'content-type': registry.contentType }).end(await registry.metrics());
      } else return false;
      return true;
    },
    announcePort: (port) => tellParent({ type: 'listening', port }),
  };
  new Gauge({
    name: 'acousticsense_ready',
    help: '1 while a part that the service needs is there, 0 while it is away (/readyz says why).',
    labelNames: ['part'],
    registers: [registry],
    async collect() {
      const reasons = await service.notReady();
      for (const part of checks.keys()) this.set({ part }, part in reasons ? 0 : 1);
    },
  });

  async function close(reason: string): Promise<void> {
    if (draining) return;
    draining = true;
    log.info({ reason }, 'stopping');
    const overtime = setTimeout(
      () => abort.abort(new Error('draining took too long')),
      config.drainSeconds * 1_000,
    );
    overtime.unref();
    const leave = () => {
      log.warn('could not close everything in time: leaving it to redelivery');
      process.exit(process.exitCode ?? 0);
    };
    setTimeout(leave, config.drainSeconds * 1_000 + giveBackMs).unref();
    for (const { what, close } of closers.reverse()) {
      try {
        await close();
      } catch (error) {
        log.warn({ err: error, what }, 'could not be closed');
      }
    }
    log.info('stopped');
    process.exit(process.exitCode ?? 0);
  }
  process.on('SIGTERM', () => void close('SIGTERM'));
  process.on('SIGINT', () => void close('SIGINT'));
  // The launcher is gone: nobody else would stop this process.
  process.on('disconnect', () => void close('parent gone'));
  // A rejection that nobody handles is a bug; the state it leaves is unknown, and every stage survives a restart.
  process.on('unhandledRejection', (error) => {
    log.fatal({ err: error }, 'unhandled rejection');
    process.exit(1);
  });

  try {
    await wire(service);
    if (config.metricsPort !== undefined) await serveHealth(service, config.metricsHost, config.metricsPort);
  } catch (error) {
    return refuse(log, error);
  }
  await reportReadiness(service);
}

/** ioredis hangs the command on its errors, with all its arguments: AUTH and HELLO have the password among theirs. */
function withoutArguments(error: Error): Record<string, unknown> {
  const { command, ...told } = pino.stdSerializers.err(error) as pino.SerializedError & {
    command?: { name?: string };
  };
  return command === undefined ? told : { ...told, command: command.name };
}

/**
 * Written at once. pino's default queues lines and flushes them on exit, and that flush never ends when the
 * reader of the pipe is gone (sonic-boom 4.2 retries EPIPE for ever): a service would outlive a killed launcher.
 */
function logDestination() {
  return pino.destination({ fd: 1, sync: true });
}

async function serveHealth(service: Service, host: string, port: number): Promise<void> {
  const server = createServer((request, response) => {
    void service.handleHealth(request, response).then((handled) => {
      if (!handled) response.writeHead(404).end();
    });
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error) =>
      reject(new StartupError(`Port ${port} for health and metrics cannot be used: ${error.message}`)),
    );
    server.listen(port, host, resolve);
  });
  const actual = (server.address() as AddressInfo).port;
  service.onClose('health server', () => server.close());
  service.log.info({ port: actual }, 'health and metrics');
  service.announcePort(actual);
}

/** Logs every change of readiness, and tells the parent when the service is ready for the first time. */
async function reportReadiness(service: Service): Promise<void> {
  let known: string | undefined;
  let told = false;
  const look = async () => {
    const reasons = await service.notReady();
    const text = JSON.stringify(reasons);
    if (text === known) return;
    known = text;
    if (text !== '{}') {
      service.log.warn({ reasons }, 'not ready');
      tellParent({ type: 'not-ready', reasons });
    } else {
      service.log.info('ready');
      if (!told) tellParent({ type: 'ready' });
      told = true;
    }
  };
  let timer: NodeJS.Timeout;
  service.onClose('readiness', () => clearTimeout(timer));
  const next = async () => {
    await look();
    timer = setTimeout(() => void next(), told ? 1_000 : checkEveryMs);
  };
  await next();
}

function refuse(log: Logger, error: unknown): void {
  const expected = error instanceof StartupError;
  const message = error instanceof Error ? error.message : String(error);
  if (expected) log.fatal(message);
  else log.fatal({ err: error }, 'could not start');
  tellParent({ type: 'failed', message });
  process.exitCode = 1;
  // Gives the log line and the message to the parent time to leave.
  setTimeout(() => process.exit(1), 100);
}

function tellParent(message: Record<string, unknown>): void {
  if (process.connected) process.send?.(message);
}

async function withTimeout(promise: Promise<void>, ms: number): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${ms} ms`)), ms);
  });
  try {
    await Promise.race([promise, timeout]);
  } finally {
    clearTimeout(timer);
  }
}
