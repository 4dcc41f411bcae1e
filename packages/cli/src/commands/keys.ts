import { defineCommand } from '../command.ts';
import { Failure } from '../failure.ts';
import { table, withTenants } from './with-tenants.ts';

const where =
  'It works on the Redis of REDIS_URL, else on that of the system which runs on DATA_DIR (default: data in the project).';
const json = { type: 'boolean', help: 'print it as JSON' } as const;

export const keysCreate = defineCommand({
  name: 'keys create',
  summary: 'Make an API key for a tenant, and the tenant if it is new.',
  operands: [{ name: 'TENANT', help: 'small letters, digits and hyphens' }],
  options: {
    name: { type: 'string', value: 'TEXT', help: 'who or what uses the key (default: nothing)' },
    json,
  },
  notes: `The key is printed once and stored nowhere: only its SHA-256 is.\n${where}`,
  examples: [
    { line: 'keys create acme --name "nightly import"', does: 'a key for the tenant acme' },
    { line: 'keys create acme > acme.key', does: 'the key alone, into a file' },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const tenant = operands[0]!;
    const { made, known } = await withTenants(config, signal, async (tenants) => ({
      known: await tenants.tenantExists(tenant),
      made: await tenants.createKey(tenant, options.name ?? ''),
    }));
    terminal.print(options.json === true ? JSON.stringify(made, null, 2) : made.key);
    if (!known) terminal.note(`The tenant ${tenant} is new.`);
    terminal.note(`Keep the key: it is not shown again. \`keys revoke ${made.id}\` ends it.`);
    return 0;
  },
});

export const keysList = defineCommand({
  name: 'keys list',
  summary: 'List the API keys: whose they are, never the keys themselves.',
  operands: [],
  options: { json },
  notes: where,
  examples: [{ line: 'keys list', does: 'all of them, the oldest first' }],
  async run({ options, terminal, config, signal }) {
    const keys = await withTenants(config, signal, (tenants) => tenants.listKeys());
    if (options.json === true) terminal.print(JSON.stringify(keys, null, 2));
    else if (keys.length === 0) terminal.note("There are no keys but the operator's own (API_KEY).");
    else {
      const rows = keys.map(({ id, tenant, name, createdAt }) => [id, tenant, createdAt, name]);
      terminal.print(table(['ID', 'TENANT', 'CREATED', 'NAME'], rows));
    }
    return 0;
  },
});

export const keysRevoke = defineCommand({
  name: 'keys revoke',
  summary: 'End an API key: within 5 seconds it is refused everywhere.',
  operands: [{ name: 'ID', help: 'as `keys list` shows it' }],
  options: { json },
  notes: `Jobs that were sent with it go on.\n${where}`,
  examples: [{ line: 'keys revoke 3f9c02d81ab4', does: 'this key' }],
  async run({ operands, options, terminal, config, signal }) {
    const key = await withTenants(config, signal, (tenants) => tenants.revokeKey(operands[0]!));
    if (key === undefined) {
      throw new Failure(`There is no key with the id ${operands[0]}; \`keys list\` shows them.`);
    }
    terminal.print(
      options.json === true
        ? JSON.stringify(key, null, 2)
        : `Revoked ${key.id} of ${key.tenant}${key.name === '' ? '' : ` (${key.name})`}.`,
    );
    return 0;
  },
});
