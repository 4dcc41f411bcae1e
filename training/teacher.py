"""Soft targets for the training clips from a classical classifier.

Kernel ridge regression (Gaussian kernel) on the statistics of model.py (and, where
asked, on spectro-temporal modulations) answers for every training clip while its neighbours are held out: five folds over runs of
neighbouring clips, so that an album or an artist is not asked about with itself in
training. Its mistakes say which genres sound alike, which a bare label does not. The
validation part is not used, except to print how good the teacher is on it:
``python training/teacher.py --data DIR``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from scipy.optimize import minimize_scalar
from sklearn.model_selection import StratifiedGroupKFold

import labels
import metrics
import prepare
from model import WindowStatistics

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

RUN_LENGTH = 12
"""Clips are stored in the order of their ids within a genre, so that neighbours
share albums and artists: runs of this many stay in one fold."""

_RIDGE = 0.3


_REACH = 16
_MODULATIONS = (
    *((0, t) for t in (1, 2, 4, 8, 16)), *((f, 0) for f in (1, 2, 4, 8)),
    *((f, sign * t) for f, t in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (4, 4), (4, 8), (8, 4))
      for sign in (1, -1)),
)
"""Ripples over rows and columns, in cycles per 32 cells; a minus sign: falling."""
_ZONES = 16


def _ripples() -> list[Tensor]:
    """Complex Gabor kernels [33, 33], one for each of `_MODULATIONS`, about half a cycle wide."""
    place = torch.arange(2 * _REACH + 1, dtype=torch.float32) - _REACH
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    out = []
    for f, t in _MODULATIONS:
        width = min(7.0, 16.0 / float(np.hypot(f, t)))
        over_rows, over_columns = width if f else 2.0, width if t else 2.0
        bump = torch.exp(-0.5 * ((rows / over_rows) ** 2 + (columns / over_columns) ** 2))
        bump = bump / bump.sum()
        turn = 2 * torch.pi * (f * rows + t * columns) / 32
        real = bump * torch.cos(turn)
        # No answer to a constant.
        out.append(torch.complex(real - bump * real.sum(), bump * torch.sin(turn)))
    return out


def modulations(windows: Tensor) -> Tensor:
    """Spectro-temporal modulation: uint8 [n, 128, 128] -> [n, 864], the logarithm of each
    ripple's mean strength, and of its deviation over time, in 16 zones of rows.
    After Chi, Ru and Shamma 2005, https://doi.org/10.1121/1.1945807"""
    n, side = windows.shape[0], 128 + 2 * _REACH
    x = F.pad(windows.float().unsqueeze(1) * (7.0 / 255.0), (_REACH,) * 4, mode="replicate")
    spectrum = torch.fft.fft2(x[:, 0])
    out = []
    for kernel in _ripples():
        answer = torch.fft.ifft2(spectrum * torch.fft.fft2(kernel, s=(side, side)))
        strength = answer[:, 2 * _REACH :, 2 * _REACH :].abs()
        for over_time in (strength.mean(dim=2), strength.std(dim=2)):
            out.append(over_time.reshape(n, _ZONES, -1).mean(dim=2).add(0.05).log())
    return torch.cat(out, dim=1)


@torch.no_grad()
def statistics(clips: prepare.Clips, modulated: bool = False) -> F32:
    """float32 [n, size] of every clip's plain window; ``modulated``: `modulations` too."""
    measure = WindowStatistics()
    rows = []
    for windows in prepare.plain_windows(clips).split(64):
        parts = [measure(windows.float() / 255.0)]
        if modulated:
            parts.append(modulations(windows))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows).numpy()


def answer(x: F32, y: I64, asked: F32, classes: int = len(labels.LABELS)) -> metrics.F64:
    """Scores [m, classes] for ``asked`` [m, size] after training on ``x`` and ``y``."""
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, asked = (np.clip((v - centre) / spread, -4, 4) for v in (x, asked))

    def kernel(a: F32, b: F32) -> F32:
        distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
        return np.exp(-distance / a.shape[1])

    # Rare genres count more, by the square root: as in the network's training.
    weight = np.bincount(y, minlength=classes)[y] ** -0.5
    weight = weight / weight.mean()
    target = 2.0 * np.eye(classes)[y] - 1.0
    solved = np.linalg.solve(kernel(x, x) + np.diag(_RIDGE / weight), target)
    return kernel(asked, x) @ solved


def temperature(scores: metrics.F64, y: I64) -> float:
    """Scale that makes softmax(scores / t) the best probabilities for ``y``."""

    def loss(log_t: float) -> float:
        p = metrics.softmax(scores, float(np.exp(log_t)))
        return float(-np.log(p[np.arange(len(y)), y] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 3.0), method="bounded").x))


def soft_targets(train: prepare.Clips, modulated: bool = False) -> F32:
    """Held-out probabilities float32 [n, classes] for the training clips."""
    x, y = statistics(train, modulated), train.label
    scores = np.zeros((len(y), len(train.names)))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for rest, part in folds.split(x, y, np.arange(len(y)) // RUN_LENGTH):
        scores[part] = answer(x[rest], y[rest], x[part], len(train.names))
    print("teacher on held-out training clips:", metrics.figures(scores, y), flush=True)
    return metrics.softmax(scores, temperature(scores, y)).astype(np.float32)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--modulations", action="store_true")
    args = p.parse_args()
    train = prepare.load_split(args.data, "train").labelled()
    valid = prepare.load_split(args.data, "valid").labelled()
    soft_targets(train, args.modulations)
    scores = answer(
        statistics(train, args.modulations), train.label, statistics(valid, args.modulations)
    )
    print("validation clips:", metrics.figures(scores, valid.label),
          metrics.by_source(scores, valid.label, valid.source))


if __name__ == "__main__":
    main()
