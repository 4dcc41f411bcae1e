import assert from 'node:assert/strict';
import { createHash, randomUUID } from 'node:crypto';
import { readdir } from 'node:fs/promises';
import { after, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { hashProfile } from '@acousticsense/shared/bundle';
import { InfrastructureFault } from '@acousticsense/shared/errors';
import { type JobRecord, jobRecordSchema, type StoredAudio, sidecarSchema } from '@acousticsense/shared/job';
import { audioKey, spectrogramKey } from '@acousticsense/shared/object-keys';
import { openStorage } from '@acousticsense/shared/open-storage';
import { CommitRefused, type StageJob } from '@acousticsense/shared/stage';
import { parseNpy } from '@acousticsense/shared/tensor';
import { pino } from 'pino';
import { song, wav } from '../../../test/audio.ts';
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

type Committed = Parameters<StageJob['commit']>;

/** A job on stored audio, with what the stage does to it written down in order. */
async function makeJob(content: Buffer | undefined = audio) {
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
    audio: {
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
  const stage = createDecodeStage({ storage, frontEnd, queues, profileHash, scratchDirectory });
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
  const stage = createDecodeStage({ storage: full, frontEnd, queues, profileHash, scratchDirectory });
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
