/**
 * Tells the container of a file from its first bytes, before ffmpeg sees it.
 *
 * ffmpeg's own probing is never used: it would also recognise playlists, which open other files. What is known
 * here is decoded with exactly one forced demuxer, what is not known is never opened by ffmpeg at all.
 *
 * Sources: ID3v2.4 structure (id3.org), ISO/IEC 11172-3 2.4.1.3 (MPEG audio header), ISO/IEC 13818-7 6.2 (ADTS),
 * RFC 9639 (FLAC), RFC 3533 (Ogg), ISO/IEC 14496-12 4.3 (file type box), RFC 8794 (EBML).
 */
import { type FileHandle, open } from 'node:fs/promises';
import { ProblemError } from '@acousticsense/shared/errors';

export interface Container {
  readonly name: 'mp3' | 'aac' | 'wav' | 'aiff' | 'flac' | 'ogg' | 'mp4';
  /** The one ffmpeg demuxer that may read it. */
  readonly demuxer: 'mp3' | 'aac' | 'wav' | 'aiff' | 'flac' | 'ogg' | 'mov';
  /** Bytes in the file. */
  readonly size: number;
  /** Bytes that the header says the file has, where it says so and the value is no placeholder. */
  readonly declaredSize?: number;
}

const headBytes = 64 * 1024;
const accepted = 'send MP3, WAV, FLAC, Ogg, M4A/MP4, AAC or AIFF';

/** Media that people do send and that is not read: refused by name. */
const refused: readonly { name: string; magic: string; at?: number }[] = [
  { name: 'Matroska/WebM', magic: '\x1a\x45\xdf\xa3' },
  { name: 'AVI', magic: 'AVI ', at: 8 },
  { name: 'Windows Media', magic: '\x30\x26\xb2\x75\x8e\x66\xcf\x11' },
  { name: 'Flash video', magic: 'FLV\x01' },
  { name: 'MPEG program stream', magic: '\x00\x00\x01\xba' },
  { name: 'RealMedia', magic: '.RMF' },
  { name: 'Core Audio', magic: 'caff' },
  { name: 'Sony Wave64', magic: 'riff\x2e\x91\xcf\x11' },
  { name: 'AU', magic: '.snd' },
  { name: 'AMR', magic: '#!AMR' },
  { name: 'DSF', magic: 'DSD ' },
  { name: 'DSDIFF', magic: 'FRM8' },
  { name: "Monkey's Audio", magic: 'MAC ' },
  { name: 'WavPack', magic: 'wvpk' },
  { name: 'Musepack', magic: 'MPCK' },
  { name: 'True Audio', magic: 'TTA1' },
  { name: 'MIDI', magic: 'MThd' },
];

/**
 * @throws {ProblemError} `empty_file`, `unsupported_format` (a container that is known and not read, playlists
 *   among them) or `not_audio`.
 */
export async function identifyContainer(file: string): Promise<Container> {
  const handle = await open(file);
  try {
    const { size } = await handle.stat();
    if (size === 0) throw new ProblemError('empty_file', 'The file holds no bytes: send it again.');
    return await identify(handle, size);
  } finally {
    await handle.close();
  }
}

async function identify(handle: FileHandle, size: number): Promise<Container> {
  const head = await readAt(handle, 0);
  const has = (magic: string, at = 0) => head.toString('latin1', at, at + magic.length) === magic;

  if ((has('RIFF') || has('RF64') || has('BW64') || has('RIFX')) && has('WAVE', 8)) {
    return {
      name: 'wav',
      demuxer: 'wav',
      size,
      ...declared(has('RIFX') ? head.readUInt32BE(4) : head.readUInt32LE(4)),
    };
  }
  if (has('FORM') && (has('AIFF', 8) || has('AIFC', 8))) {
    return { name: 'aiff', demuxer: 'aiff', size, ...declared(head.readUInt32BE(4)) };
  }
  if (has('OggS')) return { name: 'ogg', demuxer: 'ogg', size };
  if (['ftyp', 'moov', 'mdat', 'wide', 'pnot', 'skip', 'free'].some((box) => has(box, 4))) {
    return { name: 'mp4', demuxer: 'mov', size };
  }
  for (const { name, magic, at } of refused) {
    if (has(magic, at)) {
      throw new ProblemError(
        'unsupported_format',
        `The file is ${name}, which is not read here: ${accepted}.`,
      );
    }
  }
  if (
    /^(?:\xef\xbb\xbf)?\s*(?:#EXTM3U|ffconcat|\[playlist\]|<\?xml|<asx|<smil)/i.test(
      head.toString('latin1', 0, 256),
    )
  ) {
    throw new ProblemError('unsupported_format', `The file is a playlist, not audio: ${accepted}.`);
  }

  const tagged = await skipId3(handle, head);
  const body = tagged === 0 ? head : await readAt(handle, tagged);
  if (body.toString('latin1', 0, 4) === 'fLaC') return { name: 'flac', demuxer: 'flac', size };
  const atEnd = tagged + body.length >= size;
  if (holdsFrames(body, adtsFrameLength, atEnd)) return { name: 'aac', demuxer: 'aac', size };
  if (holdsFrames(body, mpegFrameLength, atEnd)) return { name: 'mp3', demuxer: 'mp3', size };
  throw new ProblemError('not_audio', `The file is not audio that can be recognised: ${accepted}.`);
}

