/**
 * Registered source buckets: what a tenant may name as `s3://bucket/key`. Such objects are read in place
 * (`source-reader.ts`), never copied.
 *
 * Everything in a source is the tenant's word. So the service's own bucket matches under no spelling, and a
 * source without credentials or role is read anonymously, never with the credentials of the service.
 */
import { randomUUID } from 'node:crypto';
import { lookup } from 'node:dns/promises';
import type { Redis } from 'ioredis';
import { z } from 'zod';
import { ProblemError } from './errors.ts';
import { withRedis } from './redis.ts';
import { type SecretPlace, type Secrets, SecretUnreadable } from './secrets.ts';

export const sourceNameSchema = z
  .string()
  .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'takes up to 63 small letters, digits and hyphens');

const credentialsSchema = z.strictObject({
  accessKeyId: z.string().min(1).max(256),
  secretAccessKey: z.string().min(1).max(1_024),
  sessionToken: z.string().min(1).max(8_192).optional(),
});
export type SourceCredentials = z.infer<typeof credentialsSchema>;

/** What a tenant says of a source. */
export const sourceDefinitionSchema = z.strictObject({
  // Without ':', so that no ARN (of an access point, which has an endpoint of its own) passes for a bucket.
  bucket: z
    .string()
    .regex(/^(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]$/, 'is no name of a bucket')
    .describe('name of the bucket'),
  prefix: z
    .string()
    .max(1_024)
    .default('')
    .describe('only keys that begin with it are read; all of the bucket when empty'),
  endpoint: z
    .string()
    .max(300)
    .optional()
    .describe('of a server that speaks S3, for example https://minio.example.com; AWS when absent'),
  region: z
    .string()
    .regex(/^[a-z0-9-]{1,63}$/, 'is no name of a region')
    .default('us-east-1'),
  pathStyle: z
    .boolean()
    .optional()
    .describe('bucket in the path instead of the host name; true with an endpoint, false without'),
  credentials: credentialsSchema.optional().describe('kept sealed and never shown again'),
  roleArn: z
    .string()
    .max(2_048)
    .regex(/^arn:[a-z0-9-]+:iam::[^:]*:role\/\S+$/, 'is no ARN of a role')
    .optional()
    .describe('role to assume: with the credentials when there are some, else as the service'),
  externalId: z
    .string()
    .regex(/^[\w+=,.@:/-]{2,1224}$/, 'is no external id')
    .optional()
    .describe('for a role assumed with credentials; a role assumed as the service has one given by it'),
});
export type SourceDefinition = z.infer<typeof sourceDefinitionSchema>;

/** Not strict: an older process reads what a newer one wrote. */
const storedSchema = z.object({
  name: z.string(),
  bucket: z.string(),
  prefix: z.string(),
  /** Scheme, host and port. */
  endpoint: z.string().optional(),
  region: z.string(),
  pathStyle: z.boolean(),
  accessKeyId: z.string().optional(),
  /** Credentials as JSON, sealed. */
  sealed: z.string().optional(),
  roleArn: z.string().optional(),
  externalId: z.string().optional(),
  /** Another one after every change: what is cached under it never goes stale. */
  revision: z.string(),
  createdAt: z.int().describe('epoch milliseconds'),
  updatedAt: z.int(),
});
type StoredSource = z.infer<typeof storedSchema>;

/** A source as the service reads it; its credentials stay sealed. */
export interface Source extends StoredSource {
  readonly tenant: string;
}

/** What a tenant is shown. */
export const sourceSchema = z.strictObject({
  name: z.string(),
  bucket: z.string(),
  prefix: z.string(),
  endpoint: z.string().optional(),
  region: z.string(),
  pathStyle: z.boolean(),
  access: z.enum(['anonymous', 'credentials', 'role']),
  accessKeyId: z.string().optional(),
  roleArn: z.string().optional(),
  externalId: z.string().optional().describe("what the role's trust policy must ask for"),
  createdAt: z.iso.datetime(),
  updatedAt: z.iso.datetime(),
});
export type SourceResource = z.infer<typeof sourceSchema>;

/** The source that may read this object: of several, the one with the longest prefix. */
export type SourceMatcher = (bucket: string, key: string) => Source | undefined;

