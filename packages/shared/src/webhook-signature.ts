/**
 * What makes a message a Standard Webhook (github.com/standard-webhooks): its three headers. Who sends, the service or
 * the command line, signs here, so that a receiver sees one and the same.
 */
import { Webhook } from 'standardwebhooks';

export interface Signed {
  /** The same however often the message is sent; without a dot, which parts what is signed. */
  readonly id: string;
  /** Byte for byte what is sent. */
  readonly body: string;
}

export interface SignatureHeaders {
  readonly 'webhook-id': string;
  /** Seconds. */
  readonly 'webhook-timestamp': string;
  /** One `v1,...` for each secret, parted by spaces: who knows any of them can verify. */
  readonly 'webhook-signature': string;
}

/**
 * @param secrets `whsec_...`, the newest first.
 * @param now of this attempt, ms since 1970: receivers refuse what is more than 5 minutes off.
 * @throws {Error} without a secret: nothing is sent unsigned; for a secret that is not base64.
 */
export function sign({ id, body }: Signed, secrets: readonly string[], now: number): SignatureHeaders {
  if (secrets.length === 0) throw new Error(`${id} cannot be signed: there is no secret`);
  const date = new Date(now);
  return {
    'webhook-id': id,
    'webhook-timestamp': String(Math.floor(now / 1_000)),
    'webhook-signature': secrets.map((secret) => new Webhook(secret).sign(id, date, body)).join(' '),
  };
}
