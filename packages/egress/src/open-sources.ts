/** What every service stands on that reads registered source buckets: opened and closed alike. */
import type { CommonConfig } from '@acousticsense/shared/common-config';
import { createSecrets, type Secrets } from '@acousticsense/shared/secrets';
import type { Service } from '@acousticsense/shared/service';
import { createSourceReader, type SourceReader } from '@acousticsense/shared/source-reader';
import { createSources, type Sources } from '@acousticsense/shared/sources';
import { createEgressGuard, type EgressGuard } from './guard.ts';

/** @throws {StartupError} for a SECRETS_KEY or an EGRESS_ALLOW that cannot be used. */
export function openSources(
  service: Pick<Service, 'registry' | 'onClose'>,
  { redis }: { readonly redis: Parameters<typeof createSources>[0]['redis'] },
  { secretsKey, egressAllow, storageUrl }: Pick<CommonConfig, 'secretsKey' | 'egressAllow' | 'storageUrl'>,
): { sources: Sources; sourceReader: SourceReader; secrets: Secrets; guard: EgressGuard } {
  const secrets = createSecrets(secretsKey);
  const guard = createEgressGuard({ allow: egressAllow });
  service.onClose('egress guard', () => guard.close());
  return {
    sources: createSources({ redis, secrets, storageUrl }),
    sourceReader: createSourceReader({ guard, secrets, registry: service.registry }),
    secrets,
    guard,
  };
}
