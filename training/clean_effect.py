"""Does cleaning a recording before the front end help the model?

``python training/clean_effect.py --data DIR [--bundle models/default] [--json OUT]``

Takes the labelled recordings under DIR/audio of which none was trained on (GTZAN clips
named in DIR/gtzan-valid.npz, whole songs of the Free Music Archive), spoils each in
several ways, cleans it with ffmpeg's own filters as the decoder would, before anything
else, and asks the model about the middle window. All comparisons are paired: the same
file spoilt in the same way with and without cleaning, so what counts are the answers
that became right and those that became wrong; ``p`` is the two-sided sign test on them.

Needs ffmpeg, and espeak-ng for the babble (left out without it).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Final, Optional

import librosa
import numpy as np
import numpy.typing as npt
import onnxruntime
import scipy.signal
import soundfile

import evaluate_audio
import labels
import metrics

F32 = npt.NDArray[np.float32]

DEFAULT_BUNDLE: Final = Path(__file__).resolve().parent.parent / "models/default"
RATE: Final = 22_050
SECONDS: Final = 32.0
SNRS: Final = (20, 10, 5)
SEED: Final = 5

# afftdn hands its samples out 25 ms late (measured on ffmpeg 5.1); a frame every 234 ms
# notices that, so it is undone, and shown by itself.
LATE: Final = 550
_IN_TIME: Final = f"atrim=start_sample={LATE},asetpts=PTS-STARTPTS"

TREATMENTS: Final = {
    "none": "anull",
    "denoise": f"afftdn,{_IN_TIME}",
    "denoise, tracking": f"afftdn=tn=1,{_IN_TIME}",
    "denoise -25 dB": f"afftdn=nf=-25,{_IN_TIME}",
    "denoise -25 dB, strong": f"afftdn=nr=24:nf=-25,{_IN_TIME}",
    "25 ms later": f"adelay=delays={LATE}S:all=1",
    "20 dB less": "volume=-20dB",
    "loudness": "loudnorm",
    "denoise -25 dB + loudness": f"afftdn=nf=-25,{_IN_TIME},loudnorm",
}
"""ffmpeg filters. ``25 ms later`` and ``20 dB less`` clean nothing: they show what a shift
of the frames and a change of level do."""
LOUDNESS_IN: Final = ("clean", "pink 10 dB", "telephone")
"""loudnorm computes at 192 kHz and takes longer than all else together: not everywhere."""


# --- spoiling ---------------------------------------------------------------------


def pink(samples: int, rng: np.random.Generator) -> F32:
    """Noise of equal power in each octave."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20.0))
    return np.fft.irfft(spectrum, samples).astype(np.float32)


def hum_and_hiss(samples: int, rng: np.random.Generator) -> F32:
    """Mains hum of 50 Hz with overtones, and white noise, of equal power."""
    time = np.arange(samples) / RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * time + rng.uniform(0, 6.28)) / k for k in (1, 2, 3, 5, 7))
    hiss = rng.normal(size=samples)
    return (hum / np.std(hum) + hiss / np.std(hiss)).astype(np.float32)


_SENTENCES: Final = (
    "We could take the early train and be there before the shops open.",
    "I told her that the kitchen window would not close after the storm.",
    "Three of them ordered soup, and the others were still reading the menu.",
    "He says the road along the river is flooded again near the old mill.",
    "Would you mind turning that down a little while I am on the telephone?",
)


def babble(samples: int, rng: np.random.Generator, folder: Path) -> F32:
    """Eight synthetic voices that talk at once."""
    mix = np.zeros(samples)
    for i, voice in enumerate(("en-us+m1", "en-gb+f2", "en-us+m3", "en-gb+f4", "de+m5", "fr+f1", "es+m7", "en-us+f5")):
        file = folder / f"voice-{i}.wav"
        if not file.exists():
            text = " ".join(_SENTENCES[(i + j) % len(_SENTENCES)] for j in range(len(_SENTENCES)))
            subprocess.run(["espeak-ng", "-v", voice, "-s", str(140 + 8 * i), "-w", str(file), text], check=True)
        speech, _ = librosa.load(file, sr=RATE)
        begin = int(rng.integers(len(speech)))
        mix += np.resize(np.roll(speech, -begin), samples) / np.std(speech)
    return mix.astype(np.float32)


