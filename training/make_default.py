"""Makes the default bundle, from the arrays to the card, in one command:

``python training/make_default.py --data DIR --audio AUDIO --work WORK --out models/default``

DIR holds the four arrays, AUDIO real labelled files (see README.md). Each step is one of
the other programs, so any of them can be repeated alone; WORK keeps the run. The shipped
bundle's recipe is `RECIPE`; what follows ``--`` goes to train.py instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

RECIPE = ("--max-minutes", "42")
"""train.py's options for the shipped bundle."""


def step(program: str, *arguments: object) -> None:
    """Runs one program of this folder; its failure ends everything."""
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    print("+", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    own, train_options = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, train_options = own[:at], own[at + 1 :]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--audio", type=Path, help="folder with gtzan/ and fma/: checks on real audio")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(own)

    step("train.py", "--data", args.data, "--out", args.work, *(train_options or RECIPE))
    step("outliers.py", "--data", args.data, "--run", args.work)
    step("robustness.py", "--data", args.data, "--run", args.work)
    if args.audio:
        step("source_check.py", "--run", args.work, "--audio", args.audio / "fma")
        step("real_files.py", "--run", args.work, "--data", args.data, "--audio", args.audio)
    step("export.py", "--run", args.work, "--out", args.out)


if __name__ == "__main__":
    main()
