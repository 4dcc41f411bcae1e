/**
 * The plate: the dark square that takes the song, is exposed from left to right while the song is worked on,
 * and then shows its spectrogram.
 */
import { fetchSpectrogram, type Job } from './api.ts';
import { elements, mayMove } from './elements.ts';
import { words } from './words.ts';

const {
  plate,
  exposed,
  invite,
  sketch,
  pictureLink,
  picture,
  playhead,
  axis,
  axisStart,
  axisEnd,
  caption,
  captionText,
} = elements;
const { download, audio, hearPart } = elements;

/** The picture's own width and height in pixels. */
const pictureSize = 224;
const largestScale = 8;
/** The service may still be writing the picture when it says `decoded`. */
const retryDelaysMs = [200, 400, 800, 1_500, 3_000];

interface Stretch {
  /** Seconds of the song at the left and at the right edge. */
  start: number;
  end: number;
}

let pictureUrl: string | undefined;
/** The run whose picture is shown or on its way. */
let pictured: AbortSignal | undefined;
let stretch: Stretch | undefined;
let label: string | undefined;

export function showInvite(title: string): void {
  clear();
  invite.hidden = sketch.hidden = false;
  elements.inviteTitle.textContent = title;
}

/** @param share 0..1 of the whole analysis */
export function expose(share: number): void {
  invite.hidden = sketch.hidden = true;
  exposed.hidden = pictureUrl !== undefined;
  exposed.style.inlineSize = `${share * 100}%`;
}

export function clear(): void {
  if (pictureUrl) URL.revokeObjectURL(pictureUrl);
  pictureUrl = pictured = stretch = label = undefined;
  picture.removeAttribute('src');
  for (const part of [pictureLink, axis, caption, playhead, hearPart, exposed]) part.hidden = true;
  plate.classList.remove('developed');
}

/**
 * Loads the spectrogram and lets it appear. Asked at every change of a job from `decoded` on; once for each run
 * it does something.
 * @throws {Failure} when the picture cannot be had.
 */
export async function showPicture(job: Job, song: File, signal: AbortSignal): Promise<void> {
  if (pictured === signal) return;
  pictured = signal;
  const pixels = plate.clientWidth * devicePixelRatio;
  const scale = Math.min(largestScale, Math.max(1, Math.ceil(pixels / pictureSize)));
  let url: string;
  try {
    url = URL.createObjectURL(await fetchWhenReady(job, scale, signal));
  } catch (error) {
    if (pictured !== signal) return;
    throw error;
  }
  picture.src = url;
  await picture.decode().catch(() => undefined);
  // The plate may have been cleared for another song meanwhile.
  if (pictured !== signal) return URL.revokeObjectURL(url);
  pictureUrl = url;
  // The picture spans just what was analysed.
  stretch = job.input && { start: job.input.analysedStart, end: job.input.analysedEnd };
  pictureLink.href = `${job.links.spectrogram}?scale=4`;
  download.href = job.links.spectrogram;
  download.download = words.pictureName(song.name);
  captionText.textContent = words.caption;
  exposed.hidden = true;
  invite.hidden = sketch.hidden = true;
  pictureLink.hidden = false;
  caption.hidden = false;
  plate.classList.add('developed');
  describe();
  if (!mayMove()) return;
  pictureLink.animate([{ clipPath: 'inset(0 100% 0 0)' }, { clipPath: 'inset(0 0 0 0)' }], {
    duration: 900,
    easing: 'cubic-bezier(0.22, 0.8, 0.3, 1)',
  });
}

/** Names the genre that was read from the picture, for those who do not see it. */
export function explainPicture({ result }: Job): void {
  label = result?.uncertain ? undefined : result?.top[0]?.label;
  describe();
}

function describe(): void {
  if (pictureUrl === undefined) return;
  picture.alt = words.picture(label);
  pictureLink.setAttribute('aria-label', `${picture.alt} ${words.openPicture}`);
  if (!stretch) return;
  axisStart.textContent = words.moment(stretch.start);
  axisEnd.textContent = words.moment(stretch.end);
  axis.hidden = false;
  hearPart.hidden = audio.error !== null;
}

async function fetchWhenReady(job: Job, scale: number, signal: AbortSignal): Promise<Blob> {
  for (const delay of retryDelaysMs) {
    try {
      return await fetchSpectrogram(job, scale, signal);
    } catch {
      signal.throwIfAborted();
      await new Promise((resolve) => setTimeout(resolve, delay));
      signal.throwIfAborted();
    }
  }
  return fetchSpectrogram(job, scale, signal);
}

/** Moves the playhead over the picture while the song plays; `hearPart` plays just that stretch. */
export function followPlayer(): void {
  let stopAt: number | undefined;
  let frame = 0;
  const draw = () => {
    const position = stretch ? (audio.currentTime - stretch.start) / (stretch.end - stretch.start) : -1;
    playhead.hidden = position < 0 || position > 1;
    playhead.style.insetInlineStart = `${position * 100}%`;
    if (stopAt !== undefined && audio.currentTime >= stopAt) {
      stopAt = undefined;
      audio.pause();
    }
    if (!audio.paused) frame = requestAnimationFrame(draw);
  };
  const follow = () => {
    cancelAnimationFrame(frame);
    draw();
  };
  for (const event of ['play', 'pause', 'seeked', 'emptied']) audio.addEventListener(event, follow);
  // Somebody who moves to another place wants to hear on from there.
  audio.addEventListener('seeking', () => {
    if (stopAt !== undefined && audio.currentTime !== stretch?.start) stopAt = undefined;
  });
  hearPart.addEventListener('click', () => {
    if (!stretch) return;
    stopAt = stretch.end;
    audio.currentTime = stretch.start;
    void audio.play().catch(() => undefined);
  });
}
