/** First byte of a window that `moody-child.ts` understands. */
export const moods = { dies: 254, hangs: 253, slow: 252, diesExplaining: 251, slowExplaining: 250 } as const;

/** A file of this name in the bundle's directory makes the child die whenever it opens the explain graph. */
export const diesOpening = 'dies-opening';
