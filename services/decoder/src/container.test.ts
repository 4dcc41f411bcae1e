import assert from 'node:assert/strict';
import { readFile, writeFile } from 'node:fs/promises';
import { after, test } from 'node:test';
import { encode, id3Picture, sine, wav, writeWav } from '../../../test/audio.ts';
import { identifyContainer } from './container.ts';
import { openDirectory } from './testing/setup.ts';

const at = await openDirectory();
after(() => at[Symbol.asyncDispose]());
await writeWav(at.file('source.wav'), [sine({ hz: 440, seconds: 1 })]);

async function bytes(name: string, content: Buffer | string): Promise<string> {
  await writeFile(at.file(name), content);
  return at.file(name);
}

for (const [name, expected] of [
  ['a.mp3', 'mp3'],
  ['a.flac', 'flac'],
  ['a.ogg', 'ogg'],
  ['a.opus', 'ogg'],
  ['a.m4a', 'mp4'],
  ['a.mov', 'mp4'],
  ['a.aac', 'aac'],
  ['a.aiff', 'aiff'],
  ['a.mp2', 'mp3'],
] as const) {
  test(`${name} is recognised by its content`, async () => {
    await encode(at.file('source.wav'), at.file(name));
    assert.equal((await identifyContainer(at.file(name))).name, expected);
  });
}

test('an MP3 is found behind 10 MB of cover art, and behind leading zeros', async () => {
  await encode(at.file('source.wav'), at.file('plain.mp3'), '-id3v2_version', '0');
  const mp3 = await readFile(at.file('plain.mp3'));
  const art = await bytes('art.mp3', Buffer.concat([id3Picture(10 * 2 ** 20), mp3]));
  assert.equal((await identifyContainer(art)).name, 'mp3');
  const zeros = await bytes('zeros.mp3', Buffer.concat([Buffer.alloc(5000), mp3]));
  assert.equal((await identifyContainer(zeros)).name, 'mp3');
});

test('a WAV header that claims more than there is says so, a placeholder does not', async () => {
  const samples = [sine({ hz: 440, seconds: 0.1 })];
  const lying = await bytes('lying.wav', wav(samples, { claimedBytes: 0xff000000 }));
  assert.ok((await identifyContainer(lying)).declaredSize! > 4e9);
  const streamed = await bytes('streamed.wav', wav(samples, { claimedBytes: 0xffffffff }));
  assert.equal((await identifyContainer(streamed)).declaredSize, undefined);
});

for (const [what, content, code] of [
  ['nothing', '', 'empty_file'],
  ['text', 'Dear listener, this is no music.\n'.repeat(1000), 'not_audio'],
  ['one byte', '\xff', 'not_audio'],
  ['bytes that look like sync words', Buffer.alloc(4096, 0xff), 'not_audio'],
  ['a PNG', Buffer.from('89504e470d0a1a0a0000000d49484452', 'hex'), 'not_audio'],
  ['a RIFF that is no sound', Buffer.from('RIFF\x10\0\0\0WEBPVP8 ', 'latin1'), 'not_audio'],
  ['Matroska', Buffer.from('1a45dfa3a3428681', 'hex'), 'unsupported_format'],
  ['AVI', Buffer.from('RIFF\x10\0\0\0AVI LIST', 'latin1'), 'unsupported_format'],
  ['an HLS playlist', '#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n', 'unsupported_format'],
  ['a concat list', "ffconcat version 1.0\nfile '/etc/passwd'\n", 'unsupported_format'],
  ['a concat list without its first line', "file '/etc/passwd'\n", 'not_audio'],
  ['an ID3 tag with nothing behind it', id3Picture(100), 'not_audio'],
] as const) {
  test(`${what}: ${code}`, async () => {
    const file = await bytes(`bad-${code}.mp3`, content);
    await assert.rejects(identifyContainer(file), { name: 'ProblemError', code });
  });
}
