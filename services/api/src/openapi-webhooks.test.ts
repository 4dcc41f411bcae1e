import assert from 'node:assert/strict';
import { test } from 'node:test';
import { eventTypes } from '@acousticsense/shared/events';
import { openApiDocument } from './openapi.ts';

interface Described {
  readonly paths: Record<string, unknown>;
  readonly webhooks: Record<
    string,
    {
      post: {
        parameters: { name: string; in: string; required: boolean }[];
        requestBody: { content: { 'application/json': { schema: { $ref: string }; example: object } } };
        responses: Record<string, unknown>;
      };
    }
  >;
  readonly components: { schemas: Record<string, { properties?: { type?: { const?: string } } }> };
}

const { webhooks, components } = openApiDocument() as unknown as Described;

test('every event is described as a webhook: its three headers, its schema, an example of it', () => {
  const types = [...eventTypes, 'endpoint.verification'];
  assert.deepEqual(Object.keys(webhooks), types);
  for (const type of types) {
    const { parameters, requestBody } = webhooks[type]!.post;
    assert.deepEqual(
      parameters.map(({ name, in: place, required }) => [name, place, required]),
      ['webhook-id', 'webhook-timestamp', 'webhook-signature'].map((name) => [name, 'header', true]),
    );
    const { schema, example } = requestBody.content['application/json'];
    const name = /^#\/components\/schemas\/(\w+)$/.exec(schema.$ref)?.[1];
    assert.equal(components.schemas[name ?? '']?.properties?.type?.const, type);
    assert.equal((example as { type: string }).type, type);
  }
});

test('what a receiver may answer is described, without the problems of this API', () => {
  for (const type of eventTypes) {
    const { post } = webhooks[type]!;
    assert.deepEqual(Object.keys(post.responses).sort(), ['2XX', '410', 'default']);
    assert.ok(!JSON.stringify(post.responses).includes('problem+json'));
  }
});