export interface Sources {
  /**
   * Judges a definition and seals its credentials; nothing is stored yet.
   * @throws {ProblemError} bad_option, source_not_allowed (the service's own bucket), secrets_not_kept
   */
  prepare(tenant: string, name: string, definition: SourceDefinition): Promise<Source>;
  /**
   * Registers a prepared source, replacing all of one of the same name.
   * @returns the source as it is stored, and whether its name is new.
   * @throws {ProblemError} too_many_sources, bad_option: another source has this bucket and prefix
   */
  save(source: Source): Promise<{ source: Source; isNew: boolean }>;
  list(tenant: string): Promise<Source[]>;
  get(tenant: string, name: string): Promise<Source | undefined>;
  /** @returns false when there was none. */
  remove(tenant: string, name: string): Promise<boolean>;
  /** The tenant's sources as they are now, to judge many objects without asking Redis again. */
  matcher(tenant: string): Promise<SourceMatcher>;
  sourceFor(tenant: string, bucket: string, key: string): Promise<Source | undefined>;
  /** Seals with the current key what an older one sealed. @returns how many sources were. */
  reseal(): Promise<number>;
}

export interface SourcesOptions {
  readonly redis: Redis;
  readonly secrets: Secrets;
  /** STORAGE_URL: when it is a bucket, no source may be it. */
  readonly storageUrl: string;
}

const maxSources = 100;
const keys = {
  /** One hash a tenant: name -> source as JSON. */
  sources: (tenant: string) => `as:{${tenant}}:sources`,
  tenants: 'as:source-tenants',
};

export const credentialsPlace = ({ tenant, name }: Pick<Source, 'tenant' | 'name'>): SecretPlace => ({
  tenant,
  name: `source:${name}`,
});

