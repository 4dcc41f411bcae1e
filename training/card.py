"""Writes MODEL_CARD.md from a run's figures."""

from __future__ import annotations

from typing import Any, Sequence

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


def _recall_table(
    scores: metrics.F64, label: npt.NDArray[np.int64], run: dict[str, Any], names: Sequence[str]
) -> str:
    best = scores.argmax(axis=1)
    lines = ["| genre | training clips | validation clips | recall % | precision % | most often taken for |",
             "|---|---:|---:|---:|---:|---|"]
    table = metrics.confusion(scores, label)
    for c, name in enumerate(names):
        total = int(table[c].sum())
        if total == 0:
            continue
        answered = int((best == c).sum())
        precision = _percent(table[c, c] / answered) if answered else "-"
        wrong = table[c].copy()
        wrong[c] = 0
        other = f"{names[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.max() else "-"
        count = run.get("trainClipsByGenre", {}).get(name, "")
        lines.append(f"| {name} | {count} | {total} | {_percent(table[c, c] / total)} | {precision} | {other} |")
    return "\n".join(lines)


def _confusion_text(
    scores: metrics.F64, label: npt.NDArray[np.int64], names: Sequence[str]
) -> str:
    table = metrics.confusion(scores, label)
    short = [name[:5] for name in names]
    lines = ["true \\ answer " + " ".join(f"{s:>5s}" for s in short)]
    for c, name in enumerate(names):
        cells = " ".join(f"{v:5d}" if v else "    ." for v in table[c])
        lines.append(f"{name:<13s} {cells}")
    return "\n".join(lines)


def _coverage_table(scores: metrics.F64, label: npt.NDArray[np.int64]) -> str:
    lines = ["| threshold | answers above it % | of those right % |", "|---:|---:|---:|"]
    for c in metrics.coverage_curve(scores, label, [t / 10 for t in range(2, 10)]):
        if c["precision"] is not None:
            lines.append(f"| {c['threshold']:.1f} | {_percent(c['coverage'])} | {_percent(c['precision'])} |")
    return "\n".join(lines)


def _robustness(run: dict[str, Any]) -> str:
    """The section on short and low-passed music, where robustness.py was run."""
    rows = run.get("robustness")
    if not rows:
        return ""
    lines = ["| | top-1 % | top-3 % | mean recall % | GTZAN top-1 % | FMA top-1 % |",
             "|---|---:|---:|---:|---:|---:|"]
    for name, f in rows.items():
        parts = " | ".join(_percent(f["bySource"][part]["top1"]) for part in ("gtzan", "fma"))
        lines.append(f"| {name} | {_percent(f['top1'])} | {_percent(f['top3'])} | "
                     f"{_percent(f['meanRecall'])} | {parts} |")
    table = "\n".join(lines)
    return (
        "## Short and low-passed music\n"
        "The same validation clips, only their first seconds, looped to a window as the\n"
        f"service loops:\n\n{table}\n\n"
    )


def _not_music(run: dict[str, Any]) -> str:
    """The section on what is no music, where outliers.py was run."""
    found = run.get("outlier")
    if not found:
        return ""
    lines = ["| synthesised | clips | confident genre before % | confident genre after % | noticed % | noticed, had the kind been unknown % |",
             "|---|---:|---:|---:|---:|---:|"]
    for name, k in found["kinds"].items():
        unseen = k.get("flaggedWhenUnseen")
        lines.append(f"| {name} | {k['n']} | {_percent(k['confidentBefore'])} | {_percent(k['confidentAfter'])} | "
                     f"{_percent(k['flagged'])} | {'-' if unseen is None else _percent(unseen)} |")
    music = ["| music | clips | wrongly called no music % |", "|---|---:|---:|"]
    for name, k in found["music"].items():
        music.append(f"| {name} | {k['n']} | {_percent(k['flagged'])} |")
    missed = ", ".join(n for n, k in found["kinds"].items() if k.get("flaggedWhenUnseen", 1.0) < 0.6)
    table, false_alarms = "\n".join(lines), "\n".join(music)
    return f"""## Not music
A network that knows fifteen genres answers one of them to anything. The graph's `outlier`
output (training/outliers.py) tells what is not like the music it was trained on; above
{found['threshold']:g} the answer is `uncertain`. Synthesised audio, never a recording; "confident" is a
genre at {found['confident']:g} or more:

{table}

{false_alarms}

The last column of the first table says what happens with a kind that the detector was
not shown: {missed} would pass for music. Expect as much of what nobody thought
of (real crowds, animals, machines, sung speech), and of real speech less than of
espeak-ng's.

"""


def _real_files(run: dict[str, Any]) -> str:
    """The section on audio files, where real_files.py was run."""
    rows = run.get("audio")
    if not rows:
        return ""
    lines = ["| | files | top-1 % | top-3 % |", "|---|---:|---:|---:|"]
    for name, f in rows.items():
        lines.append(f"| {name} | {f['clips']} | {_percent(f['top1'])} | {_percent(f['top3'])} |")
    table = "\n".join(lines)
    return f"""## Real audio
Files that it was not trained on, through a front end like the service's:

{table}

Few files: a handful of songs says nothing of `all` windows against one, except that
neither is far ahead. The arrays hold 30 s of each clip, so `all` windows cannot be measured on them.

"""


