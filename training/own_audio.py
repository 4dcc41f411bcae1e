"""Training data from anybody's labelled audio: a CSV that names files and their labels.

    path,label[,split][,group]
    songs/one.mp3,Tango,train,Orquesta A

Paths are relative to the CSV. ``split`` is ``train`` or ``valid``; without that column
15 % of each label's clips are kept for validation, chosen by hash and so the same in
every run. What belongs together stays on one side: rows with the same ``group`` (write
the artist or the album there: a network recognises a recording's sound long before its
genre), else files in the same folder where a label has several folders, else nothing.

The files go through the service's own front end (services/decoder/src/cut.ts with the
default profile), so a network never sees another picture than it will be asked about.
Every window of a training file is a clip of its own; of a validation file there is one,
the middle one, as in the service.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Final, Iterable, Optional

import numpy as np
import numpy.typing as npt

import labels
import prepare

REPOSITORY: Final = Path(__file__).resolve().parent.parent
CUT: Final = REPOSITORY / "services/decoder/src/cut.ts"
DEFAULT_PROFILE: Final = REPOSITORY / "models/default"

FEWEST_CLIPS: Final = 5
VALID_SHARE: Final = 0.15
MOST_WINDOWS: Final = 16
"""Of one file: an hour-long mix is no more of its genre than a song."""
_TOLD: Final = 20
_COLUMNS: Final = ("path", "label", "split", "group")


class ManifestError(ValueError):
    """What is wrong with the CSV: a sentence for each cause, which names the line."""

    def __init__(self, manifest: Path, causes: list[str]) -> None:
        more = len(causes) - _TOLD
        told = causes[:_TOLD] + ([f"and {more} more"] if more > 0 else [])
        super().__init__("\n".join(f"{manifest}: {cause}" for cause in told))
        self.causes = causes


@dataclass(frozen=True)
class Row:
    """One file. ``line`` is its line in the CSV; ``split`` and ``group`` are empty where
    the CSV says nothing."""

    line: int
    path: str
    label: str
    split: str
    group: str


def read_rows(manifest: Path, known: Optional[tuple[str, ...]] = None) -> list[Row]:
    """The checked rows of a CSV, in its order. ``known``: the only labels that may occur
    (in whatever letters), where a model has its labels already.

    @raises ManifestError for whatever makes it unusable, all causes at once.
    """
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise ManifestError(manifest, [f"it cannot be read ({cause})"]) from cause
    reader = csv.reader(text.splitlines())
    header = [name.strip().lower() for name in next(reader, [])]
    if not any(header):
        raise ManifestError(manifest, ["the file is empty: its first line must be path,label"])
    missing = [name for name in ("path", "label") if name not in header]
    strange = [name for name in header if name not in _COLUMNS]
    if missing or strange or len(set(header)) < len(header):
        raise ManifestError(manifest, [
            f"line 1: the header is {','.join(header)}: it must hold path and label, may hold "
            "split and group, and nothing else or twice"
        ])
    causes: list[str] = []
    rows: list[Row] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            causes.append(
                f"line {reader.line_num}: {len(cells)} cells under {len(header)} column names "
                "(a comma in a name must stand in quotes)"
            )
            continue
        cell = {name: value.strip() for name, value in zip(header, cells)}
        path = os.path.abspath(manifest.parent / cell["path"]) if cell["path"] else ""
        rows.append(Row(reader.line_num, path, cell["label"], cell.get("split", "").lower(),
                        cell.get("group", "")))
    if not rows and not causes:
        raise ManifestError(manifest, ["it names no file: below the header there must be rows"])
    causes += _faults(rows, "split" in header)
    if known is not None:
        allowed = {name.casefold() for name in known}
        causes += [f"line {row.line}: the label {row.label} is none of {', '.join(known)}"
                   for row in rows if row.label and row.label.casefold() not in allowed]
    if causes:
        raise ManifestError(manifest, causes)
    return rows


def _faults(rows: list[Row], has_split: bool) -> list[str]:
    causes: list[str] = []
    seen: dict[str, int] = {}
    spelling: dict[str, tuple[str, int]] = {}
    for row in rows:
        at = f"line {row.line}: "
        if not row.path:
            causes.append(at + "there is no path")
        elif not os.path.isfile(row.path):
            causes.append(at + f"there is no file {row.path}")
        else:
            first = seen.setdefault(os.path.realpath(row.path), row.line)
            if first != row.line:
                causes.append(at + f"{row.path} is the file of line {first} again")
        if not row.label:
            causes.append(at + "there is no label")
        else:
            spelt, first = spelling.setdefault(row.label.casefold(), (row.label, row.line))
            if spelt != row.label:
                causes.append(at + f"the label {row.label} is {spelt} (line {first}) in other letters")
        if has_split and row.split not in ("train", "valid"):
            causes.append(at + f"split is {row.split or 'empty'}: it must be train or valid")
    return causes + _too_few(rows) + (_split_faults(rows) if has_split else [])


def _too_few(rows: list[Row]) -> list[str]:
    lines: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row.label:
            lines[row.label].append(row.line)
    causes = [
        f"the label {name} has {len(at)} clip{'s' * (len(at) > 1)} "
        f"(line{'s' * (len(at) > 1)} {', '.join(map(str, at))}): "
        f"at least {FEWEST_CLIPS} are needed to learn and to check it"
        for name, at in lines.items() if len(at) < FEWEST_CLIPS
    ]
    if len(lines) == 1:
        causes.append(f"all rows carry the label {next(iter(lines))}: at least two labels are needed")
    return causes


def _split_faults(rows: list[Row]) -> list[str]:
    causes = [f"no row has split {part}" for part in ("train", "valid")
              if not any(row.split == part for row in rows)]
    trained = {row.label for row in rows if row.split == "train"}
    for name in sorted({row.label for row in rows if row.label} - trained):
        causes.append(f"no row with the label {name} has split train")
    sides: dict[str, Row] = {}
    for row in rows:
        first = sides.setdefault(row.group, row) if row.group else row
        if first.split != row.split:
            causes.append(f"line {row.line}: the group {row.group} is in {row.split} here and in "
                          f"{first.split} on line {first.line}: it must stay on one side")
    return causes


def label_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The output order of a network for these rows: the default model's labels when the
    rows use no others (in whatever letters), else their own, sorted."""
    own = {row.label for row in rows}
    if {name.casefold() for name in own} <= {name.casefold() for name in labels.LABELS}:
        return labels.LABELS
    return tuple(sorted(own, key=str.casefold))


