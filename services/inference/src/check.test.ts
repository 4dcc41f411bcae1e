import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import type { Manifest } from '@acousticsense/shared/bundle';
import { logitsOf, weightsAt, windowOf, writeMeansBundle } from './testing/means-model.ts';

interface Found {
  code: number;
  stdout: string;
  stderr: string;
}

function check(...args: string[]): Promise<Found> {
  const program = path.join(import.meta.dirname, 'check.ts');
  return new Promise((resolve) => {
    execFile(process.execPath, [program, ...args], (error, stdout, stderr) =>
      resolve({ code: error ? Number(error.code) : 0, stdout, stderr }),
    );
  });
}

/** `name` to `detail` of the lines that begin with `status`. */
function linesOf(stdout: string, status: 'ok' | 'failed'): Map<string, string> {
  const lines = stdout.split('\n').filter((line) => line.startsWith(status));
  return new Map(lines.map((line) => [line.slice(8, 23).trim(), line.slice(23)]));
}

test('a whole bundle: one line a check, each with its number, and exit code 0', async () => {
  await using bundle = await writeMeansBundle({
    full: true,
    change(manifest) {
      manifest.missing = [{ label: 'R&B', reason: 'no recordings' }];
      manifest.taxonomy = { Noise: ['Loud', 'Louder'], Calm: ['Soft', 'Softer'] };
    },
  });
  const { code, stdout, stderr } = await check(bundle.directory, '--provider', 'cpu', '--threads', '1');
  assert.equal(stderr, '');
  assert.equal(code, 0, stdout);
  assert.equal(linesOf(stdout, 'failed').size, 0);
  const ok = linesOf(stdout, 'ok');
  assert.match(ok.get('bundle')!, /^means 1, digest [0-9a-f]{16}$/);
  assert.match(ok.get('files')!, /^5 files, 0\.0 MB, every SHA-256 fits$/);
  assert.equal(ok.get('labels'), '4 in 2 families, missing: R&B (no recordings)');
  assert.equal(ok.get('precision'), 'fp32');
  assert.equal(ok.get('calibration'), 'none');
  assert.equal(ok.get('absent'), 'calibration');
  assert.equal(ok.get('provider'), 'cpu, asked for cpu');
  assert.match(ok.get('self-test')!, /^differs by \S+, 0\.0001 is allowed$/);
  assert.match(ok.get('nodes')!, /^\d+ on CPUExecutionProvider$/);
  assert.match(ok.get('speed')!, /ms a window with 1 threads/);
  assert.match(ok.get('explain')!, /^maps of 4 x 2, sums 1\.0000 to 1\.0000, /);
  assert.match(ok.get('explain nodes')!, /^\d+ on CPUExecutionProvider$/);
});

test('--json gives the same as one object', async () => {
  await using bundle = await writeMeansBundle();
  const { code, stdout } = await check(bundle.directory, '--json');
  assert.equal(code, 0);
  const report = JSON.parse(stdout);
  assert.equal(report.ok, true);
  assert.equal(report.bundle.name, 'means');
  assert.ok(report.checks.length >= 10);
  assert.deepEqual(report.classifier.strayNodes, { count: 0, names: [] });
  assert.equal(report.explain, undefined);
  const absent = report.checks.find(({ name }: { name: string }) => name === 'absent').detail;
  assert.equal(absent, 'embedding, outlier score, explain graph, taxonomy, calibration');
});

test('the default model passes', async () => {
  const { code, stdout } = await check(path.resolve(import.meta.dirname, '../../../models/default'));
  assert.equal(code, 0, stdout);
});

const hasGpu = ['/dev/nvidia0', '/dev/dri/renderD128', '/dev/dxg'].some((node) => existsSync(node));

