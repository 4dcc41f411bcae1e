/// <reference lib="dom" />
/** The page, in a real browser, against the whole product. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { type Browser, type BrowserContextOptions, chromium, type Page } from 'playwright-core';
import { song, wav } from './audio.ts';
import type { Job } from './client.ts';
import { type System, startSystem } from './system.ts';

const root = path.resolve(import.meta.dirname, '..');
const flags = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
const patience = 30_000;

let directory: string;
let system: System;
let browser: Browser;
const music = wav([song({ seconds: 35, sampleRate: 22_050 })], { sampleRate: 22_050 });

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'as-page-'));
  const vite = path.join(root, 'node_modules/vite/bin/vite.js');
  const build = [vite, 'build', '--outDir', directory, '--emptyOutDir', '--logLevel', 'warn'];
  await promisify(execFile)(process.execPath, build, { cwd: path.join(root, 'services/web') });
  system = await startSystem({ env: { WEB_DIR: directory } });
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM_PATH ?? '/usr/bin/chromium',
    args: flags,
  });
});

after(async () => {
  await browser?.close();
  await system?.stop();
  await rm(directory, { recursive: true, force: true });
});

interface Visit extends AsyncDisposable {
  page: Page;
  /** Console errors, policy violations, uncaught errors and requests to elsewhere so far. */
  complaints: string[];
}

