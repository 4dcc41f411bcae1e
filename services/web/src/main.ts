/** Wires the page: which song is chosen, and which of its five states it is in. */

import { hideAnswer, showAnswer } from './answer.ts';
import { deleteJob, Failure, type Job, type Model, type State, uploadSong, watchJob } from './api.ts';
import { listenForSongs, openPicker } from './choice.ts';
import { elements, mayMove } from './elements.ts';
import { followModel } from './model-line.ts';
import * as plate from './plate.ts';
import { createProgress } from './progress.ts';
import { drawSketch } from './sketch.ts';
import { type FixedWord, words } from './words.ts';

const { main, primary, cancel, secondary, notice, said, song: songBox, audio } = elements;

/** `idle`: no song yet; `chosen`: ready to start; the others follow in order. */
type PageState = 'idle' | 'chosen' | 'running' | 'done' | 'failed';

let song: File | undefined;
let songUrl: string | undefined;
let model: Model | undefined;
/** The analysis under way, and what is known of it at the service. */
let run: { stop: AbortController; job: Job | undefined } | undefined;
/** A job that was lost sight of, not lost: "try again" picks it up without sending the song anew. */
let unfinished: Job | undefined;
const progress = createProgress();

function fillFixedWords(): void {
  document.documentElement.lang = words.locale;
  for (const element of document.querySelectorAll<HTMLElement>('[data-word]')) {
    element.textContent = words.fixed[element.dataset.word as FixedWord];
  }
  for (const element of document.querySelectorAll<HTMLElement>('[data-label]')) {
    element.setAttribute('aria-label', words.fixed[element.dataset.label as FixedWord]);
  }
}

/** What the button does now, and whether a second one stands beside it. */
function setActions(state: PageState, retryable: boolean): void {
  const { start, tryAgain, another } = words.fixed;
  // A file that cannot work will not work again: then another song is the way on, and comes first.
  const first = state === 'failed' ? (retryable ? tryAgain : another) : start;
  const second = state === 'failed' && !retryable ? tryAgain : another;
  primary.hidden = state === 'running' || state === 'done';
  primary.textContent = first;
  primary.onclick = first === another ? openPicker : () => void analyse();
  cancel.hidden = state !== 'running';
  secondary.hidden = state !== 'done' && state !== 'failed';
  secondary.textContent = second;
  secondary.onclick = second === another ? openPicker : () => void analyse();
}

function enter(state: PageState, { retryable = true } = {}): void {
  // Focus follows the person's own step only: who is elsewhere on the page stays there.
  const active = document.activeElement;
  const mayFocus =
    active === null ||
    active === document.body ||
    [primary, cancel, secondary, elements.choose].includes(active as HTMLButtonElement);
  main.dataset.state = state;
  elements.intro.hidden = state !== 'idle' && state !== 'chosen';
  elements.progressSection.hidden = state !== 'running';
  elements.failure.hidden = state !== 'failed';
  if (state !== 'done') hideAnswer();
  setActions(state, retryable);
  if (!mayFocus || state === 'idle') return;
  const target = { chosen: primary, running: cancel, done: elements.answerTitle, failed: primary }[state];
  target.focus({ preventScroll: state === 'done' });
}

function choose(files: File[]): void {
  const next = files[0];
  if (!next) return;
  if (run) {
    say(words.busy);
    return;
  }
  const before = song;
  song = next;
  unfinished = undefined;
  if (songUrl) URL.revokeObjectURL(songUrl);
  songUrl = URL.createObjectURL(next);
  audio.src = songUrl;
  audio.hidden = false;
  elements.cannotPlay.hidden = true;
  songBox.hidden = false;
  elements.songName.textContent = next.name;
  elements.songSize.textContent = words.chosen(next.size);
  document.title = 'AcousticSense';
  plate.showInvite(words.fixed.dropAnother);
  elements.choose.textContent = words.fixed.another;
  const replaces = before !== undefined && main.dataset.state === 'chosen';
  if (files.length > 1) say(words.onlyFirst(files.length, next.name));
  else say(replaces ? words.replaced(before.name, next.name) : '');
  enter('chosen');
  primary.scrollIntoView({ block: 'nearest' });
}

