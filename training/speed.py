"""Images a second of several bundles, in one run and taking turns.

``python training/speed.py BUNDLE [BUNDLE ...] [--also-int8 BUNDLE]``

Every round times every bundle at every batch size once, so that whatever else the
machine does meets all of them alike: on a machine that is not idle the ratios hold
better than the figures. ``--also-int8`` times an int8 form of a bundle (made by
precision.py for the occasion) beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import graphs
import import_checkpoint
import precision


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait by spinning take the processor from whatever shares it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def int8_of(bundle: Path, folder: Path) -> Path:
    """An int8 graph of a bundle's float32 one, in ``folder``."""
    manifest = json.loads((bundle / "model.json").read_text())
    model = onnx.load(str(bundle / manifest["graph"]["file"]))
    outputs = [o["name"] for o in manifest["graph"]["outputs"].values()]
    graphs.split(precision.convert(model, "int8"), {"model.onnx": outputs}, folder)
    return folder / "model.onnx"


def measure(
    bundles: dict[str, tuple[Path, dict[str, Any]]], batches: list[int], threads: int, rounds: int,
) -> dict[str, Any]:
    """``bundles``: name -> (graph, manifest). -> by name: images a second by batch (of the
    median round) and the best batch."""
    networks = {name: session(path, threads) for name, (path, _) in bundles.items()}
    inputs = {}
    for name, (_, manifest) in bundles.items():
        _, bands, frames = manifest["graph"]["input"]["shape"]
        inputs[name] = np.repeat(import_checkpoint.synthetic_windows(bands, frames), 8, axis=0)
    seconds: dict[tuple[str, int], list[float]] = {(n, b): [] for n in networks for b in batches}
    for turn in range(rounds + 1):
        for batch in batches:
            for name, network in networks.items():
                manifest = bundles[name][1]
                feed = {manifest["graph"]["input"]["name"]: inputs[name][:batch]}
                wanted = [manifest["graph"]["outputs"]["logits"]["name"]]
                begin = time.perf_counter()
                network.run(wanted, feed)
                # The first turn warms up.
                if turn:
                    seconds[name, batch].append((time.perf_counter() - begin) / batch)
    out: dict[str, Any] = {}
    for name in networks:
        rates = {b: 1 / statistics.median(seconds[name, b]) for b in batches}
        best = max(rates, key=lambda b: rates[b])
        out[name] = {"imagesPerSecond": {str(b): round(r, 2) for b, r in rates.items()}, "bestBatch": best,
                     "atBestBatch": round(rates[best], 2)}
    return out


def table(found: dict[str, Any]) -> str:
    batches = list(next(iter(found["bundles"].values()))["imagesPerSecond"])
    first = next(iter(found["bundles"].values()))["atBestBatch"]
    lines = ["| | " + " | ".join(f"batch {b}" for b in batches) + " | best | of the first |",
             "|---|" + "---:|" * (len(batches) + 2)]
    for name, f in found["bundles"].items():
        cells = " | ".join(f"{f['imagesPerSecond'][b]:.2f}" for b in batches)
        lines.append(f"| {name} | {cells} | {f['atBestBatch']:.2f} (batch {f['bestBatch']}) "
                     f"| {f['atBestBatch'] / first:.2f} |")
    load = " and ".join(f"{x:.1f}" for x in found["load"])
    return (f"Images a second, {found['threads']} threads, {found['rounds']} rounds, load of the machine {load} "
            f"before and after ({found['machine']}).\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("bundles", type=Path, nargs="+")
    p.add_argument("--also-int8", type=Path, action="append", default=[])
    p.add_argument("--batches", default="1,2,4,8")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compared: dict[str, tuple[Path, dict[str, Any]]] = {}
        for bundle in [*args.bundles, *args.also_int8]:
            manifest = json.loads((bundle / "model.json").read_text())
            graph, kind = bundle / manifest["graph"]["file"], manifest["graph"].get("precision", "fp32")
            if bundle in args.also_int8 and f"{manifest['name']} {kind}" in compared:
                folder = Path(scratch) / manifest["name"]
                folder.mkdir()
                graph, kind = int8_of(bundle, folder), "int8"
            compared[f"{manifest['name']} {kind}"] = (graph, manifest)
        before = os.getloadavg()[0]
        result = measure(compared, [int(b) for b in args.batches.split(",")], args.threads, args.rounds)
        found = {"bundles": result, "threads": args.threads, "rounds": args.rounds,
                 "load": [before, os.getloadavg()[0]], "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                 "onnxruntime": onnxruntime.__version__}
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
