import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdtempDisposable, readdir, readFile, rename, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { loadBundle } from '@acousticsense/shared/bundle';
import { InfrastructureFault, StartupError } from '@acousticsense/shared/errors';
import { pino } from 'pino';
import {
  CannotExplain,
  createModelProcess,
  ModelProcessCrashed,
  type ModelProcessOptions,
} from './model-process.ts';
import {
  attentionOf,
  distance,
  logitsOf,
  moodyChild,
  windowOf,
  writeMeansBundle,
} from './testing/means-model.ts';
import { moods } from './testing/moods.ts';

const log = pino({ level: 'silent' });
const hasGpu = ['/dev/nvidia0', '/dev/dri/renderD128', '/dev/dxg'].some((node) => existsSync(node));

async function open(directory: string, options: Partial<ModelProcessOptions> = {}) {
  const bundle = await loadBundle(directory);
  const model = createModelProcess({
    bundle,
    provider: 'cpu',
    requireGpu: false,
    threads: 1,
    log,
    ...options,
  });
  return { model, bundle, [Symbol.asyncDispose]: () => model.close() };
}

const batchOf = (...windows: Uint8Array[]) => [Buffer.concat(windows), windows.length] as const;

async function gone(pid: number, withinMs = 4_000): Promise<boolean> {
  for (const end = Date.now() + withinMs; Date.now() < end; await sleep(50)) {
    try {
      process.kill(pid, 0);
      // A zombie (its parent has not looked yet) runs no more.
      const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => ') Z');
      if (stat.slice(stat.lastIndexOf(')') + 2).startsWith('Z')) return true;
    } catch {
      return true;
    }
  }
  return false;
}

test("the model's process runs without ONNX Runtime's telemetry client, which would keep a log", async () => {
  await using bundle = await writeMeansBundle();
  await using scratch = await mkdtempDisposable(path.join(tmpdir(), 'as-telemetry-'));
  const { TMPDIR } = process.env;
  process.env['TMPDIR'] = scratch.path;
  try {
    await using opened = await open(bundle.directory);
    await opened.model.start();
    await opened.model.run(...batchOf(windowOf(10)));
    const written = await readdir(scratch.path);
    assert.deepEqual(
      written.filter((name) => /^mat-debug|\.ses$/.test(name)),
      [],
    );
  } finally {
    if (TMPDIR === undefined) delete process.env['TMPDIR'];
    else process.env['TMPDIR'] = TMPDIR;
  }
});

test('a batch comes back as the logits of its windows, and the provider is the one that ran', async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const windows = [windowOf(0), windowOf(77), windowOf(255)];
  const { outputs, provider, runMs } = await model.run(...batchOf(...windows));
  assert.ok(distance(outputs.logits, windows.flatMap(logitsOf)) < 1e-4);
  assert.equal(provider, 'cpu');
  assert.ok(runMs >= 0);
  assert.equal(model.status.ready?.provider, 'cpu');
  assert.deepEqual(Object.keys(model.status.ready?.nodes ?? {}), ['CPUExecutionProvider']);
  assert.deepEqual(model.status.ready?.strayNodes, { count: 0, names: [] });
});

test('the embedded default bundle passes its own self-test', async () => {
  await using opened = await open(path.resolve(import.meta.dirname, '../../../models/default'));
  await opened.model.start();
  assert.ok(opened.model.status.ready, JSON.stringify(opened.model.status));
});

test('a model that fails its self-test is refused in a sentence', async () => {
  const wrong = [windowOf(10), windowOf(200)].map(logitsOf);
  wrong[1]![2]! += 0.5;
  await using directory = await writeMeansBundle({ selfTest: wrong });
  await using opened = await open(directory.directory);
  await assert.rejects(opened.model.start(), (error) => {
    assert.ok(error instanceof StartupError);
    assert.match(error.message, /fails its self-test.*logits\.json by 0\.500, 0\.0001 is allowed/);
    return true;
  });
  assert.equal(opened.model.pid, undefined);
});

test('a model file with one flipped bit is refused before ONNX Runtime sees it', async () => {
  await using directory = await writeMeansBundle();
  const file = path.join(directory.directory, 'model.onnx');
  const bytes = await readFile(file);
  bytes[100]! ^= 1;
  await writeFile(file, bytes);
  await assert.rejects(loadBundle(directory.directory), /model\.onnx has SHA-256 .* damaged or was changed/);
});

