/** The invariants see what they are there to see: each breach, made on purpose in a system at rest, is told. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { decodePart, encodePart } from '../../packages/shared/src/batch.ts';
import { keys } from '../../packages/shared/src/job-records.ts';
import { partKey } from '../../packages/shared/src/object-keys.ts';
import { isOver } from './catalogue.ts';
import { differences, whatIsWrong } from './invariants.ts';
import { openStorm, shortTracks } from './storm.ts';

test('each breach is told', async () => {
  await using storm = await openStorm({ tracks: shortTracks(8) });
  const caller = await storm.newCaller();
  const { id } = await caller.submit();
  await caller.when(id, isOver);
  await storm.assertNothingLeft(caller);
  const { tenant, redis, storage } = caller;
  const batch = keys.batch(tenant, id);
  const events = keys.events(tenant);
  const part = partKey(tenant, id, 0);
  const rows = decodePart(await storage.read(part));
  const event = (json: object) => redis.xadd(events, '*', 'id', 'evt_made_up', 'event', JSON.stringify(json));
  const completed = rows.find(({ state }) => state === 'completed')!;
  const again = { type: 'job.completed', data: { jobId: completed.jobId, batchId: id, row: completed.row } };
  const allEvents = await redis.dumpBuffer(events);
  const queue = (await redis.keys('{as-decode-*:meta'))[0]!.replace(/:meta$/, '');
  const queueJob = `${queue}:${completed.jobId}.7`;

  const put = (key: string) => async () => void (await storage.put(key, Buffer.from('left')));
  const remove = (key: string) => () => storage.delete(key);
  const breaches: [expected: RegExp, make: () => Promise<unknown>, mend: () => Promise<unknown>][] = [
    [
      /rows are completed, the counter says/,
      () => redis.hincrby(batch, 'completed', 1),
      () => redis.hincrby(batch, 'completed', -1),
    ],
    [
      /rows are agree, the counter says/,
      () => redis.hincrby(batch, 'agree', 1),
      () => redis.hincrby(batch, 'agree', -1),
    ],
    [/1 rows wait/, () => redis.hincrby(batch, 'waiting', 1), () => redis.hincrby(batch, 'waiting', -1)],
    [
      /is running/,
      () => redis.hset(batch, 'state', 'running'),
      () => redis.hset(batch, 'state', 'completed'),
    ],
    [
      /told were job.completed, job.completed/,
      () => event(again),
      () => redis.restore(events, 0, allEvents, 'REPLACE'),
    ],
    [/told were nothing/, () => redis.del(events), () => redis.restore(events, 0, allEvents, 'REPLACE')],
    [/field left:0 .* is left over/, () => redis.hset(batch, 'left:0', 1), () => redis.hdel(batch, 'left:0')],
    ...[keys.rows(tenant, id, 0), keys.record(tenant, completed.jobId), keys.open(tenant)].map(
      (key): (typeof breaches)[number] => [
        /key .* is left over/,
        () => redis.set(key, '.'),
        () => redis.del(key),
      ],
    ),
    [/a queue job that no list holds/, () => redis.hset(queueJob, 'data', '{}'), () => redis.del(queueJob)],
    [
      /queue jobs are not done/,
      () => redis.zadd(`${queue}:delayed`, 1, 'x'),
      () => redis.del(`${queue}:delayed`),
    ],
    ...[
      `batches/2026-01-01T00/${tenant}/${completed.jobId}/part-00000.jsonl`,
      part.replace('part-00000', 'part-00001'),
      part.replace('part-00000.jsonl', `rows/00000/${completed.jobId}/audio`),
      part.replace('part-00000.jsonl', `rows/00000/${id}/timeline.json`),
      `jobs/2026-01-01T00/${tenant}/${id}/audio`,
      `uploads/2026-01-01T00/${tenant}/${id}`,
      'elsewhere',
    ].map((key): (typeof breaches)[number] => [/^object .*: (of|the fetched audio)/, put(key), remove(key)]),
    [/without its sidecar/, put(`tensors/${tenant}/x/y/z.npy`), remove(`tensors/${tenant}/x/y/z.npy`)],
    [
      /stands in place of/,
      () => storage.put(part, encodePart([rows[1]!, ...rows.slice(1)])),
      () => storage.put(part, encodePart(rows)),
    ],
  ];
  const look = () => whatIsWrong(caller, [storm.calm.accepted, caller.accepted]);
  for (const [expected, make, mend] of breaches) {
    await make();
    const wrong = await look();
    assert.ok(
      wrong.some((sentence) => expected.test(sentence)),
      `${expected}: ${wrong.join('\n')}`,
    );
    await mend();
    assert.deepEqual(await look(), [], `mended: ${expected}`);
  }

  const other = new Map(storm.expected);
  const [ref, heard] = [...other].find(([, { probabilities }]) => probabilities)!;
  const moved = heard.probabilities!.map((one, at) => (at === 0 ? one + 1e-5 : one));
  other.set(ref, { ...heard, probabilities: moved });
  assert.equal(differences(storm.expected, other).length, 1);
  other.delete(ref);
  assert.equal(differences(storm.expected, other).length, 1);
});
