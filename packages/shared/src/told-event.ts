/** An event as it is told: complete, with the address under which its result is read. */
import { type Event, type LoggedEvent, resultPath } from './events.ts';
import type { UrlSigner } from './signed-url.ts';

/** From when it is told: longer than an event is tried. */
export const resultUrlMs = 14 * 86_400_000;

export interface TellingDeps {
  readonly signer: Pick<UrlSigner, 'sign'>;
  /** Without a slash at its end. */
  readonly publicUrl: () => string | Promise<string>;
}

/**
 * @returns how a tenant's event is told at `now` (epoch ms). `resultUrl` opens without an API key for
 *   {@link resultUrlMs}; that of `endpoint.disabled` needs one, since it shows more than the event does.
 * The function throws {@link ProblemError} secrets_not_kept, and what `publicUrl` throws.
 */
export function createTelling({ signer, publicUrl }: TellingDeps) {
  return async (
    tenant: string,
    { event }: Pick<LoggedEvent, 'event'>,
    now: number = Date.now(),
  ): Promise<Event> => {
    const path = resultPath(event);
    const signed = event.type === 'endpoint.disabled' ? path : signer.sign(tenant, path, now + resultUrlMs);
    const resultUrl = `${await publicUrl()}${signed}`;
    return { ...event, data: { ...event.data, resultUrl } } as Event;
  };
}

export type Tell = ReturnType<typeof createTelling>;
