/** Counts by keys that callers choose: those that come first are told apart, the rest is one figure. */
export interface BoundedCounts<T> {
  /** @param make of a key that was not there before. @returns undefined when there is no room for it. */
  of(key: string, make: () => T): T | undefined;
  readonly values: Iterable<T>;
  /** How often there was no room. */
  readonly others: number;
}

export function createBoundedCounts<T>(most: number): BoundedCounts<T> {
  const known = new Map<string, T>();
  let others = 0;
  return {
    of(key, make) {
      const found = known.get(key);
      if (found !== undefined) return found;
      if (known.size >= most) {
        others += 1;
        return undefined;
      }
      const made = make();
      known.set(key, made);
      return made;
    },
    get values() {
      return known.values();
    },
    get others() {
      return others;
    },
  };
}
