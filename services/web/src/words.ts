/**
 * Every word the page says, so that a second language is a second file of this shape. (Two exceptions: the
 * product's name in the title, and the sentence in `index.html` for a browser without JavaScript. Errors and
 * warnings about a file are the service's own sentences.)
 */

import type { Job } from './api.ts';

const locale = 'en';
/** U+202F: a narrow space that never breaks. */
const thin = '\u202f';

const oneDigit = new Intl.NumberFormat(locale, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const upToOne = new Intl.NumberFormat(locale, { maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat(locale, { maximumFractionDigits: 0 });
const list = new Intl.ListFormat(locale, { type: 'conjunction' });

/** @param share 0..1 */
const percent = (share: number) => `${oneDigit.format(share * 100)}${thin}%`;
const wholePercent = (share: number) => `${whole.format(share * 100)}${thin}%`;

function bytes(count: number): string {
  if (count < 1000) return `${count}${thin}bytes`;
  if (count < 1e6) return `${whole.format(count / 1e3)}${thin}kB`;
  if (count < 1e9) return `${upToOne.format(count / 1e6)}${thin}MB`;
  return `${upToOne.format(count / 1e9)}${thin}GB`;
}

/** 83.4 -> `1:23`; with `tenths` 83.4 -> `1:23.4`. */
function clock(seconds: number, tenths = false): string {
  const rounded = tenths ? Math.round(seconds * 10) / 10 : Math.round(seconds);
  const hours = Math.floor(rounded / 3600);
  const minutes = Math.floor((rounded % 3600) / 60);
  const rest = rounded % 60;
  const padded = (tenths ? rest.toFixed(1) : String(rest)).padStart(tenths ? 4 : 2, '0');
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, '0')}:${padded}` : `${minutes}:${padded}`;
}

function span(amount: number, unit: 'hour' | 'day' | 'second'): string {
  return new Intl.NumberFormat(locale, {
    style: 'unit',
    unit,
    unitDisplay: 'long',
    maximumFractionDigits: 1,
  }).format(amount);
}

function keptFor(amount: number, unit: 'hour' | 'day'): string {
  if (unit === 'hour' && amount >= 48 && amount % 24 === 0) return span(amount / 24, 'day');
  return span(amount, unit);
}

/** Codec names as people write them; what is not listed is shown as the service names it. */
const codecs: Record<string, string> = {
  mp3: 'MP3',
  mp3float: 'MP3',
  flac: 'FLAC',
  vorbis: 'Ogg Vorbis',
  opus: 'Opus',
  aac: 'AAC',
  alac: 'Apple Lossless',
};

function codec(name: string): string {
  if (name.startsWith('pcm_')) return 'PCM';
  return codecs[name] ?? name;
}

function channels(count: number): string {
  if (count === 1) return 'mono';
  if (count === 2) return 'stereo';
  return `${count} channels`;
}

export const words = {
  locale,
  percent,
  wholePercent,

  /** Fixed text: `data-word` and `data-label` in `index.html` name these. */
  fixed: {
    title: 'What genre is this?',
    intro: 'Drop a song. It is turned into a picture of its sound, and the genre is read from that picture.',
    dropHere: 'Drop a song here',
    dropAnother: 'Drop another song here',
    choose: 'Choose a file',
    formats: 'MP3, WAV, FLAC, Ogg, Opus, M4A, AAC or AIFF',
    dropNow: 'Let go to choose this song',
    start: 'Start analysis',
    cancel: 'Cancel',
    tryAgain: 'Try again',
    another: 'Choose another song',
    download: 'Download PNG',
    hearPart: 'Play this part',
    running: 'Listening…',
    failed: 'That did not work',
    plate: 'Song',
    answer: 'Answer',
    progress: 'Progress',
    steps: 'Steps of the analysis',
    topFive: 'The five likeliest genres',
    warnings: 'About this recording',
    player: 'Your song, played by this browser',
    time: 'time',
    about: 'About the model and your files',
  },

  steps: {
    sending: 'Sending the song',
    queued: 'Waiting for a free worker',
    decoding: 'Turning sound into a picture',
    decoded: 'Handing the picture to the model',
    classifying: 'Reading the genre from it',
  },

  chosen: (size: number) => bytes(size),
  replaced: (before: string, now: string) => `“${now}” takes the place of “${before}”.`,
  onlyFirst: (count: number, name: string) =>
    `One song at a time: of these ${count} files, “${name}” was taken.`,
  busy: 'One song at a time: wait for the answer or cancel it, then drop the next one.',
  noFileDropped: 'That was not a file. Drop an audio file from your computer.',
  folderDropped: 'That is a folder. Drop one audio file.',
  chooseFirst: 'Choose a song first.',
  cannotPlay: 'This browser cannot play this file. The analysis may still be able to read it.',
  tooLarge: (size: number, limit: number) =>
    `This file has ${bytes(size)}; the service takes up to ${bytes(limit)}. Choose a shorter song or a compressed format such as MP3.`,

  said: {
    started: (name: string) => `Analysis of ${name} started.`,
    sent: (share: number) => `${wholePercent(share)} sent`,
    answer: (label: string, share: number, lead: string) => `${label}, ${percent(share)}. ${lead}`,
  },
  reconnecting: 'The connection was lost. Trying to reach the service again…',
  cancelled: 'Cancelled. The song is still chosen.',
  cancelledHereOnly:
    'Stopped here, but the service could not be told: it may finish the analysis on its own.',

  unsure: 'Not sure',
  unsureWhy: (label: string, share: number, threshold: number) =>
    `${label} comes closest with ${percent(share)}, but an answer needs ${wholePercent(threshold)}.`,
  notMusic: 'Perhaps not music',
  notMusicWhy: (label: string, share: number) =>
    `This does not sound like the music the model was trained on. ${label} comes closest with ${percent(share)}, which means little here.`,
  nothing: 'Nothing to hear',
  nothingWhy: 'The analysed part is silent, so it has no genre.',
  lead: (lead: number, second: string) => {
    const points = lead * 100;
    if (points < 0.95) return `Level with ${second}.`;
    const ahead =
      points < 5
        ? 'Just ahead of'
        : points < 20
          ? 'Ahead of'
          : points < 50
            ? 'Well ahead of'
            : 'Far ahead of';
    return `${ahead} ${second}, by ${oneDigit.format(points)} points.`;
  },

  reliability: (percentRight: number) =>
    `At this confidence the model was right in ${whole.format(percentRight)}\u00a0of\u00a0100 test songs.`,

  picture: (label: string | undefined) =>
    label === undefined
      ? 'Mel spectrogram of the song: time runs from left to right, low notes lie at the bottom, brighter is louder.'
      : `Mel spectrogram of the song, read as ${label}: time runs from left to right, low notes lie at the bottom, brighter is louder.`,
  caption: 'Mel spectrogram, 224\u00a0×\u00a0224. Low notes at the bottom; brighter is louder.',
  openPicture: 'Open the spectrogram at full size in a new tab',
  pictureName: (name: string) => `${name.replace(/\.[^.]{1,5}$/, '')} - mel spectrogram.png`,
  noPicture: 'The spectrogram could not be loaded.',
  moment: (seconds: number) => clock(seconds, true),

  /** @param took seconds from the arrival of the song to the answer */
  facts: (input: NonNullable<Job['input']>, took: number) => {
    const { analysedStart, analysedEnd, duration, bitRate, sampleRate } = input;
    const rate = bitRate ? `${whole.format(bitRate / 1000)}${thin}kb/s, ` : '';
    const format = `${codec(input.codec)}, ${rate}${upToOne.format(sampleRate / 1000)}${thin}kHz, ${channels(input.channels)}`;
    return `Analysed ${clock(analysedStart, true)} to ${clock(analysedEnd, true)} of ${clock(duration, true)} in ${oneDigit.format(took)}${thin}s. ${format}.`;
  },

  failures: {
    uploadLost: 'The connection broke while the song was being sent. Check the network and try again.',
    serviceAway:
      'The service does not answer. If it runs on this computer, see whether it is still running, then try again.',
    fileUnreadable:
      'The browser can no longer read this file: it was moved, changed or deleted. Choose it again.',
    watchLost:
      'The connection to the service was lost before the answer came. Your song has arrived; try again to pick up the answer.',
    jobGone: 'The service no longer knows this analysis. Start it again.',
    unexpected: (status: number) =>
      `The service answered with an unexpected error (HTTP ${status}). Try again in a moment.`,
    garbled:
      'The service answered with something this page does not understand. Reload the page and try again.',
  },

  model: {
    line: (name: string, version: string, provider: string) =>
      `Model ${name} ${version}, on ${providerName(provider)}.`,
    /** @param split a word (`validation`) or a description of the clips */
    accuracy: (clips: number, split: string, top1: number) => {
      const oneWord = /^\w+$/.test(split);
      const measured = `On ${whole.format(clips)} ${oneWord ? `${split} ` : ''}clips top-1 was ${percent(top1)}`;
      return oneWord ? `${measured}.` : `${measured} (${split}).`;
    },
    unmeasured: 'Its accuracy was not measured.',
    uncalibrated: 'Its confidence is not calibrated.',
    genres: (labels: string[]) => `It knows ${labels.length} genres: ${list.format(labels)}.`,
    kept: (audioHours: number, resultDays: number) => {
      const files =
        audioHours > 0
          ? `Files are kept for ${keptFor(audioHours, 'hour')}`
          : 'Files are deleted after the answer';
      return `${files}, results for ${keptFor(resultDays, 'day')}.`;
    },
    unknown: 'The service does not say at the moment which model it runs.',
  },
};

function providerName(provider: string): string {
  const names: Record<string, string> = { cpu: 'CPU', cuda: 'CUDA', tensorrt: 'TensorRT', webgpu: 'WebGPU' };
  return names[provider.toLowerCase().replace(/executionprovider$/, '')] ?? provider;
}

export type FixedWord = keyof typeof words.fixed;
