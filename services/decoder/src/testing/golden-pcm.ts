/** The PCM of golden/make_golden.py, made by the same formula. */
export function makeGoldenPcm(
  { sines, noise }: { sines: readonly (readonly [number, number])[]; noise: number },
  samples: number,
  rate: number,
): Float32Array {
  let state = 1;
  return Float32Array.from({ length: samples }, (_, n) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    let sample = noise * (state / 2 ** 31 - 1);
    for (const [hz, level] of sines) sample += level * Math.sin((2 * Math.PI * hz * n) / rate);
    return sample;
  });
}
