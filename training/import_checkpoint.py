"""Makes a model bundle from a Vision Transformer checkpoint or a ready ONNX file.

``python training/import_checkpoint.py save.pt --profile ccmusic-mel --out BUNDLE``

Progress goes to stderr. At the end one JSON object on stdout says what was made. A fault
is one sentence on stderr and exit 1; then nothing was written: the bundle is built and
checked in a folder beside BUNDLE, which takes BUNDLE's name at the very end.

The exported graph is compared with the checkpoint's own package (torchvision, timm,
transformers) where that is installed; in float32 a difference above 1e-3 is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

TOLERANCE: Final = 1e-3
"""Greatest difference of a logit between the float32 graph and the original."""
LOSSY_SHARE: Final = 0.05
"""Of the logits' standard deviation: how far another machine's fp16 or int8 kernels may
be from the numbers that this one put into the self-test."""
COMPARED: Final = 4
"""Synthetic windows that graph and original are compared on."""
WEIGHTS_FILE: Final = "weights.bin"

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def synthetic_windows(bands: int, frames: int, count: int = COMPARED) -> U8:
    """Windows uint8 [count, bands, frames] from formulas, no recording: a tilted gradient
    with a beat, falling partials, smooth noise of a fixed seed at several scales."""
    row = np.arange(bands, dtype=np.float64)[:, None] * 128 / bands
    column = np.arange(frames, dtype=np.float64)[None, :] * 128 / frames
    out = [
        215 - 1.2 * row + 35 * np.sin(2 * np.pi * column / 16) * np.cos(row / 9),
        200 * np.exp(-row / 70) * (0.6 + 0.4 * np.cos(2 * np.pi * row / 11 + column / 6)),
    ]
    draw = np.random.default_rng(7)
    for k in range(2, count):
        high, wide = 4 + 3 * k, 6 + 8 * k
        coarse = draw.uniform(0, 255, (high, wide))
        rows = np.interp(np.linspace(0, high - 1, bands), np.arange(high), np.arange(high)).astype(int)
        columns = np.linspace(0, wide - 1, frames)
        out.append(np.stack([np.interp(columns, np.arange(wide), coarse[r]) for r in rows]) - 0.8 * row)
    return np.stack([np.clip(np.rint(w - w.max() + 255), 0, 255).astype(np.uint8) for w in out[:count]])


@dataclass
class Imported:
    """What both ways in, checkpoint and ONNX file, come to."""

    model: Any
    """The float32 graph (onnx.ModelProto), weights inside."""
    outputs: dict[str, list[int | str]]
    """Shape of each output by name."""
    expected: F32
    """Logits of the original for the synthetic windows."""
    parameters: int
    architecture: str
    labels: list[str]
    warnings: list[str]
    probabilities: bool = False
    """``expected`` are probabilities: the file's own answer is behind a softmax."""


