/** How far the analysis has come: five steps in words, one bar, and the plate that is exposed with it. */
import type { State } from './api.ts';
import { elements } from './elements.ts';
import { expose } from './plate.ts';
import { words } from './words.ts';

type Step = keyof typeof words.steps;

/** Where the whole bar stands when a step begins; it ends where the next one begins. */
const begins: Record<Step, number> = {
  sending: 0,
  queued: 0.5,
  decoding: 0.55,
  decoded: 0.8,
  classifying: 0.84,
};
const order = Object.keys(begins) as Step[];

/** How often a share is read aloud while a long upload runs. */
const spokenEvery = 0.25;

interface Progress {
  begin(): void;
  /** @param share 0..1 of the upload */
  sent(share: number): void;
  /** The job is in this state now. */
  reached(state: State): void;
  /** @param fraction 0..1 of the work of this state */
  within(state: State, fraction: number): void;
  connected(connected: boolean): void;
}

export function createProgress(): Progress {
  const { steps, progress, progressFill, reconnecting, said } = elements;
  const rows = order.map((step) => {
    const row = document.createElement('li');
    const name = document.createElement('span');
    name.textContent = words.steps[step];
    const share = document.createElement('span');
    share.className = 'share';
    row.append(name, ' ', share);
    return { row, share };
  });
  steps.append(...rows.map(({ row }) => row));

  let current = -1;
  let spoken = 0;

  /** Steps only go forward: events of one job can arrive late, never early. */
  const show = (step: Step, fraction: number | undefined) => {
    const index = order.indexOf(step);
    if (index < current) return;
    if (index > current && index > 0) said.textContent = words.steps[step];
    current = index;
    rows.forEach(({ row, share }, at) => {
      row.className = at < index ? 'past' : at === index ? 'now' : '';
      if (at === index) row.setAttribute('aria-current', 'step');
      else row.removeAttribute('aria-current');
      share.textContent = at === index && fraction !== undefined ? words.wholePercent(fraction) : '';
    });
    const from = begins[step];
    const next = order[index + 1];
    const whole = from + (fraction ?? 0) * ((next ? begins[next] : 1) - from);
    progress.ariaValueNow = String(Math.round(whole * 100));
    progress.ariaValueText = words.steps[step];
    progressFill.style.inlineSize = `${whole * 100}%`;
    expose(whole);
  };

  return {
    begin() {
      current = -1;
      spoken = 0;
      reconnecting.hidden = true;
      show('sending', 0);
    },
    sent(share) {
      show('sending', share);
      if (share - spoken < spokenEvery) return;
      spoken = share;
      said.textContent = words.said.sent(share);
    },
    reached(state) {
      if (state in begins) show(state as Step, undefined);
    },
    within(state, fraction) {
      if (state in begins) show(state as Step, Math.min(1, Math.max(0, fraction)));
    },
    connected(connected) {
      reconnecting.textContent = connected ? '' : words.reconnecting;
      reconnecting.hidden = connected;
    },
  };
}