def with_noise(music: F32, noise: F32, snr: float) -> F32:
    """``music`` with ``noise`` that is ``snr`` dB weaker on the whole."""
    gain = np.sqrt(np.mean(music**2) / np.mean(noise**2)) * 10 ** (-snr / 20)
    return (music + gain * noise).astype(np.float32)


def telephone(music: F32) -> F32:
    """300 to 3,400 Hz at 8 kHz in eight logarithmic bits, and back."""
    sections = scipy.signal.butter(4, (300, 3400), "bandpass", fs=RATE, output="sos")
    narrow = librosa.resample(scipy.signal.sosfilt(sections, music).astype(np.float32), orig_sr=RATE, target_sr=8000)
    loudest = max(float(np.abs(narrow).max()), 1e-9)
    companded = librosa.mu_compress(narrow / loudest, mu=255, quantize=True)
    return librosa.resample(librosa.mu_expand(companded, mu=255) * loudest, orig_sr=8000, target_sr=RATE).astype(np.float32)


Spoil = Callable[[F32, np.random.Generator], F32]


def conditions(folder: Path) -> dict[str, Spoil]:
    """Ways to spoil a recording, by name."""
    kinds: dict[str, Callable[[int, np.random.Generator], F32]] = {"pink": pink, "hum + hiss": hum_and_hiss}
    if shutil.which("espeak-ng"):
        babble(RATE, np.random.default_rng(), folder)  # makes the voices, before threads ask for them
        kinds["babble"] = lambda n, rng: babble(n, rng, folder)
    else:
        print("no espeak-ng: no babble", file=sys.stderr)
    found: dict[str, Spoil] = {"clean": lambda music, rng: music}
    for name, make in kinds.items():
        for snr in SNRS:
            found[f"{name} {snr} dB"] = (
                lambda music, rng, make=make, snr=snr: with_noise(music, make(len(music), rng), snr)
            )
    found["telephone"] = lambda music, rng: telephone(music)
    return found


# --- asking -----------------------------------------------------------------------


def recordings(data: Path) -> list[tuple[Path, int]]:
    """Files that were not trained on, and their labels."""
    with np.load(data / "gtzan-valid.npz") as z:
        held = {str(name).removesuffix(".wav").removesuffix(".au") for name in z["name"]}
    files = [f for f in sorted((data / "audio/gtzan").glob("*.flac")) if f.stem in held]
    files += sorted((data / "audio/fma").glob("*.mp3"))
    named = [(file, labels.from_file_name(file.name)) for file in files]
    return [(file, labels.INDEX[name]) for file, name in named if name is not None]


def middle(file: Path) -> F32:
    """The middle 32 s: what a window of 30 s and the filters' run-up need."""
    samples, _ = librosa.load(file, sr=RATE)
    room = max(0, len(samples) - int(SECONDS * RATE)) // 2
    return samples[room : room + int(SECONDS * RATE)]


def treatments_in(condition: str) -> list[str]:
    """The names of those that are measured under a condition."""
    return [name for name in TREATMENTS if "loudness" not in name or condition in LOUDNESS_IN]


def treat(source: Path, names: list[str]) -> dict[str, Path]:
    """Treatments of a file by name, in one run of ffmpeg."""
    outs = {name: source.with_name(f"{source.stem}-{i}.wav") for i, name in enumerate(names)}
    split = f"[0:a]asplit={len(names)}" + "".join(f"[i{i}]" for i in range(len(names)))
    chains = [f"[i{i}]{TREATMENTS[name]},aresample={RATE}[o{i}]" for i, name in enumerate(names)]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(source),
               "-filter_complex", ";".join([split, *chains])]
    for i, name in enumerate(names):
        command += ["-map", f"[o{i}]", "-c:a", "pcm_f32le", str(outs[name])]
    subprocess.run(command, check=True)
    return outs


