"""How near the service comes to the recipe that the seed's checkpoint was trained on.

``python training/ccmusic_reference.py --audio DIR [--checkpoint save.pt [--bundle BUNDLE]] [--json OUT]``

Runs the original recipe with the original libraries (librosa, matplotlib's JPEG, Pillow
and torchvision; the steps of monetjoe/music_genre's app.py and ccmusic_eval's data.py)
and the service's (cut.ts with the ``ccmusic-mel`` profile, then `picture.Picture`, the
first part of an imported graph) on the same files, slice by slice, and says how far the
224 x 224 pictures are apart in levels of 255 and, with a checkpoint, whether the network
answers the same (with a bundle, our side of it is answered by the bundle's own graph).
Each cause is measured alone:

- ``front end``: decoder, resampler, mel and decibels, both cut and drawn alike;
- ``490 frames``: the original's slices are 490 or 491 frames, ours always 491 (only
  files where it takes 490 count);
- ``drawing``: matplotlib's figure and Pillow's resize against two constant matrices;
- ``JPEG``: the figure saved as JPEG against the same figure saved without loss.

Files shorter than a slice (11.4 s), which the original cannot analyse, are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Optional

import matplotlib

matplotlib.use("Agg")

import librosa
import librosa.display
import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import checkpoint_file
import own_audio
import vit_checkpoint
from picture import CCMUSIC, Picture

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

PROFILE: Final = own_audio.REPOSITORY / "models/profiles/ccmusic-mel.json"
EXTENSIONS: Final = (".flac", ".mp3", ".wav", ".ogg", ".opus", ".aiff", ".aif", ".m4a")
SECONDS: Final = 11.4
BANDS: Final = 128
FRAMES: Final = 491
SIZE: Final = 224
STEPS_A_LEVEL: Final = 8
"""Errors are counted in eighths of a level."""

CAUSES: Final = {
    "all together": ("original", "ours"),
    "front end": ("librosa 491", "ours"),
    "490 frames": ("librosa cut", "librosa 491"),
    "drawing": ("png", "librosa cut"),
    "JPEG": ("original", "png"),
}
"""Which two pictures are compared for each cause, the nearer to the original first."""


# --- the original recipe ----------------------------------------------------------


def decibels(path: Path) -> tuple[F32, float]:
    """Mel decibels float32 [128, frames] under the track's loudest cell, and seconds."""
    samples, rate = librosa.load(path)
    mel = librosa.feature.melspectrogram(y=samples, sr=rate)
    return librosa.power_to_db(mel, ref=np.max), librosa.get_duration(y=samples, sr=rate)


def original_slices(db: F32, seconds: float) -> list[F32]:
    """The slices that app.py cuts: as many as fit, what is left over dropped at both ends."""
    frames = db.shape[1]
    step = int(SECONDS * frames / seconds)
    count = frames // step
    begin = (frames - count * step) // 2
    return [db[:, begin + i * step : begin + (i + 1) * step] for i in range(count)]


def drawing(db: F32, form: str) -> Image.Image:
    """matplotlib's figure of a slice as it is saved, ``form`` being jpg or png."""
    librosa.display.specshow(db)
    pyplot.axis("off")
    file = io.BytesIO()
    pyplot.savefig(file, format=form, bbox_inches="tight", pad_inches=0.0)
    pyplot.close()
    return Image.open(file).convert("RGB")


_RESIZE: Final = transforms.Resize([SIZE, SIZE])
_TO_TENSOR: Final = transforms.ToTensor()


def resized(image: Image.Image) -> Tensor:
    """float32 [3, 224, 224] in 0..1, before mean and deviation."""
    return _TO_TENSOR(_RESIZE(image))


# --- ours -------------------------------------------------------------------------


def colour_indices(db: F32) -> U8:
    """A slice of librosa's decibels as the decoder would quantise it: uint8 [128, frames]."""
    low, high = db.min(), db.max()
    if low == high:
        return np.zeros(db.shape, np.uint8)
    return np.minimum((db - low) / (high - low) * np.float32(256.0), 255.0).astype(np.uint8)


class Pictures:
    """`Picture` for each number of frames that occurs."""

    def __init__(self) -> None:
        self.by_frames: dict[int, Picture] = {}

    def __call__(self, window: U8) -> Tensor:
        """float32 [3, 224, 224] in 0..1, before mean and deviation."""
        frames = window.shape[1]
        if frames not in self.by_frames:
            self.by_frames[frames] = Picture(CCMUSIC, BANDS, frames)
        return self.by_frames[frames].levels(torch.from_numpy(window)[None])[0]


# --- comparing --------------------------------------------------------------------


