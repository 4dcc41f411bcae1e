/**
 * Makes the first track of a QuickTime file point at another file: its data reference becomes a Mac alias with an
 * absolute path (QuickTime File Format, "Data reference atoms"; layout of the alias as libavformat reads it).
 *
 * @param file a MOV whose `moov` follows its `mdat`, so that no chunk offset moves.
 */
export function movWithExternalTrack(file: Buffer, target: string): Buffer {
  const path = Buffer.from(target.replace(/^\//, '').replaceAll('/', ':'), 'latin1');
  const absolute = Buffer.concat([
    Buffer.from(`:${path.toString('latin1')}`, 'latin1'),
    Buffer.alloc(path.length % 2 === 0 ? 1 : 0),
  ]);
  const record = Buffer.alloc(150 + 4 + absolute.length + 4);
  record.writeInt16BE(2, 150);
  record.writeUInt16BE(absolute.length, 152);
  absolute.copy(record, 154);
  record.writeInt16BE(-1, 154 + absolute.length);

  const entry = Buffer.alloc(12);
  entry.write('alis', 4, 'latin1');
  // Offsets inside the record count from behind this header; the fixed part is 150 bytes long.
  const alias = Buffer.concat([entry, record]);
  alias.writeUInt32BE(alias.length, 0);
  const dref = Buffer.concat([Buffer.from('\0\0\0\0dref\0\0\0\0\0\0\0\x01', 'latin1'), alias]);
  dref.writeUInt32BE(dref.length, 0);

  const parents = ['moov', 'trak', 'mdia', 'minf', 'dinf'];
  const copy = Buffer.from(file);
  let at = 0;
  let end = copy.length;
  const opened: number[] = [];
  for (const name of [...parents, 'dref']) {
    while (copy.toString('latin1', at + 4, at + 8) !== name) {
      at += copy.readUInt32BE(at);
      if (at >= end) throw new Error(`no ${name}`);
    }
    opened.push(at);
    end = at + copy.readUInt32BE(at);
    at += 8;
  }
  const old = opened.pop()!;
  const oldLength = copy.readUInt32BE(old);
  for (const parent of opened)
    copy.writeUInt32BE(copy.readUInt32BE(parent) + dref.length - oldLength, parent);
  return Buffer.concat([copy.subarray(0, old), dref, copy.subarray(old + oldLength)]);
}
