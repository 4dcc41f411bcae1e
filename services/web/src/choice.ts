/** Choosing a song: the picker, and dropping a file anywhere on the page. */
import { elements } from './elements.ts';
import { words } from './words.ts';

interface Choice {
  /** The files somebody picked or dropped, at least one. */
  onFiles(files: File[]): void;
  /** Something was dropped that cannot be a song. */
  onRefused(sentence: string): void;
}

export function openPicker(): void {
  elements.file.click();
}

export function listenForSongs({ onFiles, onRefused }: Choice): void {
  const { plate, invite, choose, file, letGo, main } = elements;

  file.addEventListener('change', () => {
    const files = [...(file.files ?? [])];
    // Emptied, so that choosing the same file again is a change again.
    file.value = '';
    if (files.length > 0) onFiles(files);
  });
  choose.addEventListener('click', (event) => {
    event.stopPropagation();
    openPicker();
  });
  plate.addEventListener('click', () => {
    if (!invite.hidden) openPicker();
  });

  // Enter and leave events come for every element that is crossed: the count is zero outside of the window.
  let depth = 0;
  const hover = (over: boolean) => {
    const inviting = over && main.dataset.state !== 'running';
    plate.classList.toggle('hover', inviting);
    letGo.hidden = !inviting;
  };
  addEventListener('dragenter', (event) => {
    event.preventDefault();
    depth += 1;
    hover(true);
  });
  addEventListener('dragleave', () => {
    depth = Math.max(0, depth - 1);
    if (depth === 0) hover(false);
  });
  addEventListener('dragover', (event) => {
    event.preventDefault();
    if (event.dataTransfer) event.dataTransfer.dropEffect = 'copy';
  });
  addEventListener('drop', (event) => {
    // Without this the browser would leave the page and open the file.
    event.preventDefault();
    depth = 0;
    hover(false);
    const items = [...(event.dataTransfer?.items ?? [])];
    const files = [...(event.dataTransfer?.files ?? [])];
    if (items.some((item) => item.webkitGetAsEntry()?.isDirectory)) return onRefused(words.folderDropped);
    if (files.length === 0) return onRefused(words.noFileDropped);
    onFiles(files);
  });
}