@dataclass
class Errors:
    """Distribution of absolute differences of pixels, in levels of 255."""

    count: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(255 * STEPS_A_LEVEL + 1, dtype=np.int64)
    )
    total: float = 0.0
    slices: int = 0
    worst: float = 0.0

    def add(self, difference: npt.NDArray[np.float64]) -> None:
        """``difference``: absolute, in levels."""
        step = np.rint(difference.ravel() * STEPS_A_LEVEL).astype(np.int64)
        self.count += np.bincount(step, minlength=len(self.count))
        self.total += float(difference.sum())
        self.slices += 1
        self.worst = max(self.worst, float(difference.mean()))

    def figures(self) -> dict[str, Any]:
        """Mean, 95th percentile and the mean of the worst slice."""
        pixels = int(self.count.sum())
        if pixels == 0:
            return {"slices": 0}
        at95 = int(np.searchsorted(np.cumsum(self.count), 0.95 * pixels))
        return {
            "slices": self.slices, "mean": round(self.total / pixels, 3),
            "p95": round(at95 / STEPS_A_LEVEL, 3), "worstSlice": round(self.worst, 3),
        }


@dataclass
class Slice:
    """The pictures of one slice by name (see `CAUSES`), float32 [3, 224, 224] in 0..1."""

    file: str
    window: U8
    """What the decoder made of it: uint8 [128, 491]."""
    pictures: dict[str, Tensor]

    def differs(self, cause: str) -> bool:
        """Whether the cause is there at all: without it the two pictures are one object."""
        a, b = CAUSES[cause]
        return self.pictures[a] is not self.pictures[b]


def slices_of(path: Path, windows: U8, indices: Errors, pictures: Pictures, most: int) -> list[Slice]:
    """All pictures of a file's slices (at most ``most``, evenly spread)."""
    db, seconds = decibels(path)
    theirs = original_slices(db, seconds)
    step = theirs[0].shape[1] if theirs else 0
    count = min(len(theirs), len(windows))
    begin = (db.shape[1] - len(windows) * FRAMES) // 2
    out = []
    for i in sorted({round(j * (count - 1) / max(1, min(most, count) - 1)) for j in range(min(most, count))}):
        same_cut = db[:, begin + i * FRAMES :][:, :FRAMES]
        if same_cut.shape[1] < FRAMES:
            continue  # the original takes 490 frames of a file that holds no 491
        own = colour_indices(same_cut)
        indices.add(np.abs(own.astype(np.float64) - windows[i]))
        found = {"ours": pictures(windows[i]), "librosa 491": pictures(own)}
        cut = pictures(colour_indices(theirs[i])) if step != FRAMES else found["librosa 491"]
        found["librosa cut"] = cut
        found["png"] = resized(drawing(theirs[i], "png"))
        found["original"] = resized(drawing(theirs[i], "jpg"))
        out.append(Slice(path.name, windows[i], found))
    return out


class Answers:
    """Top-1 of each kind of picture, slice by slice."""

    def __init__(self, checkpoint: Path, bundle: Optional[Path]) -> None:
        weights, _ = checkpoint_file.read(checkpoint)
        recognised = vit_checkpoint.recognise(weights, SIZE)
        self.network: nn.Module = vit_checkpoint.original(weights, recognised).eval()
        self.normalise = transforms.Normalize(CCMUSIC.mean, CCMUSIC.std)
        self.graph = None
        if bundle:
            manifest = json.loads((bundle / "model.json").read_text())
            self.graph = onnxruntime.InferenceSession(str(bundle / manifest["graph"]["file"]))
        self.best: dict[str, list[int]] = {}
        self.agree: dict[str, list[bool]] = {cause: [] for cause in CAUSES}
        self.files: list[str] = []

    @torch.inference_mode()
    def add(self, one: Slice) -> None:
        """Asks the network about every picture of a slice; equal ones once."""
        distinct: list[Tensor] = []
        place: dict[str, int] = {}
        for name, picture in one.pictures.items():
            same = [i for i, other in enumerate(distinct) if other is picture]
            place[name] = same[0] if same else len(distinct)
            if not same:
                distinct.append(picture)
        best = self.network(self.normalise(torch.stack(distinct))).argmax(dim=1).tolist()
        found = {name: best[at] for name, at in place.items()}
        if self.graph:
            window = {self.graph.get_inputs()[0].name: one.window[None]}
            found["ours"] = int(self.graph.run(["logits"], window)[0].argmax())
        for name, answer in found.items():
            self.best.setdefault(name, []).append(answer)
        for cause, (a, b) in CAUSES.items():
            if one.differs(cause):
                self.agree[cause].append(found[a] == found[b])
        self.files.append(one.file)

    def figures(self) -> dict[str, Any]:
        """Agreement by cause, and of the tracks' majority votes."""
        if not self.files:
            return {}
        original = self.best["original"]
        share = Counter(original).most_common()
        votes = {name: self._votes(best) for name, best in self.best.items()}
        return {
            "slices": len(original),
            "classes": len(share), "commonest": round(share[0][1] / len(original), 4),
            "agreement": {
                cause: round(float(np.mean(same)), 4) for cause, same in self.agree.items() if same
            },
            "tracks": len(votes["original"]),
            "voteAgreement": round(float(np.mean(
                [votes["ours"][file] == vote for file, vote in votes["original"].items()])), 4),
        }

    def _votes(self, best: list[int]) -> dict[str, int]:
        """The class with most slices; of equals the one that came first, as in app.py."""
        cast: dict[str, Counter[int]] = {}
        for file, answer in zip(self.files, best):
            cast.setdefault(file, Counter())[answer] += 1
        return {file: votes.most_common(1)[0][0] for file, votes in cast.items()}


