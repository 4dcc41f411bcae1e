/**
 * Proof that who registers an endpoint runs it: the endpoint is sent a challenge, signed like every event, and says it
 * back. Answering 2xx is not enough (many servers do so to anything), nor is sending back what came: the challenge
 * stands alone in the answer, as its whole text or as `{"challenge": "..."}`.
 */
import { randomBytes } from 'node:crypto';
import type { VerificationEvent } from '@acousticsense/shared/events';
import { type Clock, systemClock } from './clock.ts';
import { type Deliver, explain } from './deliver.ts';

export interface Verification {
  readonly ok: boolean;
  /** Absent when it did not answer. */
  readonly status?: number;
  /** A sentence, when it is not ok. */
  readonly problem?: string;
}

const answerBytes = 4_096;
/** Of a refusal, for the sentence: receivers say there what is wrong with a signature or a clock. */
const saidLength = 200;

/**
 * @param clock whose time the event bears; the one that `deliver` has.
 * @throws the signal's reason.
 */
export async function verifyOwnership(
  deliver: Deliver,
  endpoint: { readonly id: string; readonly url: string },
  secrets: readonly string[],
  signal: AbortSignal,
  clock: Clock = systemClock,
): Promise<Verification> {
  const challenge = randomBytes(24).toString('base64url');
  const event: VerificationEvent = {
    type: 'endpoint.verification',
    timestamp: new Date(clock.now()).toISOString(),
    data: { endpointId: endpoint.id, challenge },
  };
  const id = `evt_verify_${randomBytes(16).toString('hex')}`;
  const message = { id, url: endpoint.url, body: JSON.stringify(event) };
  const outcome = await deliver(message, secrets, signal, { excerptBytes: answerBytes });
  const status = outcome.status === undefined ? {} : { status: outcome.status };
  if (outcome.kind !== 'delivered') {
    const said = outcome.excerpt?.trim().slice(0, saidLength);
    return { ok: false, ...status, problem: explain(outcome) + (said ? ` It said: ${said}` : '') };
  }
  if (holds(outcome.excerpt, challenge)) return { ok: true, ...status };
  const problem = `It answered ${outcome.status} without the challenge: say it back as plain text, or as JSON {"challenge": "..."}.`;
  return { ok: false, ...status, problem };
}

function holds(answer: string, challenge: string): boolean {
  if (answer.trim() === challenge) return true;
  try {
    const parsed = JSON.parse(answer) as { challenge?: unknown } | null;
    return parsed?.challenge === challenge;
  } catch {
    return false;
  }
}
