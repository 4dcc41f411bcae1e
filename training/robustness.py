"""How a bundle does on short and on low-passed music.

``python training/robustness.py --bundle models/default --data DIR --out RUN`` asks
about the validation clips cut to 3..30 s and looped as the service loops, and about
30 s without anything above 8 kHz. Writes RUN/robustness.json, which export.py puts
on the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import metrics
import prepare

SECONDS = (3, 5, 8, 10, 15, 20, 30)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    valid = prepare.load_split(args.data, "valid").labelled()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    network = onnxruntime.InferenceSession(
        str(args.bundle / "model.onnx"), options, ["CPUExecutionProvider"]
    )

    def ask(windows: torch.Tensor) -> metrics.Figures:
        parts = [network.run(["logits"], {"windows": w.numpy()})[0] for w in windows.split(64)]
        return metrics.figures(np.concatenate(parts), valid.label)

    rows = {f"{s} s": ask(prepare.plain_windows(valid, prepare.frames_in(s))) for s in SECONDS}
    low = prepare.plain_windows(valid)
    edge = prepare.BANDS * float(prepare.slaney_mel(np.float32(8000.0)) / prepare.slaney_mel(np.float32(11025.0)))
    low[:, int(edge) :] = 0
    rows["30 s, nothing above 8 kHz"] = ask(low)
    for name, f in rows.items():
        print(f"{name:28s} top-1 {f['top1']:.3f}  top-3 {f['top3']:.3f}  mean recall {f['meanRecall']:.3f}")
    (args.out / "robustness.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
