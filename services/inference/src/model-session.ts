/**
 * One ONNX graph of a bundle on one execution provider: compared with model.json and run on the bundle's self-test
 * before anybody's window. Lives in the model's child process (`model-child.ts`); the parent imports types only.
 */
import { rmSync } from 'node:fs';
import { mkdtemp, readdir, readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Manifest } from '@acousticsense/shared/bundle';
import { parseNpy } from '@acousticsense/shared/tensor';
import { InferenceSession, Tensor } from 'onnxruntime-node';

export type Provider = 'cpu' | 'cuda' | 'webgpu';
export type ProviderChoice = Provider | 'auto';

/** What each graph gives, by role: float32, the batch first; of one window when there is no batch. */
export interface GraphOutputs {
  classify: {
    /** [labels] */
    readonly logits: Float32Array;
    /** [size], unit length */
    readonly embedding?: Float32Array;
    /** one number a window */
    readonly outlier?: Float32Array;
  };
  explain: {
    /** [rows, columns], sums to 1, row 0 lowest in pitch */
    readonly attention: Float32Array;
  };
}
export type GraphName = keyof GraphOutputs;

/** What a graph really does, established by running the self-test and reading ONNX Runtime's own profile. */
export interface GraphReport {
  readonly provider: Provider;
  /** Graph nodes of the self-test's run by the execution provider that ran them. */
  readonly nodes: Readonly<Record<string, number>>;
  /** Nodes that did not run on the provider that was asked for (`auto`: on the one in use). */
  readonly strayNodes: {
    readonly count: number;
    /** Operator and name, the first {@link strayNamesKept} of them. */
    readonly names: readonly string[];
  };
  /** Of the self-test's batch, warmed up. */
  readonly msPerWindow: number;
}

export interface OpenGraph<G extends GraphName, Verdict> {
  /** @param windows uint8 [count, bands, frames] */
  run(windows: Uint8Array, count: number): Promise<GraphOutputs[G]>;
  release(): Promise<void>;
  readonly report: GraphReport;
  /** What the self-test measured. */
  readonly verdict: Verdict;
}

export interface OpenOptions {
  readonly directory: string;
  readonly manifest: Pick<Manifest, 'graph' | 'selfTest' | 'files'>;
  /** What was asked for: the measure of stray nodes. */
  readonly provider: ProviderChoice;
  readonly threads: number;
}

/** `bundle`: it will never work; `gpu`: it may, once the GPU is back. */
export class Refusal extends Error {
  readonly because: 'bundle' | 'gpu';
  constructor(because: 'bundle' | 'gpu', message: string) {
    super(message);
    this.because = because;
  }
}

const strayNamesKept = 20;
/** Of a vector's length and of a map's sum, which are 1: room for half precision. */
const unitTolerance = 0.01;

const executionProviders = {
  cpu: 'CPUExecutionProvider',
  cuda: 'CUDAExecutionProvider',
  webgpu: 'WebGpuExecutionProvider',
} as const satisfies Record<Provider, string>;

type Declared = { readonly name: string; readonly shape: readonly (number | 'batch')[] };

/**
 * @returns the verdict is the largest absolute difference to the expected logits.
 * @throws {Refusal} when the bundle is at fault, naming the cause; other errors are the provider's.
 */
export async function openClassifier(
  provider: Provider,
  options: OpenOptions,
): Promise<OpenGraph<'classify', number>> {
  const { graph } = options.manifest;
  const { logits, embedding, outlier } = graph.outputs;
  // The embedding is fetched whether a job wants it or not: its nodes run anyway, and 768 bytes more a window cost
  // nothing (fastest batch of 4 of the default model through the channel: 36.5 ms with it, 36.7 ms without).
  const outputs = { logits, ...(embedding ? { embedding } : {}), ...(outlier ? { outlier } : {}) };
  const opened = await openGraph('classify', graph.file, outputs, provider, options, judgeClassifier);
  const { nodes } = opened.report;
  const own = nodes[executionProviders[provider]] ?? 0;
  const all = Object.values(nodes).reduce((sum, count) => sum + count, 0);
  // A few shape computations belong on the CPU with every provider; a graph that mostly runs there is no GPU run.
  if (own * 2 > all) return opened;
  await opened.release();
  throw new Error(`it ran only ${own} of ${all} graph nodes`);
}

