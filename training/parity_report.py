"""Does an imported checkpoint give the numbers of the code it came from?

``python training/parity_report.py --data AUDIO_DIR --out DIR`` makes a checkpoint of the
seed's structure (or takes ``--checkpoint``), imports it in fp32, fp16 and int8, runs
real overlapping windows through the original network in PyTorch and through each bundle,
and writes parity.json and parity.md to DIR. Then the same comparison with front ends
broken on purpose: each must miss the same thresholds. Exit 1 when a bundle misses one or
a broken front end meets them all.

Windows, checkpoint, bundles and logits are kept in DIR; a second run uses what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

import checkpoint_file
import import_checkpoint
import import_profile
import parity_checkpoint
import parity_windows
import speed
import vit_checkpoint
from picture import Picture, PictureForm

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

PROFILE: Final = "ccmusic-mel"
FP32_LOGITS: Final = 1e-3
AGREEMENT: Final = {"fp32": 1.0, "fp16": 0.995, "int8": 0.99}
LEAST_WINDOWS: Final = 500
LEAST_CLASSES: Final = 8
LARGEST_SHARE: Final = 0.4
BROKEN_WINDOWS: Final = 60
"""One comparison with a broken front end runs on so many of the windows."""
_IMPORTER: Final = ("import_checkpoint.py", "graphs.py", "picture.py", "precision.py", "vision_transformer.py",
                    "vit_checkpoint.py", "../models/profiles/ccmusic-mel.json")
IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def in_batches(run: Callable[[U8], F32], windows: U8, cache: Path, batch: int = 4) -> F32:
    """Logits [n, classes], kept in ``cache``; a run that was stopped goes on."""
    done: list[F32] = []
    if cache.exists():
        done.append(np.load(cache))
    at, begin = sum(len(d) for d in done), time.monotonic()
    while at < len(windows):
        done.append(run(windows[at : at + batch]))
        at += len(done[-1])
        if len(done) % 10 == 0 or at == len(windows):
            whole = np.concatenate(done)
            part = cache.with_suffix(".part.npy")
            np.save(part, whole)
            part.replace(cache)
            print(f"{cache.stem}: {at} of {len(windows)} windows, {time.monotonic() - begin:.0f} s",
                  file=sys.stderr, flush=True)
    return np.concatenate(done)[: len(windows)]


def compare(ours: F32, theirs: F32) -> dict[str, Any]:
    error = np.abs(ours - theirs)
    return {
        "windows": len(ours),
        "maxError": float(error.max()),
        "maxErrorShareOfStd": float(error.max() / theirs.std()),
        "rmsErrorShareOfStd": float(np.sqrt((error**2).mean()) / theirs.std()),
        "top1Agreement": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
    }


def coverage(logits: F32, classes: int) -> dict[str, Any]:
    """How the answers spread: on one answer for everything, every comparison succeeds."""
    share = np.bincount(logits.argmax(axis=1), minlength=classes) / len(logits)
    return {"classes": int((share > 0).sum()), "largestShare": float(share.max()),
            "shares": [round(float(s), 4) for s in share]}


def bundle_of(checkpoint: Path, precision: str, out: Path) -> dict[str, Any]:
    """Imports, unless DIR holds the bundle that this code made of that very file."""
    marker = out.with_name(f"{out.name}.json")
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in _IMPORTER)
    made_of = hashlib.sha256(code + import_checkpoint.sha256(checkpoint).encode()).hexdigest()
    if marker.exists() and (out / "model.json").exists():
        report = json.loads(marker.read_text())
        if report.get("madeOf") == made_of:
            return report
    args = import_checkpoint.parse_arguments([
        str(checkpoint), "--profile", PROFILE, "--out", str(out), "--precision", precision, "--force",
        "--name", "parity", "--provenance", "A measuring instrument made by training/parity_checkpoint.py."])
    report = {"madeOf": made_of, **import_checkpoint.make(args)}
    marker.write_text(json.dumps(report))
    return report


def run_session(network: speed.onnxruntime.InferenceSession, windows: U8) -> F32:
    return network.run(["logits"], {"windows": windows})[0]


def broken_front_ends(
    original: torch.nn.Module, form: PictureForm, shape: tuple[int, int],
) -> dict[str, Callable[[U8], F32]]:
    """The original network behind front ends that each have one common mistake."""

    def behind(picture: PictureForm, change: Callable[[U8], U8] = lambda w: w) -> Callable[[U8], F32]:
        drawn = Picture(picture, *shape)

        def run(windows: U8) -> F32:
            with torch.no_grad():
                return original(drawn(torch.from_numpy(np.ascontiguousarray(change(windows))))).numpy()

        return run

    drawn, size = form.drawn, form.image_size
    return {
        "frequency axis flipped": behind(PictureForm(form.colour, "top", drawn, size, form.mean, form.std)),
        "mean and deviation of ImageNet": behind(PictureForm(form.colour, form.lowest, drawn, size, *IMAGENET)),
        "grey instead of magma": behind(PictureForm("grey", form.lowest, drawn, size, form.mean, form.std)),
        "time reversed": behind(form, lambda w: w[:, :, ::-1]),
        "no stretch to the window's own range": behind(
            form, lambda w: (40 + w.astype(np.float32) * (200 / 255)).astype(np.uint8)),
    }


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    cut = parity_windows.overlapping(args.data, PROFILE, args.out / "windows.npz")
    checkpoint = args.checkpoint or args.out / "parity.pt"
    if not checkpoint.exists():
        parity_checkpoint.make(args.data, checkpoint, args.out / "windows.npz")
    chosen = np.unique(np.linspace(0, len(cut.windows) - 1, args.windows).astype(np.int64))
    windows = cut.windows[chosen]
    if len(windows) < LEAST_WINDOWS:
        print(f"only {len(windows)} windows: at least {LEAST_WINDOWS} are wanted.", file=sys.stderr)
        return 1

    profile = import_profile.load(PROFILE)
    form = import_profile.picture_form(profile)
    weights, _ = checkpoint_file.read(checkpoint)
    recognised = vit_checkpoint.recognise(weights, form.image_size)
    original = vit_checkpoint.original(weights, recognised)
    del weights
    shape = (int(windows.shape[1]), int(windows.shape[2]))
    picture = Picture(form, *shape)
    key = hashlib.sha256(import_checkpoint.sha256(checkpoint).encode() + windows.tobytes()).hexdigest()[:10]

    def in_torch(some: U8) -> F32:
        with torch.no_grad():
            return original(picture(torch.from_numpy(some))).numpy()

    reference = in_batches(in_torch, windows, args.out / f"logits-{key}-pytorch.npy")
    rows: dict[str, dict[str, Any]] = {}
    fp32: F32 | None = None
    for precision, least in AGREEMENT.items():
        bundle = args.out / f"bundle-{precision}"
        imported = bundle_of(checkpoint, precision, bundle)
        network = speed.session(bundle / "model.onnx", args.threads)
        logits = in_batches(
            partial(run_session, network), windows,
            args.out / f"logits-{key}-{imported['digest'][:10]}-{precision}.npy")
        del network
        row = compare(logits, reference)
        if fp32 is None:
            fp32 = logits
        row["top1AgreementWithFp32"] = float((logits.argmax(axis=1) == fp32.argmax(axis=1)).mean())
        row["passes"] = row["maxError"] <= FP32_LOGITS if precision == "fp32" else row["top1AgreementWithFp32"] >= least
        row["megabytes"] = round(sum(f.stat().st_size for f in bundle.iterdir()) / 1e6, 1)
        rows[precision] = row

    some = np.linspace(0, len(windows) - 1, BROKEN_WINDOWS).astype(np.int64)
    broken: dict[str, dict[str, Any]] = {}
    for i, (name, front_end) in enumerate(broken_front_ends(original, form, shape).items()):
        logits = in_batches(front_end, windows[some], args.out / f"logits-{key}-broken-{i}.npy")
        row = compare(logits, reference[some])
        row["passesFp32"] = row["maxError"] <= FP32_LOGITS
        row["passesFp16"] = row["top1Agreement"] >= AGREEMENT["fp16"]
        row["passesInt8"] = row["top1Agreement"] >= AGREEMENT["int8"]
        broken[name] = row
    found = {
        "checkpoint": {"file": checkpoint.name, "sha256": import_checkpoint.sha256(checkpoint),
                       "architecture": recognised.architecture},
        "windows": {"count": len(windows), "of": len(cut.windows), "recordings": len(cut.names),
                    "stepFrames": cut.step_frames, "windowFrames": shape[1], "overlapping": True},
        "coverage": coverage(reference, recognised.config.head[-1]),
        "thresholds": {"fp32MaxError": FP32_LOGITS, "agreementWithFp32": {k: AGREEMENT[k] for k in ("fp16", "int8")}},
        "precisions": rows, "brokenFrontEnds": broken,
        "torch": torch.__version__, "onnxruntime": speed.onnxruntime.__version__, "cpus": os.cpu_count(),
    }
    spread = found["coverage"]
    spread["passes"] = spread["classes"] >= LEAST_CLASSES and spread["largestShare"] <= LARGEST_SHARE
    slipped = [n for n, r in broken.items() if r["passesFp32"] or r["passesFp16"] or r["passesInt8"]]
    missed = [p for p, r in rows.items() if not r["passes"]]
    found["brokenThatPass"], found["missed"] = slipped, missed
    (args.out / "parity.json").write_text(json.dumps(found, indent=2) + "\n")
    text = markdown(found)
    (args.out / "parity.md").write_text(text)
    print(text)
    for name in slipped:
        print(f"A broken front end meets a threshold: {name}. The comparison proves nothing.", file=sys.stderr)
    for name in missed:
        print(f"{name} misses its threshold.", file=sys.stderr)
    if not spread["passes"]:
        print("The answers do not spread: fewer than 8 classes, or one above 40 %.", file=sys.stderr)
    return int(bool(slipped or missed or not spread["passes"]))


def markdown(found: dict[str, Any]) -> str:
    windows, spread = found["windows"], found["coverage"]
    step = 100 * windows["stepFrames"] / windows["windowFrames"]
    lines = [
        "# Parity report", "",
        f"{found['checkpoint']['architecture']}. {windows['count']} real windows of {windows['recordings']} "
        f"recordings, cut by the service's decoder; neighbours overlap (a step of {step:.0f} % of a window). PyTorch's "
        f"top-1 covers {spread['classes']} classes, the commonest {100 * spread['largestShare']:.1f} %.", "",
        "| bundle | MB | logits: greatest error | share of std | rms share of std | top-1 as PyTorch % "
        "| top-1 as fp32 % | passes |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, r in found["precisions"].items():
        lines.append(
            f"| {name} | {r['megabytes']} | {r['maxError']:.1e} | {r['maxErrorShareOfStd']:.1e} | "
            f"{r['rmsErrorShareOfStd']:.1e} | {100 * r['top1Agreement']:.2f} | "
            f"{100 * r['top1AgreementWithFp32']:.2f} | {'yes' if r['passes'] else 'NO'} |")
    t = found["thresholds"]
    lines += [
        "", f"Thresholds: fp32 logits within {t['fp32MaxError']:g} of PyTorch; top-1 as fp32 in at least "
        f"{100 * t['agreementWithFp32']['fp16']:g} % (fp16) and {100 * t['agreementWithFp32']['int8']:g} % (int8).", "",
        "Front ends broken on purpose, which must miss every one of these thresholds:", "",
        "| broken | windows | logits: greatest error | share of std | top-1 as PyTorch % | meets fp32 / fp16 / int8 |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, r in found["brokenFrontEnds"].items():
        meets = " / ".join("YES" if r[k] else "no" for k in ("passesFp32", "passesFp16", "passesInt8"))
        lines.append(f"| {name} | {r['windows']} | {r['maxError']:.2g} | {r['maxErrorShareOfStd']:.2g} | "
                     f"{100 * r['top1Agreement']:.1f} | {meets} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder of recordings, searched with its subfolders")
    p.add_argument("--out", type=Path, required=True, help="about 1 GB: never into the project")
    p.add_argument("--checkpoint", type=Path, help="of the seed's structure; made when left out")
    p.add_argument("--windows", type=int, default=520)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    import_checkpoint.quiet()
    try:
        return run(args)
    except import_profile.ImportFault as fault:
        print(fault, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