export function createSources({ redis, secrets, storageUrl }: SourcesOptions): Sources {
  const own = ownBucket(storageUrl);

  async function list(tenant: string): Promise<Source[]> {
    const hash = await withRedis(() => redis.hgetall(keys.sources(tenant)));
    return Object.values(hash)
      .map((json) => ({ ...storedSchema.parse(JSON.parse(json)), tenant }))
      .sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  async function matcher(tenant: string): Promise<SourceMatcher> {
    const byBucket = new Map<string, Source[]>();
    // The own bucket again: a source may be older than STORAGE_URL.
    for (const source of (await list(tenant)).filter((one) => !(own && isOwn(own, one)))) {
      byBucket.set(source.bucket, [...(byBucket.get(source.bucket) ?? []), source]);
    }
    for (const sources of byBucket.values()) sources.sort((a, b) => b.prefix.length - a.prefix.length);
    return (bucket, key) =>
      leavesItsPrefix(key) ? undefined : byBucket.get(bucket)?.find(({ prefix }) => key.startsWith(prefix));
  }

  /** @returns undefined for what no key of this process opens: its tenant must register it again. */
  function sealedAnew({ tenant, name, sealed }: { tenant: string; name: string; sealed: string }) {
    const place = credentialsPlace({ tenant, name });
    try {
      return secrets.seal(secrets.open(sealed, place), place);
    } catch (error) {
      if (error instanceof SecretUnreadable) return undefined;
      throw error;
    }
  }

  return {
    async prepare(tenant, name, { credentials, endpoint: given, ...definition }) {
      const endpoint = given === undefined ? undefined : parseEndpoint(given);
      const pathStyle = definition.pathStyle ?? endpoint !== undefined;
      const target = { ...definition, pathStyle, ...(endpoint ? { endpoint } : {}) };
      if (leavesItsPrefix(definition.prefix)) {
        throw new ProblemError('bad_option', '"prefix": takes no segment "." or "..".', { field: 'prefix' });
      }
      if (own && (isOwn(own, target) || (await isOwnUnderAnotherName(own, target)))) {
        throw new ProblemError(
          'source_not_allowed',
          `The bucket ${definition.bucket} at this endpoint is the service's own storage, which is no source.`,
          { field: 'bucket' },
        );
      }
      const now = Date.now();
      return {
        ...target,
        ...roleOf(tenant, definition, credentials !== undefined),
        ...(credentials
          ? {
              accessKeyId: credentials.accessKeyId,
              sealed: secrets.seal(JSON.stringify(credentials), credentialsPlace({ tenant, name })),
            }
          : {}),
        tenant,
        name,
        revision: randomUUID(),
        createdAt: now,
        updatedAt: now,
      };
    },

    async save({ tenant, ...source }) {
      const others = (await list(tenant)).filter(({ name }) => name !== source.name);
      if (others.length >= maxSources) {
        throw new ProblemError(
          'too_many_sources',
          `${maxSources} sources are registered already; remove one that is not used.`,
        );
      }
      const twin = others.find(({ bucket, prefix }) => bucket === source.bucket && prefix === source.prefix);
      if (twin) {
        throw new ProblemError(
          'bad_option',
          `s3://${source.bucket}/${source.prefix} is registered already, as "${twin.name}": an object of it could be read in two ways.`,
          { field: 'prefix' },
        );
      }
      const before = await withRedis(() => redis.hget(keys.sources(tenant), source.name));
      const createdAt = before === null ? source.createdAt : storedSchema.parse(JSON.parse(before)).createdAt;
      // Before the hash, so that no source is unknown to `reseal`.
      await withRedis(() => redis.sadd(keys.tenants, tenant));
      const json = JSON.stringify({ ...source, createdAt } satisfies StoredSource);
      await withRedis(() => redis.hset(keys.sources(tenant), source.name, json));
      return { source: { ...source, createdAt, tenant }, isNew: before === null };
    },

    list,

    async get(tenant, name) {
      const json = await withRedis(() => redis.hget(keys.sources(tenant), name));
      return json === null ? undefined : { ...storedSchema.parse(JSON.parse(json)), tenant };
    },

    async remove(tenant, name) {
      return (await withRedis(() => redis.hdel(keys.sources(tenant), name))) === 1;
    },

    matcher,
    sourceFor: async (tenant, bucket, key) => (await matcher(tenant))(bucket, key),

    async reseal() {
      let resealed = 0;
      for (const tenant of await withRedis(() => redis.smembers(keys.tenants))) {
        const hash = await withRedis(() => redis.hgetall(keys.sources(tenant)));
        for (const [name, json] of Object.entries(hash)) {
          const source = storedSchema.loose().parse(JSON.parse(json));
          if (source.sealed === undefined || secrets.isCurrent(source.sealed)) continue;
          const sealed = sealedAnew({ tenant, name, sealed: source.sealed });
          if (sealed === undefined) continue;
          const next = JSON.stringify({ ...source, sealed });
          // Only in the place of what was read: the tenant may have registered another meanwhile.
          await withRedis(() => redis.eval(replaceUnchanged, 1, keys.sources(tenant), name, json, next));
          resealed += 1;
        }
      }
      return resealed;
    },
  };
}

const replaceUnchanged = `
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end`;

/** What its tenant is shown of it. */
export function presentSource(source: Source): SourceResource {
  const { name, bucket, prefix, endpoint, region, pathStyle, accessKeyId, roleArn, externalId } = source;
  return {
    name,
    bucket,
    prefix,
    ...(endpoint === undefined ? {} : { endpoint }),
    region,
    pathStyle,
    access: roleArn ? 'role' : accessKeyId ? 'credentials' : 'anonymous',
    ...(accessKeyId === undefined ? {} : { accessKeyId }),
    ...(roleArn === undefined ? {} : { roleArn }),
    ...(externalId === undefined ? {} : { externalId }),
    createdAt: new Date(source.createdAt).toISOString(),
    updatedAt: new Date(source.updatedAt).toISOString(),
  };
}

/**
 * A role assumed as the service gets an external id of the service's making: were it the tenant's choice, one
 * tenant could name another's role with its id (the confused deputy,
 * https://docs.aws.amazon.com/IAM/latest/UserGuide/confused-deputy.html).
 */
function roleOf(
  tenant: string,
  { roleArn, externalId }: Pick<SourceDefinition, 'roleArn' | 'externalId'>,
  ownCredentials: boolean,
): Pick<Source, 'roleArn' | 'externalId'> {
  if (roleArn === undefined) {
    if (externalId === undefined) return {};
    throw new ProblemError('bad_option', '"externalId": goes with "roleArn".', { field: 'externalId' });
  }
  if (ownCredentials) return { roleArn, ...(externalId === undefined ? {} : { externalId }) };
  const given = `acousticsense:${tenant}`;
  if (externalId !== undefined && externalId !== given) {
    throw new ProblemError(
      'bad_option',
      `"externalId": a role without credentials is assumed as the service, with the external id ${given}; let the role's trust policy ask for that one.`,
      { field: 'externalId' },
    );
  }
  return { roleArn, externalId: given };
}

/** Servers in front of a bucket may resolve such segments, and so leave the prefix or even the bucket. */
function leavesItsPrefix(key: string): boolean {
  return key.split('/').some((segment) => segment === '.' || segment === '..');
}

/** @throws {ProblemError} bad_option: anything but scheme, host and port could carry a path into another bucket. */
function parseEndpoint(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  const plain =
    url &&
    ['http:', 'https:'].includes(url.protocol) &&
    url.pathname === '/' &&
    !/[?#@]/.test(text) &&
    url.hostname !== '';
  if (!plain) {
    throw new ProblemError(
      'bad_option',
      '"endpoint": takes scheme, host and port only, for example https://s3.example.com:9000.',
      { field: 'endpoint' },
    );
  }
  return url.origin;
}

interface Bucket {
  readonly bucket: string;
  readonly endpoint?: string | undefined;
}

/** The bucket of STORAGE_URL; undefined when that is a directory. */
function ownBucket(storageUrl: string): Bucket | undefined {
  const url = new URL(storageUrl);
  if (url.protocol !== 's3:') return undefined;
  // As the SDK finds it where STORAGE_URL has none.
  const endpoint =
    url.searchParams.get('endpoint') ??
    process.env['AWS_ENDPOINT_URL_S3'] ??
    process.env['AWS_ENDPOINT_URL'] ??
    undefined;
  return { bucket: url.host, endpoint };
}

/**
 * Whether requests to `source` may end in the bucket `own`. A request has the bucket either in its path or in its
 * host name, and a server may understand both: every way of writing the one is compared with every way of the other.
 */
function isOwn(own: Bucket, source: Bucket, host = hostOf(source.endpoint)): boolean {
  const [ours, theirs] = [own.bucket.toLowerCase(), source.bucket.toLowerCase()];
  const home = hostOf(own.endpoint);
  const ways = [
    { host, bucket: theirs },
    { host: `${theirs}.${host}`, bucket: undefined },
  ];
  return ways.some(
    (way) => way.host === `${ours}.${home}` || (way.host === home && (way.bucket ?? ours) === ours),
  );
}

/** `localhost` beside its address, or a second name of the same server. Looked up once, at registration. */
async function isOwnUnderAnotherName(own: Bucket, source: Bucket): Promise<boolean> {
  if (own.endpoint === undefined || source.endpoint === undefined) return false;
  const home = hostOf(own.endpoint);
  if (!isOwn(own, source, home) || portOf(own.endpoint) !== portOf(source.endpoint)) return false;
  const [ours, theirs] = await Promise.all([own.endpoint, source.endpoint].map(addressesOf));
  return ours!.some((address) => theirs!.includes(address));
}

async function addressesOf(endpoint: string): Promise<string[]> {
  const name = new URL(endpoint).hostname.replace(/^\[(.*)\]$/, '$1');
  const found = await lookup(name, { all: true }).catch(() => []);
  return found.map(({ address }) => address.replace(/^::ffff:/, ''));
}

/** Host and port in one spelling; `aws` for every spelling of AWS, where a bucket's name is its own everywhere. */
function hostOf(endpoint: string | undefined): string {
  if (endpoint === undefined) return 'aws';
  const name = new URL(endpoint).hostname.replace(/\.$/, '');
  const aws = /^(?:(.+)\.)?s3[.-](?:[a-z0-9.-]+\.)?amazonaws\.com(?:\.cn)?$/.exec(name);
  if (aws) return aws[1] === undefined ? 'aws' : `${aws[1]}.aws`;
  const port = portOf(endpoint);
  const loopback = /^(localhost|127\.[\d.]+|\[::1\]|\[::ffff:7f[0-9a-f]{2}:[0-9a-f]+\])$/.test(name);
  return `${loopback ? 'loopback' : name}${port === '' ? '' : `:${port}`}`;
}

/** Empty for both schemes' defaults, behind which usually stands the same server. */
function portOf(endpoint: string): string {
  const { port } = new URL(endpoint);
  return ['80', '443'].includes(port) ? '' : port;
}