/**
 * @returns the verdict is the least and the greatest sum of a map.
 * @throws as {@link openClassifier}.
 */
export function openExplainer(
  provider: Provider,
  options: OpenOptions,
): Promise<OpenGraph<'explain', [number, number]>> {
  const { file, output } = options.manifest.graph.explain!;
  return openGraph('explain', file, { attention: output }, provider, options, judgeExplainer);
}

async function openGraph<G extends GraphName, Verdict>(
  graph: G,
  file: string,
  outputs: Readonly<Record<string, Declared>>,
  provider: Provider,
  options: OpenOptions,
  judge: (outputs: GraphOutputs[G], test: SelfTest, file: string) => Verdict,
): Promise<OpenGraph<G, Verdict>> {
  const { directory, manifest } = options;
  const { input } = manifest.graph;
  const [, bands, frames] = input.shape as [string, number, number];
  const names = Object.values(outputs).map(({ name }) => name);
  await checkExternalFiles(directory, file, manifest.files);

  const scratch = await mkdtemp(path.join(tmpdir(), 'acousticsense-profile-'));
  const removeScratch = () => rmSync(scratch, { recursive: true, force: true });
  process.once('exit', removeScratch);
  let session: InferenceSession | undefined;
  try {
    const sharesWeights = graph === 'explain';
    const opened = await createSession(path.join(directory, file), provider, {
      threads: options.threads,
      scratch,
      sharesWeights,
    });
    session = opened;
    checkGraph(graph, file, opened, input, outputs);
    const test = await readSelfTest(options);
    const run = async (windows: Uint8Array, count: number) => {
      const tensor = new Tensor('uint8', windows, [count, bands, frames]);
      const results = await opened.run({ [input.name]: tensor }, names);
      const byRole = Object.entries(outputs).map(([role, { name }]) => [role, results[name]!.data]);
      return Object.fromEntries(byRole) as GraphOutputs[G];
    };
    judge(await run(test.windows, test.count), test, file);
    opened.endProfiling();
    // Once more: the first run compiles shaders and lets arenas grow.
    const began = performance.now();
    const outputsOfTest = await run(test.windows, test.count);
    const msPerWindow = (performance.now() - began) / test.count;
    const verdict = judge(outputsOfTest, test, file);
    const asked = executionProviders[options.provider === 'auto' ? provider : options.provider];
    const report = { provider, ...(await readProfile(scratch, asked)), msPerWindow };
    return { run, release: () => opened.release(), report, verdict };
  } catch (error) {
    // The CPU may be tried next in this process: what a GPU session holds must not stay beside it.
    await session?.release();
    throw error;
  } finally {
    removeScratch();
    process.off('exit', removeScratch);
  }
}

async function createSession(
  file: string,
  provider: Provider,
  { threads, scratch, sharesWeights }: { threads: number; scratch: string; sharesWeights: boolean },
) {
  const session = {
    // Spinning threads take the CPU from decoders and other services on the same cores: on 2 busy cores it
    // halved the throughput (docs/decisions/inference-batches.md).
    intra_op: { allow_spinning: '0' },
    // Prepacking copies every weight into a layout of its own. Without it the weights of a second session stay in
    // the pages of the file that both map: with ViT-B/16 that was 304 MB less, opened in 41 ms against 403, and no
    // slower a window (334 ms against 337).
    ...(sharesWeights ? { disable_prepacking: '1' } : {}),
  };
  try {
    return await InferenceSession.create(file, {
      executionProviders: [provider],
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      logSeverityLevel: 3,
      extra: { session },
      enableProfiling: true,
      profileFilePrefix: path.join(scratch, 'profile'),
    });
  } catch (error) {
    if (provider !== 'cpu') throw error;
    throw new Refusal('bundle', `The model ${file} cannot be loaded by ONNX Runtime: ${messageOf(error)}`);
  }
}