/** Streams that were written into a pipe carry 0 or all ones: no claim. */
function declared(payload: number): { declaredSize?: number } {
  return payload === 0 || payload === 0xffffffff ? {} : { declaredSize: payload + 8 };
}

async function readAt(handle: FileHandle, position: number): Promise<Buffer> {
  const buffer = Buffer.alloc(headBytes);
  const { bytesRead } = await handle.read(buffer, 0, headBytes, position);
  return buffer.subarray(0, bytesRead);
}

/** Position behind all ID3v2 tags; a tag may be many megabytes of cover art. */
async function skipId3(handle: FileHandle, head: Buffer): Promise<number> {
  let position = 0;
  let tag = head;
  // More than a few tags in a row are no real file.
  for (let count = 0; count < 8; count += 1) {
    if (tag.length < 10 || tag.toString('latin1', 0, 3) !== 'ID3') break;
    const [a, b, c, d] = [tag[6]!, tag[7]!, tag[8]!, tag[9]!];
    const footer = (tag[5]! & 0x10) === 0 ? 0 : 10;
    position += 10 + (((a & 0x7f) << 21) | ((b & 0x7f) << 14) | ((c & 0x7f) << 7) | (d & 0x7f)) + footer;
    tag = await readAt(handle, position);
  }
  return position;
}

/**
 * Whether a chain of frames begins somewhere in `bytes`, each where the one before ends. Three in a row do not
 * happen by chance; a file that ends before the third must begin with one.
 */
function holdsFrames(
  bytes: Buffer,
  frameLength: (bytes: Buffer, at: number) => number,
  atEnd: boolean,
): boolean {
  for (let start = bytes.indexOf(0xff); start >= 0; start = bytes.indexOf(0xff, start + 1)) {
    let at = start;
    let frames = 0;
    for (let length = frameLength(bytes, at); length > 0 && frames < 3; length = frameLength(bytes, at)) {
      at += length;
      frames += 1;
    }
    if (frames >= 3 || (frames > 0 && start === 0 && atEnd && at >= bytes.length)) return true;
  }
  return false;
}

const bitRates = {
  1: {
    1: [0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448],
    2: [0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384],
    3: [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320],
  },
  2: {
    1: [0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256],
    2: [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],
    3: [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],
  },
} as const;

/** Bytes of the MPEG audio frame at `at`; 0 when there is none (free format is not accepted). */
function mpegFrameLength(bytes: Buffer, at: number): number {
  if (at + 4 > bytes.length || bytes[at] !== 0xff || (bytes[at + 1]! & 0xe0) !== 0xe0) return 0;
  const version = (bytes[at + 1]! >> 3) & 3;
  const layerBits = (bytes[at + 1]! >> 1) & 3;
  const rateIndex = (bytes[at + 2]! >> 2) & 3;
  if (version === 1 || layerBits === 0 || rateIndex === 3) return 0;
  const layer = (4 - layerBits) as 1 | 2 | 3;
  const family = version === 3 ? 1 : 2;
  const bitRate = (bitRates[family][layer][bytes[at + 2]! >> 4] ?? 0) * 1000;
  const sampleRate = [44_100, 48_000, 32_000][rateIndex]! / (version === 3 ? 1 : version === 2 ? 2 : 4);
  const padding = (bytes[at + 2]! >> 1) & 1;
  if (bitRate === 0) return 0;
  if (layer === 1) return (Math.floor((12 * bitRate) / sampleRate) + padding) * 4;
  const samples = layer === 3 && family === 2 ? 576 : 1152;
  return Math.floor(((samples / 8) * bitRate) / sampleRate) + padding;
}

/** Bytes of the ADTS frame at `at`; 0 when there is none. */
function adtsFrameLength(bytes: Buffer, at: number): number {
  if (at + 7 > bytes.length || bytes[at] !== 0xff || (bytes[at + 1]! & 0xf6) !== 0xf0) return 0;
  if (((bytes[at + 2]! >> 2) & 0xf) > 12) return 0;
  const length = ((bytes[at + 3]! & 3) << 11) | (bytes[at + 4]! << 3) | (bytes[at + 5]! >> 5);
  return length < 7 ? 0 : length;
}
