"""Figures for a set of predictions, computed one way everywhere."""

from __future__ import annotations

from typing import Sequence, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

import labels
from prepare import SOURCE_NAMES

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class Figures(TypedDict):
    """Shares between 0 and 1; ``meanRecall`` is over the genres present."""

    clips: int
    top1: float
    top3: float
    meanRecall: float


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> F64:
    """Probabilities [n, classes] of logits [n, classes]."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def figures(scores: npt.ArrayLike, label: I64) -> Figures:
    """Top-1, top-3 and mean per-genre recall of scores [n, classes]."""
    scores = np.asarray(scores)
    order = np.argsort(-scores, axis=1)
    hit = order[:, 0] == label
    hit3 = (order[:, :3] == label[:, None]).any(axis=1)
    recall = [hit[label == c].mean() for c in np.unique(label)]
    return {
        "clips": int(len(label)),
        "top1": float(hit.mean()),
        "top3": float(hit3.mean()),
        "meanRecall": float(np.mean(recall)),
    }


def recall_by_genre(
    scores: npt.ArrayLike, label: I64, names: Sequence[str] = labels.LABELS
) -> dict[str, float]:
    """Share of each genre's clips whose best answer is that genre."""
    best = np.asarray(scores).argmax(axis=1)
    return {
        names[c]: float((best[label == c] == c).mean()) for c in np.unique(label)
    }


def by_source(scores: npt.ArrayLike, label: I64, source: I64) -> dict[str, Figures]:
    """The figures of each source that is there, alone."""
    scores = np.asarray(scores)
    return {
        name: figures(scores[source == s], label[source == s])
        for s, name in enumerate(SOURCE_NAMES)
        if (source == s).any()
    }


def shared_genres(scores: npt.ArrayLike, label: I64, source: I64) -> dict[str, Figures]:
    """The figures of each source on the five genres that both have. A gap here is
    the source and not the genre."""
    shared = np.isin(label, [labels.INDEX[name] for name in labels.SHARED_LABELS])
    return by_source(np.asarray(scores)[shared], label[shared], source[shared])


def calibration_error(probability: F64, label: I64, bins: int = 15) -> float:
    """Expected calibration error of the best answer, in equal-width bins."""
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == label
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        members = which == b
        if members.any():
            total += members.mean() * abs(right[members].mean() - confidence[members].mean())
    return float(total)


def confusion(scores: npt.ArrayLike, label: I64) -> I64:
    """Counts [true genre, answered genre]."""
    scores = np.asarray(scores)
    best = scores.argmax(axis=1)
    table = np.zeros((scores.shape[1], scores.shape[1]), dtype=np.int64)
    np.add.at(table, (label, best), 1)
    return table


class Coverage(TypedDict):
    """Of the answers at or above ``threshold``: their share of all (``coverage``), and how
    many of them are right (``precision``; None where there is none)."""

    threshold: float
    answered: int
    coverage: float
    precision: float | None


def coverage_curve(probability: F64, label: I64, thresholds: Sequence[float]) -> list[Coverage]:
    """What is gained in precision, and lost in coverage, by each threshold on the
    confidence (the greatest of the probabilities [n, classes])."""
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == label
    out: list[Coverage] = []
    for threshold in thresholds:
        above = confidence >= threshold
        out.append({
            "threshold": round(float(threshold), 4),
            "answered": int(above.sum()),
            "coverage": float(above.mean()),
            "precision": float(right[above].mean()) if above.any() else None,
        })
    return out


Bin = TypedDict("Bin", {"from": float, "to": float, "clips": int, "right": int})
"""Answers whose confidence lies in [from, to), the last bin closed; how many are right."""


def reliability(probability: F64, label: I64, bins: int = 10) -> list[Bin]:
    """Equal-width bins of the confidence from 0 to 1, empty ones too: what
    ``calibration.reliability`` of model.json holds."""
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == label
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {"from": round(b / bins, 4), "to": round((b + 1) / bins, 4),
         "clips": int((which == b).sum()), "right": int(right[which == b].sum())}
        for b in range(bins)
    ]


def fit_temperature(logits: F32, label: I64) -> float:
    """The one temperature that minimises validation negative log-likelihood."""

    def loss(log_t: float) -> float:
        p = softmax(logits, float(np.exp(log_t)))
        return float(-np.log(p[np.arange(len(label)), label] + 1e-12).mean())

    found = minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded")
    return float(np.exp(found.x))


def pick_threshold(probability: F64, label: I64) -> float:
    """Smallest multiple of 0.05 above which at least two answers in three are right."""
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == label
    for step in range(2, 19):
        above = confidence >= step * 0.05
        if above.any() and right[above].mean() >= 2 / 3:
            return round(step * 0.05, 2)
    return 0.9
