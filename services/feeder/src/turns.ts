/**
 * Whose turn it is: deficit round-robin (Shreedhar and Varghese 1995). Who has something to hand over comes in turn, and
 * in a turn hands over as many rows as its weight is; what of a turn there is no room for now goes on when there is.
 */

export interface Turns {
  /**
   * @param waiting everybody who has something: who has nothing keeps neither place nor credit, or it would flood the
   *   queues when it comes back.
   * @param canTake whether there is room for what this one has; who cannot now is passed over and keeps its place.
   * @returns whose turn it is and how many rows it may still hand over in it; undefined when nobody can.
   */
  next(
    waiting: ReadonlySet<string>,
    canTake: (name: string) => boolean,
  ): { readonly name: string; readonly most: number } | undefined;
  took(name: string, rows: number): void;
}

/** @param quantum rows of a turn at weight 1. */
export function createTurns(quantum: number, weightOf: (name: string) => number): Turns {
  /** What is left of each one's turn, in the order of their turns. */
  const credits = new Map<string, number>();
  return {
    next(waiting, canTake) {
      for (const name of credits.keys()) if (!waiting.has(name)) credits.delete(name);
      for (const name of waiting) if (!credits.has(name)) credits.set(name, quantum * weightOf(name));
      // Who is moved behind the others comes up again in this same loop.
      for (const [name, credit] of credits) {
        if (!canTake(name)) continue;
        if (credit >= 1) return { name, most: Math.floor(credit) };
        credits.delete(name);
        credits.set(name, credit + quantum * weightOf(name));
      }
      return undefined;
    },
    took(name, rows) {
      credits.set(name, (credits.get(name) ?? 0) - rows);
    },
  };
}
