/** What the feeder is made of, put together: for the service, and for tests that replace a part. */
import type { AnswerIndex } from '@acousticsense/shared/answer-index';
import type { Backends } from '@acousticsense/shared/backends';
import { createBatchRecords } from '@acousticsense/shared/batch-records';
import type { SourceReader } from '@acousticsense/shared/source-reader';
import type { Sources } from '@acousticsense/shared/sources';
import { createTenants } from '@acousticsense/shared/tenants';
import type { Logger } from 'pino';
import type { FeederConfig } from './config.ts';
import { createFeeder } from './feeder.ts';
import { createParts } from './parts.ts';
import { createReceiver } from './receive.ts';
import { createRetention } from './retention.ts';
import { createRows } from './rows.ts';

export interface FeederParts {
  readonly backends: Pick<Backends, 'redis' | 'storage' | 'records' | 'queues'>;
  readonly sources: Sources;
  readonly sourceReader: SourceReader;
  readonly index: AnswerIndex;
  readonly log: Logger;
  /** Aborted when the feeder is to stop. */
  readonly signal: AbortSignal;
  readonly config: Pick<
    FeederConfig,
    | 'retention'
    | 'eventsWaitingMost'
    | 'factor'
    | 'openChunks'
    | 'heads'
    | 'maxRows'
    | 'resultRetentionMs'
    | 'resultsKept'
  >;
}

export function wireFeeder({ backends, sources, sourceReader, index, log, signal, config }: FeederParts) {
  const batches = createBatchRecords(backends.redis, config.retention);
  const tenants = createTenants(backends.redis);
  const common = { ...backends, ...config, batches, sources, reader: sourceReader, index, log, signal };
  const parts = createParts(common);
  const feeder = createFeeder({
    ...common,
    parts,
    rows: createRows({ ...common, parts }),
    receive: createReceiver(common).receive,
    weightOf: async (tenant) => (await tenants.getTenant(tenant))?.weight ?? 1,
  });
  return { feeder, retention: createRetention(common) };
}
