"""Real windows to compare networks on, cut by the service's own decoder.

Neighbouring windows overlap (a step of a quarter window), so they are many but not
independent: enough to see whether two networks give the same answers, not to measure
how good the answers are.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import import_profile
import own_audio

EXTENSIONS: Final = (".flac", ".mp3", ".wav", ".ogg", ".opus", ".aiff", ".aif", ".m4a")


@dataclass(frozen=True)
class Windows:
    windows: npt.NDArray[np.uint8]
    """[n, bands, frames]"""
    song: npt.NDArray[np.int64]
    """[n]: the index in ``names`` of the file that the window comes from"""
    names: list[str]
    step_frames: int


def cut(files: list[Path], profile: dict[str, Any], folder: Path) -> list[npt.NDArray[np.uint8]]:
    """All windows of each file under ``profile`` (a manifest's), by the decoder's cut.ts
    as its service would cut them: one uint8 [n, bands, frames] a file.

    :raises SystemExit: a file that cannot be read, by name.
    """
    form = folder / "profile.json"
    form.write_text(json.dumps(profile))
    cuts = own_audio.cut_files([str(file.resolve()) for file in files], form)
    out = []
    for file in files:
        found = cuts.get(str(file.resolve()))
        if found is None or found.error:
            raise SystemExit(f"{file} could not be cut: {found.error if found else 'no answer'}.")
        out.append(found.windows)
    return out


def overlapping(data: Path, profile_name: str, cache: Path) -> Windows:
    """The windows of every recording under ``data``, kept in ``cache`` (an .npz)."""
    shipped = import_profile.load(profile_name)
    step = max(1, int(shipped["profile"]["windowFrames"]) // 4)
    if not cache.exists():
        profile = {**shipped["profile"], "stepFrames": step, "placement": "anchored"}
        files = sorted(f for f in data.rglob("*") if f.suffix.lower() in EXTENSIONS)
        if not files:
            raise SystemExit(f"{data} holds no recordings.")
        with tempfile.TemporaryDirectory() as scratch:
            parts = cut(files, {**shipped, "profile": profile}, Path(scratch))
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            cache, windows=np.concatenate(parts), step=step,
            song=np.repeat(np.arange(len(files)), [len(p) for p in parts]),
            names=np.array([f.name for f in files]),
        )
    with np.load(cache) as z:
        return Windows(z["windows"], z["song"].astype(np.int64), [str(n) for n in z["names"]], int(z["step"]))
