"""Writes MODEL_CARD.md from a run's figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import labels
import metrics


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _figures_table(rows: list[tuple[str, metrics.Figures]]) -> str:
    lines = ["| | clips | top-1 % | top-3 % | mean recall % |", "|---|---:|---:|---:|---:|"]
    for name, f in rows:
        lines.append(f"| {name} | {f['clips']} | {_percent(f['top1'])} | "
                     f"{_percent(f['top3'])} | {_percent(f['meanRecall'])} |")
    return "\n".join(lines)


def _recall_table(scores: metrics.F64, label: npt.NDArray[np.int64], run: dict[str, Any]) -> str:
    best = scores.argmax(axis=1)
    lines = ["| genre | training clips | validation clips | recall % | precision % | most often taken for |",
             "|---|---:|---:|---:|---:|---|"]
    table = metrics.confusion(scores, label)
    for c, name in enumerate(labels.LABELS):
        total = int(table[c].sum())
        if total == 0:
            continue
        answered = int((best == c).sum())
        precision = _percent(table[c, c] / answered) if answered else "-"
        wrong = table[c].copy()
        wrong[c] = 0
        other = f"{labels.LABELS[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.max() else "-"
        count = run.get("trainClipsByGenre", {}).get(name, "")
        lines.append(f"| {name} | {count} | {total} | {_percent(table[c, c] / total)} | {precision} | {other} |")
    return "\n".join(lines)


def _confusion_text(scores: metrics.F64, label: npt.NDArray[np.int64]) -> str:
    table = metrics.confusion(scores, label)
    short = [name[:5] for name in labels.LABELS]
    lines = ["true \\ answer " + " ".join(f"{s:>5s}" for s in short)]
    for c, name in enumerate(labels.LABELS):
        cells = " ".join(f"{v:5d}" if v else "    ." for v in table[c])
        lines.append(f"{name:<13s} {cells}")
    return "\n".join(lines)


def _coverage_table(scores: metrics.F64, label: npt.NDArray[np.int64]) -> str:
    confidence = scores.max(axis=1)
    right = scores.argmax(axis=1) == label
    lines = ["| threshold | answers above it % | of those right % |", "|---:|---:|---:|"]
    for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        above = confidence >= t
        if above.any():
            lines.append(f"| {t:.1f} | {_percent(above.mean())} | {_percent(right[above].mean())} |")
    return "\n".join(lines)


def _robustness(run: dict[str, Any]) -> str:
    """The section on short and low-passed music, where robustness.py was run."""
    rows = run.get("robustness")
    if not rows:
        return ""
    table = _figures_table([(name, f) for name, f in rows.items()])
    return (
        "## Short and low-passed music\n"
        "The same validation clips, only their first seconds, looped to a window as the\n"
        f"service loops:\n\n{table}\n\n"
    )


def _source(run: dict[str, Any]) -> str:
    """The section on whether the collection is heard, where source_check.py was run."""
    found = run.get("source")
    if not found:
        return ""
    return f"""## Genre or collection?
Ten genres come from one collection only, so a network can learn how each collection was
cut (window length, bands) instead of how a genre sounds. {found['songs']} songs of the Free Music
Archive, {found['windows']} windows, were cut both as the stored FMA arrays were and as the service
cuts everything: answers that only GTZAN has, {_percent(found['gtzanOnlyAnswersAsArrays'])} % against {_percent(found['gtzanOnlyAnswersAsService'])} %; probability on
them, {_percent(found['gtzanOnlyProbabilityAsArrays'])} % against {_percent(found['gtzanOnlyProbabilityAsService'])} %; the same answer to both in {_percent(found['sameAnswer'])} %. (An earlier network
without the smearing inside the graph: answers 0 % against 50 %, probability 1 % against
48 %. Its validation figures looked better and were worth less.) The width of the smear
was fitted on these same songs and 30 GTZAN clips, without their labels: seven songs are
a check, no proof.

