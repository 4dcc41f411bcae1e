/**
 * Secrets at rest: what a tenant trusts the service with is sealed (AES-256-GCM, NIST SP 800-38D) before it is
 * stored, so that Redis, its append-only file and its backups hold nothing that can be used.
 *
 * A sealed text is `v1.<key id>.<nonce>.<ciphertext and tag>`. The key id tells which of several keys opens it:
 * keys are rotated by putting a new one in front, sealing anew, and dropping the old one.
 */
import { createCipheriv, createDecipheriv, createHash, randomBytes } from 'node:crypto';
import { ProblemError, StartupError } from './errors.ts';

export interface SecretPlace {
  readonly tenant: string;
  /** What the secret belongs to, for example `source:catalogue`. */
  readonly name: string;
}

export interface Secrets {
  /** @throws {ProblemError} secrets_not_kept: this service has no key. */
  seal(plain: string, place: SecretPlace): string;
  /**
   * Opens only what was sealed for this very place: a sealed text that was moved to another tenant or name is
   * none there.
   * @throws {SecretUnreadable}
   */
  open(sealed: string, place: SecretPlace): string;
  /** Whether it is sealed with the key that seals now. */
  isCurrent(sealed: string): boolean;
}

/** Sealed with a key that is not here, or not for this place, or damaged. */
export class SecretUnreadable extends Error {
  override readonly name = 'SecretUnreadable';
}

interface SecretsKey {
  /** Tells keys apart, and nothing of what they are. */
  readonly id: string;
  readonly bytes: Buffer;
}

const keyBytes = 32;
const nonceBytes = 12;
const tagBytes = 16;

/**
 * @param keys SECRETS_KEY: one or more keys of 32 bytes in base64, separated by commas. The first seals, all open.
 * @throws {StartupError} for what is no such key; the message repeats none of it.
 */
export function createSecrets(keys: string | undefined): Secrets {
  const known = parseSecretsKeys(keys ?? '');
  const [current] = known;
  return {
    seal(plain, place) {
      if (current === undefined) {
        throw new ProblemError(
          'secrets_not_kept',
          'This service keeps no credentials, because its operator has set no SECRETS_KEY.',
        );
      }
      const nonce = randomBytes(nonceBytes);
      const cipher = createCipheriv('aes-256-gcm', current.bytes, nonce, { authTagLength: tagBytes });
      cipher.setAAD(associated(current.id, place));
      const sealed = Buffer.concat([cipher.update(plain, 'utf8'), cipher.final(), cipher.getAuthTag()]);
      return ['v1', current.id, nonce.toString('base64url'), sealed.toString('base64url')].join('.');
    },

    open(text, place) {
      const [version, id, nonce64, sealed64, ...rest] = text.split('.');
      if (version !== 'v1' || sealed64 === undefined || rest.length > 0) {
        throw new SecretUnreadable('not a sealed text of a version that is known here');
      }
      const key = known.find((one) => one.id === id);
      if (key === undefined)
        throw new SecretUnreadable(`sealed with the key ${id}, which is not in SECRETS_KEY`);
      const nonce = Buffer.from(nonce64!, 'base64url');
      const sealed = Buffer.from(sealed64, 'base64url');
      if (nonce.length !== nonceBytes || sealed.length < tagBytes) {
        throw new SecretUnreadable('a sealed text that was cut');
      }
      const decipher = createDecipheriv('aes-256-gcm', key.bytes, nonce, { authTagLength: tagBytes });
      decipher.setAAD(associated(key.id, place));
      decipher.setAuthTag(sealed.subarray(-tagBytes));
      try {
        return Buffer.concat([decipher.update(sealed.subarray(0, -tagBytes)), decipher.final()]).toString(
          'utf8',
        );
      } catch (cause) {
        throw new SecretUnreadable('damaged, or sealed for another place', { cause });
      }
    },

    isCurrent: (sealed) => current !== undefined && sealed.startsWith(`v1.${current.id}.`),
  };
}

/** As JSON, so that no two places are written alike. */
function associated(keyId: string, { tenant, name }: SecretPlace): Buffer {
  return Buffer.from(JSON.stringify(['acousticsense', 'v1', keyId, tenant, name]), 'utf8');
}

/**
 * SECRETS_KEY: the first key is the current one.
 * @throws {StartupError} for what is no such key; the message repeats none of it.
 */
export function parseSecretsKeys(text: string): SecretsKey[] {
  const parts = text.split(',').map((part) => part.trim());
  return parts.filter(Boolean).map((part) => {
    const bytes = Buffer.from(part, 'base64');
    // Buffer.from skips what is no base64: a key must be all that was written.
    const canonical = bytes.toString('base64').replace(/=+$/, '');
    const given = part.replaceAll('-', '+').replaceAll('_', '/').replace(/=+$/, '');
    if (bytes.length !== keyBytes || canonical !== given) {
      throw new StartupError(
        `SECRETS_KEY takes keys of ${keyBytes} bytes in base64, separated by commas: make one with "openssl rand -base64 32".`,
      );
    }
    return {
      id: createHash('sha256').update('acousticsense key id').update(bytes).digest('hex').slice(0, 8),
      bytes,
    };
  });
}
