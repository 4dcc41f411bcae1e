/** House mappings that a tenant keeps under a name, to be used by its batches. */

import { ProblemError } from '@acousticsense/shared/errors';
import { type Mapping, parseMapping } from '@acousticsense/shared/house-genres';
import { ObjectNotFound, type Storage } from '@acousticsense/shared/storage';

export interface Mappings {
  /** @returns what of it the labels can be mapped by. @throws {ProblemError} mapping_invalid */
  save(
    tenant: string,
    name: string,
    text: string,
    contentType: string,
    labels: readonly string[],
  ): Promise<Mapping>;
  /** @throws {ProblemError} mapping_not_found; mapping_invalid: the model has other labels than it speaks of */
  read(tenant: string, name: string, labels: readonly string[]): Promise<Mapping>;
  list(tenant: string): Promise<string[]>;
  /** @returns false when there was none. */
  remove(tenant: string, name: string): Promise<boolean>;
}

const folder = (tenant: string) => `mappings/${tenant}/`;
const keyOf = (tenant: string, name: string) => `${folder(tenant)}${name}.json`;

export function createMappings(storage: Storage): Mappings {
  return {
    async save(tenant, name, text, contentType, labels) {
      const mapping = parseMapping(text, contentType, labels);
      // As it was sent: another model may have other labels.
      await storage.put(keyOf(tenant, name), Buffer.from(JSON.stringify({ text, contentType })));
      return mapping;
    },
    async read(tenant, name, labels) {
      try {
        const stored = JSON.parse((await storage.read(keyOf(tenant, name))).toString('utf8')) as {
          text: string;
          contentType: string;
        };
        return parseMapping(stored.text, stored.contentType, labels);
      } catch (error) {
        if (!(error instanceof ObjectNotFound)) throw error;
        throw new ProblemError(
          'mapping_not_found',
          `There is no mapping "${name}": put it to /v1/mappings/${name}.`,
          {
            field: 'mapping',
          },
        );
      }
    },
    async list(tenant) {
      const names: string[] = [];
      for await (const { key } of storage.list(folder(tenant)))
        names.push(key.slice(folder(tenant).length).replace(/\.json$/, ''));
      return names.sort();
    },
    async remove(tenant, name) {
      const there = (await storage.stat(keyOf(tenant, name))) !== undefined;
      await storage.delete(keyOf(tenant, name));
      return there;
    },
  };
}
