"""Profiles that a checkpoint is imported with: models/profiles/*.json, or a user's file.

A profile holds what no checkpoint says of itself: how audio becomes windows
(``profile``, exactly the manifest's), how windows become pictures (``picture``), the
labels in output order where they are known, and how the answers of windows become one.
The service checks ``profile`` once more when it loads the bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from picture import PictureForm

SHIPPED: Final = Path(__file__).resolve().parent.parent / "models" / "profiles"


class ImportFault(Exception):
    """What is wrong with what the user gave, in one sentence."""


Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(low: int, high: int) -> tuple[str, Check]:
    return (f"a whole number from {low} to {high}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


def _one_of(*values: Any) -> tuple[str, Check]:
    said = " or ".join(json.dumps(v) for v in values)
    return said, lambda v: any(v is w or (type(v) is type(w) and v == w) for w in values)


def _colour_known(value: Any) -> bool:
    if value == "grey":
        return True
    import matplotlib

    return isinstance(value, str) and value in matplotlib.colormaps


def _three(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_number, value))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


# The manifest's profileSchema (packages/shared/src/bundle.ts); a test holds them together.
_PROFILE: Final[dict[str, tuple[str, Check]]] = {
    "sampleRate": _whole(8_000, 48_000),
    "channels": _one_of("mean"),
    "resampler": _one_of("soxr", "swr"),
    "window": _one_of("hann"),
    "fftSize": _whole(256, 8192),
    "hopLength": _whole(1, 1 << 20),
    "centered": _one_of(True, False),
    "padMode": _one_of("none", "zero"),
    "power": _one_of(1, 2),
    "melScale": _one_of("slaney", "htk"),
    "melNorm": _one_of("slaney", "none"),
    "melBands": _whole(16, 512),
    "minHz": ("a number from 0", lambda v: _number(v) and v >= 0),
    "maxHz": ("a number above 0", lambda v: _number(v) and v > 0),
    "reference": _one_of("max"),
    "scope": _one_of("window", "track"),
    "floorDb": ("a number below 0", lambda v: _number(v) and v < 0),
    "stretch": _one_of("none", "window"),
    "quantisation": _one_of("linear-uint8", "matplotlib-uint8"),
    "windowFrames": _whole(8, 4096),
    "stepFrames": _whole(1, 4096),
    "placement": _one_of("anchored", "centred"),
    "shortInput": _one_of("loop"),
}

_PICTURE: Final[dict[str, tuple[str, Check]]] = {
    "colour": ('"grey" or the name of a matplotlib colour map', _colour_known),
    "lowest": _one_of("bottom", "top"),
    "drawn": ("null or [height, width] in pixels, each from 8 to 8192",
              lambda v: v is None or (isinstance(v, list) and len(v) == 2
                                      and all(_number(x) and 8 <= x <= 8192 for x in v))),
    "resize": _one_of("antialiased-bilinear"),
    "imageSize": _whole(16, 1024),
    "mean": ("three numbers", _three),
    "std": ("three numbers, none of them 0", lambda v: _three(v) and all(v)),
}

_TOP: Final[dict[str, tuple[str, Check]]] = {
    "name": ("a word of small letters, digits, dots, dashes",
             lambda v: isinstance(v, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", v) is not None),
    "description": ("a sentence", lambda v: isinstance(v, str)),
    "labels": ("null or a list of names in output order", lambda v: v is None or _strings(v)),
    "profile": ("an object", lambda v: isinstance(v, dict)),
    "picture": ("an object", lambda v: isinstance(v, dict)),
    "windows": ('"middle", "all" or a whole number from 1 to 64',
                lambda v: v in ("middle", "all") or _whole(1, 64)[1](v)),
    "aggregation": _one_of("mean", "vote"),
}
_OPTIONAL: Final[dict[str, tuple[str, Check]]] = {
    "refusedLabels": ('{"labels": [...], "reason": "..."}',
                      lambda v: isinstance(v, dict) and set(v) == {"labels", "reason"}
                      and _strings(v["labels"]) and isinstance(v["reason"], str)),
}


def _faults(where: str, fields: dict[str, tuple[str, Check]], given: dict[str, Any],
            optional: dict[str, tuple[str, Check]] | None = None) -> list[str]:
    found = [f"{where}{name} is missing ({said})" for name, (said, _) in fields.items() if name not in given]
    for name, value in given.items():
        rule = fields.get(name) or (optional or {}).get(name)
        if rule is None:
            found.append(f"{where}{name} is not a field")
        elif not rule[1](value):
            shown = json.dumps(value)
            found.append(f"{where}{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {rule[0]}")
    return found


def validate(given: Any, source: str) -> dict[str, Any]:
    """:raises ImportFault: names every field that is missing, unknown or wrong."""
    if not isinstance(given, dict):
        raise ImportFault(f"The profile {source} is not a JSON object.")
    found = _faults("", _TOP, given, _OPTIONAL)
    for part, fields in (("profile", _PROFILE), ("picture", _PICTURE)):
        if isinstance(given.get(part), dict):
            found += _faults(f"{part}.", fields, given[part])
    if not found:
        profile = given["profile"]
        if profile["stepFrames"] > profile["windowFrames"]:
            found.append("profile.stepFrames is larger than profile.windowFrames")
        if profile["maxHz"] > profile["sampleRate"] / 2:
            found.append("profile.maxHz lies above half of profile.sampleRate")
        if profile["minHz"] >= profile["maxHz"]:
            found.append("profile.minHz does not lie below profile.maxHz")
    if found:
        raise ImportFault(f"The profile {source} cannot be used: {'; '.join(found)}.")
    return given


def load(name_or_file: str) -> dict[str, Any]:
    """A shipped profile by name, or one from a .json file.

    :raises ImportFault: not found, not JSON, or fields that are wrong.
    """
    shipped = SHIPPED / f"{name_or_file}.json"
    by_name = re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name_or_file) is not None and shipped.exists()
    path = shipped if by_name else Path(name_or_file)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise ImportFault(
            f"The profile {name_or_file} is neither a shipped one ({names}) nor a readable file."
        ) from None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as cause:
        raise ImportFault(f"The profile {path} is not JSON (line {cause.lineno}: {cause.msg}).") from None
    return validate(given, str(name_or_file))


def picture_form(profile: dict[str, Any]) -> PictureForm:
    """The ``picture`` of a profile that `load` returned."""

    def three(values: list[float]) -> tuple[float, float, float]:
        return float(values[0]), float(values[1]), float(values[2])

    p = profile["picture"]
    return PictureForm(
        colour=p["colour"], lowest=p["lowest"],
        drawn=None if p["drawn"] is None else (float(p["drawn"][0]), float(p["drawn"][1])),
        image_size=p["imageSize"], mean=three(p["mean"]), std=three(p["std"]),
    )


def _plain(label: str) -> str:
    return re.sub(r"[^a-z0-9]", "", label.casefold().replace("&", "n"))


def read_labels(path: Path) -> list[str]:
    """A JSON list, or one label a line (a last empty line is no label).

    :raises ImportFault: unreadable, or not labels.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise ImportFault(f"The labels file {path} cannot be read as text ({type(cause).__name__}).") from None
    if text.lstrip().startswith(("[", "{")):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as cause:
            raise ImportFault(f"The labels file {path} is not JSON (line {cause.lineno}: {cause.msg}).") from None
        if not _strings(given):
            raise ImportFault(f"The labels file {path} is JSON, but no list of names.")
        return [label.strip() for label in given]
    return [line.strip() for line in text.rstrip().splitlines()]


def check_labels(labels: list[str], outputs: int, profile: dict[str, Any]) -> None:
    """:raises ImportFault: empty, repeated, too few, too many, or a set that the profile refuses."""
    if not any(labels):
        raise ImportFault("The list of labels is empty.")
    if "" in labels:
        raise ImportFault(f"Label {labels.index('') + 1} of {len(labels)} is empty.")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ImportFault(f"Labels repeat: {', '.join(repeated)}.")
    # Before the number is compared: the wrong set is the nearer cause.
    refused = profile.get("refusedLabels")
    if refused and {_plain(label) for label in labels} == {_plain(label) for label in refused["labels"]}:
        raise ImportFault(
            f"These {len(labels)} labels are refused for {profile['name']}: {refused['reason']}. "
            "Leave --labels out to get the true ones."
        )
    if len(labels) != outputs:
        fault = "Too few labels" if len(labels) < outputs else "Too many labels"
        raise ImportFault(f"{fault}: {len(labels)} for a network with {outputs} outputs.")