def from_checkpoint(args: argparse.Namespace, profile: dict[str, Any], windows: U8) -> Imported:
    """:raises ImportFault: what is wrong with the file."""
    import torch

    import checkpoint_file
    import graphs
    import import_profile
    import onnx_graph
    import vision_transformer
    import vit_checkpoint
    from picture import Picture

    found: list[str] = []
    say(f"reading {args.checkpoint}")
    weights, remarks = checkpoint_file.read(args.checkpoint)
    for remark in remarks:
        say(remark)
    hugging_face = any(key.startswith("vit.") for key in weights)
    beside = _config_beside(args.checkpoint) if hugging_face else {}
    form = import_profile.picture_form(profile)
    recognised = vit_checkpoint.recognise(
        weights, form.image_size, args.heads or beside.get("heads"), beside.get("eps"))
    say(recognised.architecture)
    labels = _labels(args, profile, beside.get("labels"), recognised.config.head[-1])
    lossy = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()} - {"float32"})
    if lossy:
        found.append(f"The checkpoint's weights are {', '.join(lossy)}; they were brought to float32.")

    picture = Picture(form, windows.shape[1], windows.shape[2])
    network = vision_transformer.ImportedNetwork(picture, vit_checkpoint.build(weights, recognised)).eval()
    batch = torch.from_numpy(windows)
    try:
        original = vit_checkpoint.original(weights, recognised)
        say(f"computing the logits of {recognised.family}'s own network")
        with torch.no_grad():
            expected = original(picture(batch)).numpy()
        del original
    except ImportError:
        found.append(f"{recognised.family}'s package is not installed: the graph was compared with this project's "
                     "own network only, not with the original code.")
        with torch.no_grad():
            expected = network(batch)[0].numpy()
    parameters = sum(p.numel() for p in network.parameters())
    say("exporting to ONNX")
    model = graphs.export(network, batch[:2], onnx_graph.INPUT, onnx_graph.OUTPUTS)
    c = recognised.config
    outputs: dict[str, list[int | str]] = {
        onnx_graph.LOGITS: ["batch", c.head[-1]], onnx_graph.EMBEDDING: ["batch", c.width],
        onnx_graph.ATTENTION: ["batch", c.grid, c.grid],
    }
    return Imported(model, outputs, expected, parameters, recognised.architecture, labels, found)


def from_onnx(args: argparse.Namespace, profile: dict[str, Any], windows: U8) -> Imported:
    """:raises ImportFault: what is wrong with the file."""
    import onnxruntime
    import torch

    import checkpoint_file
    import import_profile
    import onnx_graph
    from picture import Picture

    say(f"reading {args.checkpoint}")
    checkpoint_file.check_outside(args.checkpoint)
    form = import_profile.picture_form(profile)
    picture = Picture(form, windows.shape[1], windows.shape[2])
    adopted = onnx_graph.adopt(
        args.checkpoint, picture, windows.shape[1], windows.shape[2], args.input, args.output)
    classes = adopted.model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    labels = _labels(args, profile, None, classes)
    say("computing the answers of the file as it is")
    with torch.no_grad():
        given = picture(torch.from_numpy(windows)).numpy() if adopted.drawn else windows
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        network = onnxruntime.InferenceSession(str(args.checkpoint), options, ["CPUExecutionProvider"])
        expected = network.run([adopted.output], {adopted.input: given})[0]
    except Exception as cause:  # noqa: BLE001 - ONNX Runtime has an exception class per fault
        raise import_profile.ImportFault(
            f"ONNX Runtime cannot run {args.checkpoint}: {checkpoint_file.first_line(cause)}.") from None
    found = ["A ready ONNX file gives neither embedding nor explanation: only its logits are used."]
    if adopted.left_aside:
        found.append(f"Outputs of the file that are left aside: {', '.join(adopted.left_aside)}.")
    if adopted.probabilities:
        found.append("The file ended in a softmax, which was taken off: a bundle's output is logits.")
    parameters = sum(int(np.prod(i.dims)) for i in adopted.model.graph.initializer)
    architecture = (f"ONNX graph {'behind the picture of the profile' if adopted.drawn else 'on windows'}, "
                    f"{len(adopted.model.graph.node)} nodes")
    return Imported(adopted.model, {onnx_graph.LOGITS: ["batch", classes]}, expected, parameters,
                    architecture, labels, found, adopted.probabilities)


def _config_beside(checkpoint: Path) -> dict[str, Any]:
    """What Hugging Face's config.json beside the file says: heads, eps, labels."""
    import import_profile

    path = checkpoint.parent / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("model_type") != "vit":
        return {}
    act = config.get("hidden_act", "gelu")
    if act != "gelu":
        raise import_profile.ImportFault(f"{path} says hidden_act {act}: only the exact gelu is known.")
    found: dict[str, Any] = {}
    if isinstance(config.get("num_attention_heads"), int):
        found["heads"] = config["num_attention_heads"]
    if isinstance(config.get("layer_norm_eps"), float):
        found["eps"] = config["layer_norm_eps"]
    names = config.get("id2label")
    if isinstance(names, dict) and all(str(k).isdecimal() for k in names):
        labels = [str(names[k]) for k in sorted(names, key=int)]
        if not all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
            found["labels"] = labels
    return found


