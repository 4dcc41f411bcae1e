/** Catches up one copy of an answer index, to be killed meanwhile: STORAGE, INDEX_DIR and TENANT in the environment. */
import pino from 'pino';
import { createAnswerIndex } from '../answer-index.ts';
import { openStorage } from '../open-storage.ts';

const { STORAGE = '', INDEX_DIR = '', TENANT = '' } = process.env;
const index = createAnswerIndex({
  storage: openStorage(STORAGE),
  directory: INDEX_DIR,
  log: pino({ level: 'silent' }),
});
process.send?.('begun');
try {
  await index.refresh(TENANT);
  process.send?.('done');
} catch (error) {
  const { name, part, message } = error as Error & { part?: string };
  process.send?.({ name, part, message, found: index.find(TENANT, ['unknown']) });
}
await index.close();
process.disconnect?.();
