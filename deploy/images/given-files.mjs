/**
 * Secrets as files, for every image: a file /run/secrets/NAME or /run/secrets/GROUP/NAME, with a name in capitals,
 * stands for the variable NAME. Loaded before the service (`--import`), whose configuration then reads the
 * environment alone. A variable that is set otherwise wins; a file that cannot be read ends the start.
 */
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';

const place = process.env.SECRETS_DIR || '/run/secrets';

function take(directory, depth) {
  let entries;
  try {
    entries = readdirSync(directory, { withFileTypes: true });
  } catch (error) {
    if (depth === 0 && error.code === 'ENOENT') return;
    throw error;
  }
  for (const { name } of entries) {
    const file = path.join(directory, name);
    if (/^[A-Z][A-Z0-9_]*$/.test(name)) process.env[name] ||= readFileSync(file, 'utf8').trimEnd();
    // Kubernetes mounts with links and hidden folders of its own (..data): those are not entered.
    else if (depth === 0 && /^[a-z][a-z0-9-]*$/.test(name)) take(file, 1);
  }
}

try {
  take(place, 0);
} catch (error) {
  console.error(`A secret under ${place} cannot be read: ${error.message}`);
  process.exit(1);
}
