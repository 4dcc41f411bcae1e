"""Turns a training run into a model bundle.

``python training/export.py --run RUN --out models/default`` writes model.onnx,
model.json, the numeric self-test and MODEL_CARD.md. All figures come from the
run's own validation logits; nothing is entered by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics as stats
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from scipy.optimize import minimize_scalar

import card
import labels
import metrics
import prepare
from model import IMAGE_SIZE, GenreViT, ModelConfig

VERSION = "0.1.0"
OPSET = 18
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


def profile() -> dict[str, Any]:
    """What the service's decoder has to do: model.json's ``profile``."""
    return {
        "sampleRate": prepare.SAMPLE_RATE, "channels": "mean", "resampler": "soxr",
        "window": "hann", "fftSize": prepare.FFT_SIZE, "hopLength": prepare.HOP,
        "centered": False, "padMode": "none", "power": 2,
        "melScale": "slaney", "melNorm": "slaney", "melBands": prepare.BANDS,
        "minHz": 0, "maxHz": prepare.SAMPLE_RATE // 2,
        "reference": "max", "scope": "window", "floorDb": int(prepare.FLOOR_DB),
        "quantisation": "linear-uint8",
        "windowFrames": prepare.FRAMES, "stepFrames": prepare.FRAMES // 2,
        "shortInput": "loop",
    }


def fit_temperature(logits: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> float:
    """The one temperature that minimises validation negative log-likelihood."""

    def loss(log_t: float) -> float:
        p = metrics.softmax(logits, float(np.exp(log_t)))
        return float(-np.log(p[np.arange(len(label)), label] + 1e-12).mean())

    found = minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded")
    return float(np.exp(found.x))


def pick_threshold(probability: metrics.F64, label: npt.NDArray[np.int64]) -> float:
    """Smallest multiple of 0.05 above which at least two answers in three are right."""
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == label
    for step in range(2, 19):
        above = confidence >= step * 0.05
        if above.any() and right[above].mean() >= 2 / 3:
            return round(step * 0.05, 2)
    return 0.9


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


def export_onnx(model: GenreViT, path: Path) -> None:
    """Writes the graph with its weights in one file; the batch is free."""
    example = torch.from_numpy(self_test_windows())
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        model, (example,), input_names=["windows"], output_names=["logits", "embedding"],
        dynamic_shapes={"windows": {0: batch}}, opset_version=OPSET, dynamo=True,
        external_data=False, verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)
    graph = onnx.load(str(path))
    # Paths and source lines of the exporting machine are of no use to a reader.
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.graph.value_info, *graph.graph.initializer,
                  *graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]
    graph.doc_string = ""
    # Readers older than the writing library accept this version.
    graph.ir_version = min(graph.ir_version, 10)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def milliseconds_per_window(path: Path) -> float:
    """Median time for one window on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    one = self_test_windows()[:1]
    times = []
    for _ in range(40):
        begin = time.perf_counter()
        network.run(None, {"windows": one})
        times.append((time.perf_counter() - begin) * 1000)
    return stats.median(times[5:])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--preliminary", action="store_true",
                   help="mark the bundle as one of an unfinished run")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    saved = torch.load(args.run / "model.pt", weights_only=True)
    run: dict[str, Any] = json.loads((args.run / "run.json").read_text())
    for extra in ("robustness", "source"):
        path = args.run / f"{extra}.json"
        if path.exists():
            run[extra] = json.loads(path.read_text())
    config = ModelConfig.from_dict(saved["config"])
    model = GenreViT(config)
    model.load_state_dict(saved["state"])
    model.eval()

    onnx_path = args.out / "model.onnx"
    export_onnx(model, onnx_path)
    windows = self_test_windows()
    network = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    logits, embedding = network.run(["logits", "embedding"], {"windows": windows})
    with torch.no_grad():
        expected, expected_embedding = model(torch.from_numpy(windows))
    worst = float(np.abs(logits - expected.numpy()).max())
    worst_embedding = float(np.abs(embedding - expected_embedding.numpy()).max())
    lone = network.run(["logits"], {"windows": windows[1:]})[0]
    if max(worst, worst_embedding, float(np.abs(lone - logits[1:]).max())) > 1e-3:
        raise SystemExit(f"the exported graph differs from the network by {worst:.2g}")
    np.save(args.out / "self-test.npy", windows)
    (args.out / "self-test-logits.json").write_text(
        json.dumps([[round(float(v), 6) for v in row] for row in logits]) + "\n"
    )

    with np.load(args.run / "valid.npz") as z:
        valid_logits, label, source = z["logits"], z["label"], z["source"]
    temperature = round(fit_temperature(valid_logits, label), 4)
    before = metrics.softmax(valid_logits)
    after = metrics.softmax(valid_logits, temperature)
    threshold = pick_threshold(after, label)
    overall = metrics.figures(after, label)
    sources = metrics.by_source(after, label, source)
    ece_before = metrics.calibration_error(before, label)
    ece = metrics.calibration_error(after, label)

    def rounded(f: metrics.Figures) -> dict[str, Any]:
        return {k: v if k == "clips" else round(float(v), 4) for k, v in f.items()}  # type: ignore[arg-type]

    files = {n: sha256(args.out / n) for n in ("model.onnx", "self-test.npy", "self-test-logits.json")}
    manifest = {
        "format": 1,
        "name": "acousticsense-default",
        "version": VERSION + ("-preliminary" if args.preliminary else ""),
        "licence": LICENCE,
        "provenance": PROVENANCE,
        "labels": list(labels.LABELS),
        "profile": profile(),
        "graph": {
            "file": "model.onnx",
            "input": {"name": "windows", "shape": ["batch", prepare.BANDS, prepare.FRAMES],
                      "type": "uint8"},
            "outputs": {
                "logits": {"name": "logits", "shape": ["batch", len(labels.LABELS)]},
                "embedding": {"name": "embedding", "shape": ["batch", config.dim]},
            },
            "imageSize": IMAGE_SIZE,
            "colour": "no colour map; rows smeared to the form the network was trained on, "
                      "re-referenced to the loudest cell, scaled to 0-1; two channels: that, "
                      "and that less each row's mean over time",
            "resize": "bilinear",
            "mean": [config.mean, 0], "std": [config.std, round(config.std / 2, 5)],
        },
        "aggregation": "mean",
        "calibration": {"method": "temperature", "temperature": temperature},
        "threshold": threshold,
        "accuracy": {
            "split": "validation",
            "clips": overall["clips"],
            "top1": round(overall["top1"], 4), "top3": round(overall["top3"], 4),
            "meanRecall": round(overall["meanRecall"], 4),
            "bySource": {k: rounded(v) for k, v in sources.items()},
            "perGenreRecall": {k: round(v, 4) for k, v in metrics.recall_by_genre(after, label).items()},
            "ece": round(ece, 4),
        },
        "selfTest": {"input": "self-test.npy", "output": "self-test-logits.json", "tolerance": 1e-3},
        "files": files,
    }
    (args.out / "model.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    size = onnx_path.stat().st_size / 1e6
    speed = milliseconds_per_window(onnx_path)
    (args.out / "MODEL_CARD.md").write_text(card.write(
        manifest=manifest, run=run, scores=after, label=label, source=source,
        ece_before=ece_before, size_mb=size, ms_per_window=speed,
        preliminary=args.preliminary,
    ))
    print(f"top-1 {overall['top1']:.3f}  top-3 {overall['top3']:.3f}  mean recall "
          f"{overall['meanRecall']:.3f}  ECE {ece_before:.3f} -> {ece:.3f} (T {temperature})  "
          f"threshold {threshold}  {size:.1f} MB  {speed:.1f} ms/window  "
          f"graph against network {worst:.1e}")


if __name__ == "__main__":
    main()
