/**
 * What `npm start`, `npm test`, `npm run check` and `npm run bench` run first.
 *
 * It sees to it that the npm packages, the pinned Node and the system's programs are there, then hands over to
 * the pinned Node. It runs on whatever Node the machine has, from Debian's 18 on, before any package is
 * installed: so it is plain JavaScript, without types and without dependencies.
 */
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { accessSync, constants, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const root = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const pinnedNode = path.join(root, 'node_modules', `node-linux-${process.arch}`, 'bin', 'node');
const web = path.join(root, 'services', 'web');

/** Per command: the file that the pinned Node runs, and what must be there before. */
const commands = {
  start: { entry: 'launcher/start.ts', page: true },
  test: { entry: 'launcher/run-tests.ts', page: true, forTests: true },
  check: { entry: 'launcher/check.ts', systemPackages: false },
  bench: { entry: 'launcher/run-bench.ts' },
  exec: { systemPackages: false },
};

/** Something the person at the keyboard can act on: printed as it is, without a stack trace. */
class Refusal extends Error {}

async function main() {
  const [name, ...rest] = process.argv.slice(2);
  const command = commands[name];
  if (command === undefined) {
    throw new Refusal(`Usage: node launcher/bootstrap.mjs ${Object.keys(commands).join('|')} [arguments]`);
  }
  checkPlatform();
  const packages = missingSystemPackages(command);
  if (packages.length > 0) await installSystemPackages(packages);
  if (!npmPackagesInstalled()) installNpmPackages();
  await checkPinnedNode();
  if (command.page === true) buildPage();
  const args = command.entry === undefined ? rest : [path.join(root, command.entry), ...rest];
  handOver(args);
}

function checkPlatform() {
  if (process.platform !== 'linux' || !['x64', 'arm64'].includes(process.arch)) {
    throw new Refusal(
      `AcousticSense runs on Linux (x64 or arm64), this is ${process.platform} ${process.arch}: use a Linux machine, a container or WSL 2.`,
    );
  }
  if (Number(process.versions.node.split('.')[0]) < 18) {
    throw new Refusal(`Node ${process.versions.node} is too old to begin with: install Node 18 or later.`);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The system's programs
// ---------------------------------------------------------------------------------------------------------

/** @returns {string[]} Debian packages */
function missingSystemPackages({ systemPackages = true, forTests = false }) {
  const missing = [];
  if (!libatomicFound()) missing.push('libatomic1');
  if (!systemPackages) return missing;
  if (!programFound('ffmpeg') || !programFound('ffprobe')) missing.push('ffmpeg');
  const ownRedis = forTests || !redisUrlSet();
  if (ownRedis && !programFound('redis-server')) missing.push('redis-server');
  if (forTests) {
    if (!programFound('chromium')) missing.push('chromium');
    if (!programFound('strace')) missing.push('strace');
    if (!programFound('faketime')) missing.push('faketime');
    if (!programFound('openssl')) missing.push('openssl');
  }
  return missing;
}

function programFound(program) {
  return (process.env.PATH ?? '').split(':').some((directory) => {
    try {
      accessSync(path.join(directory, program), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** The official Node 26 binaries link against libatomic.so.1, which a minimal Debian does not have. */
function libatomicFound() {
  if (existsSync(pinnedNode)) return !/libatomic/.test(startPinnedNode().stderr);
  const machine = process.arch === 'x64' ? 'x86_64' : 'aarch64';
  return [
    `/usr/lib/${machine}-linux-gnu`,
    `/lib/${machine}-linux-gnu`,
    '/usr/lib64',
    '/lib64',
    '/usr/lib',
  ].some((directory) => existsSync(path.join(directory, 'libatomic.so.1')));
}

/** start.ts reads the `.env` file properly; here only whether it names a Redis matters. */
function redisUrlSet() {
  if (process.env.REDIS_URL) return true;
  try {
    return /^\s*(export\s+)?REDIS_URL\s*=\s*\S/m.test(readFileSync(path.join(root, '.env'), 'utf8'));
  } catch {
    return false;
  }
}

/**
 * Runs as root, with the packages as arguments. Debian starts and enables a service when its package is
 * installed; ours is to stay private, so policy-rc.d (a Debian convention: exit code 101 = forbidden) holds it
 * back, and what was enabled on the way is disabled again. A Redis that was there before is not touched.
 */
const installScript = `
policy=/usr/sbin/policy-rc.d
case " $* " in *" redis-server "*) new_redis=1 ;; *) new_redis= ;; esac
if [ -n "$new_redis" ] && dpkg-query -W -f '\${Status}' redis-server 2>/dev/null | grep -q 'ok installed'; then new_redis=; fi
if [ -n "$new_redis" ] && [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 130' HUP INT TERM
  printf '#!/bin/sh\\nexit 101\\n' > "$policy" && chmod 755 "$policy" || exit 1
fi
apt-get -q -o DPkg::Lock::Timeout=300 update || echo 'apt-get update failed; going on with the package lists that are here.' >&2
DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \\
  install --no-install-recommends "$@" || exit 1
if [ -n "$new_redis" ]; then
  if [ -d /run/systemd/system ]; then systemctl disable --now redis-server.service
  else deb-systemd-helper disable redis-server.service; update-rc.d redis-server disable
  fi >/dev/null 2>&1
fi
exit 0
`;

async function installSystemPackages(packages) {
  const list = packages.join(' ');
  if (!programFound('apt-get')) {
    throw new Refusal(
      `AcousticSense needs what Debian's packages ${list} hold: install it with this system's package manager, then run the same command again.`,
    );
  }
  const atTerminal = process.stdin.isTTY === true && process.stdout.isTTY === true && !process.env.CI;
  const rootHere = process.getuid() === 0;
  const sudoFree = !rootHere && programFound('sudo') && spawnSync('sudo', ['-n', 'true']).status === 0;
  const sudoAsks = !rootHere && !sudoFree && programFound('sudo') && atTerminal;
  const byHand = oneCommand(packages);
  if (!rootHere && !sudoFree && !sudoAsks) {
    throw new Refusal(
      `These system packages are missing and need root to install: ${list}. Run this, then the same command again:\n\n  ${byHand}\n`,
    );
  }
  if (atTerminal) {
    const yes = await confirm(
      `AcousticSense needs these system packages: ${list}. Install them now with ${rootHere ? 'apt-get' : 'sudo apt-get'}? [Y/n] `,
    );
    if (!yes)
      throw new Refusal(
        `Nothing was installed. Run this when you are ready, then the same command again:\n\n  ${byHand}\n`,
      );
  } else {
    console.log(`Installing system packages: ${list}`);
  }
  const argv = [
    ...(rootHere ? [] : sudoFree ? ['sudo', '-n'] : ['sudo']),
    'sh',
    '-c',
    installScript,
    'install',
    ...packages,
  ];
  const { status } = spawnSync(argv[0], argv.slice(1), {
    stdio: [sudoAsks ? 'inherit' : 'ignore', 'inherit', 'inherit'],
  });
  const stillMissing = packages.filter((name) => name !== 'libatomic1' && !programFound(name));
  if (status !== 0 || stillMissing.length > 0) {
    throw new Refusal(
      `The system packages could not be installed (see above). Run this, then the same command again:\n\n  ${byHand}\n`,
    );
  }
}

/** One line that a person with root rights can paste. */
function oneCommand(packages) {
  const steps = ['apt-get update', `apt-get install -y --no-install-recommends ${packages.join(' ')}`];
  if (packages.includes('redis-server') && existsSync('/run/systemd/system')) {
    steps.push('systemctl disable --now redis-server');
  }
  if (process.getuid() === 0) return steps.join(' && ');
  if (programFound('sudo')) return steps.map((step) => `sudo ${step}`).join(' && ');
  return `su -c '${steps.join(' && ')}'`;
}

function confirm(question) {
  const terminal = createInterface({ input: process.stdin, output: process.stdout });
  return new Promise((resolve) => {
    terminal.on('close', () => resolve(false));
    terminal.question(question, (answer) => {
      resolve(/^\s*(y|yes)?\s*$/i.test(answer));
      terminal.close();
    });
  });
}

// ---------------------------------------------------------------------------------------------------------
// npm packages and the pinned Node
// ---------------------------------------------------------------------------------------------------------

/**
 * Compares package-lock.json with `node_modules/.package-lock.json`, which npm writes last when it has
 * installed: so an interrupted install, another lockfile and an install by hand are all told apart rightly.
 */
function npmPackagesInstalled() {
  const wanted = readLock(path.join(root, 'package-lock.json'));
  const present = readLock(path.join(root, 'node_modules', '.package-lock.json'));
  if (wanted === undefined)
    throw new Refusal(
      'package-lock.json is missing or damaged: restore it with `git checkout package-lock.json`.',
    );
  if (present === undefined || !existsSync(pinnedNode)) return false;
  return Object.entries(wanted).every(([location, entry]) => {
    if (!location.startsWith('node_modules/') && !location.includes('/node_modules/')) return true;
    const found = present[location];
    if (found === undefined)
      return (entry.optional === true && !isForThisMachine(entry)) || entry.peer === true;
    return entry.link === true || (found.version === entry.version && found.integrity === entry.integrity);
  });
}

/** Of an optional package: that it is a native part for exactly this kind of machine. */
function isForThisMachine({ os, cpu, libc }) {
  const fits = (list, value) => list === undefined || [list].flat().includes(value);
  return (
    os !== undefined &&
    cpu !== undefined &&
    fits(os, 'linux') &&
    fits(cpu, process.arch) &&
    fits(libc, 'glibc')
  );
}

function readLock(file) {
  try {
    return JSON.parse(readFileSync(file, 'utf8')).packages;
  } catch {
    return undefined;
  }
}

/** The npm that runs this, or else the one beside the running Node. */
function findNpm() {
  const fromNpm = process.env.npm_execpath;
  if (fromNpm !== undefined && /\bnpm-cli\.js$/.test(fromNpm) && existsSync(fromNpm))
    return [process.execPath, fromNpm];
  const beside = path.join(path.dirname(process.execPath), 'npm');
  if (existsSync(beside)) return [beside];
  if (programFound('npm')) return ['npm'];
  throw new Refusal(
    'npm is missing: install it (on Debian: sudo apt-get install -y npm), then run the same command again.',
  );
}

function installNpmPackages() {
  const [npm, ...args] = findNpm();
  console.log('Installing npm packages (about 800 MB on disk)...');
  const { status } = spawnSync(npm, [...args, 'ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: root,
    env: {
      ...process.env,
      NODE_OPTIONS: `--require ${JSON.stringify(path.join(root, 'launcher', 'npm-engine.cjs'))}`,
    },
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  if (status !== 0) {
    throw new Refusal(
      'npm ci failed (see above): check that the npm registry can be reached and that the disk has 1 GB free, then run the same command again.',
    );
  }
}

function startPinnedNode() {
  const { status, stdout, stderr, error } = spawnSync(pinnedNode, ['--version'], { encoding: 'utf8' });
  return { ok: status === 0, version: stdout, stderr: error ? error.message : stderr };
}

async function checkPinnedNode() {
  if (!existsSync(pinnedNode)) {
    throw new Refusal(
      `npm did not install node-linux-${process.arch}: run \`npm ci --include=optional\` and look for its error.`,
    );
  }
  let tried = startPinnedNode();
  if (!tried.ok && /libatomic/.test(tried.stderr)) {
    await installSystemPackages(['libatomic1']);
    tried = startPinnedNode();
  }
  if (!tried.ok) {
    const reason = tried.stderr.trim().split('\n')[0];
    throw new Refusal(
      `The pinned Node does not start here (${reason}): it needs a Linux with glibc 2.28 or later, such as Debian 10 or newer.`,
    );
  }
}

// ---------------------------------------------------------------------------------------------------------
// The page, and handing over
// ---------------------------------------------------------------------------------------------------------

function buildPage() {
  const stamp = path.join(web, 'dist', '.sources-sha256');
  const sources = hashSources();
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === sources) return;
  console.log('Building the page...');
  const vite = path.join(root, 'node_modules', 'vite', 'bin', 'vite.js');
  const { status } = spawnSync(pinnedNode, [vite, 'build', '--logLevel', 'warn'], {
    cwd: web,
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  if (status !== 0)
    throw new Refusal('The page could not be built (see above): services/web holds its sources.');
  writeFileSync(stamp, sources);
}

/** SHA-256 over the names and contents of everything the page is built from, the lockfile included. */
function hashSources() {
  const hash = createHash('sha256').update(readFileSync(path.join(root, 'package-lock.json')));
  const visit = (directory) => {
    for (const entry of readdirSync(directory, { withFileTypes: true }).sort((a, b) =>
      a.name < b.name ? -1 : 1,
    )) {
      if (['dist', 'node_modules'].includes(entry.name)) continue;
      const full = path.join(directory, entry.name);
      if (entry.isDirectory()) visit(full);
      else hash.update(`\0${path.relative(web, full)}\0`).update(readFileSync(full));
    }
  };
  visit(web);
  return hash.digest('hex');
}

/**
 * Runs the pinned Node in this process's place: same terminal, same exit code, signals passed on. setpriv makes
 * the kernel end it when this process dies, however it dies.
 */
function handOver(args) {
  const argv = [pinnedNode, ...args];
  if (programFound('setpriv')) argv.unshift('setpriv', '--pdeathsig', 'TERM');
  const child = spawn(argv[0], argv.slice(1), {
    stdio: 'inherit',
    env: {
      ...process.env,
      PATH: `${path.dirname(pinnedNode)}:${path.join(root, 'node_modules', '.bin')}:${process.env.PATH}`,
    },
  });
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  if (process.env.npm_lifecycle_event !== undefined) stopWithNpm(child);
  child.on('error', (error) => {
    console.error(`${argv[0]} could not be started: ${error.message}`);
    process.exit(1);
  });
  child.on('exit', (code, signal) => process.exit(signal === null ? code : 1));
}

/**
 * npm killed outright, or the shell that it runs scripts in, leaves this process to init: then nobody could stop
 * the product from the terminal any more.
 */
function stopWithNpm(child) {
  const parent = process.ppid;
  const npm = /^(sh|dash|bash)$/.test(nameOf(parent)) ? parentOf(parent) : undefined;
  setInterval(() => {
    if (process.ppid !== parent || (npm !== undefined && parentOf(parent) !== npm)) child.kill('SIGTERM');
  }, 500).unref();
}

// Fields of /proc/PID/stat (proc(5)): the name in parentheses, the state, the parent.
const nameOf = (pid) => /\((.*)\)/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8'))?.[1] ?? '';
const parentOf = (pid) => {
  try {
    return Number(/\) \S (\d+)/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8'))?.[1]);
  } catch {
    return undefined;
  }
};

main().catch((error) => {
  console.error(error instanceof Refusal ? error.message : error);
  process.exit(1);
});