/**
 * Weights outside a graph's file are named in it only, as `external_data` entries of TensorProto (field 1: the key
 * "location", field 2: the path). One that model.json has no SHA-256 for could change unseen.
 * https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
 */
async function checkExternalFiles(directory: string, file: string, files: Manifest['files']): Promise<void> {
  const bytes = await readFile(path.join(directory, file)).catch((cause: Error) => {
    throw new Refusal('bundle', `The model bundle's file ${file} cannot be read: ${cause.message}`);
  });
  const entry = Buffer.from('\x0a\x08location\x12', 'latin1');
  for (let at = bytes.indexOf(entry); at !== -1; at = bytes.indexOf(entry, at + 1)) {
    const begin = at + entry.length + 1;
    const location = path.posix.normalize(bytes.toString('utf8', begin, begin + bytes[begin - 1]!));
    if (Object.hasOwn(files, location)) continue;
    throw new Refusal(
      'bundle',
      `${file} keeps weights in ${location}: model.json's "files" has no SHA-256 for it.`,
    );
  }
}

/** @throws {Refusal} naming the input or output of which graph and model.json disagree. */
function checkGraph(
  graph: GraphName,
  file: string,
  opened: InferenceSession,
  input: Declared,
  outputs: Readonly<Record<string, Declared>>,
): void {
  const whose = graph === 'classify' ? "the model's graph" : `the explain graph ${file}`;
  checkValue(whose, 'input', opened.inputMetadata, input, 'uint8');
  for (const output of Object.values(outputs))
    checkValue(whose, 'output', opened.outputMetadata, output, 'float32');
  const other = opened.inputNames.find((name) => name !== input.name);
  if (other === undefined) return;
  throw new Refusal('bundle', `${capital(whose)} needs an input ${other} that model.json does not name.`);
}

function checkValue(
  whose: string,
  kind: 'input' | 'output',
  declared: readonly InferenceSession.ValueMetadata[],
  expected: Declared,
  type: 'uint8' | 'float32',
): void {
  const actual = declared.find(({ name }) => name === expected.name);
  if (!actual?.isTensor) {
    const names = declared.map(({ name }) => name).join(', ');
    throw new Refusal('bundle', `model.json names the ${kind} ${expected.name}; ${whose} has ${names}.`);
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
    `The ${kind} ${expected.name} of ${whose} is ${actual.type} ${JSON.stringify(actual.shape)}, model.json says ${type} ${JSON.stringify(expected.shape)}.`,
  );
}

interface SelfTest {
  /** uint8 [count, bands, frames] */
  readonly windows: Uint8Array;
  readonly count: number;
  readonly logits: readonly number[];
  readonly tolerance: number;
  /** File of the expected logits. */
  readonly output: string;
}

async function readSelfTest({ directory, manifest }: OpenOptions): Promise<SelfTest> {
  const { input, output, tolerance } = manifest.selfTest;
  const windows = await readWith(path.join(directory, input), parseNpy);
  const [count = 0, ...sides] = windows.shape;
  if (count < 1 || JSON.stringify(sides) !== JSON.stringify(manifest.graph.input.shape.slice(1))) {
    throw new Refusal(
      'bundle',
      `The self-test's input ${input} has shape ${JSON.stringify(windows.shape)}, which the model does not take.`,
    );
  }
  const logits: unknown[] = await readWith(path.join(directory, output), (bytes) =>
    (JSON.parse(bytes.toString('utf8')) as unknown[][]).flat(),
  );
  const labels = manifest.graph.outputs.logits.shape.at(-1) as number;
  if (logits.length !== count * labels || !logits.every(Number.isFinite)) {
    throw new Refusal(
      'bundle',
      `The self-test's output ${output} must hold ${count} rows of ${labels} numbers.`,
    );
  }
  return { windows: windows.data, count, logits: logits as number[], tolerance, output };
}