def window_of(file: Path, profile: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The middle window, uint8 [1, bands, frames], by `evaluate_audio`'s front end: the
    service's numbers without a process for each file."""
    samples = evaluate_audio.read_mono(file, RATE)
    return evaluate_audio.to_windows(evaluate_audio.mel_power(samples, profile), profile, "middle")


def sign_test(better: int, worse: int) -> float:
    """Two-sided: how likely so uneven a split of ``better + worse`` is by chance."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(max(better, worse), n + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare(scores: dict[str, npt.NDArray[np.float64]], truth: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Figures of each treatment against none."""
    right = {name: s.argmax(axis=1) == truth for name, s in scores.items()}
    out = {}
    for name, s in scores.items():
        figures = metrics.figures(s, truth)
        better = int((right[name] & ~right["none"]).sum())
        worse = int((~right[name] & right["none"]).sum())
        out[name] = {
            "top1": round(figures["top1"], 4), "top3": round(figures["top3"], 4),
            "wrongToRight": better, "rightToWrong": worse, "p": round(sign_test(better, worse), 4),
        }
    return out


def measure(data: Path, bundle: Path, only: Optional[list[str]]) -> dict[str, Any]:
    """All figures; the JSON that this program writes."""
    manifest = json.loads((bundle / "model.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = onnxruntime.InferenceSession(str(bundle / manifest["graph"]["file"]), options)
    temperature = float((manifest["calibration"] if manifest["calibration"] != "none" else {}).get("temperature", 1.0))
    files = recordings(data)
    truth = np.array([label for _, label in files])
    music = [middle(file) for file, _ in files]
    found: dict[str, Any] = {}
    pooled: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in TREATMENTS}
    moved: dict[str, list[float]] = {name: [] for name in TREATMENTS}
    with tempfile.TemporaryDirectory(prefix="as-clean-") as scratch:
        folder = Path(scratch)
        for place, (condition, spoil) in enumerate(conditions(folder).items()):
            if only and condition not in only:
                continue
            names = treatments_in(condition)

            def hear(i: int, names: list[str] = names, place: int = place, spoil: Spoil = spoil) -> dict[str, npt.NDArray[np.uint8]]:
                source = folder / f"{i}.wav"
                spoilt = spoil(music[i], np.random.default_rng((SEED, place, i)))
                soundfile.write(source, spoilt / max(1.0, float(np.abs(spoilt).max())), RATE, subtype="FLOAT")
                return {name: window_of(file, manifest["profile"]) for name, file in treat(source, names).items()}

            with ThreadPoolExecutor(2) as pool:
                each = list(pool.map(hear, range(len(music))))
            heard = {name: [windows[name] for windows in each] for name in names}
            scores = {}
            for name, windows in heard.items():
                logits = network.run(["logits"], {network.get_inputs()[0].name: np.concatenate(windows)})[0]
                scores[name] = metrics.softmax(logits, temperature)
                pooled[name].append(scores[name])
                moved[name] += [float(np.abs(w.astype(float) - p).mean()) for w, p in zip(windows, heard["none"])]
            found[condition] = compare(scores, truth)
            print(condition, json.dumps({n: f["top1"] for n, f in found[condition].items()}), file=sys.stderr, flush=True)
    # Over all conditions only those that were measured in all.
    every = {name: np.concatenate(s) for name, s in pooled.items() if len(s) == len(found)}
    return {
        "model": f"{manifest['name']} {manifest['version']}", "files": len(files), "filters": TREATMENTS,
        "conditions": found,
        "all": compare(every, np.tile(truth, len(found))),
        "meanChangeOfCells": {name: round(float(np.mean(m)), 3) for name, m in moved.items() if m},
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table to read: top-1 / top-3, (+ became right, - became wrong, p)."""
    names = [name for name in found["filters"]]
    rows = [[f"{found['model']}, {found['files']} files", *names]]
    for condition, by in [*found["conditions"].items(), ("all", found["all"])]:
        cells = [condition]
        for name in names:
            f = by.get(name)
            if f is None:
                cells.append("")
                continue
            cell = f"{100 * f['top1']:.1f} / {100 * f['top3']:.1f}"
            if name != "none":
                cell += f" (+{f['wrongToRight']} -{f['rightToWrong']}, {f['p']:.2f})"
            cells.append(cell)
        rows.append(cells)
    rows.append(["mean change of a cell, of 255", *(str(found["meanChangeOfCells"].get(n, "")) for n in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with gtzan-valid.npz and audio/")
    p.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    p.add_argument("--only", action="append", help="a condition by name; may be repeated")
    p.add_argument("--json", type=Path, help="also write the figures there")
    args = p.parse_args()
    found = measure(args.data, args.bundle, args.only)
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
