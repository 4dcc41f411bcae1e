"""Reads a checkpoint's weights without running anything that the file says.

PyTorch's ``weights_only`` unpickler builds tensors and plain containers and refuses the
rest; safetensors holds nothing else.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from import_profile import ImportFault

# Where training scripts keep the weights inside a bigger dictionary, best first: a
# moving average is what such a script evaluates.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
# DataParallel, Lightning and torch.compile put these before every name.
_PREFIXES: Final = ("module.", "model.", "_orig_mod.", "network.", "net.")
# Values that training scripts keep beside the weights; each builds data only.
_HARMLESS: Final[list[Any]] = [
    argparse.Namespace, np.dtype, np.ndarray,
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]

# Modules whose names are no code of the file's author.
_PLAIN: Final = ("torch", "collections", "numpy", "argparse", "_codecs")

Weights = dict[str, Tensor]


def read(path: Path) -> tuple[Weights, list[str]]:
    """Weights by name, as stored, and remarks on what was undone to get at them.

    :raises ImportFault: what the file is instead.
    """
    check_outside(path)
    if path.suffix.lower() == ".safetensors":
        content = _read_safetensors(path)
    else:
        content = _read_torch(path)
    return _unwrap(content, path)


def check_outside(path: Path) -> None:
    if path.is_dir():
        raise ImportFault(f"{path} is a folder: name the checkpoint file in it.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as cause:
        raise ImportFault(f"The checkpoint {path} cannot be read ({cause.strerror}).") from None
    if size == 0:
        raise ImportFault(f"The checkpoint {path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"^size (\d+)", head, re.MULTILINE)
        true_size = f" of {int(wanted[1]) / 1e6:.0f} MB" if wanted else ""
        raise ImportFault(
            f"{path} is a Git LFS pointer ({size} bytes of text), not the checkpoint{true_size}: "
            "fetch the file itself, for example with `git lfs pull`."
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ImportFault(f"{path} is a web page, not a checkpoint: download the file itself.")


def _read_safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportFault(f"{path} needs the Python package safetensors, which is not installed.") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as cause:
        raise ImportFault(f"{path} is truncated, damaged or no safetensors file ({first_line(cause)}).") from None


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        magic = file.read(4)
    zipped = magic.startswith(b"PK")
    if zipped:
        if not zipfile.is_zipfile(path):
            raise ImportFault(f"{path} is truncated: the directory at the end of the file is missing.")
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as cause:
        raise ImportFault(_refused(path, str(cause), zipped)) from None
    except EOFError:
        raise ImportFault(f"{path} is truncated: it ends in the middle of its data.") from None
    except MemoryError:
        raise ImportFault(f"{path} asks for more memory than there is: it is damaged.") from None
    except Exception as cause:  # noqa: BLE001 - the reader answers foreign bytes with any exception
        raise ImportFault(f"{path} is damaged or no PyTorch checkpoint ({first_line(cause)}).") from None


def _check_archive(path: Path) -> None:
    """Truncation leaves no directory; a changed byte shows in one record's checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("data.pkl") for name in names):
                raise ImportFault(f"{path} is a ZIP archive of something else: it holds no data.pkl.")
            bad = _bad_records(archive)
    except zipfile.BadZipFile as cause:
        raise ImportFault(f"{path} is damaged ({first_line(cause)}).") from None
    # All of them differ where checksums were switched off on saving.
    if bad and len(bad) < len(names):
        raise ImportFault(
            f"{path} is damaged: {len(bad)} of its {len(names)} records, first {bad[0]}, "
            "do not have the checksum that was stored with them."
        )


def _bad_records(archive: zipfile.ZipFile) -> list[str]:
    bad = []
    for name in archive.namelist():
        try:
            with archive.open(name) as record:
                while record.read(1 << 20):
                    pass
        except zipfile.BadZipFile:
            bad.append(name)
    return bad


def _refused(path: Path, message: str, zipped: bool) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"(?:of type|class|function) `?([\w.]+)", message)
    named = [found[1]] if found else _called(path, zipped)
    name = next((name for name in named if name.split(".")[0] not in _PLAIN), None) if not found else found[1]
    if name is None and named:
        return (f"{path} was pickled with a protocol that is not read: "
                "save it with torch.save's own, without pickle_protocol.")
    if name is None:
        return f"{path} is no PyTorch checkpoint, or a damaged one ({first_line(message)})."
    advice = ""
    if name.split(".")[0] in ("torch", "torchvision", "timm", "transformers", "__main__"):
        advice = " If it is a whole model that was saved, save model.state_dict() instead."
    return (
        f"{path} holds code and was not run: to load it, Python would have to call {name}. "
        f"Only tensors and plain containers are read.{advice}"
    )


def _called(path: Path, zipped: bool) -> list[str]:
    """What a pickle would have Python call, as ``module.name``, read off its opcodes: nothing
    is built and nothing runs. For protocols that PyTorch's reader gives up on unnamed."""
    names: list[str] = []
    texts: list[str] = []
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        else:
            content = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    except (ValueError, IndexError, OSError, zipfile.BadZipFile):
        pass  # What was read up to the damage.
    return names


def first_line(cause: object) -> str:
    """Of what a library says, to stand in brackets in a sentence of ours."""
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0][:160].rstrip(".")


def _is_weights(value: Any) -> bool:
    return (isinstance(value, dict) and bool(value)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()))


def _unwrap(content: Any, path: Path) -> tuple[Weights, list[str]]:
    remarks: list[str] = []
    for _ in range(3):
        if _is_weights(content):
            break
        if not isinstance(content, dict):
            raise ImportFault(f"{path} holds a {type(content).__name__}, not the weights of a network.")
        inner = next((k for k in _WRAPPERS if isinstance(content.get(k), dict) and content[k]), None)
        if inner is None:
            keys = ", ".join(str(k) for k in list(content)[:10])
            raise ImportFault(f"{path} holds no weights: a dictionary with the keys {keys or '(none)'}.")
        beside = [str(k) for k in content if k != inner]
        remarks.append(f"weights taken from '{inner}'" + (f", left aside: {', '.join(beside[:10])}" if beside else ""))
        content = content[inner]
    if not _is_weights(content):
        raise ImportFault(f"{path} holds no weights, or things that are no tensors among them.")
    weights: Weights = dict(content)
    hollow = next((k for k, w in weights.items() if w.is_meta or w.is_quantized or w.layout != torch.strided), None)
    if hollow is not None:
        w = weights[hollow]
        kind = "empty (on the device 'meta')" if w.is_meta else "quantised" if w.is_quantized else "sparse"
        raise ImportFault(f"{path} holds tensors that are {kind}, first {hollow}: save the plain values.")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in weights):
                weights = {key.removeprefix(prefix): value for key, value in weights.items()}
                remarks.append(f"prefix '{prefix}' taken off every key")
                stripped = True
    return weights, remarks
