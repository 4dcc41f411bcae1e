"""Soft targets for the training clips from a classical classifier.

Kernel ridge regression (Gaussian kernel) on the statistics of model.py answers for
every training clip while its neighbours are held out: five folds over runs of
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


@torch.no_grad()
def statistics(clips: prepare.Clips) -> F32:
    """float32 [n, size] of every clip's plain window."""
    windows = prepare.plain_windows(clips)
    measure = WindowStatistics()
    return torch.cat([measure(w.float() / 255.0) for w in windows.split(256)]).numpy()


def answer(x: F32, y: I64, asked: F32) -> metrics.F64:
    """Scores [m, classes] for ``asked`` [m, size] after training on ``x`` and ``y``."""
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, asked = (np.clip((v - centre) / spread, -4, 4) for v in (x, asked))

    def kernel(a: F32, b: F32) -> F32:
        distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
        return np.exp(-distance / a.shape[1])

    # Rare genres count more, by the square root: as in the network's training.
    weight = np.bincount(y, minlength=len(labels.LABELS))[y] ** -0.5
    weight = weight / weight.mean()
    target = 2.0 * np.eye(len(labels.LABELS))[y] - 1.0
    solved = np.linalg.solve(kernel(x, x) + np.diag(_RIDGE / weight), target)
    return kernel(asked, x) @ solved


def temperature(scores: metrics.F64, y: I64) -> float:
    """Scale that makes softmax(scores / t) the best probabilities for ``y``."""

    def loss(log_t: float) -> float:
        p = metrics.softmax(scores, float(np.exp(log_t)))
        return float(-np.log(p[np.arange(len(y)), y] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 3.0), method="bounded").x))


def soft_targets(train: prepare.Clips) -> F32:
    """Held-out probabilities float32 [n, classes] for the training clips."""
    x, y = statistics(train), train.label
    scores = np.zeros((len(y), len(labels.LABELS)))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for rest, part in folds.split(x, y, np.arange(len(y)) // RUN_LENGTH):
        scores[part] = answer(x[rest], y[rest], x[part])
    print("teacher on held-out training clips:", metrics.figures(scores, y), flush=True)
    return metrics.softmax(scores, temperature(scores, y)).astype(np.float32)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    args = p.parse_args()
    train = prepare.load_split(args.data, "train").labelled()
    valid = prepare.load_split(args.data, "valid").labelled()
    soft_targets(train)
    scores = answer(statistics(train), train.label, statistics(valid))
    print("validation clips:", metrics.figures(scores, valid.label),
          metrics.by_source(scores, valid.label, valid.source))


if __name__ == "__main__":
    main()
