/** Processes as the kernel tells of them (Linux). */
import { readdir, readFile } from 'node:fs/promises';

/** The children of all threads of a process; see proc(5), /proc/pid/task/tid/children. */
export async function childrenOf(pid: number): Promise<number[]> {
  const lists = await Promise.all(
    (await readdir(`/proc/${pid}/task`)).map((task) =>
      // A thread may end between the two readings.
      readFile(`/proc/${pid}/task/${task}/children`, 'utf8').catch(() => ''),
    ),
  );
  return lists.join(' ').trim().split(/\s+/).filter(Boolean).map(Number);
}