def _key_of(rows: list[Row]) -> Callable[[Row], str]:
    """What may not be torn apart; see the top of this file."""
    if any(row.group for row in rows):
        return lambda row: f"group {row.group}" if row.group else f"file {row.path}"
    folders: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        folders[row.label].add(os.path.dirname(row.path))
    if min(map(len, folders.values())) >= FEWEST_CLIPS:
        return lambda row: f"folder {os.path.dirname(row.path)}"
    return lambda row: f"file {os.path.basename(row.path)}"


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows: by the CSV's own ``split``, else about 15 % of each
    label's rows to validation, whole groups at a time and in the order of their hashes.
    A label all of whose rows are one group is in training only."""
    if any(row.split for row in rows):
        return ([r for r in rows if r.split == "train"], [r for r in rows if r.split == "valid"])
    key = _key_of(rows)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    # A group that spans labels is counted under the commonest of them.
    by_label: dict[str, list[str]] = defaultdict(list)
    for name, members in groups.items():
        by_label[Counter(r.label for r in members).most_common(1)[0][0]].append(name)
    held: set[str] = set()
    for names in by_label.values():
        names.sort(key=lambda name: hashlib.sha256(os.fsencode(_portable(name))).hexdigest())
        wanted = VALID_SHARE * sum(len(groups[name]) for name in names)
        taken = 0
        for name in names[:-1]:
            if taken > 0 and taken + len(groups[name]) / 2 > wanted:
                break
            held.add(name)
            taken += len(groups[name])
    return ([r for r in rows if key(r) not in held], [r for r in rows if key(r) in held])


def _portable(name: str) -> str:
    """The same in every place that the data is copied to: the last two parts of a path."""
    return "/".join(name.split("/")[-2:])


def find_node() -> str:
    """The Node that this project pins, else one on the path."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    pinned = REPOSITORY / f"node_modules/node-linux-{machine}/bin/node"
    found = str(pinned) if pinned.exists() else shutil.which("node")
    if found is None:
        raise RuntimeError("There is no Node: run npm ci in the repository first.")
    return found


@dataclass(frozen=True)
class Cut:
    """What the decoder's front end made of one file. ``windows``: uint8 [n, bands,
    frames]; ``silent``: bool [n]; both empty where ``error`` says what was wrong."""

    windows: npt.NDArray[np.uint8]
    silent: npt.NDArray[np.bool_]
    error: str = ""


