/** Which refs a manifest has used so far: 12 bytes a slot, where a set of strings would take 100 and more. */
import { getRandomValues } from 'node:crypto';

export interface SeenRefs {
  /** @returns the line that has the ref already; when none has, it is this line's from now on. */
  claim(ref: string, line: number): number | undefined;
}

/**
 * Open addressing over 64-bit hashes; the strings are not kept, so two refs of one hash are taken for one. Among a
 * million different refs that happens with a probability of 3 in 100 million (n^2 / 2^65). The seed is random:
 * nobody can choose refs that meet. A million refs take 24 MiB, and 12 more while the table grows.
 */
export function createSeenRefs(): SeenRefs {
  const [seedA, seedB] = getRandomValues(new Int32Array(2)) as unknown as [number, number];
  let capacity = 1_024;
  let used = 0;
  /** Two words a slot. */
  let hashes = new Int32Array(2 * capacity);
  /** 0: the slot is free. */
  let lines = new Uint32Array(capacity);

  /** The slot that holds the hash, or the free one where it belongs. */
  function slotOf(a: number, b: number): number {
    const mask = capacity - 1;
    let slot = a & mask;
    while (lines[slot] !== 0 && (hashes[2 * slot] !== a || hashes[2 * slot + 1] !== b))
      slot = (slot + 1) & mask;
    return slot;
  }

  function set(slot: number, a: number, b: number, line: number): void {
    hashes[2 * slot] = a;
    hashes[2 * slot + 1] = b;
    lines[slot] = line;
  }

  function grow(): void {
    const [oldHashes, oldLines] = [hashes, lines];
    capacity *= 2;
    hashes = new Int32Array(2 * capacity);
    lines = new Uint32Array(capacity);
    oldLines.forEach((line, slot) => {
      if (line === 0) return;
      const [a, b] = [oldHashes[2 * slot]!, oldHashes[2 * slot + 1]!];
      set(slotOf(a, b), a, b, line);
    });
  }

  return {
    claim(ref, line) {
      let a = seedA;
      let b = seedB;
      for (let i = 0; i < ref.length; i += 1) {
        const unit = ref.charCodeAt(i);
        a = Math.imul(a ^ unit, 0x85ebca6b);
        a ^= a >>> 15;
        b = Math.imul(b ^ unit, 0xc2b2ae35);
        b ^= b >>> 13;
      }
      a = mixed(a ^ ref.length);
      b = mixed(b + ref.length);
      const slot = slotOf(a, b);
      if (lines[slot] !== 0) return lines[slot];
      set(slot, a, b, line);
      used += 1;
      if (4 * used > 3 * capacity) grow();
      return undefined;
    },
  };
}

/** MurmurHash3's finaliser: every bit of the input moves half of the output's (Appleby, public domain). */
function mixed(word: number): number {
  let h = word ^ (word >>> 16);
  h = Math.imul(h, 0x85ebca6b);
  h ^= h >>> 13;
  h = Math.imul(h, 0xc2b2ae35);
  return h ^ (h >>> 16);
}