for (const { what, change, sentence } of [
  {
    what: 'another input name',
    change: (graph) => Object.assign(graph.input, { name: 'image' }),
    sentence: /names the input image; the model's graph has windows/,
  },
  {
    what: 'another output name',
    change: (graph) => Object.assign(graph.outputs.logits, { name: 'scores' }),
    sentence: /names the output scores; the model's graph has logits/,
  },
  {
    what: 'an embedding that the graph has not',
    change: (graph) =>
      Object.assign(graph.outputs, { embedding: { name: 'embedding', shape: ['batch', 8] } }),
    sentence: /names the output embedding/,
  },
  {
    what: 'another rank of the output',
    change: (graph) => Object.assign(graph.outputs.logits, { shape: ['batch', 1, 4] }),
    sentence:
      /output logits of the model's graph is float32 \["batch",4\], model\.json says float32 \["batch",1,4\]/,
  },
] as {
  what: string;
  change: (graph: import('@acousticsense/shared/bundle').Manifest['graph']) => void;
  sentence: RegExp;
}[]) {
  test(`a model.json with ${what} is refused in a sentence`, async () => {
    await using directory = await writeMeansBundle({ change: ({ graph }) => change(graph) });
    await using opened = await open(directory.directory);
    await assert.rejects(opened.model.start(), (error) => {
      assert.ok(error instanceof StartupError);
      assert.match(error.message, sentence);
      return true;
    });
  });
}

/** A Vulkan driver in software that comes with Chromium: slow, but a real WebGPU adapter. */
const swiftShader = '/usr/lib/chromium/vk_swiftshader_icd.json';

test('on WebGPU the answers are the same, and the provider is the one that ran', {
  skip: !existsSync(swiftShader),
}, async () => {
  process.env.VK_ICD_FILENAMES = swiftShader;
  try {
    await using directory = await writeMeansBundle();
    await using opened = await open(directory.directory, { provider: 'webgpu', requireGpu: true });
    const { model } = opened;
    await model.start();
    assert.ok(model.status.ready, JSON.stringify(model.status));
    assert.ok((model.status.ready.nodes.WebGpuExecutionProvider ?? 0) > 0);
    const windows = [windowOf(0), windowOf(77)];
    const { outputs, provider } = await model.run(...batchOf(...windows));
    assert.equal(provider, 'webgpu');
    assert.ok(distance(outputs.logits, windows.flatMap(logitsOf)) < 1e-3);
  } finally {
    delete process.env.VK_ICD_FILENAMES;
  }
});

test('CUDA that cannot be used falls back to the CPU and says so', { skip: hasGpu }, async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory, { provider: 'cuda' });
  await opened.model.start();
  assert.equal(opened.model.status.ready?.provider, 'cpu');
  assert.match(opened.model.status.ready?.fallback ?? '', /^cuda: .*Failed to load shared library/);
  const { count, names } = opened.model.status.ready!.strayNodes;
  assert.equal(count, opened.model.status.ready!.nodes.CPUExecutionProvider);
  assert.ok(
    names.some((name) => name.startsWith('ReduceMean ')),
    names.join(),
  );
});

test('with REQUIRE_GPU a missing GPU is never ready, gives the reason and is tried again', {
  skip: hasGpu,
}, async () => {
  await using directory = await writeMeansBundle();
  let restarts = 0;
  await using opened = await open(directory.directory, {
    provider: 'auto',
    requireGpu: true,
    onRestart: () => (restarts += 1),
  });
  const { model } = opened;
  await model.start();
  assert.ok(!model.status.ready);
  assert.match(model.status.reason, /^REQUIRE_GPU=1, and no GPU can be used \(cuda: .*; webgpu: .*\)\.$/);
  await assert.rejects(model.whenReady(1_500), InfrastructureFault);
  assert.ok(restarts >= 1);
  assert.ok(!model.status.ready);
});

test('the explain graph is opened when it is first wished for, and again in the next process', async () => {
  await using directory = await writeMeansBundle({ full: true });
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const explainFile = path.join(directory.directory, 'explain.onnx');
  const report = await model.openExplainer(0);
  assert.ok(report.sums.every((sum) => Math.abs(sum - 1) < 1e-5));
  assert.equal(report.provider, 'cpu');
  assert.deepEqual(Object.keys(report.nodes), ['CPUExecutionProvider']);
  const windows = [windowOf(0), windowOf(77, 255), windowOf(255)];
  const explained = async () => (await model.run(...batchOf(...windows), 'explain')).outputs.attention;
  assert.ok(distance(await explained(), windows.map(attentionOf).flat(2)) < 1e-6);
  // Open is open: its file is not read again.
  await rename(explainFile, `${explainFile}.away`);
  await model.openExplainer(0);
  await rename(`${explainFile}.away`, explainFile);

  const first = model.pid!;
  process.kill(first, 'SIGKILL');
  for (let i = 0; model.pid === first && i < 200; i += 1) await sleep(10);
  await model.openExplainer(10_000);
  assert.ok(distance(await explained(), windows.map(attentionOf).flat(2)) < 1e-6);
});

