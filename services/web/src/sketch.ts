/**
 * What the empty plate shows: the mel spectrogram of a tune that was never played, drawn from its notes. It is
 * blue, so that nobody takes it for the picture of their own song.
 */

/** Onset and length in columns, pitch in Hz: an arpeggio over a walking bass. */
const tune: [onset: number, length: number, hertz: number, level: number][] = [
  [6, 40, 110, 1],
  [14, 60, 440, 0.7],
  [28, 60, 523.3, 0.7],
  [42, 64, 659.3, 0.75],
  [58, 44, 87.3, 1],
  [66, 54, 698.5, 0.7],
  [80, 60, 880, 0.8],
  [96, 58, 659.3, 0.65],
  [110, 44, 98, 1],
  [118, 56, 587.3, 0.7],
  [132, 62, 784, 0.8],
  [148, 60, 987.8, 0.75],
  [162, 60, 110, 1],
  [170, 54, 880, 0.75],
  [184, 40, 1046.5, 0.7],
  [198, 26, 1318.5, 0.8],
];
const harmonics = 9;
const topHertz = 8_000;

/** Colours from silence to loud: red, green, blue. */
const palette = [
  [12, 10, 20],
  [22, 24, 62],
  [28, 58, 150],
  [58, 116, 238],
  [150, 190, 255],
  [240, 246, 255],
] as const;

/** O'Shaughnessy's mel scale. */
const mel = (hertz: number) => 2595 * Math.log10(1 + hertz / 700);

export function drawSketch(canvas: HTMLCanvasElement): void {
  const context = canvas.getContext('2d');
  if (!context) return;
  const { width, height } = canvas;
  const level = new Float32Array(width * height);
  for (const [onset, length, hertz, loud] of tune) {
    for (let harmonic = 1; harmonic <= harmonics; harmonic++) {
      const row = height - 1 - (mel(hertz * harmonic) / mel(topHertz)) * (height - 1);
      if (row < 2) break;
      // Higher partials are weaker and die sooner.
      const fade = length / (0.8 + 0.45 * harmonic);
      for (let x = onset; x < Math.min(width, onset + length); x++) {
        const strength = (loud / harmonic ** 0.55) * Math.exp(-(x - onset) / fade);
        for (let y = Math.max(0, Math.floor(row - 3)); y <= Math.min(height - 1, row + 3); y++) {
          level[y * width + x]! += strength * Math.exp(-((y - row) ** 2) / 1.6);
        }
      }
    }
    // The attack: a breath of noise over all bands.
    for (let y = 0; y < height; y++) {
      for (let x = onset; x < Math.min(width, onset + 5); x++) {
        level[y * width + x]! += 0.1 * loud * Math.exp(-(x - onset) / 1.5) * (0.4 + 0.6 * grain(x, y));
      }
    }
  }
  const image = context.createImageData(width, height);
  level.forEach((value, index) => {
    const noise = 0.05 * grain(index % width, Math.floor(index / width));
    const place = Math.min(1, value + noise) ** 0.8 * (palette.length - 1);
    const below = Math.min(palette.length - 2, Math.floor(place));
    for (let channel = 0; channel < 3; channel++) {
      const from = palette[below]![channel]!;
      image.data[index * 4 + channel] = from + (palette[below + 1]![channel]! - from) * (place - below);
    }
    image.data[index * 4 + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

/** The same noise at every visit, 0..1. */
function grain(x: number, y: number): number {
  let hash = Math.imul(x + 1, 374_761_393) ^ Math.imul(y + 1, 668_265_263);
  hash = Math.imul(hash ^ (hash >>> 13), 1_274_126_177);
  return ((hash ^ (hash >>> 16)) >>> 0) / 0xffff_ffff;
}
