/** The footer: which model answers, how good it was measured to be, how long files and results are kept. */
import { fetchModel, type Model } from './api.ts';
import { elements } from './elements.ts';
import { words } from './words.ts';

const firstRetryMs = 2_000;
const longestRetryMs = 60_000;

/** Asks until the service answers, ever more rarely, then shows the lines. */
export async function followModel(onKnown: (model: Model) => void): Promise<void> {
  for (let wait = firstRetryMs; ; wait = Math.min(longestRetryMs, wait * 2)) {
    try {
      const model = await fetchModel();
      show(model);
      return onKnown(model);
    } catch {
      elements.modelLine.textContent = words.model.unknown;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function show({ name, version, provider, accuracy, calibrated, labels, retention }: Model): void {
  elements.modelLine.textContent = [
    words.model.line(name, version, provider),
    accuracy === 'none'
      ? words.model.unmeasured
      : words.model.accuracy(accuracy.clips, accuracy.split, accuracy.top1),
    ...(calibrated ? [] : [words.model.uncalibrated]),
    words.model.genres(labels),
  ].join(' ');
  elements.kept.textContent = words.model.kept(retention.audioHours, retention.resultDays);
}
