/** What decoding costs: the processor time of this process and of every ffmpeg that it has waited for. */
import { readFileSync } from 'node:fs';
import { Counter, type Registry } from 'prom-client';

/** The kernel's USER_HZ, the same on every architecture that this runs on. */
const ticksPerSecond = 100;

/**
 * Seconds of processor time, user and system, since the process began; `process.cpuUsage()` leaves out the children,
 * which do most of the work here. A child counts from its end on.
 */
export function processorSeconds(): number {
  const stat = readFileSync('/proc/self/stat', 'latin1');
  // The name in parentheses may hold anything; behind it comes field 3. 14 to 17: utime, stime, cutime, cstime.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return fields.slice(11, 15).reduce((ticks, field) => ticks + Number(field), 0) / ticksPerSecond;
}

export function exportProcessorTime(registry: Registry): void {
  new Counter({
    name: 'acousticsense_decode_cpu_seconds_total',
    help: 'Processor time of the decoder and of the ffmpeg processes that have ended.',
    registers: [registry],
    collect() {
      this.reset();
      this.inc(processorSeconds());
    },
  });
}
