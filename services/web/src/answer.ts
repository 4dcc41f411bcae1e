/** The answer: the genre in large type, the five likeliest as bars, what is to be known about the recording. */
import type { Job, Result, Scored } from './api.ts';
import { elements, mayMove } from './elements.ts';
import { words } from './words.ts';

const { answer, answerLabel, answerShare, answerLead, reliability, bars, warnings, facts } = elements;

export function hideAnswer(): void {
  answer.hidden = true;
}

/** @returns the answer in spoken sentences */
export function showAnswer(job: Job, result: Result): string {
  const { top, uncertain } = result;
  answer.classList.toggle('uncertain', uncertain);
  const spoken = showHeadline(result);
  reliability.textContent = result.reliability ? words.reliability(result.reliability.percent) : '';
  reliability.hidden = !result.reliability;
  bars.replaceChildren(...top.map(bar));
  bars.hidden = top.length === 0;
  warnings.replaceChildren(...job.warnings.map(({ message }) => item(message)));
  warnings.hidden = job.warnings.length === 0;
  const seconds = (Date.parse(job.updatedAt) - Date.parse(job.createdAt)) / 1000;
  facts.textContent = job.input ? words.facts(job.input, seconds) : '';
  answer.hidden = false;
  return `${spoken} ${reliability.textContent}`.trim();
}

function showHeadline(result: Result): string {
  const [first, second] = result.top;
  answerShare.textContent = '';
  if (!first) {
    answerLabel.textContent = words.nothing;
    answerLead.textContent = words.nothingWhy;
    return `${words.nothing}. ${words.nothingWhy}`;
  }
  if (result.uncertain) {
    const notMusic = result.uncertainBecause === 'not_music';
    answerLabel.textContent = notMusic ? words.notMusic : words.unsure;
    answerLead.textContent = notMusic
      ? words.notMusicWhy(first.label, first.confidence)
      : words.unsureWhy(first.label, first.confidence, result.threshold);
    return `${answerLabel.textContent}. ${answerLead.textContent}`;
  }
  const lead = second ? words.lead(result.lead, second.label) : '';
  answerLabel.textContent = first.label;
  answerShare.textContent = words.percent(first.confidence);
  answerLead.textContent = lead;
  return words.said.answer(first.label, first.confidence, lead);
}

function bar({ label, confidence }: Scored, index: number): HTMLLIElement {
  const row = document.createElement('li');
  const name = document.createElement('span');
  name.className = 'label';
  name.textContent = label;
  const share = document.createElement('span');
  share.className = 'share';
  share.textContent = words.percent(confidence);
  const track = document.createElement('span');
  track.className = 'track';
  track.ariaHidden = 'true';
  const fill = document.createElement('span');
  fill.className = 'fill';
  fill.style.inlineSize = `${confidence * 100}%`;
  track.append(fill);
  row.append(name, ' ', share, track);
  if (mayMove()) {
    fill.animate([{ transform: 'scaleX(0)' }, { transform: 'scaleX(1)' }], {
      duration: 700,
      delay: index * 70,
      easing: 'cubic-bezier(0.2, 0.8, 0.2, 1)',
      fill: 'backwards',
    });
  }
  return row;
}

function item(sentence: string): HTMLLIElement {
  const row = document.createElement('li');
  row.textContent = sentence;
  return row;
}