def measure(files: list[Path], answers: Optional[Answers], most: int) -> dict[str, Any]:
    """All figures; the JSON that this program writes."""
    cuts = own_audio.cut_files([str(file) for file in files], PROFILE)
    errors = {cause: Errors() for cause in CAUSES}
    indices = Errors()
    pictures = Pictures()
    used, left_out, frames = 0, [], Counter[int]()
    for number, file in enumerate(files):
        cut = cuts[str(file)]
        seconds = 0.0 if cut.error else librosa.get_duration(path=file)
        if cut.error or seconds < SECONDS:
            left_out.append({"file": file.name, "why": cut.error or f"{seconds:.1f} s are no slice"})
            continue
        slices = slices_of(file, cut.windows, indices, pictures, most)
        used += bool(slices)
        for one in slices:
            frames[FRAMES - one.differs("490 frames")] += 1
            for cause, (a, b) in CAUSES.items():
                if one.differs(cause):
                    apart = (one.pictures[a] - one.pictures[b]).abs().double().numpy() * 255.0
                    errors[cause].add(apart)
            if answers:
                answers.add(one)
        print(f"{number + 1} of {len(files)} files", file=sys.stderr, flush=True)
    total = int(indices.count.sum())
    return {
        "files": used, "leftOut": left_out,
        "slicesByFrames": {str(length): n for length, n in sorted(frames.items())},
        "levels": {
            **indices.figures(),
            "cells": total, "different": total - int(indices.count[0]),
            "byMoreThanOne": int(indices.count[STEPS_A_LEVEL + 1 :].sum()),
        },
        "pixels": {cause: e.figures() for cause, e in errors.items()},
        **({"answers": answers.figures()} if answers else {}),
        "versions": {
            "librosa": librosa.__version__, "matplotlib": matplotlib.__version__,
            "pillow": Image.__version__, "torch": torch.__version__,
        },
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table to read."""
    levels, answers = found["levels"], found.get("answers")
    lines = [
        f"{found['files']} files, {sum(found['slicesByFrames'].values())} slices "
        f"({', '.join(f'{n} of {length} frames' for length, n in found['slicesByFrames'].items())}), "
        f"{len(found['leftOut'])} files left out",
        f"levels before the picture: {levels['different']} of {levels['cells']} cells differ, "
        f"{levels['byMoreThanOne']} of them by more than one level",
        f"{'pixels, levels of 255':22s} {'slices':>7s} {'mean':>7s} {'p95':>7s} {'worst':>7s}"
        + (f" {'top-1':>8s}" if answers else ""),
    ]
    for cause, f in found["pixels"].items():
        row = f"{cause:22s} {f['slices']:7d}"
        if f["slices"]:
            row += f" {f['mean']:7.2f} {f['p95']:7.2f} {f['worstSlice']:7.2f}"
            if answers:
                row += f" {100 * answers['agreement'][cause]:7.1f}%"
        lines.append(row)
    if answers:
        lines.append(
            f"the original's answers: {answers['classes']} classes, the commonest "
            f"{100 * answers['commonest']:.0f} %; majority votes of {answers['tracks']} tracks agree in "
            f"{100 * answers['voteAgreement']:.1f} %"
        )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--audio", type=Path, required=True, help="folder, searched with its subfolders")
    p.add_argument("--checkpoint", type=Path, help="a ViT checkpoint with the seed's structure")
    p.add_argument("--bundle", type=Path, help="the bundle that was imported from it")
    p.add_argument("--slices", type=int, default=64, help="at most so many of a file")
    p.add_argument("--files", type=int, default=0, help="at most so many files, evenly spread (0: all)")
    p.add_argument("--json", type=Path, help="also write the figures there")
    args = p.parse_args()
    files = sorted(f.resolve() for f in args.audio.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise SystemExit(f"no audio file under {args.audio}")
    if args.files:
        files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, args.files).astype(int))]
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.bundle and not args.checkpoint:
        raise SystemExit("--bundle needs the --checkpoint that it was imported from: it answers for the original")
    answers = Answers(args.checkpoint, args.bundle) if args.checkpoint else None
    found = measure(files, answers, args.slices)
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
