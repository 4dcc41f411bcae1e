"""Turns a training run into a model bundle.

``python training/export.py --run RUN --out models/default`` writes the two graphs over
one weights file, model.json, the numeric self-test, MODEL_CARD.md and its pictures. All
figures come from the run's own files; nothing is entered by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics as stats
import time
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import card
import figures
import graphs
import labels
import metrics
import prepare
from model import GRID, IMAGE_SIZE, GenreViT, load_network, roll_out
from outliers import OutlierScore, load_score

NAME = "acousticsense-default"
VERSION = "0.2.0"
LICENCE = (
    "Weights: under the licence of this project. The training recordings are not "
    "part of the bundle; see provenance for their terms."
)
PROVENANCE = (
    "Trained by this project from random initial weights on log-mel spectrograms of "
    "two public collections: GTZAN (fault-filtered, artist-separated split; its "
    "authors hold no rights to the recordings, which were never cleared) and "
    "FMA-small of the Free Music Archive (each track under the Creative Commons "
    "licence of its artist, some of them non-commercial). No recording and no "
    "spectrogram of one is included. R&B is no label because neither collection "
    "holds a recording of it. Whoever needs a model with cleared rights should bring "
    "their own bundle."
)
TAXONOMY = {
    "Roots": ["Blues", "Country", "Folk"],
    "Classical": ["Classical"],
    "Jazz": ["Jazz"],
    "Pop and dance": ["Disco", "Electronic", "Pop"],
    "Hip-Hop and Rap": ["Hip-Hop", "Rap"],
    "Rock and Metal": ["Metal", "Rock"],
    "World": ["Latin", "Reggae", "World"],
}
MISSING = [{
    "label": "R&B",
    "reason": "Neither collection that the model was trained on holds a recording of it, and "
              "a label that was never trained would be an invention.",
}]


def self_test_windows() -> npt.NDArray[np.uint8]:
    """Two synthetic windows uint8 [2, 128, 128]: a tilted gradient with a slow beat,
    and partials that fall with frequency. Formulas, so no recording is shipped."""
    row = np.arange(128, dtype=np.float64)[:, None]
    column = np.arange(128, dtype=np.float64)[None, :]
    first = 215 - 1.2 * row + 35 * np.sin(2 * np.pi * column / 16) * np.cos(row / 9)
    second = 200 * np.exp(-row / 70) * (0.6 + 0.4 * np.cos(2 * np.pi * row / 11 + column / 6))
    out = np.stack([first, second])
    out = out - out.max(axis=(1, 2), keepdims=True) + 255
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


class ExportedForm(nn.Module):
    """The network as the service runs it: windows uint8 [n, 128, 128] -> logits [n, classes],
    embedding [n, dim], outlier [n], attention [n, 14, 14]."""

    OUTPUTS = ("logits", "embedding", "outlier", "attention")

    def __init__(self, model: GenreViT, score: OutlierScore) -> None:
        super().__init__()
        self.model = model
        self.score = score

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        common = self.model.common(windows)
        found = self.model.features(common)
        embedding = F.normalize(found.pooled, dim=1)
        logits = self.model.head(F.gelu(found.pooled))
        outlier = self.score(found.measured)
        return logits, embedding, outlier, roll_out(found.attention)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_graph(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def milliseconds_per_window(network: onnxruntime.InferenceSession) -> float:
    """Median time for one window on one thread."""
    one = self_test_windows()[:1]
    times = []
    for _ in range(40):
        begin = time.perf_counter()
        network.run(None, {"windows": one})
        times.append((time.perf_counter() - begin) * 1000)
    return stats.median(times[5:])


def load_run(run: Path) -> tuple[ExportedForm, dict[str, Any]]:
    """The trained network with its outlier score, and all that the run says of itself."""
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    for extra in ("robustness", "source", "outlier", "audio"):
        path = run / f"{extra}.json"
        if path.exists():
            facts[extra] = json.loads(path.read_text())
    return ExportedForm(load_network(run), load_score(run / "outlier.pt")).eval(), facts


def write_graphs(form: ExportedForm, out: Path) -> npt.NDArray[np.float32]:
    """Both graphs and the weights; checks them against PyTorch, alone and in a batch.

    Returns the logits of the self-test's windows.
    """
    windows = self_test_windows()
    outputs = form.OUTPUTS
    graph = graphs.export(form, torch.from_numpy(windows), "windows", outputs)
    graphs.split(graph, {"model.onnx": outputs[:3], "explain.onnx": outputs[3:]}, out)
    with torch.no_grad():
        expected = [value.numpy() for value in form(torch.from_numpy(windows))]
    found: list[npt.NDArray[np.float32]] = []
    for name, names in (("model.onnx", outputs[:3]), ("explain.onnx", outputs[3:])):
        network = open_graph(out / name)
        together = network.run(list(names), {"windows": windows})
        alone = network.run(list(names), {"windows": windows[1:]})
        for both, one in zip(together, alone):
            worst = float(np.abs(both - expected[len(found)]).max())
            worst = max(worst, float(np.abs(one - both[1:]).max()))
            if not worst <= 1e-3:
                raise SystemExit(f"the graph's {outputs[len(found)]} differs from the network's by {worst:.2g}")
            found.append(both)
    return found[0]


def calibrate(
    logits: npt.NDArray[np.float32], label: npt.NDArray[np.int64]
) -> tuple[dict[str, Any], metrics.F64]:
    """model.json's ``calibration``, and the calibrated probabilities [n, classes]."""
    temperature = round(metrics.fit_temperature(logits, label), 4)
    before, after = metrics.softmax(logits), metrics.softmax(logits, temperature)
    return {
        "method": "temperature", "temperature": temperature,
        "data": "the validation clips, one window of 30 s each", "clips": len(label),
        "eceBefore": round(metrics.calibration_error(before, label), 4),
        "ece": round(metrics.calibration_error(after, label), 4),
        "reliability": metrics.reliability(after, label),
    }, after


