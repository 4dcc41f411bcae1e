import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { countFrames, createFrameCutter } from './frames.ts';
import { createMelFilterbank, createPowerSpectrum, type MelLayout, toDecibels } from './log-mel.ts';
import { makeGoldenPcm } from './testing/golden-pcm.ts';

interface Golden {
  sines: [number, number][];
  noise: number;
  cases: {
    name: string;
    profile: MelLayout & { hopLength: number; centered: boolean; samples: number };
    frames: number;
    decibels: number[];
  }[];
}

const golden = JSON.parse(
  readFileSync(new URL('golden/log-mel.golden.json', import.meta.url), 'utf8'),
) as Golden;

for (const { name, profile, frames, decibels } of golden.cases) {
  test(`log-mel equals librosa within 0.01 dB: ${name}`, () => {
    const { sampleRate, fftSize, hopLength: hop, centered, melBands, power, samples } = profile;
    const grid = { fftSize, hop, lead: centered ? fftSize / 2 : 0 };
    const spectrum = createPowerSpectrum(fftSize);
    const filterbank = createMelFilterbank(profile);
    const mel = new Float32Array(frames * melBands);
    const cutter = createFrameCutter(grid, { firstFrame: 0, firstSample: 0 }, (frame, buffer, offset) => {
      filterbank.apply(spectrum.transform(buffer, offset), mel, frame * melBands);
    });

    assert.equal(countFrames(grid, samples), frames);
    cutter.push(makeGoldenPcm(golden, samples, sampleRate));
    cutter.finish(frames);
    let worst = 0;
    for (const [i, expected] of decibels.entries()) {
      worst = Math.max(worst, Math.abs(toDecibels(mel[i]!, power) - expected));
    }
    assert.equal(decibels.length, mel.length);
    assert.ok(worst <= 0.01, `largest difference ${worst} dB`);
  });
}

test('an FFT size that is no power of two is refused by name', () => {
  assert.throws(() => createPowerSpectrum(1536), /profile\.fftSize is 1536/);
});