def _commands(run: dict[str, Any]) -> str:
    """How train.py was called, first stage first."""
    stages = [run]
    while stages[0].get("init"):
        stages.insert(0, stages[0]["init"])
    lines = []
    for i, stage in enumerate(stages):
        options = stage["settings"]
        changed = " ".join(
            f"--{key.replace('_', '-')}" + ("" if options[key] is True else f" {options[key]:g}")
            for key in stage.get("nonDefault", [])
        )
        begin = f"--init RUN{i} " if i else ""
        lines.append(f"python training/train.py --data DIR --out RUN{i + 1} {begin}{changed}".strip()
                     + f"   # {stage['epochsDone']} epochs, {stage['minutes']:.0f} minutes")
    return "\n".join(lines)


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


def _calibration(manifest: dict[str, Any], scores: metrics.F64, label: npt.NDArray[np.int64]) -> str:
    calibration = manifest["calibration"]
    return f"""One temperature, {calibration['temperature']}, fitted on the validation clips; it is in `model.json`, the
graph's logits are raw. Expected calibration error (15 bins): {calibration['eceBefore']:.3f} before,
{calibration['ece']:.3f} after, on the clips it was fitted on.

![How often the answer was right at each confidence](reliability.png)
![Precision against coverage](coverage.png)

{_coverage_table(scores, label)}

Default threshold for `uncertain`: {manifest['threshold']}, the smallest multiple of 0.05 above which at least
two answers in three were right on validation."""


def write_own(
    *, manifest: dict[str, Any], run: dict[str, Any], scores: metrics.F64,
    label: npt.NDArray[np.int64],
) -> str:
    """The card of a network that somebody trained on audio of their own: its figures. What
    the recordings are, and who may use what was learned from them, only they can add."""
    names = manifest["labels"]
    return f"""# Model card: {manifest['name']} {manifest['version']}

Labels: {', '.join(names)}. {run['trainClips']} training windows, {run['validClips']} validation windows.

```
{_commands(run)}
```
On {run['machine']} (PyTorch {run['torch']}).

## How good it is
{_figures_table([("validation", metrics.figures(scores, label))])}

{_recall_table(scores, label, run, names)}

![Confusion matrix](confusion.png)

```
{_confusion_text(scores, label, names)}
```

## Calibration
{_calibration(manifest, scores, label)}
"""


def write(
    *, manifest: dict[str, Any], run: dict[str, Any], scores: metrics.F64,
    label: npt.NDArray[np.int64], source: npt.NDArray[np.int64], size_mb: float, ms_per_window: float, preliminary: bool,
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
    notice = (
        "\n> **Preliminary**: exported from an unfinished or early run so that the "
        "pipeline has a trained model. It is replaced by the final one.\n"
        if preliminary else ""
    )
    options = run["settings"]
    share = float(options.get("teacher_share", 0.0))
    teacher = (
        f" Targets: {_percent(1 - share)} % the clip's label (smoothed), {_percent(share)} % the\n"
        "held-out answer of a classical classifier (training/teacher.py)."
        if share > 0 else ""
    )
    tags = (
        f" Beside the genre it learned to\nname {len(labels.TAGS)} of FMA's tags, also on {run['unlabelledClips']} clips without a target\n"
        "genre (Experimental, Instrumental)."
        if run.get("unlabelledClips") else ""
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
{_commands(run)}
```
On {run['machine']} (PyTorch {run['torch']}); the processor was
shared with other work.{teacher}{tags}
`python training/make_default.py --data DIR --audio AUDIO` does all of it, the measurements and the export.
Random crops of 3 to 30 s (looped to 30 s, as the service
loops short input), random equaliser, contrast, row shift, blur, low-pass, noise floor,
masks, mixing of two clips, rare genres drawn more often (chance of a genre: clips to the
power of {options['balance']:g}), label smoothing. Afterwards the genre prior that this taught was levelled
to clips to the power of {run.get('prior', options['balance']):g} (a catalogue is not mixed like the training data). The weights
are the exponential average at the end of the schedule; **no epoch was picked by its
validation figure**.

## How good it is
Validation, one window of 30 s a clip, from the arrays:

{_figures_table(rows)}

Floor (support-vector machine on cepstral statistics, same data, training/svm_floor.py):
top-1 52.4 %, top-3 79.3 %, mean recall 50.3 %. On the five genres that both sources have, FMA's top-1 is
{gap:+.1f} points from GTZAN's: that much of the difference is the source and not the
genre (and partly the mix of the five genres, which differs).

{_recall_table(scores, label, run, labels.LABELS)}

The rare genres are measured on few clips ({smallest}): one clip more or less
moves their recall by several points.

![Confusion matrix](confusion.png)

```
{_confusion_text(scores, label, labels.LABELS)}
```

## Calibration
{_calibration(manifest, scores, label)}

{_real_files(run)}{_not_music(run)}{_source(run)}{_robustness(run)}## Known failures and limits
- Seldom recognised (recall): {weak}. The confusions above say what they are taken for.
- It always ranks its genres, whatever it hears; only `uncertain` says that it should not
  be believed. What is no music passes for music where the table above says so.
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
