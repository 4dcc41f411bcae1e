"""Runs a bundle on audio files, with the service's front end written anew.

``python training/evaluate_audio.py --bundle models/default --audio DIR`` prints
one CSV line per file and the accuracy. It shares no code with the service, so the
two can be checked against each other. The label of a file is the first part of its
name (``jazz.00003.flac``, ``Folk_Somebody.mp3``).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt
import onnxruntime
import soundfile
import soxr

import labels
import metrics

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

EXTENSIONS = (".flac", ".mp3", ".wav", ".ogg", ".opus", ".aiff", ".aif")


def read_mono(path: Path, rate: int) -> F32:
    """Samples float32 [n] at ``rate`` Hz, the mean of all channels."""
    samples, native = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if native != rate:
        mono = soxr.resample(mono, native, rate, quality="HQ")
    return np.asarray(mono, dtype=np.float32)


def mel_power(samples: F32, profile: dict[str, Any]) -> F32:
    """Mel power [bands, frames] of samples [n]; frames are not centred."""
    if len(samples) < profile["fftSize"]:
        samples = np.pad(samples, (0, profile["fftSize"] - len(samples)))
    return librosa.feature.melspectrogram(
        y=samples, sr=profile["sampleRate"], n_fft=profile["fftSize"],
        hop_length=profile["hopLength"], window="hann", center=profile["centered"],
        power=float(profile["power"]), n_mels=profile["melBands"],
        fmin=profile["minHz"], fmax=profile["maxHz"], htk=False, norm="slaney",
    )


def window_starts(frames: int, profile: dict[str, Any], which: str) -> list[int]:
    """First frames of the windows: the middle one, or all with the last anchored
    to the end."""
    length, step = int(profile["windowFrames"]), int(profile["stepFrames"])
    if frames <= length:
        return [0]
    if which == "middle":
        return [(frames - length) // 2]
    if which == "first":
        return [0]
    starts = list(range(0, frames - length + 1, step))
    if starts[-1] != frames - length:
        starts.append(frames - length)
    return starts


def to_windows(power: F32, profile: dict[str, Any], which: str) -> U8:
    """Mel power [bands, frames] -> windows uint8 [n, bands, windowFrames]."""
    length, floor = int(profile["windowFrames"]), float(profile["floorDb"])
    out = []
    for start in window_starts(power.shape[1], profile, which):
        part = power[:, start : start + length]
        part = part[:, np.arange(length) % part.shape[1]]
        peak = max(float(part.max()), 1e-20)
        db = 10.0 * np.log10(np.maximum(part / peak, 1e-20))
        level = np.rint((np.clip(db, floor, 0.0) - floor) / -floor * 255.0)
        out.append(level.astype(np.uint8))
    return np.stack(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--audio", type=Path, required=True, help="folder, searched with its subfolders")
    p.add_argument("--windows", choices=("middle", "first", "all"), default="middle")
    p.add_argument("--logits", type=Path, help="also write raw logits per file as JSON")
    args = p.parse_args()

    manifest = json.loads((args.bundle / "model.json").read_text())
    profile, names = manifest["profile"], manifest["labels"]
    calibration = manifest.get("calibration", {"method": "none"})
    temperature = float(calibration.get("temperature", 1.0))
    network = onnxruntime.InferenceSession(
        str(args.bundle / manifest["graph"]["file"]), providers=["CPUExecutionProvider"]
    )
    files = sorted(f for f in args.audio.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise SystemExit(f"no audio file under {args.audio}")

    out = csv.writer(sys.stdout)
    out.writerow(["file", "label", "top1", "p1", "top2", "p2", "top3", "p3"])
    scores, truth, kept = [], [], {}
    for file in files:
        samples = read_mono(file, profile["sampleRate"])
        windows = to_windows(mel_power(samples, profile), profile, args.windows)
        logits = network.run(["logits"], {"windows": windows})[0]
        probability = metrics.softmax(logits, temperature).mean(axis=0)
        kept[file.name] = [[round(float(v), 5) for v in row] for row in logits]
        order = np.argsort(-probability)[:3]
        label = labels.from_file_name(file.name)
        row: list[str] = [file.name, label or ""]
        for i in order:
            row += [names[i], f"{probability[i]:.4f}"]
        out.writerow(row)
        if label in names:
            scores.append(probability)
            truth.append(names.index(label))
    if args.logits:
        args.logits.write_text(json.dumps(kept))
    if truth:
        f = metrics.figures(np.array(scores), np.array(truth))
        print(f"{f['clips']} labelled files of {len(files)}: top-1 {f['top1']:.3f}, "
              f"top-3 {f['top3']:.3f}, mean recall {f['meanRecall']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
