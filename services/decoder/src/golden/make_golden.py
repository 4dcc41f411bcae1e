"""Golden vectors of the log-mel front end, computed by librosa on PCM that both languages make by the same formula.

    python make_golden.py            (librosa 0.11, matplotlib, numpy) rewrites the two .golden.json beside this file

PCM: `SAMPLES` samples of float32: five sines whose frequencies and levels are listed, plus white noise from a linear
congruential generator (Numerical Recipes' constants). Values are decibels, 10 log10 (power) or 20 log10 (magnitude),
without a reference and clamped at -300 dB, frame by frame, lowest band first, to three decimals.

stretched.golden.json: windows as a colour map is asked for them, by librosa's own `power_to_db` over the whole track and
matplotlib's own `Normalize` over each slice; the index is what `Colormap.__call__` takes the colour by. The same PCM,
with one gain for each third of it.
"""

import base64
import json
from pathlib import Path

import librosa
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, Normalize

SINES = [(61.7, 0.3), (440.0, 0.25), (1234.5, 0.1), (5000.0, 0.02), (9876.0, 0.003)]
NOISE = 0.001

PROFILES = {
    "centred-hop-512": dict(sampleRate=22050, fftSize=2048, hopLength=512, centered=True, power=2,
                            melScale="slaney", melNorm="slaney", melBands=128, minHz=0, maxHz=11025, samples=8192),
    "uncentred-hop-5168": dict(sampleRate=22050, fftSize=2048, hopLength=5168, centered=False, power=2,
                               melScale="slaney", melNorm="slaney", melBands=128, minHz=0, maxHz=11025, samples=66150),
    "htk-without-norm": dict(sampleRate=16000, fftSize=1024, hopLength=160, centered=True, power=2,
                             melScale="htk", melNorm="none", melBands=64, minHz=60, maxHz=7600, samples=4000),
    "magnitude-44100": dict(sampleRate=44100, fftSize=4096, hopLength=1024, centered=False, power=1,
                            melScale="slaney", melNorm="slaney", melBands=96, minHz=20, maxHz=16000, samples=16384),
}


def make_pcm(samples: int, rate: int) -> np.ndarray:
    state, noise = 1, np.empty(samples)
    for n in range(samples):
        state = (state * 1664525 + 1013904223) % 2**32
        noise[n] = state / 2**31 - 1
    time = np.arange(samples) / rate
    pcm = NOISE * noise
    for hz, level in SINES:
        pcm += level * np.sin(2 * np.pi * hz * time)
    return pcm.astype(np.float32)


def log_mel(pcm: np.ndarray, p: dict) -> np.ndarray:
    mel = librosa.feature.melspectrogram(
        y=pcm, sr=p["sampleRate"], n_fft=p["fftSize"], hop_length=p["hopLength"], center=p["centered"],
        pad_mode="constant", window="hann", power=p["power"], n_mels=p["melBands"], fmin=p["minHz"], fmax=p["maxHz"],
        htk=p["melScale"] == "htk", norm="slaney" if p["melNorm"] == "slaney" else None)
    return (20 / p["power"]) * np.log10(np.maximum(mel.astype(np.float64), 1e-30))


WINDOW = 40
STRETCHED = {
    "quiet, loud, digital silence": (0.02, 1.0, 0.0),
    "so quiet that 1e-10 lies above the floor": (2e-6, 2e-6, 0.0),
    "silence": (0.0, 0.0, 0.0),
}


def colour_indices(part: np.ndarray) -> np.ndarray:
    """Which of 256 colours matplotlib gives each cell: the map's red channel is made to say so."""
    steps = ListedColormap(np.stack([np.arange(256) / 255] * 3, axis=1))
    return np.rint(steps(Normalize()(part))[..., 0] * 255).astype(np.uint8)


def stretched(gains: tuple[float, ...]) -> dict:
    """Slices as the ccmusic recipe cuts them, but of WINDOW frames."""
    pcm = make_pcm(3 * WINDOW * 512 + 17 * 512, 22050)
    third = -(-len(pcm) // 3)
    pcm *= np.repeat(np.float32(gains), third)[: len(pcm)]
    mel = librosa.feature.melspectrogram(y=pcm, sr=22050)
    db = librosa.power_to_db(mel, ref=np.max)
    count = db.shape[1] // WINDOW
    begin = int(0.5 * (db.shape[1] - count * WINDOW))
    slices = [db[:, begin + i * WINDOW :][:, :WINDOW] for i in range(count)]
    return {"frames": db.shape[1], "begin": begin,
            "windows": [base64.b64encode(colour_indices(part).tobytes()).decode() for part in slices]}


def write(name: str, golden: dict) -> None:
    path = Path(__file__).with_name(name)
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


def main() -> None:
    cases = []
    for name, p in PROFILES.items():
        decibels = log_mel(make_pcm(p["samples"], p["sampleRate"]), p)
        cases.append({"name": name, "profile": p, "frames": decibels.shape[1],
                      "decibels": [round(float(v), 3) for v in decibels.T.ravel()]})
    write("log-mel.golden.json", {"librosa": librosa.__version__, "sines": SINES, "noise": NOISE, "cases": cases})
    write("stretched.golden.json", {
        "librosa": librosa.__version__, "matplotlib": matplotlib.__version__, "windowFrames": WINDOW,
        "cases": [{"name": name, "gains": gains, **stretched(gains)} for name, gains in STRETCHED.items()]})


if __name__ == "__main__":
    main()
