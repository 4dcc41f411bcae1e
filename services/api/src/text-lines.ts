/** Bytes as they come to lines of text, in memory that does not depend on how long a line is. */
import { isUtf8 } from 'node:buffer';

export interface Line {
  /** Counted from 1. */
  readonly number: number;
  /** Without its line break. What is not UTF-8 in it stands as U+FFFD; empty when the line is too long. */
  readonly text: string;
  readonly fault?: 'row_not_utf8' | 'row_too_long';
}

export interface LineSplitter {
  push(bytes: Buffer): Generator<Line, void, undefined>;
  /** The last line, if it has no line break. */
  end(): Generator<Line, void, undefined>;
}

const lineFeed = 0x0a;
const carriageReturn = 0x0d;
/** Bounds what is decoded at once, whatever the size of the buffers that come. */
const sliceBytes = 64 * 1024;

/** Lines end with LF or CRLF. One that exceeds `maxBytes` is told by its number, its bytes are let go as they come. */
export function createLineSplitter(maxBytes: number): LineSplitter {
  /** The beginning of the line whose end has not come yet. */
  const begun = Buffer.allocUnsafe(maxBytes);
  let length = 0;
  let tooLong = false;
  let number = 0;

  function hold(bytes: Buffer): void {
    tooLong ||= length + bytes.length > maxBytes;
    if (tooLong) return;
    bytes.copy(begun, length);
    length += bytes.length;
  }

  function release(): Line {
    const line = tooLong ? overlong() : decode(begun.subarray(0, length));
    length = 0;
    tooLong = false;
    return line;
  }

  function overlong(): Line {
    number += 1;
    return { number, text: '', fault: 'row_too_long' };
  }

  function decode(bytes: Buffer): Line {
    if (bytes.length > maxBytes) return overlong();
    number += 1;
    const end = bytes.length > 0 && bytes[bytes.length - 1] === carriageReturn ? -1 : undefined;
    const text = bytes.toString('utf8').slice(0, end);
    return isUtf8(bytes) ? { number, text } : { number, text, fault: 'row_not_utf8' };
  }

  /** Lines that each end within `bytes`. Checked and decoded as one: that is what makes it fast. */
  function* wholeLines(bytes: Buffer): Generator<Line, void, undefined> {
    if (!isUtf8(bytes)) {
      for (let from = 0; from < bytes.length; ) {
        const end = bytes.indexOf(lineFeed, from);
        yield decode(bytes.subarray(from, end));
        from = end + 1;
      }
      return;
    }
    const all = bytes.toString('utf8');
    for (let from = 0; from < all.length; ) {
      const end = all.indexOf('\n', from);
      const text = all.slice(from, all.charCodeAt(end - 1) === carriageReturn && end > from ? end - 1 : end);
      from = end + 1;
      // A UTF-16 unit takes three bytes of UTF-8 at most.
      if (text.length * 3 > maxBytes && Buffer.byteLength(text) > maxBytes) yield overlong();
      else {
        number += 1;
        yield { number, text };
      }
    }
  }

  return {
    *push(bytes) {
      for (let from = 0; from < bytes.length; from += sliceBytes) {
        const slice = bytes.subarray(from, from + sliceBytes);
        const first = slice.indexOf(lineFeed);
        if (first < 0) {
          hold(slice);
          continue;
        }
        const last = slice.lastIndexOf(lineFeed);
        hold(slice.subarray(0, first));
        yield release();
        yield* wholeLines(slice.subarray(first + 1, last + 1));
        hold(slice.subarray(last + 1));
      }
    },
    *end() {
      if (tooLong || length > 0) yield release();
    },
  };
}