def _labels(args: argparse.Namespace, profile: dict[str, Any], beside: list[str] | None, outputs: int) -> list[str]:
    import import_profile

    if args.labels is not None:
        labels = import_profile.read_labels(args.labels)
    elif beside is not None and profile["labels"] is None:
        labels = beside
        say("labels taken from config.json beside the checkpoint")
    elif profile["labels"] is not None:
        labels = profile["labels"]
    else:
        raise import_profile.ImportFault(
            f"No labels: the profile {profile['name']} has none, so --labels must name a file with the {outputs} "
            "names in output order, one a line.")
    import_profile.check_labels(labels, outputs, profile)
    return labels


def run_graph(path: Path, windows: U8, outputs: list[str]) -> list[F32]:
    """:raises ImportFault: ONNX Runtime refuses the graph."""
    import onnxruntime

    import checkpoint_file
    import import_profile

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        network = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return network.run(outputs, {"windows": windows})
    except Exception as cause:  # noqa: BLE001 - ONNX Runtime has an exception class per fault
        raise import_profile.ImportFault(
            f"ONNX Runtime cannot run the exported {path.name}: {checkpoint_file.first_line(cause)}.") from None


def compare(folder: Path, imported: Imported, windows: U8, precision: str) -> tuple[F32, dict[str, float]]:
    """Runs what was written against the original. -> (logits, logitError)

    :raises ImportFault: not the original's numbers, or answers that depend on the batch.
    """
    import import_profile
    import onnx_graph

    named = [name for name in imported.outputs if name != onnx_graph.ATTENTION]
    answers = dict(zip(named, run_graph(folder / "model.onnx", windows, named), strict=True))
    logits = answers[onnx_graph.LOGITS]
    if not np.isfinite(logits).all():
        raise import_profile.ImportFault(f"The {precision} graph's logits are no numbers: import in fp32.")
    given, expected = logits, imported.expected
    if imported.probabilities:
        given = np.exp(logits - logits.max(axis=1, keepdims=True))
        given /= given.sum(axis=1, keepdims=True)
    worst = float(np.abs(given - expected).max())
    deviation = float(expected.std())
    error = {"max": worst, "shareOfStd": worst / deviation if deviation > 0 else 0.0}
    if precision == "fp32" and worst > TOLERANCE:
        raise import_profile.ImportFault(
            f"The exported graph's logits differ from the original's by up to {worst:.2g} (allowed {TOLERANCE:g}), "
            f"{100 * error['shareOfStd']:.2g} % of their standard deviation.")
    lone = run_graph(folder / "model.onnx", windows[1:2], [onnx_graph.LOGITS])[0]
    apart = float(np.abs(lone - logits[1:2]).max())
    if apart > max(TOLERANCE, 0.01 * deviation):
        raise import_profile.ImportFault(
            f"A window's logits depend on the other windows of its batch (by {apart:.2g}): the graph mixes them.")
    if onnx_graph.EMBEDDING in answers:
        length = np.linalg.norm(answers[onnx_graph.EMBEDDING], axis=1)
        if np.abs(length - 1).max() > TOLERANCE:
            raise import_profile.ImportFault("The exported graph's embeddings are not of unit length.")
    if onnx_graph.ATTENTION in imported.outputs:
        attention = run_graph(folder / "explain.onnx", windows[:2], [onnx_graph.ATTENTION])[0]
        if list(attention.shape[1:]) != imported.outputs[onnx_graph.ATTENTION][1:] \
                or np.abs(attention.sum(axis=(1, 2)) - 1).max() > TOLERANCE:
            raise import_profile.ImportFault("The exported explanation does not sum to 1.")
    return logits, error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resize_words(profile: dict[str, Any]) -> str:
    """The manifest's ``graph.resize``."""
    drawn = profile["picture"]["drawn"]
    first = "" if drawn is None else f"drawn by nearest cell into {drawn[1]:g} x {drawn[0]:g} pixels, then "
    lowest = profile["picture"]["lowest"]
    return f"{first}antialiased bilinear (Pillow's), lowest band at the {lowest}"


