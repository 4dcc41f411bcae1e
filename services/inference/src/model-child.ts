/**
 * The child process that holds the ONNX Runtime sessions: the classifier from the start, the explain graph from the
 * first wish for it on, so that its memory and load time stay away from those who never ask. Started by
 * `model-process.ts`, never imported by it.
 *
 * `InferenceSession.run` is a synchronous native call: it blocks the event loop for the whole batch, may crash
 * the process, and memory of released sessions does not come back. So it lives here, and the parent ends the
 * process where others would release a session.
 *
 * Batches arrive over Node's own IPC channel with `serialization: 'advanced'`: one `Uint8Array` a message is
 * written as raw bytes (no base64, no JSON), about 0.2 ms for a batch of 16 windows against tens of
 * milliseconds for running it, and framing, back-pressure and "the parent is gone" come with it.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import {
  type GraphName,
  type GraphOutputs,
  type GraphReport,
  messageOf,
  type OpenGraph,
  type OpenOptions,
  openClassifier,
  openExplainer,
  type Provider,
  Refusal,
} from './model-session.ts';

export interface LoadRequest extends OpenOptions {
  readonly type: 'load';
  /** A GPU that cannot be used is then no reason to fall back to the CPU but to refuse. */
  readonly requireGpu: boolean;
}

/** Only after `ready`, and only when the manifest names an explain graph. */
export interface OpenExplainRequest {
  readonly type: 'open-explain';
  readonly id: number;
}

export interface RunRequest {
  readonly type: 'run';
  readonly id: number;
  readonly graph: GraphName;
  /** uint8 [count, bands, frames] */
  readonly windows: Uint8Array;
  readonly count: number;
}

export type Request = LoadRequest | OpenExplainRequest | RunRequest;

export interface SessionReport extends GraphReport {
  /** Why a provider that was wanted is not the one in use. */
  readonly fallback?: string;
  /** Largest difference to the bundle's expected logits. */
  readonly selfTestError: number;
  readonly loadMs: number;
}

export interface ExplainReport extends GraphReport {
  /** Least and greatest sum of a map on the self-test: 1 but for rounding. */
  readonly sums: readonly [number, number];
  readonly loadMs: number;
}

export type Reply =
  | { readonly type: 'ready'; readonly report: SessionReport }
  | { readonly type: 'refused'; readonly because: Refusal['because']; readonly message: string }
  | { readonly type: 'explain-ready'; readonly id: number; readonly report: ExplainReport }
  /** The explain graph will never work; the classifier is not touched by it. */
  | { readonly type: 'explain-refused'; readonly id: number; readonly message: string }
  | {
      readonly type: 'result';
      readonly id: number;
      readonly outputs: GraphOutputs[GraphName];
      readonly runMs: number;
      readonly provider: Provider;
    }
  | { readonly type: 'failed'; readonly id: number; readonly message: string };

type Classifier = OpenGraph<'classify', number>;

let loaded: LoadRequest | undefined;
let classifier: Classifier | undefined;
let explainer: OpenGraph<'explain', [number, number]> | undefined;

process.on('message', (request: Request) => {
  if (request.type === 'load') void load(request);
  else if (request.type === 'open-explain') void openExplain(request);
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
    const { opened, fallback } = await openSession(request);
    loaded = request;
    classifier = opened;
    const report: SessionReport = {
      ...opened.report,
      ...(fallback === undefined ? {} : { fallback }),
      selfTestError: opened.verdict,
      loadMs: performance.now() - began,
    };
    reply({ type: 'ready', report });
  } catch (error) {
    const because = error instanceof Refusal ? error.because : 'bundle';
    process.send!({ type: 'refused', because, message: messageOf(error) } satisfies Reply, () =>
      process.exit(1),
    );
  }
}

async function openExplain({ id }: OpenExplainRequest): Promise<void> {
  try {
    const began = performance.now();
    explainer = await openExplainer(classifier!.report.provider, loaded!);
    const { report, verdict } = explainer;
    const loadMs = performance.now() - began;
    reply({ type: 'explain-ready', id, report: { ...report, sums: verdict, loadMs } });
  } catch (error) {
    const type = error instanceof Refusal ? 'explain-refused' : 'failed';
    reply({ type, id, message: messageOf(error) });
  }
}

async function run({ id, graph, windows, count }: RunRequest): Promise<void> {
  try {
    const began = performance.now();
    const opened = graph === 'explain' ? explainer! : classifier!;
    const outputs = await opened.run(windows, count);
    const runMs = performance.now() - began;
    reply({ type: 'result', id, outputs, runMs, provider: opened.report.provider });
  } catch (error) {
    reply({ type: 'failed', id, message: messageOf(error) });
  }
}

/**
 * Tries the providers in order, one session with exactly one provider each: so a provider that is away throws
 * instead of being passed over in silence.
 */
async function openSession(request: LoadRequest): Promise<{ opened: Classifier; fallback?: string }> {
  const { candidates, passedOver } = plan(request);
  const reasons = [...passedOver];
  for (const provider of candidates) {
    try {
      const opened = await openClassifier(provider, request);
      if (provider !== 'cpu' && request.provider === 'auto' && !request.requireGpu) {
        return await fasterOf(opened, await openClassifier('cpu', request));
      }
      return { opened, ...(reasons.length === 0 ? {} : { fallback: reasons.join('; ') }) };
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
async function fasterOf(
  gpu: Classifier,
  cpu: Classifier,
): Promise<{ opened: Classifier; fallback?: string }> {
  const { provider, msPerWindow } = gpu.report;
  if (msPerWindow < cpu.report.msPerWindow) {
    await cpu.release();
    return { opened: gpu };
  }
  await gpu.release();
  const [slow, fast] = [msPerWindow, cpu.report.msPerWindow].map((ms) => ms.toPrecision(2));
  const fallback = `${provider}: slower than the CPU (${slow} ms a window against ${fast})`;
  return { opened: cpu, fallback };
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
