"""How a trained network does on real audio files that it was not trained on.

``python training/real_files.py --run RUN --data DIR --audio AUDIO``. AUDIO holds gtzan/ (clips
named as in the arrays; only those of the validation part are asked about) and fma/ (whole
songs, ``Genre_Title.mp3``). The front end is evaluate_audio.py's, with librosa. The songs are
asked about with one window and with all. Writes RUN/audio.json, which export.py puts on the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evaluate_audio
import labels
import metrics
import prepare
from model import GenreViT, load_network


def held_out(data: Path) -> set[str]:
    """Names of GTZAN's validation clips (``blues.00000``)."""
    with np.load(data / "gtzan-valid.npz") as z:
        return {str(name) for name in z["name"]}


@torch.no_grad()
def ask(
    model: GenreViT, temperature: float, files: list[Path], which: str
) -> metrics.Figures:
    """Figures of the mean probability over ``which`` windows of each file."""
    settings: dict[str, Any] = prepare.profile()
    scores, truth = [], []
    for file in files:
        label = labels.from_file_name(file.name)
        if label is None:
            continue
        samples = evaluate_audio.read_mono(file, settings["sampleRate"])
        windows = evaluate_audio.to_windows(
            evaluate_audio.mel_power(samples, settings), settings, which
        )
        logits = torch.cat([model(w)[0] for w in torch.from_numpy(windows).split(32)]).numpy()
        scores.append(metrics.softmax(logits, temperature).mean(axis=0))
        truth.append(labels.INDEX[label])
    return metrics.figures(np.array(scores), np.array(truth))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--audio", type=Path, required=True)
    args = p.parse_args()
    model = load_network(args.run)
    with np.load(args.run / "valid.npz") as z:
        temperature = metrics.fit_temperature(z["logits"], z["label"])

    known = held_out(args.data)
    clips = sorted(f for f in (args.audio / "gtzan").glob("*.flac") if f.stem in known)
    songs = sorted((args.audio / "fma").glob("*.mp3"))
    rows = {
        "GTZAN clips, their first 15 to 20 s": ask(model, temperature, clips, "middle"),
        "FMA songs, one window from the middle": ask(model, temperature, songs, "middle"),
        "FMA songs, all windows": ask(model, temperature, songs, "all"),
    }
    for name, f in rows.items():
        print(f"{name:40s} {f['clips']} files  top-1 {f['top1']:.3f}  top-3 {f['top3']:.3f}")
    (args.run / "audio.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
