/** An input or a part outside is at fault: one sentence that says what was wrong and what to do. Exit code 1. */
export class Failure extends Error {
  override readonly name = 'Failure';
}

/** The command was typed wrongly. Exit code 2. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}

/** The user stopped it. Exit code 130, as a shell has it for SIGINT. */
export class Stopped extends Error {
  override readonly name = 'Stopped';
}

/** `ENOENT` and the like, or nothing for what is no error of the system. */
export function systemCode(error: unknown): string | undefined {
  return (error as NodeJS.ErrnoException | undefined)?.code;
}
