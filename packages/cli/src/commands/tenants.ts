import type { TenantSetting, TenantSettings } from '@acousticsense/shared/tenants';
import { defineCommand, numberOption } from '../command.ts';
import { UsageError } from '../failure.ts';
import { table, withTenants } from './with-tenants.ts';

/** The option that sets it, and the least it may be. */
const settings = {
  weight: ['weight', 1],
  requestsPerMinute: ['requests-per-minute', 0],
  openJobs: ['open-jobs', 1],
  rowsPerDay: ['rows-per-day', 0],
  bytesPerDay: ['bytes-per-day', 0],
} as const satisfies Record<TenantSetting, readonly [string, number]>;
const names = Object.keys(settings) as TenantSetting[];

const json = { type: 'boolean', help: 'print it as JSON' } as const;

export const tenantsSet = defineCommand({
  name: 'tenants set',
  summary: "Set a tenant's share and limits; makes the tenant if it is new.",
  operands: [{ name: 'TENANT', help: 'small letters, digits and hyphens' }],
  options: {
    weight: {
      type: 'string',
      value: 'N',
      help: 'share of the workers beside the other tenants (default: 1)',
    },
    'requests-per-minute': { type: 'string', value: 'N', help: 'requests to the API' },
    'open-jobs': { type: 'string', value: 'N', help: 'unfinished jobs at a time; never unlimited' },
    'rows-per-day': { type: 'string', value: 'N', help: 'accepted jobs and rows of batches' },
    'bytes-per-day': { type: 'string', value: 'N', help: 'uploaded bytes' },
    json,
  },
  notes:
    'What is not named stays as it is. 0 is no limit; `default` goes back to what the service has set (REQUESTS_PER_MINUTE, MAX_OPEN_JOBS, ROWS_PER_DAY, BYTES_PER_DAY). It holds within 5 seconds.\nIt works on the Redis of REDIS_URL, else on that of the system which runs on DATA_DIR.',
  examples: [
    { line: 'tenants set acme --weight 3', does: 'three times the share of a tenant of weight 1' },
    { line: 'tenants set acme --rows-per-day 100000 --requests-per-minute 600', does: 'limits' },
    { line: 'tenants set acme --rows-per-day default', does: "back to the service's own limit" },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const change: { [S in TenantSetting]?: number | undefined } = {};
    for (const name of names) {
      const [option, least] = settings[name];
      const given = options[option];
      if (given === undefined) continue;
      change[name] = given === 'default' ? undefined : numberOption(option, given, { least, whole: true });
    }
    if (Object.keys(change).length === 0) {
      const all = names.map((name) => `--${settings[name][0]}`).join(', ');
      throw new UsageError(`Say what to set: ${all}.`);
    }
    const tenant = operands[0]!;
    const now = await withTenants(config, signal, (tenants) => tenants.setTenant(tenant, change));
    terminal.print(
      options.json === true ? JSON.stringify({ tenant, ...now }, null, 2) : rows([{ tenant, ...now }]),
    );
    return 0;
  },
});

export const tenantsList = defineCommand({
  name: 'tenants list',
  summary: 'List the tenants with their share and limits.',
  operands: [],
  options: { json },
  notes: 'A hyphen is the limit that the service has set; 0 is none.',
  examples: [{ line: 'tenants list', does: 'all of them' }],
  async run({ options, terminal, config, signal }) {
    const all = await withTenants(config, signal, (tenants) => tenants.listTenants());
    terminal.print(options.json === true ? JSON.stringify(all, null, 2) : rows(all));
    return 0;
  },
});

function rows(tenants: readonly ({ tenant: string } & TenantSettings)[]): string {
  const header = ['TENANT', ...names.map((name) => settings[name][0].toUpperCase())];
  return table(
    header,
    tenants.map((one) => [one.tenant, ...names.map((name) => String(one[name] ?? '-'))]),
  );
}
