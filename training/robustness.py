"""How a trained network does on short and on low-passed music.

``python training/robustness.py --run RUN --data DIR`` asks about the validation clips cut to 3..30 s and looped as the service loops, and about
30 s without anything above 8 kHz. Writes RUN/robustness.json, which export.py puts
on the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import metrics
import prepare
from model import GenreViT, ModelConfig
from train import predict

SECONDS = (3, 5, 8, 10, 15, 20, 30)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    args = p.parse_args()
    valid = prepare.load_split(args.data, "valid").labelled()
    torch.set_num_threads(2)
    saved = torch.load(args.run / "model.pt", weights_only=True)
    model = GenreViT(ModelConfig.from_dict(saved["config"]))
    model.load_state_dict(saved["state"])

    def ask(windows: torch.Tensor) -> metrics.Figures:
        return metrics.figures(predict(model, windows).numpy(), valid.label)

    rows = {f"{s} s": ask(prepare.plain_windows(valid, prepare.frames_in(s))) for s in SECONDS}
    low = prepare.plain_windows(valid)
    edge = prepare.BANDS * float(prepare.slaney_mel(np.float32(8000.0)) / prepare.slaney_mel(np.float32(11025.0)))
    low[:, int(edge) :] = 0
    rows["30 s, nothing above 8 kHz"] = ask(low)
    for name, f in rows.items():
        print(f"{name:28s} top-1 {f['top1']:.3f}  top-3 {f['top3']:.3f}  mean recall {f['meanRecall']:.3f}")
    (args.run / "robustness.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
