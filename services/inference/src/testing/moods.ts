/** First byte of a window that `moody-child.ts` understands. */
export const moods = { dies: 254, hangs: 253, slow: 252 } as const;
