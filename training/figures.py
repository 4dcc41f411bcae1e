"""The card's pictures: confusion matrix, reliability, precision against coverage.

``python training/figures.py --run RUN --out DIR`` draws them from RUN/valid.npz.
export.py calls `draw_all` with the probabilities that it has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

import matplotlib
import numpy as np
from PIL import Image

import labels
import metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#222222"
_BLUE = "#2b6cb0"
_GREY = "#9aa5b1"
_STYLE: dict[str, Any] = {
    "font.size": 8, "axes.edgecolor": _GREY, "axes.labelcolor": _INK, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
}
FILES = ("confusion.png", "reliability.png", "coverage.png")


def _save(figure: "Figure", path: Path) -> None:
    """A PNG of 64 colours: a quarter of the size, no visible loss in such drawings."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def confusion_matrix(
    probability: metrics.F64, label: metrics.I64, path: Path,
    names: Sequence[str] = labels.LABELS,
) -> None:
    """Rows: the true genre, with its clips; columns: the answer. Colour: per cent of the
    row; numbers: clips."""
    table = metrics.confusion(probability, label)
    total = table.sum(axis=1, keepdims=True)
    share = table / np.maximum(total, 1)
    with plt.rc_context({**_STYLE, "axes.spines.bottom": False, "axes.spines.left": False}):
        figure, axes = plt.subplots(figsize=(6.6, 6.0), layout="constrained")
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*np.nonzero(table)):
            axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=7,
                      color="white" if share[row, column] > 0.5 else _INK)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), [f"{n} ({t})" for n, t in zip(names, total[:, 0])])
        axes.tick_params(length=0)
        axes.set_xlabel("answer")
        axes.set_ylabel("genre (validation clips)")
        _save(figure, path)


def reliability_diagram(probability: metrics.F64, label: metrics.I64, path: Path) -> None:
    """How often the answer was right at each confidence, with the 95 % Wilson interval
    of each bin; below, how many answers had that confidence."""
    some = [b for b in metrics.reliability(probability, label) if b["clips"] > 0]
    middle = np.array([(b["from"] + b["to"]) / 2 for b in some])
    clips = np.array([b["clips"] for b in some], dtype=np.float64)
    right = np.array([b["right"] for b in some]) / clips
    z = 1.96
    centre = (right + z * z / (2 * clips)) / (1 + z * z / clips)
    half = z * np.sqrt(right * (1 - right) / clips + z * z / (4 * clips**2)) / (1 + z * z / clips)
    with plt.rc_context(_STYLE):
        figure, (top, below) = plt.subplots(
            2, 1, figsize=(4.4, 4.6), height_ratios=(3, 1), sharex=True, layout="constrained"
        )
        top.plot((0, 100), (0, 100), color=_GREY, linewidth=1, linestyle="--")
        top.errorbar(100 * middle, 100 * right, fmt="o", color=_BLUE, markersize=4, linewidth=1,
                     yerr=100 * np.stack([right - centre + half, centre + half - right]).clip(0))
        top.set_xlim(0, 100)
        top.set_ylim(0, 100)
        top.set_ylabel("right %")
        error = metrics.calibration_error(probability, label)
        top.set_title(f"{len(label)} validation clips, calibration error {100 * error:.1f} %", fontsize=8)
        below.bar(100 * middle, clips, width=8, color=_BLUE)
        below.set_xlabel("confidence of the answer, after calibration %")
        below.set_ylabel("clips")
        _save(figure, path)


def coverage_diagram(
    probability: metrics.F64, label: metrics.I64, path: Path, threshold: float | None = None
) -> None:
    """Share of answers that stay above a threshold against the share of them that are
    right; ``threshold`` is marked."""
    curve = metrics.coverage_curve(probability, label, np.linspace(0, 0.95, 96).tolist())
    # A precision of fewer than 20 answers is noise.
    curve = [c for c in curve if c["answered"] >= 20]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
        axes.plot([100 * c["coverage"] for c in curve], [100 * (c["precision"] or 0) for c in curve],
                  color=_BLUE, linewidth=1.5)
        marks = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        for c in metrics.coverage_curve(probability, label, marks):
            if c["answered"] < 20 or c["precision"] is None:
                continue
            chosen = threshold is not None and abs(c["threshold"] - threshold) < 1e-6
            axes.plot(100 * c["coverage"], 100 * c["precision"], "o", color=_BLUE, markersize=4)
            axes.annotate(f"{c['threshold']:g}", (100 * c["coverage"], 100 * c["precision"]),
                          textcoords="offset points", xytext=(4, 4),
                          fontweight="bold" if chosen else "normal")
        if threshold is not None:
            at = metrics.coverage_curve(probability, label, [threshold])[0]
            if at["precision"] is not None:
                axes.plot(100 * at["coverage"], 100 * at["precision"], "o", markersize=9,
                          markerfacecolor="none", color=_INK)
        axes.set_xlim(0, 103)
        axes.set_ylim(min([40.0, *(100 * (c["precision"] or 0) for c in curve)]), 100)
        axes.set_xlabel("answers at or above the threshold %")
        axes.set_ylabel("of those right %")
        axes.set_title("numbers: thresholds; circle: the default", fontsize=8)
        _save(figure, path)


def draw_all(
    probability: metrics.F64, label: metrics.I64, directory: Path,
    threshold: float | None = None, names: Sequence[str] = labels.LABELS,
) -> list[Path]:
    """The three pictures, as `FILES`. ``probability``: calibrated, float64 [n, classes]."""
    paths = [directory / name for name in FILES]
    confusion_matrix(probability, label, paths[0], names)
    reliability_diagram(probability, label, paths[1])
    coverage_diagram(probability, label, paths[2], threshold)
    return paths


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with np.load(args.run / "valid.npz") as z:
        logits, label = z["logits"], z["label"]
    probability = metrics.softmax(logits, metrics.fit_temperature(logits, label))
    for path in draw_all(probability, label, args.out, metrics.pick_threshold(probability, label)):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
