"""Figures for a set of predictions, computed one way everywhere."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt

import labels
from prepare import SOURCE_NAMES

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


def recall_by_genre(scores: npt.ArrayLike, label: I64) -> dict[str, float]:
    """Share of each genre's clips whose best answer is that genre."""
    best = np.asarray(scores).argmax(axis=1)
    return {
        labels.LABELS[c]: float((best[label == c] == c).mean()) for c in np.unique(label)
    }


def by_source(scores: npt.ArrayLike, label: I64, source: I64) -> dict[str, Figures]:
    """The figures of each source alone."""
    scores = np.asarray(scores)
    return {
        name: figures(scores[source == s], label[source == s])
        for s, name in enumerate(SOURCE_NAMES)
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
    best = np.asarray(scores).argmax(axis=1)
    table = np.zeros((len(labels.LABELS), len(labels.LABELS)), dtype=np.int64)
    np.add.at(table, (label, best), 1)
    return table