def rounded(f: metrics.Figures) -> dict[str, Any]:
    return {k: v if k == "clips" else round(float(v), 4) for k, v in f.items()}  # type: ignore[arg-type]


def manifest_of(
    form: ExportedForm, names: Sequence[str], calibration: dict[str, Any],
    probability: metrics.F64, label: npt.NDArray[np.int64], source: npt.NDArray[np.int64],
    version: str, outlier_threshold: float,
) -> dict[str, Any]:
    """model.json without the hashes of its files."""
    config = form.model.config
    overall = metrics.figures(probability, label)
    ours = tuple(names) == labels.LABELS
    return {
        "format": 1, "name": NAME if ours else "own", "version": version,
        "licence": LICENCE if ours else "not stated",
        "provenance": PROVENANCE if ours else "Trained with this project's training/train.py on its user's audio.",
        "labels": list(names),
        **({"taxonomy": TAXONOMY, "missing": MISSING} if ours else {}),
        "profile": prepare.profile(),
        "graph": {
            "file": "model.onnx",
            "input": {"name": "windows", "shape": ["batch", prepare.BANDS, prepare.FRAMES],
                      "type": "uint8"},
            "outputs": {
                "logits": {"name": "logits", "shape": ["batch", len(names)]},
                "embedding": {"name": "embedding", "shape": ["batch", config.dim]},
                "outlier": {"name": "outlier", "shape": ["batch"]},
            },
            "explain": {"file": "explain.onnx",
                        "output": {"name": "attention", "shape": ["batch", GRID, GRID]}},
            "precision": "fp32",
            "imageSize": IMAGE_SIZE,
            "colour": "no colour map; rows smeared to the form the network was trained on, "
                      "re-referenced to the loudest cell, scaled to 0-1; two channels: that, "
                      "and that less each row's mean over time",
            "resize": "bilinear",
            "mean": [config.mean, 0], "std": [config.std, round(config.std / 2, 5)],
        },
        "windows": "middle",
        "aggregation": "mean",
        "calibration": calibration,
        "threshold": metrics.pick_threshold(probability, label),
        "outlierThreshold": outlier_threshold,
        "accuracy": {
            "split": "validation",
            **rounded(overall),
            "bySource": {k: rounded(v) for k, v in metrics.by_source(probability, label, source).items()},
            "perGenreRecall": {
                k: round(v, 4) for k, v in metrics.recall_by_genre(probability, label, names).items()
            },
            "ece": calibration["ece"],
        },
        "selfTest": {"input": "self-test.npy", "output": "self-test-logits.json", "tolerance": 1e-3},
    }


BUNDLE_FILES = ("model.onnx", "explain.onnx", "weights.bin", "self-test.npy", "self-test-logits.json")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--preliminary", action="store_true",
                   help="mark the bundle as one of an unfinished run")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    form, run = load_run(args.run)
    names = run.get("labels", list(labels.LABELS))
    logits = write_graphs(form, args.out)
    np.save(args.out / "self-test.npy", self_test_windows())
    (args.out / "self-test-logits.json").write_text(
        json.dumps([[round(float(v), 6) for v in row] for row in logits]) + "\n"
    )

    with np.load(args.run / "valid.npz") as z:
        valid_logits, label, source = z["logits"], z["label"], z["source"]
    calibration, probability = calibrate(valid_logits, label)
    manifest = manifest_of(
        form, names, calibration, probability, label, source,
        VERSION + ("-preliminary" if args.preliminary else ""), float(run["outlier"]["threshold"]),
    )
    manifest["files"] = {name: sha256(args.out / name) for name in BUNDLE_FILES}
    (args.out / "model.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    figures.draw_all(probability, label, args.out, manifest["threshold"], names)
    size = sum((args.out / name).stat().st_size for name in BUNDLE_FILES) / 1e6
    speed = milliseconds_per_window(open_graph(args.out / "model.onnx"))
    if manifest["name"] == NAME:
        text = card.write(
            manifest=manifest, run=run, scores=probability, label=label, source=source,
            size_mb=size, ms_per_window=speed, preliminary=args.preliminary,
        )
    else:
        text = card.write_own(manifest=manifest, run=run, scores=probability, label=label)
    (args.out / "MODEL_CARD.md").write_text(text)
    accuracy = manifest["accuracy"]
    print(f"top-1 {accuracy['top1']:.3f}  top-3 {accuracy['top3']:.3f}  mean recall "
          f"{accuracy['meanRecall']:.3f}  ECE {calibration['eceBefore']:.3f} -> {calibration['ece']:.3f} "
          f"(T {calibration['temperature']})  threshold {manifest['threshold']}  {size:.1f} MB  "
          f"{speed:.1f} ms/window")


if __name__ == "__main__":
    main()
