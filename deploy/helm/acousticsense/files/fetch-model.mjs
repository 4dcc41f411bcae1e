/**
 * The init container of decoders and inference workers: sees to it that the bundle that this Deployment is named after
 * is the one that it serves.
 *
 *   MODEL_DIGEST   SHA-256 of model.json
 *   MODEL_SOURCE   where the bundle lies: a directory (file:///...), or a place like STORAGE_URL (s3://bucket/prefix?...)
 *   MODEL_TARGET   directory to copy it to; empty: it is only checked
 *   MODEL_FILES    `all`, or `manifest` for model.json alone (what the decoder needs)
 *
 * Every file is compared with the hash that model.json has for it before it gets its name. What is there and right is
 * not fetched again. Ends non-zero with one line that says what is wrong; Kubernetes shows it and tries again.
 */
import { createHash } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { pathToFileURL } from 'node:url';

const { MODEL_DIGEST, MODEL_SOURCE, MODEL_TARGET, MODEL_FILES = 'all', APP_DIR = '/app' } = process.env;

const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex');

async function hashOf(file) {
  const hash = createHash('sha256');
  try {
    await pipeline(createReadStream(file), hash);
  } catch (error) {
    if (error.code === 'ENOENT') return undefined;
    throw error;
  }
  return hash.digest('hex');
}

async function openSource() {
  const module = pathToFileURL(path.join(APP_DIR, 'packages/shared/src/open-storage.ts'));
  const { openStorage } = await import(module.href);
  return openStorage(MODEL_SOURCE);
}

async function main() {
  const source = await openSource();
  const manifest = await source.read('model.json').catch((error) => {
    throw new Error(`model.json cannot be read at ${source.description}: ${error.message}`);
  });
  const digest = sha256(manifest);
  if (digest !== MODEL_DIGEST)
    throw new Error(`model.json at ${source.description} has SHA-256 ${digest}, expected ${MODEL_DIGEST}`);
  if (!MODEL_TARGET) return `${digest} is what is at ${source.description}`;

  await mkdir(MODEL_TARGET, { recursive: true });
  const files = MODEL_FILES === 'manifest' ? {} : JSON.parse(manifest.toString('utf8')).files;
  for (const [name, expected] of Object.entries(files)) {
    const target = path.join(MODEL_TARGET, name);
    if (path.relative(MODEL_TARGET, target).startsWith('..'))
      throw new Error(`model.json names ${name}, which lies outside its directory`);
    if ((await hashOf(target)) === expected) continue;
    await mkdir(path.dirname(target), { recursive: true });
    const part = `${target}.part`;
    try {
      await pipeline(await source.get(name), createWriteStream(part));
      const actual = await hashOf(part);
      if (actual !== expected)
        throw new Error(
          `${name} at ${source.description} has SHA-256 ${actual}, model.json says ${expected}`,
        );
      await rename(part, target);
    } finally {
      await rm(part, { force: true });
    }
  }
  // Last: a directory with a model.json is complete.
  const target = path.join(MODEL_TARGET, 'model.json');
  if ((await hashOf(target)) !== digest) {
    await writeFile(`${target}.part`, manifest);
    await rename(`${target}.part`, target);
  }
  return `${digest} is in ${MODEL_TARGET}`;
}

try {
  console.log(await main());
  process.exit(0);
} catch (error) {
  console.error(`The model cannot be had: ${error.message}`);
  process.exit(1);
}
