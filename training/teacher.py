"""Soft targets for the training clips from classical classifiers.

``python training/teacher.py --data DIR --out TEACHER.npz``. A support-vector
machine, a logistic regression and a forest of random trees on the statistics of
model.py answer for every training clip while its neighbours are held out (five
folds over runs of neighbouring clips, so that an album or artist is not asked about
with itself in training). The validation part is not used, except to print how good
the ensemble is on it when trained on all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import labels
import metrics
import prepare
from model import WindowStatistics

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

RUN_LENGTH = 12
"""Clips are stored in the order of their ids within a genre, so that neighbours
share albums and artists: runs of this many stay in one fold."""


@torch.no_grad()
def statistics(clips: prepare.Clips) -> F32:
    """float32 [n, size] of every clip's plain window."""
    windows = prepare.plain_windows(clips)
    measure = WindowStatistics()
    return torch.cat([measure(w.float() / 255.0) for w in windows.split(256)]).numpy()


def answer(x: F32, y: I64, asked: F32) -> list[metrics.F64]:
    """Scores [m, classes] of the three classifiers, trained on ``x``, for ``asked``."""
    svm = make_pipeline(StandardScaler(), SVC(C=5.0, class_weight="balanced"))
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.003, max_iter=60, class_weight="balanced")
    )
    forest = ExtraTreesClassifier(
        300, min_samples_leaf=3, class_weight="balanced", random_state=0
    )
    return [
        svm.fit(x, y).decision_function(asked),
        np.log(linear.fit(x, y).predict_proba(asked) + 1e-6),
        np.log(forest.fit(x, y).predict_proba(asked) + 1e-3),
    ]


def temperature(scores: metrics.F64, y: I64) -> float:
    """Scale that makes softmax(scores / t) the best probabilities for ``y``."""

    def loss(log_t: float) -> float:
        p = metrics.softmax(scores, float(np.exp(log_t)))
        return float(-np.log(p[np.arange(len(y)), y] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 3.0), method="bounded").x))


def make(train: prepare.Clips, out: Path) -> None:
    """Writes to ``out``: ``probability`` float32 [n, classes], the held-out answers
    for the training clips, and ``heat`` [3], the classifiers' temperatures."""
    x, y = statistics(train), train.label
    groups = np.arange(len(y)) // RUN_LENGTH
    held_out = [np.zeros((len(y), len(labels.LABELS))) for _ in range(3)]
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for rest, part in folds.split(x, y, groups):
        for all_scores, scores in zip(held_out, answer(x[rest], y[rest], x[part])):
            all_scores[part] = scores
    heat = [temperature(scores, y) for scores in held_out]
    probability = np.mean([metrics.softmax(s, t) for s, t in zip(held_out, heat)], axis=0)
    print("teacher on held-out training clips:", metrics.figures(probability, y), flush=True)
    np.savez(out, probability=probability.astype(np.float32), heat=np.array(heat))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    torch.set_num_threads(1)
    train = prepare.load_split(args.data, "train").labelled()
    valid = prepare.load_split(args.data, "valid").labelled()
    make(train, args.out)
    with np.load(args.out) as z:
        heat = z["heat"]
    final = answer(statistics(train), train.label, statistics(valid))
    check = np.mean([metrics.softmax(s, t) for s, t in zip(final, heat)], axis=0)
    print("validation clips:", metrics.figures(check, valid.label),
          metrics.by_source(check, valid.label, valid.source))


if __name__ == "__main__":
    main()
