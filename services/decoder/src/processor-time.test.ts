import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { test } from 'node:test';
import { Registry } from 'prom-client';
import { exportProcessorTime, processorSeconds } from './processor-time.ts';

test('the processor time of a child that has ended is counted, and so is its own', async () => {
  const registry = new Registry();
  exportProcessorTime(registry);
  const before = processorSeconds();
  const own = process.cpuUsage();
  const busy = 'const end = process.cpuUsage().user + 400_000; while (process.cpuUsage().user < end);';
  await once(spawn(process.execPath, ['-e', busy], { stdio: 'ignore' }), 'exit');
  const { user, system } = process.cpuUsage(own);
  const counted = processorSeconds() - before;
  assert.ok(counted >= 0.35 + (user + system) / 1_000_000 - 0.05, `${counted} s`);
  const told = Number(/^acousticsense_decode_cpu_seconds_total (\S+)$/m.exec(await registry.metrics())?.[1]);
  assert.ok(told >= before + counted, `${told} s`);
});