def cut_files(
    paths: list[str], profile: Path = DEFAULT_PROFILE, windows: str = "all",
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, Cut]:
    """Runs cut.ts: the front end of the service on many files, several at a time.

    ``told`` hears how many files are done.

    @raises RuntimeError when it cannot begin (no ffmpeg, a profile that is none).
    """
    found: dict[str, Cut] = {}
    none = (np.zeros((0, 0, 0), np.uint8), np.zeros(0, np.bool_))
    with tempfile.TemporaryDirectory(prefix="as-cut-") as scratch:
        listing = Path(scratch, "files")
        listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
        out = Path(scratch, "windows")
        command = [find_node(), str(CUT), "--profile", str(profile), "--windows", windows,
                   "--out", str(out)]
        with open(listing, "rb") as names, open(Path(scratch, "stderr"), "w+") as stderr:
            process = subprocess.Popen(
                command, stdin=names, stdout=subprocess.PIPE, stderr=stderr, text=True,
                encoding="utf-8",
            )
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if "error" in said:
                    found[said["file"]] = Cut(*none, said["error"]["message"])
                else:
                    tensor = Path(said["tensor"])
                    silent = np.array([window["silent"] for window in said["windows"]])
                    found[said["file"]] = Cut(np.load(tensor), silent)
                    tensor.unlink()
                told(len(found))
            if process.wait() != 0:
                stderr.seek(0)
                raise RuntimeError(f"The front end stopped: {stderr.read().strip()}")
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def to_common_form(window: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """A window of the service, uint8 [128, 128] -> decibels float16 [128, 128] in the form
    that `prepare.Clips` holds."""
    db = window.astype(np.float32) * np.float32(-prepare.FLOOR_DB / 255.0) + prepare.FLOOR_DB
    return prepare.smear(db.astype(np.float32)).astype(np.float16)


def load_manifest(manifest: Path) -> tuple[prepare.Clips, prepare.Clips]:
    """Training and validation clips of a CSV.

    Their ``names`` are the CSV's own labels, or the default model's when it uses no
    others. Files that cannot be read, and silent windows, are left out; which files and
    why is printed to stderr.

    @raises ManifestError naming the lines: see `read_rows`; also when a label has too
        few files left that can be read.
    """
    rows = read_rows(manifest)
    if any("\n" in row.path for row in rows):
        raise ManifestError(manifest, ["a path holds a line break"])

    def told(done: int) -> None:
        if done % 100 == 0 or done == len(rows):
            print(f"{done} of {len(rows)} files cut into windows", file=sys.stderr)

    cuts = cut_files([row.path for row in rows], told=told)
    shape = (prepare.BANDS, prepare.FRAMES)
    usable: list[Row] = []
    for row in rows:
        cut = cuts[row.path]
        if cut.error:
            print(f"{manifest}: line {row.line}: left out. {cut.error}", file=sys.stderr)
        elif cut.silent.all():
            print(f"{manifest}: line {row.line}: left out. The file is silent.", file=sys.stderr)
        elif cut.windows.shape[1:] != shape:
            raise RuntimeError(
                f"{DEFAULT_PROFILE} makes windows of {cut.windows.shape[1:]}, the network takes {shape}."
            )
        else:
            usable.append(row)
    too_few = _too_few(usable)
    if too_few or not usable:
        left_out = len(rows) - len(usable)
        raise ManifestError(manifest, [f"{left_out} of {len(rows)} files could not be used", *too_few])
    names = label_names(usable)
    train, valid = split_rows(usable)
    unchecked = sorted({r.label for r in train} - {r.label for r in valid})
    if unchecked:
        print(f"{manifest}: no validation clip for {', '.join(unchecked)}: all are of one group, "
              "or the CSV says so", file=sys.stderr)
    if not valid:
        raise ManifestError(manifest, ["nothing is left to validate on: every label is one group"])
    return (_clips(train, cuts, names, MOST_WINDOWS), _clips(valid, cuts, names, 1))


def _clips(
    rows: list[Row], cuts: dict[str, Cut], names: tuple[str, ...], most: int
) -> prepare.Clips:
    index = {name.casefold(): i for i, name in enumerate(names)}
    db: list[npt.NDArray[np.float16]] = []
    label: list[int] = []
    for row in rows:
        heard = cuts[row.path].windows[~cuts[row.path].silent]
        places = [len(heard) // 2] if most == 1 else _spread(len(heard), most)
        for place in places:
            db.append(to_common_form(heard[place]))
            label.append(index[row.label.casefold()])
    return prepare.Clips(
        db, np.array(label, dtype=np.int64), np.full(len(db), prepare.OWN, dtype=np.int64),
        np.zeros((len(db), 0), dtype=np.float32), names,
    )
