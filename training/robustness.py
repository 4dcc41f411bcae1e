"""How a trained network does on short and on low-passed music.

``python training/robustness.py --run RUN --data DIR`` asks about the validation clips
cut to their first 3..30 s and looped as the service loops, and about 30 s without
anything above 4, 5.5 and 8 kHz. Writes RUN/robustness.json, which export.py puts on the
card: for each row the figures of all clips, and under ``bySource`` those of each source.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import metrics
import prepare
from model import load_network
from train import predict

SECONDS = (3, 5, 8, 10, 15, 20, 30)
KILOHERTZ = (8.0, 5.5, 4.0)


class Row(metrics.Figures):
    """One line of the table."""

    bySource: dict[str, metrics.Figures]


def low_passed(windows: torch.Tensor, hz: float) -> torch.Tensor:
    """Windows uint8 [n, 128, 128] with every band whose centre lies above ``hz`` at the
    floor, as a codec leaves it."""
    top = float(prepare.slaney_mel(np.float32(prepare.SAMPLE_RATE / 2)))
    centre = np.arange(1, prepare.BANDS + 1) / (prepare.BANDS + 1) * top
    out = windows.clone()
    out[:, int(np.searchsorted(centre, prepare.slaney_mel(np.float32(hz)), side="right")) :] = 0
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    valid = prepare.load_split(args.data, "valid").labelled()
    torch.set_num_threads(args.threads)
    model = load_network(args.run)

    def ask(windows: torch.Tensor) -> Row:
        logits = predict(model, windows).numpy()
        return {**metrics.figures(logits, valid.label),
                "bySource": metrics.by_source(logits, valid.label, valid.source)}

    rows = {f"{s} s": ask(prepare.plain_windows(valid, prepare.frames_in(s))) for s in SECONDS}
    whole = prepare.plain_windows(valid)
    for khz in KILOHERTZ:
        rows[f"30 s, nothing above {khz:g} kHz"] = ask(low_passed(whole, khz * 1000))
    for name, row in rows.items():
        parts = [("all", row), *row["bySource"].items()]
        print(f"{name:30s}" + "   ".join(
            f"{part} {100 * f['top1']:.1f} {100 * f['top3']:.1f} {100 * f['meanRecall']:.1f}"
            for part, f in parts))
    (args.run / "robustness.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
