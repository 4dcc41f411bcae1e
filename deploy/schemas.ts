/**
 * Makes the JSON schemas that kubeconform reads out of what the projects publish: Kubernetes' OpenAPI document, and
 * the CRDs of KEDA and of the Prometheus operator. Run by tools.sh.
 *
 *   node schemas.ts OUT swagger.json crd.yaml...
 *
 * Strict: a field that the API does not know is an error, as it is with `kubectl apply --validate=strict`.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parse } from 'yaml';

interface Schema {
  [key: string]: unknown;
  type?: string;
  format?: string;
  properties?: Record<string, Schema>;
  additionalProperties?: Schema | boolean;
  $ref?: string;
}

interface Crd {
  spec: {
    group: string;
    names: { kind: string };
    versions: { name: string; schema: { openAPIV3Schema: Schema } }[];
  };
}

const intOrString: Schema = { oneOf: [{ type: 'string' }, { type: 'integer' }] };
const quantity: Schema = { oneOf: [{ type: 'string' }, { type: 'number' }] };

/** As the API server takes it: unknown fields refused, two types where it takes two. */
function strict(schema: unknown): unknown {
  if (Array.isArray(schema)) return schema.map(strict);
  if (typeof schema !== 'object' || schema === null) return schema;
  const node = schema as Schema;
  if (node.format === 'int-or-string' || node['x-kubernetes-int-or-string'] === true) return intOrString;
  const result: Schema = {};
  for (const [key, value] of Object.entries(node)) {
    if (key === 'description' || (key.startsWith('x-') && key !== 'x-kubernetes-group-version-kind'))
      continue;
    result[key] =
      key === 'properties'
        ? Object.fromEntries(Object.entries(value as object).map(([name, field]) => [name, strict(field)]))
        : strict(value);
  }
  const open =
    node.additionalProperties !== undefined || node['x-kubernetes-preserve-unknown-fields'] === true;
  if (node.properties !== undefined && !open) result.additionalProperties = false;
  return result;
}

/** kubeconform's name for a kind: `deployment-apps-v1.json`. */
function fileOf(kind: string, group: string, version: string): string {
  const suffix = group === '' ? version : `${group.split('.')[0]}-${version}`;
  return `${kind}-${suffix}.json`.toLowerCase();
}

const [out, swagger, ...crds] = process.argv.slice(2) as [string, string, ...string[]];
mkdirSync(out, { recursive: true });
const write = (name: string, value: unknown) => writeFileSync(path.join(out, name), JSON.stringify(value));

const { definitions } = JSON.parse(readFileSync(swagger, 'utf8')) as { definitions: Record<string, Schema> };
const made = Object.fromEntries(
  Object.entries(definitions).map(([name, schema]) => [
    name,
    name.endsWith('.api.resource.Quantity') ? quantity : (strict(schema) as Schema),
  ]),
);
const definitionRef = '#/definitions/';
/** With what it refers to, and what that refers to: each file stands alone. */
function complete(schema: Schema): Schema {
  const needed: Record<string, Schema> = {};
  const collect = (node: unknown): void => {
    if (typeof node !== 'object' || node === null) return;
    const { $ref } = node as Schema;
    if (typeof $ref === 'string') {
      const name = $ref.slice(definitionRef.length);
      if (name in needed) return;
      needed[name] = made[name]!;
      collect(made[name]);
    } else for (const value of Object.values(node)) collect(value);
  };
  collect(schema);
  return { ...schema, definitions: needed };
}

for (const [name, schema] of Object.entries(definitions)) {
  const kinds = schema['x-kubernetes-group-version-kind'] as
    | { kind: string; group: string; version: string }[]
    | undefined;
  // Those that stand for one kind; what all kinds share (DeleteOptions, ...) names hundreds.
  if (kinds?.length !== 1) continue;
  const { kind, group, version } = kinds[0]!;
  const required = [...new Set([...((schema['required'] as string[]) ?? []), 'apiVersion', 'kind'])];
  write(fileOf(kind, group, version), complete({ ...made[name], required }));
}
const metadata: Schema = { $ref: `${definitionRef}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta` };
for (const file of crds) {
  const { spec } = parse(readFileSync(file, 'utf8')) as Crd;
  for (const { name, schema } of spec.versions) {
    const own = strict(schema.openAPIV3Schema) as Schema;
    const properties = { ...own.properties, metadata };
    write(fileOf(spec.names.kind, spec.group, name), complete({ ...own, properties }));
  }
}