def write_bundle(folder: Path, args: argparse.Namespace, profile: dict[str, Any]) -> dict[str, Any]:
    """Fills the empty ``folder`` with a checked bundle. -> what is printed, less the path."""
    import graphs
    import onnx_graph
    import precision

    shape = profile["profile"]["melBands"], profile["profile"]["windowFrames"]
    windows = synthetic_windows(*shape)
    ready = args.checkpoint.suffix.lower() == ".onnx"
    imported = (from_onnx if ready else from_checkpoint)(args, profile, windows)
    if args.precision != "fp32":
        say(f"converting to {args.precision}")
    model = precision.convert(imported.model, args.precision)
    imported.model = None
    parts = {"model.onnx": [name for name in imported.outputs if name != onnx_graph.ATTENTION]}
    if onnx_graph.ATTENTION in imported.outputs:
        parts["explain.onnx"] = [onnx_graph.ATTENTION]
    graphs.split(model, parts, folder, WEIGHTS_FILE)
    del model
    say("comparing the exported graph with the original")
    logits, error = compare(folder, imported, windows, args.precision)

    exact = args.precision == "fp32"
    # fp16 and int8 are told by how far they are from themselves elsewhere: logitError
    # says how far they are from the original.
    tolerance = TOLERANCE if exact else round(max(TOLERANCE, LOSSY_SHARE * float(logits.std())), 6)
    np.save(folder / "self-test.npy", windows)
    stored = imported.expected if exact and not imported.probabilities else logits
    (folder / "self-test-logits.json").write_text(
        json.dumps([[round(float(v), 6) for v in row] for row in stored]) + "\n")
    files = sorted([*parts, WEIGHTS_FILE, "self-test.npy", "self-test-logits.json"])
    manifest = _manifest(args, profile, imported, tolerance, {name: sha256(folder / name) for name in files})
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "model.json").write_text(text, "utf-8")
    return {
        "digest": hashlib.sha256(text.encode()).hexdigest(), "parameters": imported.parameters,
        "architecture": imported.architecture, "files": [*files, "model.json"], "precision": args.precision,
        "logitError": error, "warnings": imported.warnings,
    }


def _manifest(args: argparse.Namespace, profile: dict[str, Any], imported: Imported, tolerance: float,
              files: dict[str, str]) -> dict[str, Any]:
    import onnx_graph

    picture, front = profile["picture"], profile["profile"]
    outputs = {name: {"name": name, "shape": imported.outputs[name]}
               for name in (onnx_graph.LOGITS, onnx_graph.EMBEDDING) if name in imported.outputs}
    graph: dict[str, Any] = {
        "file": "model.onnx",
        "input": {"name": onnx_graph.INPUT, "type": "uint8",
                  "shape": ["batch", front["melBands"], front["windowFrames"]]},
        "outputs": outputs,
    }
    if onnx_graph.ATTENTION in imported.outputs:
        graph["explain"] = {"file": "explain.onnx", "output": {
            "name": onnx_graph.ATTENTION, "shape": imported.outputs[onnx_graph.ATTENTION]}}
    graph |= {"precision": args.precision, "imageSize": picture["imageSize"], "colour": picture["colour"],
              "resize": resize_words(profile), "mean": picture["mean"], "std": picture["std"]}
    provenance = args.provenance or (
        f"Imported from {args.checkpoint.name} (SHA-256 {sha256(args.checkpoint)}): {imported.architecture}. "
        "What it was trained on was not stated.")
    return {
        "format": 1, "name": args.name, "version": args.version,
        "licence": args.licence or "not stated at import", "provenance": provenance,
        "labels": imported.labels, "profile": front, "graph": graph,
        "windows": profile["windows"], "aggregation": profile["aggregation"],
        "calibration": "none", "threshold": 0.5, "accuracy": "none",
        "selfTest": {"input": "self-test.npy", "output": "self-test-logits.json", "tolerance": tolerance},
        "files": files,
    }


