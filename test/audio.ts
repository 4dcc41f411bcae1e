/** Audio that tests make for themselves: synthesis, a WAV writer that can also lie, and ffmpeg as the encoder. */
import { execFile } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { promisify } from 'node:util';

/** One Float32Array per channel, all of one length. */
export type Channels = readonly Float32Array[];

export interface Tone {
  hz: number;
  seconds: number;
  sampleRate?: number;
  /** Peak, 1 is full scale. */
  level?: number;
}

export function sine({ hz, seconds, sampleRate = 44_100, level = 0.5 }: Tone): Float32Array {
  const step = (2 * Math.PI * hz) / sampleRate;
  return Float32Array.from(
    { length: Math.round(seconds * sampleRate) },
    (_, n) => level * Math.sin(step * n),
  );
}

/** White noise that is the same for the same seed. */
export function noise({
  seconds,
  sampleRate = 44_100,
  level = 0.5,
  seed = 1,
}: Omit<Tone, 'hz'> & { seed?: number }): Float32Array {
  let state = seed >>> 0;
  return Float32Array.from({ length: Math.round(seconds * sampleRate) }, () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return level * (state / 2 ** 31 - 1);
  });
}

/** Something like music: a chord of partials that changes every half second, over soft noise. */
export function song({
  seconds,
  sampleRate = 44_100,
  seed = 1,
}: {
  seconds: number;
  sampleRate?: number;
  seed?: number;
}): Float32Array {
  const out = noise({ seconds, sampleRate, level: 0.02, seed });
  for (let n = 0; n < out.length; n += 1) {
    const beat = Math.floor((n / sampleRate) * 2);
    const root = 110 * 2 ** (((beat * 5 + seed) % 12) / 12);
    const decay = Math.exp(-4 * (((n / sampleRate) * 2) % 1));
    for (let partial = 1; partial <= 6; partial += 1) {
      out[n]! += ((0.25 * decay) / partial) * Math.sin((2 * Math.PI * root * partial * n) / sampleRate);
    }
  }
  return out;
}

export type SampleFormat = 'pcm16' | 'pcm24' | 'float32';

export interface WavOptions {
  sampleRate?: number;
  format?: SampleFormat;
  /** Written into the header instead of the real number of bytes, as a broken recorder would. */
  claimedBytes?: number;
}

/** A WAVE file in memory; integer formats are clipped at full scale, floats are kept as they are, NaN included. */
export function wav(
  channels: Channels,
  { sampleRate = 44_100, format = 'pcm16', claimedBytes }: WavOptions = {},
): Buffer {
  const width = { pcm16: 2, pcm24: 3, float32: 4 }[format];
  const frames = channels[0]?.length ?? 0;
  const dataBytes = frames * channels.length * width;
  const file = Buffer.alloc(44 + dataBytes);
  const claimed = claimedBytes ?? dataBytes;
  file.write('RIFF', 0, 'latin1');
  file.writeUInt32LE(Math.min(0xffffffff, claimed + 36), 4);
  file.write('WAVEfmt ', 8, 'latin1');
  file.writeUInt32LE(16, 16);
  file.writeUInt16LE(format === 'float32' ? 3 : 1, 20);
  file.writeUInt16LE(channels.length, 22);
  file.writeUInt32LE(sampleRate, 24);
  file.writeUInt32LE(sampleRate * channels.length * width, 28);
  file.writeUInt16LE(channels.length * width, 32);
  file.writeUInt16LE(width * 8, 34);
  file.write('data', 36, 'latin1');
  file.writeUInt32LE(claimed, 40);
  let at = 44;
  for (let n = 0; n < frames; n += 1) {
    for (const channel of channels) {
      const sample = channel[n]!;
      if (format === 'float32') file.writeFloatLE(sample, at);
      else {
        const top = 2 ** (width * 8 - 1);
        file.writeIntLE(Math.max(-top, Math.min(top - 1, Math.round(sample * top))), at, width);
      }
      at += width;
    }
  }
  return file;
}

export async function writeWav(file: string, channels: Channels, options: WavOptions = {}): Promise<void> {
  await writeFile(file, wav(channels, options));
}

/** Runs ffmpeg and waits; for encoding and for what only ffmpeg can synthesise. */
export async function ffmpeg(...args: string[]): Promise<void> {
  await promisify(execFile)('ffmpeg', ['-nostdin', '-v', 'error', '-y', ...args]);
}

/** Encodes a file into the format that the target's name says. */
export async function encode(source: string, target: string, ...options: string[]): Promise<void> {
  await ffmpeg('-i', source, ...options, target);
}

/** An ID3v2.3 tag that holds one picture of this many bytes. */
export function id3Picture(bytes: number): Buffer {
  const header = Buffer.from('\0image/jpeg\0\x03\0', 'latin1');
  const picture = Buffer.alloc(bytes, 0x55);
  picture.set([0xff, 0xd8, 0xff, 0xe0]);
  const frame = Buffer.alloc(10);
  frame.write('APIC', 0, 'latin1');
  frame.writeUInt32BE(header.length + bytes, 4);
  const size = 10 + header.length + bytes;
  const tag = Buffer.from([
    0x49,
    0x44,
    0x33,
    3,
    0,
    0,
    (size >> 21) & 0x7f,
    (size >> 14) & 0x7f,
    (size >> 7) & 0x7f,
    size & 0x7f,
  ]);
  return Buffer.concat([tag, frame, header, picture]);
}
