import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { chmodSync, copyFileSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';

const bootstrap = path.join(import.meta.dirname, 'bootstrap.mjs');

describe('the bootstrap for a user without root on a machine where programs are missing', () => {
  let clone: string;
  let programs: string;

  before(() => {
    clone = mkdtempSync(path.join(tmpdir(), 'as-bootstrap-'));
    programs = path.join(clone, 'programs');
    mkdirSync(path.join(clone, 'launcher'));
    mkdirSync(programs);
    copyFileSync(bootstrap, path.join(clone, 'launcher/bootstrap.mjs'));
    copyFileSync(
      path.join(import.meta.dirname, '../package-lock.json'),
      path.join(clone, 'package-lock.json'),
    );
    // The clone of the one who tests may lie where nobody else can read.
    copyFileSync(process.execPath, path.join(clone, 'node'));
    for (const file of ['.', 'node', 'launcher', 'programs']) chmodSync(path.join(clone, file), 0o755);
    for (const file of ['launcher/bootstrap.mjs', 'package-lock.json'])
      chmodSync(path.join(clone, file), 0o644);
  });
  after(() => rmSync(clone, { recursive: true }));

  function install(name: string, script: string): void {
    writeFileSync(path.join(programs, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  }

  /** Runs as `nobody` when the tests run as root, with nothing on the PATH but `programs`. */
  function run(command: string, env: Record<string, string> = {}) {
    const argv = [path.join(clone, 'node'), path.join(clone, 'launcher/bootstrap.mjs'), command];
    if (process.getuid!() === 0) {
      argv.unshift('/usr/bin/setpriv', '--reuid=65534', '--regid=65534', '--clear-groups');
    }
    const options = { env: { PATH: programs, ...env }, encoding: 'utf8', cwd: clone, input: '' } as const;
    const { status, stdout, stderr } = spawnSync(argv[0]!, argv.slice(1), options);
    assert.doesNotMatch(stderr, /\n\s+at /, 'a stack trace');
    return { status, stdout, stderr, commands: stderr.match(/^ {2}\S.*apt-get.*$/gm) ?? [] };
  }

  test('names the packages where there is no apt-get', () => {
    const { status, stderr } = run('start');
    assert.equal(status, 1);
    assert.match(stderr, /needs what Debian's packages (libatomic1 )?ffmpeg redis-server hold/);
  });

  test('prints one command for all that is missing, and exits non-zero', () => {
    install('apt-get', 'exit 99');
    const { status, commands } = run('start');
    assert.equal(status, 1);
    assert.equal(commands.length, 1);
    assert.match(
      commands[0]!,
      /^ {2}su -c 'apt-get update && apt-get install -y --no-install-recommends (libatomic1 )?ffmpeg redis-server( &&.*)?'$/,
    );
  });

  test('with sudo that asks for a password, the command uses sudo', () => {
    install('sudo', 'exit 1');
    const { status, commands } = run('start');
    assert.equal(status, 1);
    assert.match(
      commands[0] ?? '',
      /^ {2}sudo apt-get update && sudo apt-get install -y --no-install-recommends (libatomic1 )?ffmpeg redis-server( && sudo .*)?$/,
    );
  });

  test('asks for no Redis when REDIS_URL names one', () => {
    const { commands } = run('start', { REDIS_URL: 'redis://elsewhere:6379' });
    assert.match(commands[0] ?? '', / ffmpeg$/);
  });

  test('asks for what the tests need as well when it is to run them', () => {
    const { commands } = run('test', { REDIS_URL: 'redis://elsewhere:6379' });
    assert.match(commands[0] ?? '', / ffmpeg redis-server chromium strace faketime openssl( |$)/);
  });

  test('says that npm is missing when the programs are there and npm is not', () => {
    for (const name of ['ffmpeg', 'ffprobe', 'redis-server']) {
      rmSync(path.join(programs, name), { force: true });
      symlinkSync('/bin/true', path.join(programs, name));
    }
    const { status, stderr } = run('start');
    assert.equal(status, 1);
    assert.match(stderr, /^npm is missing/);
  });
});

test('the bootstrap explains itself when it is given no command', () => {
  const { status, stderr } = spawnSync(process.execPath, [bootstrap], { encoding: 'utf8' });
  assert.equal(status, 1);
  assert.match(stderr, /^Usage: .*start\|test\|check\|bench\|exec/);
});