/** A word to everybody: seen on the page and read aloud. */
function say(sentence: string): void {
  notice.textContent = sentence;
}

async function analyse(): Promise<void> {
  if (run) return;
  if (!song) {
    say(words.chooseFirst);
    openPicker();
    return;
  }
  if (model && song.size > model.limits.maxBytes) {
    fail(new Failure(words.tooLarge(song.size, model.limits.maxBytes), false));
    return;
  }
  const current = { stop: new AbortController(), job: unfinished };
  const { signal } = current.stop;
  const chosen = song;
  unfinished = undefined;
  run = current;
  say('');
  said.textContent = words.said.started(chosen.name);
  plate.clear();
  progress.begin();
  enter('running');
  try {
    current.job ??= await uploadSong(chosen, progress.sent, signal);
    const last = await watchJob(
      current.job,
      {
        onJob(job) {
          current.job = job;
          progress.reached(job.state);
          if (isPictured(job.state)) plate.showPicture(job, chosen, signal).catch(() => say(words.noPicture));
        },
        onFraction: progress.within,
        onConnected: progress.connected,
      },
      signal,
    );
    run = undefined;
    finish(last);
  } catch (error) {
    // After a cancel there may be another run by now.
    if (signal.aborted) return;
    run = undefined;
    if (error instanceof Failure && current.job && error.status === undefined) unfinished = current.job;
    fail(error instanceof Failure ? error : new Failure(words.failures.garbled, true));
  }
}

function isPictured(state: State): boolean {
  return state === 'decoded' || state === 'classifying' || state === 'completed';
}

function finish(job: Job): void {
  if (job.state === 'failed') {
    fail(new Failure(job.error?.message ?? words.failures.garbled, job.error?.retryable ?? true));
    return;
  }
  if (job.state === 'cancelled' || !job.result) {
    backToChosen(words.cancelled);
    return;
  }
  const spoken = showAnswer(job, job.result);
  enter('done');
  said.textContent = spoken;
  document.title = `${elements.answerLabel.textContent} · AcousticSense`;
  plate.explainPicture(job);
  // On a telephone the progress stood lower down than the picture and the answer begin.
  if (main.getBoundingClientRect().top < 0) {
    main.scrollIntoView({ block: 'start', behavior: mayMove() ? 'smooth' : 'auto' });
  }
}

function fail({ message, retryable }: Failure): void {
  elements.failureText.textContent = message;
  plate.showInvite(words.fixed.dropAnother);
  enter('failed', { retryable });
}

function backToChosen(sentence: string): void {
  plate.showInvite(words.fixed.dropAnother);
  say(sentence);
  enter('chosen');
}

async function stop(): Promise<void> {
  if (!run) return;
  const { stop: controller, job } = run;
  run = undefined;
  controller.abort();
  backToChosen(words.cancelled);
  if (!job) return;
  await deleteJob(job).catch((error: unknown) => {
    // Gone already is as good as cancelled.
    if (!(error instanceof Failure && (error.status === 404 || error.status === 410)))
      say(words.cancelledHereOnly);
  });
}

fillFixedWords();
drawSketch(elements.sketch);
setActions('idle', true);
listenForSongs({ onFiles: choose, onRefused: say });
cancel.addEventListener('click', () => void stop());
audio.addEventListener('error', () => {
  if (!audio.getAttribute('src')) return;
  elements.cannotPlay.textContent = words.cannotPlay;
  elements.cannotPlay.hidden = false;
  audio.hidden = true;
  elements.hearPart.hidden = true;
});
plate.followPlayer();
void followModel((known) => {
  model = known;
});