test('a service starts without the explain graph being opened, and classifies on when it turns out to be bad', async () => {
  await using directory = await writeMeansBundle({
    full: true,
    spoil: { 'explain.onnx': () => Buffer.from('no graph at all') },
  });
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const { pid } = model;
  for (let i = 0; i < 2; i += 1) {
    await assert.rejects(model.openExplainer(0), (error) => {
      assert.ok(error instanceof CannotExplain);
      assert.match(error.message, /explain\.onnx cannot be loaded by ONNX Runtime/);
      return true;
    });
  }
  const { outputs } = await model.run(...batchOf(windowOf(3)));
  assert.ok(distance(outputs.logits, logitsOf(windowOf(3))) < 1e-4);
  assert.equal(model.pid, pid);
});

test('kill -9 in mid-run rejects the run, and another process takes over', async () => {
  await using directory = await writeMeansBundle();
  let restarts = 0;
  await using opened = await open(directory.directory, {
    childScript: moodyChild,
    onRestart: () => (restarts += 1),
  });
  const { model } = opened;
  await model.start();
  const first = model.pid!;
  const run = model.run(...batchOf(windowOf(9, moods.slow)));
  await sleep(100);
  process.kill(first, 'SIGKILL');
  await assert.rejects(run, (error) => {
    assert.ok(error instanceof ModelProcessCrashed);
    assert.match(error.message, /SIGKILL/);
    return true;
  });
  assert.equal(model.status.ready, undefined);
  await model.whenReady(10_000);
  assert.notEqual(model.pid, first);
  assert.equal(restarts, 1);
  const { outputs } = await model.run(...batchOf(windowOf(3)));
  assert.ok(distance(outputs.logits, logitsOf(windowOf(3))) < 1e-4);
});

test('a process killed while idle is no longer ready, and comes back', async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const first = model.pid!;
  process.kill(first, 'SIGKILL');
  for (let i = 0; model.pid === first && i < 200; i += 1) await sleep(10);
  assert.ok(!model.status.ready);
  await model.whenReady(10_000);
});

test('a run that hangs is killed at its deadline', async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory, { childScript: moodyChild, runDeadlineMs: 300 });
  const { model } = opened;
  await model.start();
  const first = model.pid!;
  await assert.rejects(model.run(...batchOf(windowOf(9, moods.hangs))), /a batch took longer than 0\.3 s/);
  assert.ok(await gone(first));
  await model.whenReady(10_000);
});

test('a batch that ONNX Runtime fails on counts as a crash, and a clean process follows', async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const first = model.pid;
  await assert.rejects(model.run(new Uint8Array(100), 1), ModelProcessCrashed);
  await model.whenReady(10_000);
  assert.notEqual(model.pid, first);
});

test('closing ends the process, and the model is away from then on', async () => {
  await using directory = await writeMeansBundle();
  await using opened = await open(directory.directory);
  const { model } = opened;
  await model.start();
  const { pid } = model;
  await model.close();
  assert.ok(await gone(pid!));
  await assert.rejects(model.run(...batchOf(windowOf(1))), InfrastructureFault);
  await assert.rejects(model.whenReady(60_000), /stopping/);
});

test('a hung process does not outlive a parent that was killed', async () => {
  await using directory = await writeMeansBundle();
  const program = `
    import { loadBundle } from '@acousticsense/shared/bundle';
    import { pino } from 'pino';
    import { createModelProcess } from './model-process.ts';
    import { moodyChild, windowOf } from './testing/means-model.ts';
    const bundle = await loadBundle(${JSON.stringify(directory.directory)});
    const log = pino({ level: 'silent' });
    const model = createModelProcess({ bundle, provider: 'cpu', requireGpu: false, threads: 1, log, childScript: moodyChild });
    await model.start();
    void model.run(windowOf(9, ${moods.hangs}), 1);
    process.stdout.write(String(model.pid));`;
  const parent = spawn(process.execPath, ['--input-type=module-typescript', '-e', program], {
    cwd: import.meta.dirname,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [chunk] = (await once(parent.stdout, 'data')) as [Buffer];
  const pid = Number(chunk);
  assert.ok(pid > 0);
  await sleep(200);
  parent.kill('SIGKILL');
  assert.ok(await gone(pid), `process ${pid} still runs`);
});