def make(args: argparse.Namespace) -> dict[str, Any]:
    """The whole import. :raises ImportFault: in one sentence; nothing is left then."""
    from import_profile import ImportFault, load

    out: Path = args.out
    if out.exists() and not args.force:
        raise ImportFault(f"{out} exists already: choose another --out, or --force to replace it.")
    if out.exists() and not (out / "model.json").is_file():
        raise ImportFault(f"{out} exists and is no model bundle: --force replaces bundles only.")
    profile = load(args.profile)
    if args.name is None:
        plain = re.sub(r"[^a-z0-9._-]+", "-", args.checkpoint.stem.lower()).strip("-._")
        args.name = (plain or profile["name"])[:64]
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", args.name):
        raise ImportFault(f"--name {args.name} cannot be a model's name: small letters, digits, dots, dashes, "
                          "at most 64, a letter or digit first.")
    if not 1 <= len(args.version) <= 40:
        raise ImportFault("--version must have 1 to 40 characters.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as cause:
        raise ImportFault(f"{out.parent} cannot be written to ({cause.strerror}).") from None
    try:
        folder.chmod(0o755)
        report = write_bundle(folder, args, profile)
        _put_in_place(folder, out)
    except OSError as cause:
        raise ImportFault(f"The bundle could not be written: {cause.strerror} ({cause.filename}).") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"bundle": str(out.resolve()), **report}


def _put_in_place(folder: Path, out: Path) -> None:
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / out.name)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"{message[0].upper()}{message[1:]}.")
        sys.exit(1)


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    import precision

    p = _Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("checkpoint", type=Path, help=".pt, .pth, .bin or .safetensors, or a ready .onnx")
    p.add_argument("--profile", required=True, help="shipped (models/profiles) or a file like those")
    p.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    p.add_argument("--labels", type=Path, help="one a line or a JSON list, in output order")
    p.add_argument("--name", help="default: the file's")
    p.add_argument("--version", default="1")
    p.add_argument("--licence")
    p.add_argument("--provenance")
    p.add_argument("--precision", choices=precision.PRECISIONS, default="fp32")
    p.add_argument("--heads", type=int, help="attention heads, where the width does not tell")
    p.add_argument("--input", help="of an ONNX file that has several")
    p.add_argument("--output", help="the logits of an ONNX file that has several outputs")
    p.add_argument("--force", action="store_true", help="replace a bundle that exists")
    return p.parse_args(given)


def quiet() -> None:
    """Libraries' warnings are not for the person who imports."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _stop(*_: object) -> NoReturn:
    sys.exit(143)


def main(given: list[str] | None = None, run: Callable[[argparse.Namespace], dict[str, Any]] = make) -> int:
    # Stopped by a signal, it still takes its unfinished folder away.
    signal.signal(signal.SIGTERM, _stop)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        args = parse_arguments(given)
        from import_profile import ImportFault

        try:
            report = run(args)
        except ImportFault as fault:
            say(str(fault))
            return 1
        except KeyboardInterrupt:
            say("Stopped.")
            return 130
        except MemoryError:
            say("There is not enough memory for this checkpoint.")
            return 1
        except Exception as cause:  # noqa: BLE001 - the caller is promised one sentence
            first = (str(cause).strip().splitlines() or [""])[0][:300]
            say(f"The import failed for a reason that it does not know ({type(cause).__name__}: {first}).")
            return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
