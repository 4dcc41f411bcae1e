"""The floor to beat: a support-vector machine on cepstral statistics.

``python training/svm_floor.py --data DIR`` trains it on the train parts and prints
the validation figures. No network is worth shipping that does not clearly beat it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import metrics
import prepare

F32 = npt.NDArray[np.float32]


def statistics(windows: npt.NDArray[np.uint8]) -> F32:
    """374 statistics per window: uint8 [n, 128, 128] -> float32 [n, 374]."""
    x = windows.astype(np.float32)
    cepstra = dct(x, axis=1, norm="ortho")[:, :30]
    delta = np.diff(cepstra, axis=2)
    bands = x.reshape(len(x), 32, 4, 128).mean(axis=2)
    centred = cepstra[:, :20] - cepstra[:, :20].mean(axis=2, keepdims=True)
    spectrum = np.abs(np.fft.rfft(centred, axis=2))[:, :, 1:]
    modulation = np.log1p(spectrum.reshape(len(x), 20, 8, 8).mean(axis=3))
    parts = [
        cepstra.mean(axis=2), cepstra.std(axis=2), delta.std(axis=2),
        np.percentile(cepstra, 10, axis=2), np.percentile(cepstra, 90, axis=2),
        bands.mean(axis=2), bands.std(axis=2), modulation.reshape(len(x), -1),
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    args = p.parse_args()
    train = prepare.load_split(args.data, "train").labelled()
    valid = prepare.load_split(args.data, "valid").labelled()
    begin = time.time()
    machine = make_pipeline(StandardScaler(), SVC(C=3.0, class_weight="balanced"))
    machine.fit(statistics(prepare.plain_windows(train).numpy()), train.label)
    scores = machine.decision_function(statistics(prepare.plain_windows(valid).numpy()))
    print(f"trained and applied in {time.time() - begin:.0f} s")
    for name, f in [("all", metrics.figures(scores, valid.label)),
                    *metrics.by_source(scores, valid.label, valid.source).items()]:
        print(f"{name:6s} clips {f['clips']:4d}  top-1 {f['top1']:.3f}  "
              f"top-3 {f['top3']:.3f}  mean recall {f['meanRecall']:.3f}")
    for name, f in metrics.shared_genres(scores, valid.label, valid.source).items():
        print(f"five shared genres, {name}: top-1 {f['top1']:.3f} of {f['clips']}")


if __name__ == "__main__":
    main()