async function open(options: BrowserContextOptions = {}): Promise<Visit> {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(patience);
  const complaints: string[] = [];
  page.on('console', (message) => {
    if (message.type() === 'error' || message.type() === 'warning') complaints.push(message.text());
  });
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('request', (request) => {
    const url = new URL(request.url());
    if (url.protocol !== 'blob:' && url.origin !== system.url) complaints.push(`request to ${url}`);
  });
  await page.addInitScript(() => {
    document.addEventListener('securitypolicyviolation', (event) => {
      console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`);
    });
  });
  await page.goto(system.url);
  return { page, complaints, [Symbol.asyncDispose]: () => context.close() };
}

/** Lets go of files over the middle of the page, as a mouse would. */
async function drop(page: Page, ...files: { name: string; bytes: Buffer }[]): Promise<void> {
  const transfer = await page.evaluateHandle(
    (dropped) => {
      const data = new DataTransfer();
      for (const { name, base64 } of dropped) {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name));
      }
      return data;
    },
    files.map(({ name, bytes }) => ({ name, base64: bytes.toString('base64') })),
  );
  await page.dispatchEvent('main', 'dragenter', { dataTransfer: transfer });
  await page.dispatchEvent('main', 'drop', { dataTransfer: transfer });
}

/** The results that the page is told are the service's own, but for `change`: answers of models that are not here. */
async function changeResults(page: Page, change: Partial<NonNullable<Job['result']>>): Promise<void> {
  await page.route('**/v1/jobs/*/events', async (route) => {
    const response = await route.fetch();
    const body = (await response.text()).replaceAll(/^data: (.*)$/gm, (line, json) => {
      const job = JSON.parse(json) as Job;
      return job.result ? `data: ${JSON.stringify({ ...job, result: { ...job.result, ...change } })}` : line;
    });
    await route.fulfill({ response, body });
  });
}

const button = (page: Page, name: string) => page.getByRole('button', { name, exact: true });
const state = (page: Page, name: string) => page.waitForSelector(`main[data-state=${name}]`);
const textOf = async (page: Page, part: string) => (await page.locator(part).textContent()) ?? '';
const focused = (page: Page) => page.evaluate(() => document.activeElement?.id ?? '');

/** Width and height of a PNG. */
function pngSize(file: Buffer): [number, number] {
  assert.equal(file.subarray(1, 4).toString('latin1'), 'PNG');
  return [file.readUInt32BE(16), file.readUInt32BE(20)];
}

describe('the page', () => {
  test('shows five bars and the spectrogram of a song that is dropped', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await drop(page, { name: 'Evening tune.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await state(page, 'done');

    const bars = page.getByRole('list', { name: 'The five likeliest genres' }).getByRole('listitem');
    assert.equal(await bars.count(), 5);
    const shares = (await bars.locator('.share').allTextContents()).map(Number.parseFloat);
    assert.deepEqual(
      shares,
      shares.toSorted((a, b) => b - a),
    );
    assert.ok(shares[0]! > 0 && shares.reduce((sum, share) => sum + share) <= 100.5);
    const widths = await bars
      .locator('.fill')
      .evaluateAll((fills) =>
        fills.map((fill) => (fill.clientWidth / fill.parentElement!.clientWidth) * 100),
      );
    widths.forEach((width, index) => {
      assert.ok(
        Math.abs(width - shares[index]!) < 2,
        `bar ${index} is ${width} % wide, not ${shares[index]}`,
      );
    });
    assert.match(await textOf(page, '#answer-lead'), /by [\d.]+ points|an answer needs|Level with/);

    const picture = page.getByRole('img', { name: /^Mel spectrogram/ });
    await picture.waitFor();
    assert.ok(
      await picture.evaluate((image: HTMLImageElement) => image.complete && image.naturalWidth >= 224),
    );
    assert.equal(
      await page.locator('audio').evaluate((audio: HTMLAudioElement) => Math.round(audio.duration)),
      35,
    );
    assert.deepEqual(complaints, []);
  });

  test('plays the song, and moves over the spectrogram while it does', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await drop(page, { name: 'Evening tune.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await state(page, 'done');
    await button(page, 'Play this part').click();
    await page.locator('#playhead').waitFor();
    const left = () =>
      page.locator('#playhead').evaluate((line) => Number.parseFloat(line.style.insetInlineStart));
    const before = await left();
    await page.waitForFunction(
      (from) =>
        Number.parseFloat(document.querySelector<HTMLElement>('#playhead')!.style.insetInlineStart) > from,
      before,
    );
    const seconds = await page.locator('audio').evaluate((audio: HTMLAudioElement) => audio.currentTime);
    assert.ok(seconds > 2 && seconds < 35, `at ${seconds} s, where the middle of 35 s is analysed`);
    assert.deepEqual(complaints, []);
  });

  test('downloads the spectrogram as a PNG of 224 by 224', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await drop(page, { name: 'Evening tune.wav', bytes: music });
    await button(page, 'Start analysis').click();
    const arrives = page.waitForEvent('download');
    await page.getByRole('link', { name: 'Download PNG' }).click();
    const download = await arrives;
    assert.match(download.suggestedFilename(), /^Evening tune.*\.png$/);
    assert.deepEqual(pngSize(await readFile(await download.path())), [224, 224]);
    assert.deepEqual(complaints, []);
  });

  test('says beside an answer how often the model was right at its confidence, where that is known', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await changeResults(page, {
      uncertain: false,
      reliability: { right: 96, clips: 132, from: 0.7, to: 0.8, percent: 73 },
    });
    await drop(page, { name: 'Evening tune.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await state(page, 'done');
    const line = page.locator('#answer').getByText(/At this confidence/);
    assert.match(
      (await line.textContent()) ?? '',
      /^At this confidence the model was right in 73\sof\s100 test songs\.$/,
    );
    assert.match(await textOf(page, '#said'), /in 73\sof\s100 test songs\.$/);

    // The next answer is not one of the kind that was tested.
    await page.unroute('**/v1/jobs/*/events');
    await changeResults(page, { uncertain: false, reliability: undefined });
    await drop(page, { name: 'Another tune.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await state(page, 'done');
    assert.equal(await line.count(), 0);
    assert.doesNotMatch(await textOf(page, '#said'), /test songs|undefined/);
    assert.deepEqual(complaints, []);
  });

  test('gives each reason for which it does not name a genre its own words', async () => {
    const headlines = new Set<string>();
    for (const [because, sentence] of [
      ['confidence', /comes closest with [\d.]+\s?%, but an answer needs 80\s?%\./],
      ['not_music', /^This does not sound like the music the model was trained on\./],
      ['silent', /silent/],
    ] as const) {
      await using visit = await open();
      const { page, complaints } = visit;
      const change = { uncertain: true, uncertainBecause: because, threshold: 0.8 };
      await changeResults(page, because === 'silent' ? { ...change, top: [] } : change);
      await drop(page, { name: 'Washing machine.wav', bytes: music });
      await button(page, 'Start analysis').click();
      await state(page, 'done');
      const headline = await textOf(page, '#answer-title');
      headlines.add(headline);
      assert.match(await textOf(page, '#answer-lead'), sentence);
      assert.equal(await page.locator('#bars li').count(), because === 'silent' ? 0 : 5);
      assert.equal(await textOf(page, '#answer-share'), '', 'a number beside it would look like an answer');
      assert.ok((await textOf(page, '#said')).startsWith(headline.trim()));
      assert.deepEqual(complaints, []);
    }
    assert.equal(headlines.size, 3);
  });

  test('says of a model that was neither measured nor calibrated that it was not', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await page.route('**/v1/model', async (route) => {
      const response = await route.fetch();
      await route.fulfill({
        response,
        json: { ...(await response.json()), accuracy: 'none', calibrated: false },
      });
    });
    await page.reload();
    const footer = page.getByRole('contentinfo');
    await footer.getByText('Files are').waitFor();
    const text = (await footer.textContent()) ?? '';
    assert.match(text, /accuracy was not measured\..*not calibrated\./);
    assert.doesNotMatch(text, /top-1|undefined|NaN/);
    assert.deepEqual(complaints, []);
  });

  test('tells in a sentence why a text named .mp3 has no genre, and takes the next song', async () => {
    await using visit = await open();
    const { page } = visit;
    await drop(page, {
      name: 'diary.mp3',
      bytes: Buffer.from('Dear diary, today I heard a song.\n'.repeat(50)),
    });
    await button(page, 'Start analysis').click();
    await state(page, 'failed');
    const sentence = await textOf(page, '#failure-text');
    assert.match(sentence, /^[A-Z].{20,}\.$/s);
    assert.doesNotMatch(sentence, /[{}_]|undefined|Error/);
    await button(page, 'Try again').waitFor();

    await drop(page, { name: 'next.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await state(page, 'done');
    assert.equal(await page.locator('#bars li').count(), 5);
  });

  test('takes one song at a time, and says which', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    await drop(page, { name: 'one.wav', bytes: music }, { name: 'two.wav', bytes: music });
    assert.match(await textOf(page, '#notice'), /2 files.*“one\.wav”/);
    await drop(page, { name: 'three.wav', bytes: music });
    assert.match(await textOf(page, '#notice'), /“three\.wav”.*“one\.wav”/);
    assert.equal(await textOf(page, '#song-name'), 'three.wav');
    assert.deepEqual(complaints, []);
  });

  test('cancels a song that waits, and the service forgets it', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    const decoder = system.pid('decoder');
    process.kill(decoder, 'SIGSTOP');
    try {
      await drop(page, { name: 'patience.wav', bytes: music });
      const accepted = page.waitForResponse((response) => response.url().endsWith('/v1/jobs'));
      await button(page, 'Start analysis').click();
      const { links } = (await (await accepted).json()) as { links: { self: string } };
      await page.locator('#steps li[aria-current=step]', { hasText: 'Waiting' }).waitFor();
      const told = page.waitForResponse((response) => response.request().method() === 'DELETE');
      await button(page, 'Cancel').click();
      assert.match(await textOf(page, '#notice'), /^Cancelled/);
      assert.ok((await told).ok());
      const job = await fetch(system.url + links.self);
      assert.ok(job.status === 404 || (await job.json()).state === 'cancelled');
    } finally {
      process.kill(decoder, 'SIGCONT');
    }
    await button(page, 'Start analysis').click();
    await state(page, 'done');
    assert.deepEqual(complaints, []);
  });

  test('cancels a song that is still being sent', async () => {
    await using visit = await open();
    const { page } = visit;
    const network = await page.context().newCDPSession(page);
    await network.send('Network.emulateNetworkConditions', {
      offline: false,
      latency: 0,
      downloadThroughput: -1,
      uploadThroughput: 200_000,
    });
    await drop(page, { name: 'slow.wav', bytes: music });
    await button(page, 'Start analysis').click();
    await page.waitForFunction(() => {
      const now = Number(document.querySelector('#progress')?.getAttribute('aria-valuenow'));
      return now > 2 && now < 45;
    });
    await button(page, 'Cancel').click();
    await button(page, 'Start analysis').waitFor();
    assert.equal(await page.locator('main').getAttribute('data-state'), 'chosen');
  });

  test('waits for a service that restarts in the middle of an analysis', async () => {
    await using visit = await open();
    const { page } = visit;
    const decoder = system.pid('decoder');
    process.kill(decoder, 'SIGSTOP');
    try {
      await drop(page, { name: 'restart.wav', bytes: music });
      await button(page, 'Start analysis').click();
      await page.locator('#steps li[aria-current=step]', { hasText: 'Waiting' }).waitFor();
      await system.kill('api');
      await page.getByText('The connection was lost.').waitFor();
    } finally {
      process.kill(decoder, 'SIGCONT');
    }
    await system.start('api');
    await state(page, 'done');
    assert.equal(await page.locator('#bars li').count(), 5);
  });

  test('says that the service is away, and tries again when asked', async () => {
    await using visit = await open();
    const { page } = visit;
    await drop(page, { name: 'again.wav', bytes: music });
    await system.kill('api');
    await button(page, 'Start analysis').click();
    await page.getByRole('alert').getByText('The service does not answer.').waitFor();
    await system.start('api');
    await button(page, 'Try again').click();
    await state(page, 'done');
  });

  test('works with the keyboard alone', async () => {
    await using visit = await open();
    const { page, complaints } = visit;
    // Asked for early: the browser needs a moment before it hands choosers over.
    const chooser = page.waitForEvent('filechooser');
    await page.keyboard.press('Tab');
    assert.equal(await focused(page), 'choose');
    await page.keyboard.press('Enter');
    await (await chooser).setFiles({ name: 'keys.wav', mimeType: 'audio/wav', buffer: music });
    await state(page, 'chosen');
    assert.equal(await focused(page), 'primary');
    await page.keyboard.press('Space');
    await state(page, 'done');
    await page.waitForFunction(() => document.activeElement?.id === 'answer-title');
    await page.getByRole('link', { name: 'Download PNG' }).waitFor();

    // All that can be done now is reached by Tab, going on from the answer and round from the top.
    const reached = new Set<string>();
    for (let presses = 0; presses < 25; presses++) {
      await page.keyboard.press('Tab');
      reached.add(await focused(page));
    }
    for (const id of ['secondary', 'audio', 'picture-link', 'download']) assert.ok(reached.has(id), id);
    await page.locator('#download').focus();
    const download = page.waitForEvent('download');
    await page.keyboard.press('Enter');
    assert.match((await download).suggestedFilename(), /\.png$/);
    assert.deepEqual(complaints, []);
  });

  test('tells which model answers, how good it is and how long things are kept', async () => {
    await using visit = await open();
    const { page } = visit;
    const footer = page.getByRole('contentinfo');
    await footer.getByText('Files are').waitFor();
    const model = await (await fetch(`${system.url}/v1/model`)).json();
    const text = (await footer.textContent()) ?? '';
    assert.ok(text.includes(`${model.name} ${model.version}`), text);
    assert.match(text, /On [\d,]+ .*clips top-1 was \d+\.\d\s?%/);
    for (const label of model.labels) assert.ok(text.includes(label), label);
  });

  for (const colorScheme of ['light', 'dark'] as const) {
    test(`fits a telephone and has readable contrast in a ${colorScheme} room`, async () => {
      await using visit = await open({ colorScheme, viewport: { width: 360, height: 740 } });
      const { page } = visit;
      const check = async (moment: string) => {
        assert.ok(
          await page.evaluate(() => document.documentElement.scrollWidth <= 360),
          `${moment}: too wide`,
        );
        assert.deepEqual(await lowContrast(page), [], moment);
      };
      await check('idle');
      const name = `${'A very long name that somebody gave to a recording '.repeat(4)}.wav`;
      await drop(page, { name, bytes: music });
      await check('chosen');
      await button(page, 'Start analysis').click();
      await state(page, 'done');
      await check('done');
      await drop(page, { name: `${'x'.repeat(200)}.mp3`, bytes: Buffer.from('no music') });
      await button(page, 'Start analysis').click();
      await state(page, 'failed');
      await check('failed');
    });
  }
});

/**
 * Texts under the contrast that WCAG 2.2 AA asks for (1.4.3): 4.5, or 3 from 24 px (18.66 px bold) on. Formulas:
 * https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
 */
async function lowContrast(page: Page): Promise<string[]> {
  return page.evaluate(() => {
    const channels = (colour: string) => (colour.match(/[\d.]+/g) ?? []).map(Number);
    const luminance = (colour: string) => {
      const [r, g, b] = channels(colour).map((value) => {
        const c = value / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
    };
    const isOpaque = (colour: string) => (channels(colour)[3] ?? 1) === 1;
    const background = (element: Element): string => {
      const colour = getComputedStyle(element).backgroundColor;
      return isOpaque(colour) || !element.parentElement ? colour : background(element.parentElement);
    };
    const low: string[] = [];
    for (const element of document.body.querySelectorAll<HTMLElement>('*')) {
      const text = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
      if (!text.some((node) => node.textContent?.trim()) || !element.checkVisibility()) continue;
      const { color, fontSize, fontWeight } = getComputedStyle(element);
      const [light, dark] = [luminance(color), luminance(background(element))].sort((a, b) => b - a);
      const size = Number.parseFloat(fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(fontWeight) >= 700);
      const ratio = (light! + 0.05) / (dark! + 0.05);
      if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)}: ${element.textContent?.slice(0, 40)}`);
    }
    return low;
  });
}
