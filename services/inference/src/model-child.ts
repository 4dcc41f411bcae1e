/**
 * The child process that holds the ONNX Runtime session. Started by `model-process.ts`, never imported by it.
 *
 * `InferenceSession.run` is a synchronous native call: it blocks the event loop for the whole batch, may crash
 * the process, and memory of released sessions does not come back. So it lives here, one session a process, and
 * the parent ends the process where others would release a session.
 *
 * Batches arrive over Node's own IPC channel with `serialization: 'advanced'`: one `Uint8Array` a message is
 * written as raw bytes (no base64, no JSON), about 0.2 ms for a batch of 16 windows against tens of
 * milliseconds for running it, and framing, back-pressure and "the parent is gone" come with it.
 */
import { existsSync, rmSync } from 'node:fs';
import { mkdtemp, readdir, readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import type { Manifest } from '@acousticsense/shared/bundle';
import { parseNpy } from '@acousticsense/shared/tensor';
import { InferenceSession, Tensor } from 'onnxruntime-node';

export type Provider = 'cpu' | 'cuda' | 'webgpu';
export type ProviderChoice = Provider | 'auto';

export interface LoadRequest {
  readonly type: 'load';
  readonly directory: string;
  readonly manifest: Pick<Manifest, 'graph' | 'selfTest'>;
  readonly provider: ProviderChoice;
  /** A GPU that cannot be used is then no reason to fall back to the CPU but to refuse. */
  readonly requireGpu: boolean;
  readonly threads: number;
}

export interface RunRequest {
  readonly type: 'run';
  readonly id: number;
  /** uint8 [count, bands, frames] */
  readonly windows: Uint8Array;
  readonly count: number;
}

/** What the session really is, established by running the self-test and reading ONNX Runtime's own profile. */
export interface SessionReport {
  readonly provider: Provider;
  /** Why a provider that was wanted is not the one in use. */
  readonly fallback?: string;
  /** Graph nodes of the self-test's run by the execution provider that ran them. */
  readonly nodes: Readonly<Record<string, number>>;
  /** Largest difference to the bundle's expected logits. */
  readonly selfTestError: number;
  /** Of the self-test's batch, warmed up. */
  readonly msPerWindow: number;
  readonly loadMs: number;
}

export type Reply =
  | { readonly type: 'ready'; readonly report: SessionReport }
  /** `bundle`: it will never work; `gpu`: it may, once the GPU is back. */
  | { readonly type: 'refused'; readonly because: 'bundle' | 'gpu'; readonly message: string }
  /** logits: float32 [count, labels] */
  | { readonly type: 'result'; readonly id: number; readonly logits: Float32Array; readonly runMs: number }
  | { readonly type: 'failed'; readonly id: number; readonly message: string };

const executionProviders = {
  cpu: 'CPUExecutionProvider',
  cuda: 'CUDAExecutionProvider',
  webgpu: 'WebGpuExecutionProvider',
} as const satisfies Record<Provider, string>;

class Refusal extends Error {
  readonly because: 'bundle' | 'gpu';
  constructor(because: 'bundle' | 'gpu', message: string) {
    super(message);
    this.because = because;
  }
}

let session: InferenceSession | undefined;
let graph: Manifest['graph'] | undefined;

process.on('message', (request: LoadRequest | RunRequest) => {
  if (request.type === 'load') void load(request);
  else void run(request);
});
process.on('disconnect', () => process.exit(0));
// A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group, but the parent still needs its batches
// while it drains: it ends this process itself.
process.on('SIGINT', () => {});
process.on('SIGTERM', () => {});
dieWithParent(process.ppid);

async function load(request: LoadRequest): Promise<void> {
  try {
    const began = performance.now();
    const opened = await openSession(request);
    graph = request.manifest.graph;
    session = opened.session;
    reply({ type: 'ready', report: { ...opened.report, loadMs: performance.now() - began } });
  } catch (error) {
    const because = error instanceof Refusal ? error.because : 'bundle';
    process.send!({ type: 'refused', because, message: messageOf(error) } satisfies Reply, () =>
      process.exit(1),
    );
  }
}

async function run({ id, windows, count }: RunRequest): Promise<void> {
  try {
    const began = performance.now();
    const logits = await runGraph(session!, graph!, windows, count);
    reply({ type: 'result', id, logits, runMs: performance.now() - began });
  } catch (error) {
    reply({ type: 'failed', id, message: messageOf(error) });
  }
}

type Opened = { session: InferenceSession; report: Omit<SessionReport, 'loadMs'> };

/**
 * Tries the providers in order, one session with exactly one provider each: so a provider that is away throws
 * instead of being passed over in silence.
 */
async function openSession(request: LoadRequest): Promise<Opened> {
  const { candidates, passedOver } = plan(request);
  const reasons = [...passedOver];
  for (const provider of candidates) {
    try {
      const opened = await openWith(provider, request);
      if (provider !== 'cpu' && request.provider === 'auto' && !request.requireGpu) {
        return await fasterOf(opened, await openWith('cpu', request));
      }
      return withFallback(opened, reasons);
    } catch (error) {
      if (provider === 'cpu') throw error;
      reasons.push(`${provider}: ${messageOf(error)}`);
    }
  }
  throw new Refusal('gpu', `REQUIRE_GPU=1, and no GPU can be used (${reasons.join('; ')}).`);
}

/**
 * A software driver can pass for a GPU and is then a thousand times slower than the CPU provider (SwiftShader
 * took 8 s for a window of the default model), and a tiny model does not repay the way to a GPU.
 */
async function fasterOf(gpu: Opened, cpu: Opened): Promise<Opened> {
  const { provider, msPerWindow } = gpu.report;
  if (msPerWindow < cpu.report.msPerWindow) {
    await cpu.session.release();
    return gpu;
  }
  await gpu.session.release();
  const [slow, fast] = [msPerWindow, cpu.report.msPerWindow].map((ms) => ms.toPrecision(2));
  return withFallback(cpu, [`${provider}: slower than the CPU (${slow} ms a window against ${fast})`]);
}

function withFallback(opened: Opened, reasons: readonly string[]): Opened {
  if (reasons.length === 0) return opened;
  return { ...opened, report: { ...opened.report, fallback: reasons.join('; ') } };
}

/** Which providers are worth a try. `auto` leaves out those whose libraries or devices this machine has not. */
function plan({ provider, requireGpu }: LoadRequest): { candidates: Provider[]; passedOver: string[] } {
  const last: Provider[] = requireGpu ? [] : ['cpu'];
  if (provider === 'cpu') return { candidates: last, passedOver: requireGpu ? ['PROVIDER=cpu'] : [] };
  if (provider !== 'auto') return { candidates: [provider, ...last], passedOver: [] };
  const candidates: Provider[] = [];
  const passedOver: string[] = [];
  if (hasCudaLibrary()) candidates.push('cuda');
  else if (requireGpu) passedOver.push('cuda: its provider library is not installed beside ONNX Runtime');
  // Without a device node a Vulkan driver can only be a software one, which is slower than the CPU provider.
  if (['/dev/dri/renderD128', '/dev/nvidia0', '/dev/dxg'].some((node) => existsSync(node)))
    candidates.push('webgpu');
  else if (requireGpu) passedOver.push('webgpu: there is no GPU device node (/dev/dri, /dev/nvidia0)');
  return { candidates: [...candidates, ...last], passedOver };
}

function hasCudaLibrary(): boolean {
  const main = createRequire(import.meta.url).resolve('onnxruntime-node');
  const directory = path.join(main, `../../bin/napi-v6/${process.platform}/${process.arch}`);
  return existsSync(path.join(directory, 'libonnxruntime_providers_cuda.so'));
}

async function openWith(provider: Provider, { directory, manifest, threads }: LoadRequest): Promise<Opened> {
  const scratch = await mkdtemp(path.join(tmpdir(), 'acousticsense-profile-'));
  const removeScratch = () => rmSync(scratch, { recursive: true, force: true });
  process.once('exit', removeScratch);
  let opened: InferenceSession | undefined;
  try {
    opened = await createSession(path.join(directory, manifest.graph.file), provider, threads, scratch);
    checkGraph(opened, manifest);
    await selfTest(opened, directory, manifest);
    opened.endProfiling();
    // Once more: the first run compiles shaders and lets arenas grow.
    const { error: selfTestError, msPerWindow } = await selfTest(opened, directory, manifest);
    const nodes = await nodesByProvider(scratch);
    const own = nodes[executionProviders[provider]] ?? 0;
    const all = Object.values(nodes).reduce((sum, count) => sum + count, 0);
    // A few shape computations belong on the CPU with every provider; a graph that mostly runs there is no GPU run.
    if (own * 2 <= all) throw new Error(`it ran only ${own} of ${all} graph nodes`);
    return { session: opened, report: { provider, nodes, selfTestError, msPerWindow } };
  } catch (error) {
    // The CPU may be tried next in this process: what a GPU session holds must not stay beside it.
    await opened?.release();
    throw error;
  } finally {
    removeScratch();
    process.off('exit', removeScratch);
  }
}

async function createSession(file: string, provider: Provider, threads: number, scratch: string) {
  try {
    return await InferenceSession.create(file, {
      executionProviders: [provider],
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      logSeverityLevel: 3,
      // Spinning threads take the CPU from decoders and other services on the same cores: on 2 busy cores it
      // halved the throughput (docs/decisions/inference-batches.md).
      extra: { session: { intra_op: { allow_spinning: '0' } } },
      enableProfiling: true,
      profileFilePrefix: path.join(scratch, 'profile'),
    });
  } catch (error) {
    if (provider !== 'cpu') throw error;
    throw new Refusal('bundle', `The model ${file} cannot be loaded by ONNX Runtime: ${messageOf(error)}`);
  }
}

/** @throws {Refusal} naming the input or output of which graph and model.json disagree. */
function checkGraph(opened: InferenceSession, { graph }: LoadRequest['manifest']): void {
  const { logits, embedding } = graph.outputs;
  checkValue('input', opened.inputMetadata, graph.input, 'uint8');
  checkValue('output', opened.outputMetadata, logits, 'float32');
  if (embedding) checkValue('output', opened.outputMetadata, embedding, 'float32');
  const others = opened.inputNames.filter((name) => name !== graph.input.name);
  if (others.length > 0)
    throw new Refusal(
      'bundle',
      `The model's graph needs an input ${others[0]} that model.json does not name.`,
    );
}

function checkValue(
  kind: 'input' | 'output',
  declared: readonly InferenceSession.ValueMetadata[],
  expected: { readonly name: string; readonly shape: readonly (number | 'batch')[] },
  type: 'uint8' | 'float32',
): void {
  const actual = declared.find(({ name }) => name === expected.name);
  if (!actual?.isTensor) {
    const names = declared.map(({ name }) => name).join(', ');
    throw new Refusal(
      'bundle',
      `model.json names the ${kind} ${expected.name}; the model's graph has ${names}.`,
    );
  }
  const fits =
    actual.type === type &&
    actual.shape.length === expected.shape.length &&
    expected.shape.every((side, i) =>
      side === 'batch' ? typeof actual.shape[i] === 'string' : side === actual.shape[i],
    );
  if (fits) return;
  throw new Refusal(
    'bundle',
    `The model's ${kind} ${expected.name} is ${actual.type} ${JSON.stringify(actual.shape)}, model.json says ${type} ${JSON.stringify(expected.shape)}.`,
  );
}

/**
 * Runs the bundle's own test.
 * @returns the largest absolute difference to the expected logits, which lies within the bundle's tolerance,
 *   and how long the run took.
 */
async function selfTest(
  opened: InferenceSession,
  directory: string,
  manifest: LoadRequest['manifest'],
): Promise<{ error: number; msPerWindow: number }> {
  const { input, output, tolerance } = manifest.selfTest;
  const { shape, data } = parseNpy(await readFile(path.join(directory, input)));
  const [count = 0, ...sides] = shape;
  if (JSON.stringify(sides) !== JSON.stringify(manifest.graph.input.shape.slice(1))) {
    throw new Refusal(
      'bundle',
      `The self-test's input ${input} has shape ${JSON.stringify(shape)}, which the model does not take.`,
    );
  }
  const expected = (JSON.parse(await readFile(path.join(directory, output), 'utf8')) as number[][]).flat();
  const began = performance.now();
  const actual = await runGraph(opened, manifest.graph, data, count);
  const msPerWindow = (performance.now() - began) / count;
  if (expected.length !== actual.length) {
    throw new Refusal(
      'bundle',
      `The self-test expects ${expected.length} numbers (${output}), the model gives ${actual.length}.`,
    );
  }
  const error = actual.reduce((worst, value, i) => Math.max(worst, Math.abs(value - expected[i]!)), 0);
  if (error <= tolerance) return { error, msPerWindow };
  throw new Refusal(
    'bundle',
    `The model fails its self-test: its logits differ from ${output} by ${error.toPrecision(3)}, ${tolerance} is allowed.`,
  );
}

async function runGraph(
  opened: InferenceSession,
  { input, outputs }: Manifest['graph'],
  windows: Uint8Array,
  count: number,
): Promise<Float32Array> {
  const [, bands, frames] = input.shape as [string, number, number];
  const tensor = new Tensor('uint8', windows, [count, bands, frames]);
  const results = await opened.run({ [input.name]: tensor }, [outputs.logits.name]);
  return results[outputs.logits.name]!.data as Float32Array;
}

/** Reads ONNX Runtime's profile (Chrome trace format): one event for each kernel that ran, with its provider. */
async function nodesByProvider(directory: string): Promise<Record<string, number>> {
  const [file] = await readdir(directory);
  const events = JSON.parse(await readFile(path.join(directory, file!), 'utf8')) as {
    name: string;
    args?: { provider?: string };
  }[];
  const nodes: Record<string, number> = {};
  for (const { name, args } of events) {
    if (!args?.provider || !name.endsWith('_kernel_time')) continue;
    nodes[args.provider] = (nodes[args.provider] ?? 0) + 1;
  }
  return nodes;
}

/**
 * The channel's end is noticed between runs only. This thread sees it in a run that never ends too, so that no
 * hung process outlives a killed parent.
 */
function dieWithParent(parent: number): void {
  const watch = `
    const { workerData } = require('node:worker_threads');
    setInterval(() => { if (process.ppid !== workerData) process.kill(process.pid, 'SIGKILL'); }, 500);`;
  new Worker(watch, {
    eval: true,
    workerData: parent,
    resourceLimits: { maxOldGenerationSizeMb: 8 },
  }).unref();
}

function reply(message: Reply): void {
  if (process.connected) process.send!(message);
}

/** Without the place in ONNX Runtime's own source that begins many of its messages. */
function messageOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.replace(/^\S+\.(cc|h):\d+ .*? was false\. /s, '').trim();
}
