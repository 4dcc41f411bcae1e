/** A service with nothing in it but what the tests of `service.ts` want to see; told by its environment. */
import { setTimeout as sleep } from 'node:timers/promises';
import { StartupError } from '../errors.ts';
import { startService } from '../service.ts';

const { MODE = '' } = process.env;
const config = { logLevel: 'info', metricsHost: '127.0.0.1', metricsPort: 0, drainSeconds: 1 };

await startService(
  'small',
  () => {
    if (MODE === 'bad-config') throw new StartupError('PORT: must be a number.');
    return config;
  },
  async (service) => {
    for (const what of ['first', 'second', 'third']) {
      service.onClose(what, () => service.log.info(`closed ${what}`));
    }
    if (MODE === 'slow-drain') {
      service.onClose('work', async () => {
        await new Promise((resolve) => service.closing.addEventListener('abort', resolve));
        service.log.info('work given back');
      });
    }
    if (MODE === 'hanging-closer') {
      // What a connection that waits for Redis does: it holds the process and never ends.
      service.onClose('stuck', () => new Promise(() => setInterval(() => {}, 1_000)));
    }
    if (MODE === 'failing-closer') {
      service.onClose('broken', () => {
        throw new Error('cannot close');
      });
    }
    if (MODE === 'late') {
      const from = Date.now();
      service.addCheck('model', async () => {
        if (Date.now() - from < 1_200) throw new Error('still loading');
      });
    }
    if (MODE === 'hanging-check') service.addCheck('storage', () => sleep(60_000));
    if (MODE === 'unfit') {
      service.addCheck('redis', async () => {
        throw new StartupError('This Redis runs in cluster mode.');
      });
    }
    if (MODE === 'bug') setTimeout(() => void Promise.reject(new Error('a bug')), 300);
  },
);
