/** Where one job or batch is to be told of: under an endpoint that has proven to be the caller's. */
import { type Endpoints, hasCredentials, isUnder } from '@acousticsense/shared/endpoints';
import { ProblemError } from '@acousticsense/shared/errors';
import type { Callback } from '@acousticsense/shared/job';

/**
 * @returns the callback as it is kept, under the endpoint that is closest above it.
 * @throws {ProblemError} callback_not_allowed
 */
export type CallbackFor = (tenant: string, url: string) => Promise<Callback>;

export function createCallbacks(endpoints: Pick<Endpoints, 'list'>): CallbackFor {
  return async (tenant, text) => {
    const url = URL.parse(text);
    if (url === null) throw refused('is no URL');
    if (!['https:', 'http:'].includes(url.protocol)) throw refused('must begin with https://');
    if (hasCredentials(text)) throw refused('must hold no user and no password');
    if (text.includes('#')) throw refused('must hold no fragment (#), which is never sent');
    const above = (await endpoints.list(tenant))
      .filter((endpoint) => isUnder(endpoint, text))
      .sort((a, b) => b.url.length - a.url.length);
    const enabled = above.find(({ status }) => status === 'enabled');
    if (enabled) return { endpointId: enabled.id, url: url.href };
    const [closest] = above;
    if (closest === undefined) {
      throw refused('lies under none of your endpoints: register one at /v1/webhooks/endpoints');
    }
    throw refused(
      closest.status === 'disabled'
        ? `lies under the endpoint ${closest.id}, which is disabled: enable it first`
        : `lies under the endpoint ${closest.id}, which is not verified yet: let it answer the challenge first`,
    );
  };
}

const refused = (why: string) =>
  new ProblemError('callback_not_allowed', `"callbackUrl" ${why}.`, { field: 'callbackUrl' });