test('a provider that cannot be had fails, and the nodes that do not run on it are named', {
  skip: hasGpu,
}, async () => {
  await using bundle = await writeMeansBundle();
  const { code, stdout } = await check(bundle.directory, '--provider', 'cuda');
  assert.equal(code, 1);
  assert.match(linesOf(stdout, 'failed').get('provider')!, /^cpu, asked for cuda \(cuda: .*shared library/);
  assert.match(linesOf(stdout, 'ok').get('nodes')!, /; \d+ not on the asked provider: .*ReduceMean \S+/);
});

test('called wrongly it says how, with exit code 2', async () => {
  for (const args of [[], ['a', 'b'], ['a', '--provider', 'gpu'], ['a', '--threads', '0'], ['a', '--what']]) {
    const { code, stdout, stderr } = await check(...args);
    assert.equal(code, 2);
    assert.equal(stdout, '');
    assert.match(stderr, /^check: .+\n$/);
  }
});

const setFloat = (at: number, value: number) => (bytes: Buffer) => {
  const changed = Buffer.from(bytes);
  changed.writeFloatLE(value, at);
  return changed;
};
/** Another name of the same length, so that the file stays a graph. */
const renamed = (from: string, to: string) => (bytes: Buffer) =>
  Buffer.from(bytes.toString('latin1').replaceAll(from, to), 'latin1');
const wrongLogits = [windowOf(10), windowOf(200)].map(logitsOf);
wrongLogits[1]![2]! += 0.5;

type Options = NonNullable<Parameters<typeof writeMeansBundle>[0]>;
const change = (alter: (manifest: Manifest) => unknown): Options => ({
  change(manifest) {
    alter(manifest);
  },
});

const faults: {
  what: string;
  options?: Options;
  /** What happens to the directory after the bundle was made. */
  harm?: (directory: string) => Promise<unknown>;
  line: string;
  sentence: RegExp;
}[] = [
  {
    what: 'no bundle at all',
    harm: (directory) => rm(path.join(directory, 'model.json')),
    line: 'bundle',
    sentence: /No model bundle at .*model\.json cannot be read/,
  },
  ...['model.onnx', 'explain.onnx', 'weights.bin', 'input.npy', 'logits.json'].map((file) => ({
    what: `one flipped bit in ${file}`,
    async harm(directory: string) {
      const bytes = await readFile(path.join(directory, file));
      bytes[bytes.length >> 1]! ^= 1;
      await writeFile(path.join(directory, file), bytes);
    },
    line: 'bundle',
    sentence: new RegExp(`${file} has SHA-256 [0-9a-f]{64}, model\\.json says .* damaged or was changed`),
  })),
  {
    what: 'a missing weights file',
    harm: (directory) => rm(path.join(directory, 'weights.bin')),
    line: 'bundle',
    sentence: /file .*weights\.bin cannot be read/,
  },
  {
    what: 'a weights file that nothing vouches for',
    options: change(({ files }) => delete files['weights.bin']),
    line: 'model',
    sentence: /^model\.onnx keeps weights in weights\.bin: model\.json's "files" has no SHA-256 for it\.$/,
  },
  {
    what: 'too few labels',
    options: change(({ labels }) => labels.splice(3)),
    line: 'bundle',
    sentence: /3 labels for logits of shape \["batch",4\]/,
  },
  {
    what: 'labels and a shape that the graph does not give',
    options: change((manifest) => {
      manifest.labels = ['Loud', 'Soft'];
      manifest.graph.outputs.logits.shape = ['batch', 2];
    }),
    line: 'model',
    sentence:
      /output logits of the model's graph is float32 \["batch",4\], model\.json says float32 \["batch",2\]/,
  },
  {
    what: 'an embedding of another size',
    options: change(({ graph }) => Object.assign(graph.outputs.embedding!, { shape: ['batch', 192] })),
    line: 'model',
    sentence: /output embedding of the model's graph is float32 \["batch",2\], model\.json says .*192/,
  },
  {
    what: 'an outlier output that the graph has not',
    options: change(({ graph }) => Object.assign(graph.outputs.outlier!, { name: 'strangeness' })),
    line: 'model',
    sentence: /names the output strangeness; the model's graph has logits, embedding, outlier/,
  },
  {
    what: 'a self-test that fails',
    options: { selfTest: wrongLogits },
    line: 'model',
    sentence: /fails its self-test: its logits differ from logits\.json by 0\.500, 0\.0001 is allowed/,
  },
  {
    what: 'a self-test without enough numbers',
    options: { selfTest: [[1, 2, 3, 4]] },
    line: 'model',
    sentence: /self-test's output logits\.json must hold 2 rows of 4 numbers/,
  },
  {
    what: 'a self-test without a window',
    options: {
      spoil: {
        'input.npy': (bytes) =>
          Buffer.from(bytes.toString('latin1').replace('(2,', '(0,').slice(0, 128), 'latin1'),
      },
    },
    line: 'model',
    sentence: /self-test's input input\.npy has shape \[0,16,8\]/,
  },
  {
    what: 'logits that are not numbers',
    options: { spoil: { 'weights.bin': setFloat(weightsAt.slope, Number.NaN) } },
    line: 'model',
    sentence: /self-test of model\.onnx gives NaN in logits/,
  },
  {
    what: 'a model file that is no graph',
    options: { spoil: { 'model.onnx': () => Buffer.from('no graph at all') } },
    line: 'model',
    sentence: /model\.onnx cannot be loaded by ONNX Runtime/,
  },
  {
    what: 'an explain graph with another input',
    options: { spoil: { 'explain.onnx': renamed('windows', 'picture') } },
    line: 'explain',
    sentence: /names the input windows; the explain graph explain\.onnx has picture/,
  },
  {
    what: 'an explain graph with maps of another size',
    options: change(({ graph }) => Object.assign(graph.explain!.output, { shape: ['batch', 14, 14] })),
    line: 'explain',
    sentence:
      /output attention of the explain graph explain\.onnx is float32 \["batch",4,2\], model\.json says .*14/,
  },
  {
    what: 'attention that is not a number',
    options: { spoil: { 'weights.bin': setFloat(weightsAt.gain, Number.NaN) } },
    line: 'explain',
    sentence: /self-test of explain\.onnx gives NaN in attention/,
  },
  {
    what: 'attention that does not sum to one',
    options: { spoil: { 'weights.bin': setFloat(weightsAt.gain, 3) } },
    line: 'explain',
    sentence: /map of the explain graph explain\.onnx sums to 1\.25 .* must sum to 1/,
  },
  {
    what: 'negative attention',
    options: { spoil: { 'weights.bin': setFloat(weightsAt.gain, -1) } },
    line: 'explain',
    sentence: /explain graph explain\.onnx gives a negative share/,
  },
];

for (const { what, options = {}, harm = async () => {}, line, sentence } of faults) {
  test(`a bundle with ${what} fails in one sentence that says so`, async () => {
    await using bundle = await writeMeansBundle({ full: true, ...options });
    await harm(bundle.directory);
    const { code, stdout, stderr } = await check(bundle.directory, '--provider', 'cpu');
    assert.equal(stderr, '');
    assert.equal(code, 1, stdout);
    const failed = linesOf(stdout, 'failed');
    assert.deepEqual([...failed.keys()], [line], stdout);
    assert.match(failed.get(line)!, sentence);
  });
}
