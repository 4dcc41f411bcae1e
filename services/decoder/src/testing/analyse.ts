/**
 * Analyses one file in a process of its own and prints a JSON line: for tests that watch the process from outside.
 *
 *     node analyse.ts <file> <windows> [name of the profile]
 */
import { analyse, profiles } from './setup.ts';

const [file, windows, profile = 'default'] = process.argv.slice(2);
try {
  const choice = windows === 'all' || windows === 'middle' ? windows : Number(windows);
  const { tensor } = await analyse(file!, {
    windows: choice,
    profile: profiles[profile as keyof typeof profiles],
  });
  console.log(JSON.stringify({ shape: tensor.shape, peakKb: process.resourceUsage().maxRSS }));
} catch (error) {
  console.log(JSON.stringify({ code: (error as { code?: string }).code, message: (error as Error).message }));
}