async function readWith<T>(file: string, parse: (bytes: Buffer) => T): Promise<T> {
  try {
    return parse(await readFile(file));
  } catch (error) {
    throw new Refusal('bundle', `The self-test's file ${file} cannot be read: ${messageOf(error)}`);
  }
}

function judgeClassifier(outputs: GraphOutputs['classify'], test: SelfTest, file: string): number {
  checkFinite(outputs, file);
  const { logits, embedding } = outputs;
  const error = test.logits.reduce((worst, value, i) => Math.max(worst, Math.abs(value - logits[i]!)), 0);
  if (error > test.tolerance) {
    throw new Refusal(
      'bundle',
      `The model fails its self-test: its logits differ from ${test.output} by ${error.toPrecision(3)}, ${test.tolerance} is allowed.`,
    );
  }
  if (embedding) {
    for (const vector of rowsOf(embedding, test.count)) {
      const length = Math.hypot(...vector);
      if (Math.abs(length - 1) <= unitTolerance) continue;
      throw new Refusal(
        'bundle',
        `The model's embedding has length ${length.toPrecision(3)} on the self-test: it must be 1.`,
      );
    }
  }
  return error;
}

function judgeExplainer(
  outputs: GraphOutputs['explain'],
  test: SelfTest,
  file: string,
): [least: number, greatest: number] {
  checkFinite(outputs, file);
  const maps = rowsOf(outputs.attention, test.count);
  if (outputs.attention.some((share) => share < 0))
    throw new Refusal('bundle', `The explain graph ${file} gives a negative share on the self-test.`);
  const sums = maps.map((map) => map.reduce((a, b) => a + b, 0));
  const wrong = sums.find((sum) => Math.abs(sum - 1) > unitTolerance);
  if (wrong === undefined) return [Math.min(...sums), Math.max(...sums)];
  throw new Refusal(
    'bundle',
    `A map of the explain graph ${file} sums to ${wrong.toPrecision(3)} on the self-test: the shares must sum to 1.`,
  );
}

function checkFinite(outputs: object, file: string): void {
  for (const [role, values] of Object.entries(outputs) as [string, Float32Array][]) {
    const wrong = values.find((value) => !Number.isFinite(value));
    if (wrong === undefined) continue;
    throw new Refusal('bundle', `The self-test of ${file} gives ${wrong} in ${role}: no finite number.`);
  }
}

function rowsOf(batch: Float32Array, count: number): Float32Array[] {
  const width = batch.length / count;
  return Array.from({ length: count }, (_, row) => batch.subarray(row * width, (row + 1) * width));
}

/** Reads ONNX Runtime's profile (Chrome trace format): one event for each kernel that ran, with its provider. */
async function readProfile(
  directory: string,
  asked: string,
): Promise<Pick<GraphReport, 'nodes' | 'strayNodes'>> {
  const [file] = await readdir(directory);
  const events = JSON.parse(await readFile(path.join(directory, file!), 'utf8')) as {
    name: string;
    args?: { provider?: string; op_name?: string };
  }[];
  const nodes: Record<string, number> = {};
  const stray: string[] = [];
  for (const { name, args } of events) {
    if (!args?.provider || !name.endsWith('_kernel_time')) continue;
    nodes[args.provider] = (nodes[args.provider] ?? 0) + 1;
    if (args.provider !== asked) stray.push(`${args.op_name} ${name.slice(0, -'_kernel_time'.length)}`);
  }
  return { nodes, strayNodes: { count: stray.length, names: stray.slice(0, strayNamesKept) } };
}

const capital = (text: string) => text[0]!.toUpperCase() + text.slice(1);

/** Without the place in ONNX Runtime's own source that begins many of its messages. */
export function messageOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.replace(/^\S+\.(cc|h):\d+ .*? was false\. /s, '').trim();
}
