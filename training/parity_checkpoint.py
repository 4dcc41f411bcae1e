"""A checkpoint of exactly the seed's structure whose answers depend on the picture.

``python training/parity_checkpoint.py --data AUDIO_DIR --out parity.pt``

The seed's own checkpoint is not ours to pass on, and random weights give one answer to
everything, on which every comparison succeeds. This one is trained just long enough to
spread its answers over what it hears; it is a ruler, not a classifier of genres.

torchvision's ``vit_b_16`` with the seed's head, weights from a fixed seed. An untrained
backbone already carries the picture to its last token; the head is trained on that until
its answers are decided, which takes seconds once the features are computed. The 16
targets are groups of recordings with like mean spectra and like loudness over time
(k-means), which a picture shows; genres would need more than minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

import parity_windows
from picture import CCMUSIC, Picture

CLASSES: Final = 16
SIZES: Final = (768, 289, 110, 42, CLASSES)
SEED: Final = 11
PROFILE: Final = "ccmusic-mel"
TRAINED_ON: Final = 330
"""Windows: about every second of the overlapping ones."""
STEPS: Final = 4000
LEARNING_RATE: Final = 7e-4


def seed_head(sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    """The seed's head: dropouts at 0, 3 and 6, linear layers at 1, 4, 7 and 9."""
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if i < 3:
            layers.append(nn.Dropout(0.1))
        layers.append(nn.Linear(into, out))
        if i < 3:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def seed_network() -> torchvision.models.VisionTransformer:
    """torchvision's vit_b_16 with the seed's head: state-dict keys ``heads.head.{1,4,7,9}.*``."""
    network = torchvision.models.vit_b_16(weights=None)
    network.heads = nn.Sequential()
    network.heads.add_module("head", seed_head())
    return network


def like_groups(cut: parity_windows.Windows) -> npt.NDArray[np.int64]:
    """One of 16 groups for each window, the same for all windows of a recording."""
    level = cut.windows.astype(np.float64)
    about = np.concatenate([level.mean(axis=2), level.std(axis=2)], axis=1)
    by_song = np.stack([about[cut.song == s].mean(axis=0) for s in range(len(cut.names))])
    by_song = (by_song - by_song.mean(axis=0)) / by_song.std(axis=0)
    found = KMeans(CLASSES, n_init=10, random_state=SEED).fit(by_song)
    return found.labels_.astype(np.int64)[cut.song]


def train_head(network: torchvision.models.VisionTransformer, cut: parity_windows.Windows) -> None:
    """On the features of evenly chosen windows; the backbone stays as it is."""
    generator = torch.Generator().manual_seed(SEED)
    used = np.unique(np.linspace(0, len(cut.windows) - 1, TRAINED_ON).astype(np.int64))
    target = torch.from_numpy(like_groups(cut)[used])
    picture = Picture(CCMUSIC, *cut.windows.shape[1:])
    head, network.heads = network.heads, nn.Sequential()
    network.eval()
    begin, parts = time.monotonic(), []
    with torch.no_grad():
        for i in range(0, len(used), 4):
            parts.append(network(picture(torch.from_numpy(cut.windows[used[i : i + 4]]))))
            if i % 40 == 0:
                print(f"features of {i + len(parts[-1])} of {len(used)} windows, "
                      f"{time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    features = torch.cat(parts)
    network.heads = head
    # Groups differ in size: without weights the largest would take the uncertain windows.
    weight = 1.0 / torch.bincount(target, minlength=CLASSES).clamp(min=1).float().sqrt()
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    head.train()
    for _ in range(STEPS):
        batch = torch.randint(len(target), (64,), generator=generator)
        loss = F.cross_entropy(head(features[batch]), target[batch], weight=weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    with torch.no_grad():
        answer = head(features).argmax(dim=1)
    share = torch.bincount(answer, minlength=CLASSES) / len(answer)
    print(f"on the {len(used)} windows it was trained on: {100 * float((answer == target).float().mean()):.0f} % as "
          f"its targets, {int((share > 0).sum())} classes, the commonest {100 * float(share.max()):.0f} %, "
          f"{time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def make(data: Path, out: Path, cache: Path) -> None:
    """Trains and writes the checkpoint, a plain state dict."""
    torch.manual_seed(SEED)
    network = seed_network()
    train_head(network, parity_windows.overlapping(data, PROFILE, cache))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    torch.save(network.state_dict(), part)
    part.replace(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder of recordings, searched with its subfolders")
    p.add_argument("--out", type=Path, required=True, help="344 MB: never into the project")
    p.add_argument("--cache", type=Path, help="where the cut windows are kept; default beside --out")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    make(args.data, args.out, args.cache or args.out.with_name("parity-windows.npz"))


if __name__ == "__main__":
    main()