"""


def write(
    *, manifest: dict[str, Any], run: dict[str, Any], scores: metrics.F64,
    label: npt.NDArray[np.int64], source: npt.NDArray[np.int64], ece_before: float,
    size_mb: float, ms_per_window: float, preliminary: bool,
) -> str:
    """The card as Markdown. ``scores``: calibrated probabilities [n, classes]."""
    sources = metrics.by_source(scores, label, source)
    shared = metrics.shared_genres(scores, label, source)
    gap = 100 * (shared["fma"]["top1"] - shared["gtzan"]["top1"])
    recall = metrics.recall_by_genre(scores, label)
    weak = ", ".join(
        f"{n} ({100 * r:.0f} %)" for n, r in sorted(recall.items(), key=lambda i: i[1]) if r < 0.36
    )
    rows = [("all", metrics.figures(scores, label)), ("GTZAN", sources["gtzan"]),
            ("FMA", sources["fma"]), ("five shared genres, GTZAN", shared["gtzan"]),
            ("five shared genres, FMA", shared["fma"])]
    calibration = manifest["calibration"]["temperature"]
    notice = (
        "\n> **Preliminary**: exported from an unfinished or early run so that the "
        "pipeline has a trained model. It is replaced by the final one.\n"
        if preliminary else ""
    )
    options = run["settings"]
    changed = " ".join(
        f"--{key.replace('_', '-')} {options[key]:g}" for key in run.get("nonDefault", [])
    )
    command = f"python training/train.py --data DIR --out RUN {changed}".strip()
    share = float(options.get("teacher_share", 0.0))
    teacher = (
        f" Targets: {_percent(1 - share)} % the clip's label (smoothed), {_percent(share)} % the\n"
        "held-out answer of a classical classifier (training/teacher.py)."
        if share > 0 else ""
    )
    test_sizes = sorted((int((label == c).sum()), n) for c, n in enumerate(labels.LABELS))
    smallest = ", ".join(f"{n} ({k})" for k, n in test_sizes[:4])
    return f"""# Model card: {manifest['name']} {manifest['version']}
{notice}
Says which of {len(labels.LABELS)} genres a piece of music belongs to, from 30 s of it at a time.
A Vision Transformer (14 x 14 patch tokens at 224 x 224, behind a small convolutional
stem), {run['parameters'] / 1e6:.2f} million parameters, {size_mb:.1f} MB, float32 ONNX.
{ms_per_window:.0f} ms a window on one thread of the machine below (ONNX Runtime, CPU; median, machine not idle).

Labels: {', '.join(labels.LABELS)}.

## What it was trained on
- **GTZAN**: ten genres, 30 s clips, the public fault-filtered and artist-separated
  split. The collectors of GTZAN hold **no rights to its recordings and cleared none**.
- **FMA-small**: tracks of the Free Music Archive, the first 30 s. Each is under the
  **Creative Commons licence its artist chose; some of these forbid commercial use**.
- Both as stored log-mel spectrograms. No recording and no spectrogram is in this
  project. Whether weights trained on such recordings may be used for a given purpose
  is for the user to judge; whoever needs cleared rights should bring another bundle.
- Blues, Classical, Country, Disco and Jazz come from GTZAN only; Electronic, Folk,
  Latin, Rap and World from FMA only. The rest comes from both. FMA's sub-genres decide
  on Rap, Latin, Metal and Reggae; what remains of its International is World.
- **There is no R&B**: neither collection holds a recording of it. A label that was
  never trained would be an invention.
- {run['trainClips']} training clips with a genre, {run['validClips']} validation clips; no artist (GTZAN) and
  no run of neighbouring tracks (FMA: an album) is on both sides. The validation clips
  were used to compare a handful of configurations (training/EXPERIMENTS.md), to fit one
  temperature and to place the threshold: their figures are slightly kind. No test part
  was looked at.

## How it was trained
```
{command}
python training/export.py --run RUN --out models/default
```
{run['epochsDone']} epochs in {run['minutes']:.0f} minutes on {run['machine']} (PyTorch {run['torch']}), no GPU. The processor was
shared with other work.{teacher} Random crops of 3 to 30 s (looped to 30 s, as the service
loops short input), random equaliser, contrast, row shift, blur, low-pass, noise floor,
masks, mixing of two clips, square-root class balancing, label smoothing. The weights
are the exponential average at the end of the schedule; **no epoch was picked by its
validation figure**.

## How good it is
Validation, one window of 30 s a clip, from the arrays:

{_figures_table(rows)}

Floor (support-vector machine on cepstral statistics, same data): top-1 52.4 %, top-3
78.5 %, mean recall 50.3 %. On the five genres that both sources have, FMA's top-1 is
{gap:+.1f} points from GTZAN's: that much of the difference is the source and not the
genre (and partly the mix of the five genres, which differs).

{_recall_table(scores, label, run)}

The rare genres are measured on few clips ({smallest}): one clip more or less
moves their recall by several points.

```
{_confusion_text(scores, label)}
```

## Calibration
One temperature, {calibration}, fitted on the validation clips; it is in `model.json`, the
graph's logits are raw. Expected calibration error (15 bins): {ece_before:.3f} before,
{manifest['accuracy']['ece']:.3f} after, on the clips it was fitted on.

{_coverage_table(scores, label)}

Default threshold for `uncertain`: {manifest['threshold']}, the smallest multiple of 0.05 above which at least
two answers in three were right on validation.

{_source(run)}{_robustness(run)}## Known failures and limits
- Seldom recognised (recall): {weak}. The confusions above say what they are taken for.
- It always answers with one of its genres. Speech, noise, tones and silence are not
  recognised as "not music"; no out-of-distribution score is part of this version.
- Pop is whatever FMA's artists and GTZAN called so, and it runs into Rock, Electronic
  and Folk. Genre names of FMA were given by the artists: part of the "errors" are
  disagreements about words.
- Under 8 s the answer is markedly worse.
- Western recordings of the 1950s to 2010s dominate. World holds very different music
  under one name. Latin, Rap and GTZAN's five own genres have 42 to 139 training clips.
- A column every 234 ms: rhythm faster than that is seen only by its statistics.
- The ten one-source genres can still be told partly by how their source sounds (year,
  recording, mastering); smearing and augmentation remove the cut, not that.
- All validation figures are on stored arrays brought to one form. Real audio through the
  service comes close to that form and is not identical.
"""
