"""Does the network hear the genre or the collection?

``python training/source_check.py --run RUN --audio DIR``. DIR holds songs of the Free
Music Archive (any labels; none is used). Each 30 s of them is cut twice: as the stored
FMA arrays were (native rate, 46 ms at 44.1 kHz), and as the service cuts everything.
A network that learned the cut answers the second with genres that only GTZAN has.
Writes RUN/source.json, which export.py puts on the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch

import evaluate_audio
import labels
import metrics
import prepare
from model import load_network

GTZAN_ONLY = [labels.INDEX[n] for n in ("Blues", "Classical", "Country", "Disco", "Jazz")]
SECONDS = 30
STEP_SECONDS = 20


def as_arrays_were_cut(samples: prepare.F32, rate: int) -> torch.Tensor:
    """30 s of samples [n] at the native rate -> prepared window uint8 [1, 128, 128]."""
    power = librosa.feature.melspectrogram(y=samples, sr=rate, n_fft=2048, hop_length=512, n_mels=128)
    db = librosa.power_to_db(power, ref=np.max, top_db=80)
    db = db[:, np.floor((np.arange(128) + 0.5) * db.shape[1] / 128).astype(int)]
    stored = np.round((db - db.min()) / (db.max() - db.min()) * 255).astype(np.uint8)
    return prepare.quantise(torch.from_numpy(prepare.fma_array_view(stored))[None])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--audio", type=Path, required=True)
    args = p.parse_args()
    model = load_network(args.run)

    stored, served, songs = [], [], 0
    for file in sorted(args.audio.rglob("*.mp3")):
        native, rate = soundfile.read(file, dtype="float32", always_2d=True)
        mono = native.mean(axis=1)
        served_samples = evaluate_audio.read_mono(file, prepare.SAMPLE_RATE)
        songs += 1
        for start in range(0, len(mono) // rate - SECONDS, STEP_SECONDS):
            stored.append(as_arrays_were_cut(mono[start * rate : (start + SECONDS) * rate], rate))
            part = served_samples[start * prepare.SAMPLE_RATE : (start + SECONDS) * prepare.SAMPLE_RATE]
            power = evaluate_audio.mel_power(part, prepare.profile())
            served.append(torch.from_numpy(evaluate_audio.to_windows(power, prepare.profile(), "first")))
    with torch.no_grad():
        first = metrics.softmax(model.prepared_logits(torch.cat(stored)).numpy())
        second = metrics.softmax(model(torch.cat(served))[0].numpy())
    result = {
        "songs": songs,
        "windows": len(stored),
        "gtzanOnlyAnswersAsArrays": float(np.isin(first.argmax(axis=1), GTZAN_ONLY).mean()),
        "gtzanOnlyAnswersAsService": float(np.isin(second.argmax(axis=1), GTZAN_ONLY).mean()),
        "gtzanOnlyProbabilityAsArrays": float(first[:, GTZAN_ONLY].sum(axis=1).mean()),
        "gtzanOnlyProbabilityAsService": float(second[:, GTZAN_ONLY].sum(axis=1).mean()),
        "sameAnswer": float((first.argmax(axis=1) == second.argmax(axis=1)).mean()),
    }
    print(json.dumps(result, indent=1))
    (args.run / "source.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
