/** The parts of `index.html` that the code touches, found once and typed; a missing one fails at start. */

function find<T extends Element>(id: string, type: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof type)) throw new Error(`index.html has no ${type.name} #${id}`);
  return found;
}

const block = (id: string) => find(id, HTMLElement);
const button = (id: string) => find(id, HTMLButtonElement);

export const elements = {
  main: block('main'),
  intro: block('intro'),

  plate: block('plate'),
  exposed: block('exposed'),
  sketch: find('sketch', HTMLCanvasElement),
  invite: block('invite'),
  inviteTitle: block('invite-title'),
  letGo: block('let-go'),
  choose: button('choose'),
  file: find('file', HTMLInputElement),
  pictureLink: find('picture-link', HTMLAnchorElement),
  picture: find('picture', HTMLImageElement),
  playhead: block('playhead'),
  axis: block('axis'),
  axisStart: block('axis-start'),
  axisEnd: block('axis-end'),
  caption: block('caption'),
  captionText: block('caption-text'),
  download: find('download', HTMLAnchorElement),

  progressSection: block('progress-section'),
  progress: block('progress'),
  progressFill: block('progress-fill'),
  steps: find('steps', HTMLOListElement),
  reconnecting: block('reconnecting'),

  failure: block('failure'),
  failureText: block('failure-text'),

  answer: block('answer'),
  answerTitle: block('answer-title'),
  answerLabel: block('answer-label'),
  answerShare: block('answer-share'),
  answerLead: block('answer-lead'),
  reliability: block('reliability'),
  bars: find('bars', HTMLOListElement),
  warnings: block('warnings'),
  facts: block('facts'),

  song: block('song'),
  songName: block('song-name'),
  songSize: block('song-size'),
  audio: find('audio', HTMLAudioElement),
  cannotPlay: block('cannot-play'),
  hearPart: button('hear-part'),

  notice: block('notice'),
  primary: button('primary'),
  cancel: button('cancel'),
  secondary: button('secondary'),
  said: block('said'),

  modelLine: block('model'),
  kept: block('kept'),
};

/** Movement only for those who have not asked their system for less of it. */
export function mayMove(): boolean {
  return !matchMedia('(prefers-reduced-motion: reduce)').matches;
}
