import assert from 'node:assert/strict';
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { readdir } from 'node:fs/promises';
import { after, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { openSources } from '@acousticsense/egress/open-sources';
import { hashProfile } from '@acousticsense/shared/bundle';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import {
  type JobRecord,
  jobRecordSchema,
  type SourceObject,
  type StoredAudio,
  sidecarSchema,
} from '@acousticsense/shared/job';
import { audioKey, spectrogramKey, uploadKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { connectRedisForWorker } from '@acousticsense/shared/redis';
import { sourceDefinitionSchema } from '@acousticsense/shared/sources';
import { CommitRefused, type StageJob } from '@acousticsense/shared/stage';
import { parseNpy } from '@acousticsense/shared/tensor';
import { pino } from 'pino';
import { Registry } from 'prom-client';
import { song, wav } from '../../../test/audio.ts';
import { startRedis } from '../../../test/redis.ts';
import { startS3, testCredentials } from '../../../test/s3.ts';
import { createFfmpeg } from './ffmpeg.ts';
import { createFrontEnd } from './front-end.ts';
import { createDecodeStage } from './stage.ts';
import { defaultProfile, ffmpegOptions, openDirectory } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());
const storage = openStorage(pathToFileURL(at.file('objects')).href);
const profileHash = hashProfile(defaultProfile);
const frontEnd = createFrontEnd({
  ffmpeg: createFfmpeg(ffmpegOptions),
  profile: defaultProfile,
  maxSeconds: 14_400,
});
const audio = wav([song({ seconds: 12 })]);

const redisServer = await startRedis();
const redis = connectRedisForWorker(redisServer.url);
const s3 = await startS3();
const closers: (() => unknown)[] = [];
after(async () => {
  for (const close of closers) await close();
  redis.disconnect();
  await s3[Symbol.asyncDispose]();
  await redisServer[Symbol.asyncDispose]();
});
const registry = new Registry();
const { sources, sourceReader } = openSources(
  { registry, onClose: (_what, close) => closers.push(close) },
  { redis },
  {
    secretsKey: randomBytes(32).toString('base64'),
    egressAllow: new URL(s3.endpoint).host,
    storageUrl: `s3://own?endpoint=${s3.endpoint}`,
  },
);
const sourceDeps = { sources, sourceReader, maxSourceBytes: 1 << 30 };

type Committed = Parameters<StageJob['commit']>;

/** A job on stored audio, with what the stage does to it written down in order. */
async function makeJob(content: Buffer | undefined = audio, source?: SourceObject) {
  // UUIDv7, as the API makes them.
  const id = randomUUID().replace(
    /^.{8}-.{4}-4/,
    `${Date.now()
      .toString(16)
      .padStart(12, '0')
      .replace(/^(.{8})/, '$1-')}-7`,
  );
  const key = audioKey({ tenant: 'local', id });
  if (content.length > 0) await storage.put(key, content);
  const record: JobRecord = jobRecordSchema.parse({
    id,
    tenant: 'local',
    state: 'decoding',
    generation: 1,
    version: 2,
    createdAt: Date.now() - 50,
    updatedAt: Date.now(),
    traceparent: `00-${'1'.repeat(32)}-${'2'.repeat(16)}-01`,
    modelDigest: 'f'.repeat(64),
    modelName: 'test',
    modelVersion: '1',
    profileHash,
    audio: source
      ? { source, filename: '1.wav' }
      : {
          key,
          size: content.length,
          sha256: createHash('sha256').update(content).digest('hex'),
          filename: '../../\n🎵.mp3',
        },
    selection: { windows: 'middle', start: 0 },
    presentation: { topK: 5, threshold: 0.5 },
  });
  const steps: string[] = [];
  const commits: Committed[] = [];
  const job: StageJob = {
    record,
    log: pino({ level: 'silent' }),
    async commit(...commit) {
      steps.push('commit');
      commits.push(commit);
    },
    progress() {},
    sendBack: () => Promise.reject(new Error('not for this stage')),
    recordCrash: () => Promise.reject(new Error('not for this stage')),
  };
  const queues = {
    async add(stage: string) {
      steps.push(`add ${stage}`);
    },
  };
  const scratchDirectory = at.file('scratch');
  const stage = createDecodeStage({
    storage,
    frontEnd,
    queues,
    ...sourceDeps,
    profileHash,
    scratchDirectory,
  });
  return { job, stage, steps, commits, scratchDirectory };
}

const signal = () => AbortSignal.timeout(30_000);
const storedAudio = (job: StageJob) => job.record.audio as StoredAudio;

test('audio becomes a tensor, a sidecar and a spectrogram, then a commit, then an inference job', async () => {
  const { job, stage, steps, commits, scratchDirectory } = await makeJob();
  await stage.run(job, signal());
  assert.deepEqual(steps, ['commit', 'add inference']);
  const [to, { decoded, timings }] = commits[0]!;
  assert.equal(to, 'decoded');
  assert.equal(decoded!.contentId, storedAudio(job).sha256);
  const tensor = parseNpy(await storage.read(`${decoded!.tensorKey}.npy`));
  assert.deepEqual(tensor.shape, [1, 128, 128]);
  const sidecar = sidecarSchema.parse(
    JSON.parse((await storage.read(`${decoded!.tensorKey}.json`)).toString()),
  );
  assert.deepEqual(sidecar.windows, decoded!.windows);
  assert.deepEqual(sidecar.input, decoded!.input);
  assert.equal(parseNpy(await storage.read(spectrogramKey(job.record))).shape[0], 128);
  assert.ok(timings!.decodeWait! >= 50 && timings!.decode! > 0);
  assert.deepEqual(await readdir(scratchDirectory), []);
});

test('a job that died between its last object and its commit is not decoded again', async () => {
  const { job, stage, commits } = await makeJob();
  await stage.run(job, signal());
  await storage.delete(storedAudio(job).key);
  await stage.run(job, signal());
  assert.deepEqual(commits[1]![1].decoded, commits[0]![1].decoded);
});

test('another job on the same audio shares the tensor and has a spectrogram of its own', async () => {
  const one = await makeJob();
  const two = await makeJob();
  await one.stage.run(one.job, signal());
  await two.stage.run(two.job, signal());
  assert.equal(two.commits[0]![1].decoded!.tensorKey, one.commits[0]![1].decoded!.tensorKey);
  assert.ok(await storage.stat(spectrogramKey(two.job.record)));
});

test('audio that is gone, and audio that is none, are problems of the job and leave nothing in scratch', async () => {
  const gone = await makeJob(Buffer.alloc(0));
  await assert.rejects(gone.stage.run(gone.job, signal()), { name: 'ProblemError', code: 'audio_gone' });
  const text = await makeJob(Buffer.from('not music\n'.repeat(100)));
  await assert.rejects(text.stage.run(text.job, signal()), { name: 'ProblemError', code: 'not_audio' });
  assert.deepEqual(text.steps, []);
  assert.deepEqual(await readdir(text.scratchDirectory), []);
});

test('storage that fails is no fault of the audio', async () => {
  const { job, scratchDirectory } = await makeJob();
  const full = {
    ...storage,
    put: () => Promise.reject(new InfrastructureFault('storage', 'disk full')),
  };
  const queues = { add: () => Promise.reject(new Error('must not be reached')) };
  const stage = createDecodeStage({
    storage: full,
    frontEnd,
    queues,
    ...sourceDeps,
    profileHash,
    scratchDirectory,
  });
  await assert.rejects(
    stage.run(job, signal()),
    (error) => error instanceof InfrastructureFault && error.part === 'storage',
  );
  assert.deepEqual(await readdir(scratchDirectory), []);
});

test('a refused commit reaches the runner, and nothing is handed on', async () => {
  const { job, stage, steps } = await makeJob();
  const refusal = new CommitRefused({ outcome: 'cancelled', state: 'cancelled', generation: 1, version: 3 });
  await assert.rejects(stage.run({ ...job, commit: () => Promise.reject(refusal) }, signal()), refusal);
  assert.deepEqual(steps, []);
});

test('a cancelled job ends with the reason of its signal', async () => {
  const { job, stage, scratchDirectory } = await makeJob();
  const reason = new Error('cancelled');
  await assert.rejects(
    stage.run(job, AbortSignal.abort(reason)),
    (error: Error) => error === reason || error.name === 'AbortError',
  );
  assert.deepEqual(await readdir(scratchDirectory), []);
});

/** An object in the bucket `music`, of a tenant that has registered it. @returns its ETag. */
async function putInSource(key: string, content: Buffer): Promise<string> {
  const definition = sourceDefinitionSchema.parse({
    bucket: 'music',
    prefix: 'albums/',
    endpoint: s3.endpoint,
    credentials: testCredentials,
  });
  await sources.save(await sources.prepare('local', 'catalogue', definition));
  const answer = await fetch(`${s3.endpoint}/music/${key}`, { method: 'PUT', body: new Uint8Array(content) });
  return answer.headers.get('etag')!;
}

async function sourceReads(): Promise<Record<string, number>> {
  const metric = await registry.getSingleMetric('acousticsense_source_reads_total')!.get();
  return Object.fromEntries(metric.values.map(({ labels, value }) => [labels['operation'], value]));
}

test('an object of a registered source is read in place, known by its SHA-256, and copied nowhere', async () => {
  // Larger than one range.
  const long = wav([song({ seconds: 240 })]);
  assert.ok(long.length > 9 << 20, `${long.length} bytes`);
  const etag = await putInSource('albums/long.wav', long);
  const before = await sourceReads();
  const known = { bucket: 'music', key: 'albums/long.wav', etag, size: long.length };
  const { job, stage, steps, commits, scratchDirectory } = await makeJob(Buffer.alloc(0), known);
  await stage.run(job, signal());
  assert.deepEqual(steps, ['commit', 'add inference']);
  const { decoded } = commits[0]![1];
  assert.equal(decoded!.contentId, createHash('sha256').update(long).digest('hex'));
  const ranges = Math.ceil(long.length / (8 << 20));
  assert.deepEqual(await sourceReads(), { ...before, GET: before['GET']! + ranges });
  assert.equal(await storage.stat(audioKey(job.record)), undefined);
  assert.deepEqual(await readdir(scratchDirectory), []);
});

test('the same sound from a source and from an upload shares one tensor', async () => {
  await putInSource('albums/same.wav', audio);
  const uploaded = await makeJob();
  const named = await makeJob(Buffer.alloc(0), { bucket: 'music', key: 'albums/same.wav' });
  await uploaded.stage.run(uploaded.job, signal());
  await named.stage.run(named.job, signal());
  assert.equal(named.commits[0]![1].decoded!.tensorKey, uploaded.commits[0]![1].decoded!.tensorKey);
});

test('what no source of the tenant holds is refused, the own bucket and a source removed meanwhile included', async () => {
  await putInSource('albums/mine.wav', audio);
  await fetch(`${s3.endpoint}/music/other/1.wav`, { method: 'PUT', body: new Uint8Array(audio) });
  const refused = async (bucket: string, key: string) => {
    const { job, stage, steps, scratchDirectory } = await makeJob(Buffer.alloc(0), { bucket, key });
    await assert.rejects(stage.run(job, signal()), { name: 'ProblemError', code: 'source_not_allowed' });
    assert.deepEqual([steps, await readdir(scratchDirectory)], [[], []]);
  };
  const before = await sourceReads();
  await refused('music', 'other/1.wav');
  await refused('foreign', 'albums/mine.wav');
  await refused('own', 'jobs/2026-11-22T19/local/x/audio');
  await sources.remove('local', 'catalogue');
  await refused('music', 'albums/mine.wav');
  assert.deepEqual(await sourceReads(), before);
});

test('an object that changed, vanished, is empty, too large or no audio is the problem of its job', async () => {
  const etag = await putInSource('albums/changing.wav', audio);
  await putInSource('albums/changing.wav', wav([song({ seconds: 13 })]));
  await putInSource('albums/empty.wav', Buffer.alloc(0));
  await putInSource('albums/text.wav', Buffer.from('not music\n'.repeat(100)));
  const cases: [Omit<SourceObject, 'bucket'>, string][] = [
    [{ key: 'albums/changing.wav', etag }, 'source_changed'],
    [{ key: 'albums/changing.wav', size: audio.length }, 'source_changed'],
    [{ key: 'albums/none.wav' }, 'source_not_found'],
    [{ key: 'albums/empty.wav' }, 'empty_file'],
    [{ key: 'albums/none.wav', size: (1 << 30) + 1 }, 'file_too_large'],
    [{ key: 'albums/text.wav' }, 'not_audio'],
  ];
  for (const [object, code] of cases) {
    const { job, stage, steps, scratchDirectory } = await makeJob(Buffer.alloc(0), {
      bucket: 'music',
      ...object,
    });
    await assert.rejects(stage.run(job, signal()), { name: 'ProblemError', code }, JSON.stringify(object));
    assert.deepEqual([steps, await readdir(scratchDirectory)], [[], []]);
  }
});

test('a list of sources that cannot be read now is no fault of the job', async () => {
  const { job, scratchDirectory } = await makeJob(Buffer.alloc(0), { bucket: 'music', key: 'albums/x.wav' });
  const away = {
    sourceFor: () => Promise.reject(new InfrastructureFault('redis', 'Redis cannot be reached')),
  };
  const queues = { add: () => Promise.reject(new Error('must not be reached')) };
  const stage = createDecodeStage({
    storage,
    frontEnd,
    queues,
    ...sourceDeps,
    sources: away,
    profileHash,
    scratchDirectory,
  });
  await assert.rejects(stage.run(job, signal()), InfrastructureFault);
});

for (const [where, url] of [
  ['a directory', pathToFileURL(at.file('uploads')).href],
  ['a bucket', s3.url],
] as const) {
  test(`an upload in ${where} is read as it was when the job was made of it, or not at all`, async () => {
    const uploads = openStorage(url);
    closers.push(() => uploads.close());
    const made = await makeJob();
    const key = uploadKey('local', made.job.record.id);
    const etag = await uploads.put(key, audio);
    const job = {
      ...made.job,
      record: { ...made.job.record, audio: { key, size: audio.length, etag, filename: 'a.wav' } },
    };
    const stage = createDecodeStage({
      ...{ storage: uploads, frontEnd, queues: { async add() {} }, ...sourceDeps, profileHash },
      scratchDirectory: made.scratchDirectory,
    });
    await stage.run(job, signal());
    assert.equal(
      made.commits[0]![1].decoded!.contentId,
      createHash('sha256').update(audio).digest('hex'),
      'nobody knew it before',
    );
    await uploads.put(key, wav([song({ seconds: 11 })]));
    await assert.rejects(stage.run(job, signal()), { name: 'ProblemError', code: 'source_changed' });
    await uploads.delete(key);
    await assert.rejects(stage.run(job, signal()), { name: 'ProblemError', code: 'audio_gone' });
    assert.equal(made.commits.length, 1);
    assert.deepEqual(await readdir(made.scratchDirectory), []);
  });
}
