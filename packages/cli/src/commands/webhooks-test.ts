import { setTimeout as sleep } from 'node:timers/promises';
import { z } from 'zod';
import { type Caller, problemSchema } from '../caller.ts';
import { defineCommand } from '../command.ts';
import { Failure } from '../failure.ts';
import { callerOf, callerOptions } from './with-caller.ts';

const endpointsSchema = z.object({ endpoints: z.array(z.object({ id: z.string(), url: z.string() })) });
const orderSchema = z.object({ orderId: z.string() });
const testSchema = z.discriminatedUnion('state', [
  z.object({ state: z.literal('waiting') }),
  z.object({
    state: z.literal('done'),
    at: z.string(),
    outcome: z.enum(['delivered', 'failed', 'gone']),
    ms: z.number(),
    status: z.number().optional(),
    problem: z.string().optional(),
    excerpt: z.string().optional(),
  }),
]);

const pollMs = 250;
/** An attempt takes 15 s at most; the rest is for those before it. */
const patienceMs = 60_000;

export const webhooksTest = defineCommand({
  name: 'webhooks test',
  summary: 'Have a service send one signed test event to an endpoint, and tell what it answered.',
  operands: [{ name: 'ENDPOINT', help: 'its id (ep_...), or its URL' }],
  options: {
    ...callerOptions,
    json: { type: 'boolean', help: 'print the outcome as JSON' },
  },
  notes:
    'The event is an example of job.completed whose webhook-id begins with evt_test_. It is sent once, whatever the state of the endpoint, and changes nothing of it.\nExit code 0 when the endpoint answered 2xx, 1 otherwise.',
  examples: [
    { line: 'webhooks test https://hooks.example.com/genre', does: 'by its URL' },
    { line: 'webhooks test ep_4fGh2k --url https://genre.example.com', does: 'of another service' },
  ],
  async run({ operands, options, terminal, config, signal }) {
    const caller = callerOf(options, config);
    const id = await endpointId(caller, operands[0]!, signal);
    const place = `/v1/webhooks/endpoints/${encodeURIComponent(id)}`;
    const { orderId } = await ask(caller, `${place}/test`, orderSchema, signal, 'POST');
    for (const from = Date.now(); ; await sleep(pollMs, undefined, { signal })) {
      const test = await ask(caller, `${place}/tests/${orderId}`, testSchema, signal);
      if (test.state === 'done') {
        const { state: _, ...outcome } = test;
        terminal.print(options.json === true ? JSON.stringify(outcome, null, 2) : describe(outcome));
        return test.outcome === 'delivered' ? 0 : 1;
      }
      if (Date.now() - from > patienceMs) {
        throw new Failure(
          `Nothing was sent within ${patienceMs / 1_000} s: does the webhook service of ${caller.base} run?`,
        );
      }
    }
  },
});

function describe({
  at,
  outcome,
  status,
  problem,
  ms,
  excerpt,
}: Omit<Extract<z.infer<typeof testSchema>, { state: 'done' }>, 'state'>): string {
  // That of `status` says no more than the status.
  const why = problem === undefined || problem === 'status' ? [] : [problem];
  const words = [at, outcome, ...(status === undefined ? [] : [String(status)]), ...why, `${ms} ms`];
  return [words.join('  '), ...(excerpt ? [excerpt] : [])].join('\n');
}

/** @throws {Failure} no endpoint has this URL, or several have. */
async function endpointId(caller: Caller, given: string, signal: AbortSignal): Promise<string> {
  const url = URL.parse(given);
  if (url === null) return given;
  const { endpoints } = await ask(caller, '/v1/webhooks/endpoints', endpointsSchema, signal);
  const found = endpoints.filter((one) => URL.parse(one.url)?.href === url.href);
  if (found.length === 1) return found[0]!.id;
  throw new Failure(
    found.length === 0
      ? `No endpoint of ${caller.base} has the URL ${given}.`
      : `Several endpoints have this URL: give one of ${found.map(({ id }) => id).join(', ')}.`,
  );
}

/** @throws {Failure} what the service says instead. */
async function ask<T>(
  { base, request }: Caller,
  at: string,
  schema: z.ZodType<T>,
  signal: AbortSignal,
  method = 'GET',
): Promise<T> {
  const { response, body } = await request(at, signal, () => ({ method }));
  const parsed = schema.safeParse(body);
  if (response.ok && parsed.success) return parsed.data;
  const { data: problem } = problemSchema.safeParse(body);
  throw new Failure(
    problem === undefined
      ? `${base} has no webhooks: it answers ${response.status}.`
      : `${base} refuses: ${problem.detail}`,
  );
}
