/** What the webhook service tells Prometheus. */
import type { Endpoint } from '@acousticsense/shared/endpoints';
import { Counter, Gauge, Histogram, type Registry } from 'prom-client';

export type Metrics = ReturnType<typeof createMetrics>;

export function createMetrics(registry: Registry) {
  const registers = [registry];
  return {
    attempts: new Counter({
      name: 'acousticsense_webhook_attempts_total',
      help: 'Attempts to deliver, by outcome (delivered, failed, gone) and what was wrong (problem).',
      labelNames: ['outcome', 'problem'],
      registers,
    }),
    seconds: new Histogram({
      name: 'acousticsense_webhook_delivery_seconds',
      help: 'From the event to its delivery.',
      buckets: [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600, 3_600, 86_400],
      registers,
    }),
    deadLetters: new Counter({
      name: 'acousticsense_webhook_dead_letters_total',
      help: 'Messages that are not tried any more.',
      labelNames: ['reason'],
      registers,
    }),
  };
}

export interface State {
  leads(): boolean;
  lagSeconds(): number;
  statuses(): Readonly<Record<Endpoint['status'], number>>;
  outstanding(): Promise<number>;
  unarchived(): Promise<number>;
}

/** Read when they are asked for; what is the same from every process is told by the leading one only. */
export function exportState(registry: Registry, state: State): void {
  const registers = [registry];
  new Gauge({
    name: 'acousticsense_webhook_leads',
    help: '1 in the process that hands events over and archives them.',
    registers,
    collect() {
      this.set(state.leads() ? 1 : 0);
    },
  });
  new Gauge({
    name: 'acousticsense_webhook_lag_seconds',
    help: 'Age of the oldest event that the queue of an enabled endpoint has not got yet.',
    registers,
    collect() {
      this.set(state.leads() ? state.lagSeconds() : 0);
    },
  });
  new Gauge({
    name: 'acousticsense_webhook_endpoints',
    help: 'Endpoints by status.',
    labelNames: ['status'],
    registers,
    collect() {
      this.reset();
      if (state.leads())
        for (const [status, count] of Object.entries(state.statuses())) this.set({ status }, count);
    },
  });
  new Gauge({
    name: 'acousticsense_webhook_outstanding',
    help: 'Messages of all endpoints that are under way or wait to be tried again.',
    registers,
    async collect() {
      this.set(state.leads() ? await state.outstanding().catch(() => 0) : 0);
    },
  });
  new Gauge({
    name: 'acousticsense_events_unarchived',
    help: 'Events in Redis beyond those that are kept there on purpose.',
    registers,
    async collect() {
      this.set(state.leads() ? await state.unarchived().catch(() => 0) : 0);
    },
  });
}
