/**
 * Tenants and their API keys.
 *
 * A key is random and long, so there is nothing to guess in its SHA-256: that alone is stored, without salt or a slow
 * hash. Whoever reads Redis, its files or a backup learns no key.
 *
 * Processes may believe what they have read for {@link believedMs}: a revoked key dies, and a changed setting holds,
 * within 5 seconds everywhere.
 */
import { createHash, randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { ProblemError } from './errors.ts';
import { tenantNameSchema } from './pipeline.ts';
import { withRedis } from './redis.ts';

/** The tenant of the operator's own key, and of callers on the same machine where no key is asked for. Always there. */
export const defaultTenant = 'default';

const limit = z.int().min(0).max(1e15);

/** An absent limit is the service's own default; 0 is no limit. */
export const tenantSettingsSchema = z.strictObject({
  weight: z.int().min(1).max(1_000).describe('share of the workers beside the weights of the other tenants'),
  requestsPerMinute: limit.optional(),
  /** Never unlimited: every open job has a record in Redis. */
  openJobs: limit.min(1).optional(),
  rowsPerDay: limit.optional().describe('accepted jobs and rows of batches'),
  bytesPerDay: limit.optional().describe('uploaded bytes'),
});
export type TenantSettings = z.infer<typeof tenantSettingsSchema>;
export type TenantSetting = keyof TenantSettings;

export interface ApiKey {
  readonly id: string;
  readonly tenant: string;
  /** For people: who or what uses it. */
  readonly name: string;
  readonly createdAt: string;
}

export interface Tenants {
  /** Makes the tenant too, if it is new. The key itself is never to be had again. @throws {ProblemError} bad_option */
  createKey(tenant: string, name: string): Promise<ApiKey & { readonly key: string }>;
  /** @returns the key that is no more; undefined when there was none. */
  revokeKey(id: string): Promise<ApiKey | undefined>;
  /** The oldest first. */
  listKeys(): Promise<ApiKey[]>;
  /** Whose key it is; undefined for a key that was never made, or is revoked. */
  findKey(key: string): Promise<{ readonly tenant: string; readonly keyId: string } | undefined>;

  /** @returns undefined for a tenant that does not exist. */
  getTenant(tenant: string): Promise<TenantSettings | undefined>;
  tenantExists(tenant: string): Promise<boolean>;
  /**
   * Changes these settings and makes the tenant if it is new; `undefined` goes back to the default, what is not named
   * stays. Two changes at once both hold, as far as they name other settings.
   * @throws {ProblemError} bad_option
   */
  setTenant(
    tenant: string,
    change: { readonly [S in TenantSetting]?: number | undefined },
  ): Promise<TenantSettings>;
  listTenants(): Promise<({ readonly tenant: string } & TenantSettings)[]>;
}

const keysKey = 'as:api-keys';
/** `acme/weight`: one field a setting, so that a change of one is one atomic step; `acme/createdAt`: it exists. */
const settingsKey = 'as:tenant-settings';
const settingNames = Object.keys(tenantSettingsSchema.shape) as TenantSetting[];
const defaultWeight = 1;

const believedMs = 2_000;
/** What is remembered is bounded, whatever keys and tenants come. */
const rememberedMost = 10_000;

const secretBytes = 24;
const keyPattern = /^as_[\w-]{32}$/;

export function createTenants(redis: Redis): Tenants {
  const keys = remember((digest: string) => readKey(digest));
  const settings = remember((tenant: string) => readSettings(tenant));

  async function readKey(digest: string) {
    const json = await withRedis(() => redis.hget(keysKey, digest));
    if (json === null) return undefined;
    const { id, tenant } = JSON.parse(json) as ApiKey;
    return { tenant, keyId: id };
  }

  async function readSettings(tenant: string): Promise<TenantSettings | undefined> {
    const fields = ['createdAt', ...settingNames].map((name) => `${tenant}/${name}`);
    const [createdAt, ...values] = await withRedis(() => redis.hmget(settingsKey, ...fields));
    if (createdAt == null && tenant !== defaultTenant) return undefined;
    return settingsOf(settingNames.map((name, index) => [name, values[index] ?? undefined]));
  }

  async function makeTenant(tenant: string): Promise<void> {
    checkName(tenant);
    await withRedis(() => redis.hsetnx(settingsKey, `${tenant}/createdAt`, new Date().toISOString()));
  }

  async function allKeys(): Promise<(ApiKey & { digest: string })[]> {
    const all = await withRedis(() => redis.hgetall(keysKey));
    return Object.entries(all)
      .map(([digest, json]) => ({ ...(JSON.parse(json) as ApiKey), digest }))
      .sort((a, b) => a.createdAt.localeCompare(b.createdAt) || a.id.localeCompare(b.id));
  }

  return {
    async createKey(tenant, name) {
      await makeTenant(tenant);
      const key = `as_${randomBytes(secretBytes).toString('base64url')}`;
      const made = { id: randomBytes(6).toString('hex'), tenant, name, createdAt: new Date().toISOString() };
      await withRedis(() => redis.hset(keysKey, digestOf(key), JSON.stringify(made)));
      return { ...made, key };
    },

    async revokeKey(id) {
      const found = (await allKeys()).find((key) => key.id === id);
      if (found === undefined) return undefined;
      const { digest, ...key } = found;
      await withRedis(() => redis.hdel(keysKey, digest));
      keys.forget(digest);
      return key;
    },

    async listKeys() {
      return (await allKeys()).map(({ digest: _, ...key }) => key);
    },

    // What cannot be a key is told without asking Redis.
    findKey: async (key) => (keyPattern.test(key) ? keys.get(digestOf(key)) : undefined),

    getTenant: async (tenant) => (isName(tenant) ? settings.get(tenant) : undefined),

    tenantExists: async (tenant) => isName(tenant) && (await settings.get(tenant)) !== undefined,

    async setTenant(tenant, change) {
      checkName(tenant);
      const parsed = tenantSettingsSchema.partial().safeParse(change);
      if (!parsed.success) {
        const { path, message } = parsed.error.issues[0]!;
        throw new ProblemError('bad_option', `"${path.join('.')}": ${message}.`, { field: path.join('.') });
      }
      const set: string[] = [];
      const unset: string[] = [];
      for (const name of settingNames.filter((one) => one in change)) {
        const value = parsed.data[name];
        if (value === undefined) unset.push(`${tenant}/${name}`);
        else set.push(`${tenant}/${name}`, String(value));
      }
      await makeTenant(tenant);
      if (set.length > 0) await withRedis(() => redis.hset(settingsKey, ...set));
      if (unset.length > 0) await withRedis(() => redis.hdel(settingsKey, ...unset));
      settings.forget(tenant);
      return (await settings.get(tenant))!;
    },

    async listTenants() {
      const all = await withRedis(() => redis.hgetall(settingsKey));
      const byTenant = new Map<string, [string, string][]>([[defaultTenant, []]]);
      for (const [field, value] of Object.entries(all)) {
        const [tenant, name] = field.split('/') as [string, string];
        byTenant.set(tenant, [...(byTenant.get(tenant) ?? []), [name, value]]);
      }
      return [...byTenant]
        .map(([tenant, entries]) => ({ tenant, ...settingsOf(entries) }))
        .sort((a, b) => a.tenant.localeCompare(b.tenant));
    },
  };
}

/** Not strict: a setting of a newer version is left alone by an older process. */
function settingsOf(entries: readonly (readonly [string, string | undefined])[]): TenantSettings {
  const known = entries.filter(
    (entry): entry is [TenantSetting, string] =>
      entry[1] !== undefined && (settingNames as string[]).includes(entry[0]),
  );
  return {
    weight: defaultWeight,
    ...Object.fromEntries(known.map(([name, value]) => [name, Number(value)])),
  };
}

function isName(tenant: string): boolean {
  return tenantNameSchema.safeParse(tenant).success;
}

function checkName(tenant: string): void {
  if (isName(tenant)) return;
  throw new ProblemError(
    'bad_option',
    `"${tenant.slice(0, 70)}" cannot be a tenant's name: small letters, digits and hyphens, at most 63, none of them a hyphen at the beginning.`,
    { field: 'tenant' },
  );
}

function digestOf(key: string): string {
  return createHash('sha256').update(key).digest('hex');
}

/**
 * Believes what was read for {@link believedMs}, counted from before the reading. What is not there is never
 * remembered: a key works as soon as it is made, and made-up keys fill no memory.
 */
function remember<T>(read: (of: string) => Promise<T | undefined>) {
  const known = new Map<string, { at: number; value: Promise<T | undefined> }>();
  return {
    get(of: string): Promise<T | undefined> {
      const entry = known.get(of);
      if (entry && performance.now() - entry.at < believedMs) return entry.value;
      if (known.size >= rememberedMost) known.clear();
      const fresh = { at: performance.now(), value: read(of) };
      known.set(of, fresh);
      const drop = () => known.get(of) === fresh && known.delete(of);
      fresh.value.then((value) => value === undefined && drop(), drop);
      return fresh.value;
    },
    forget(of: string): void {
      known.delete(of);
    },
  };
}
