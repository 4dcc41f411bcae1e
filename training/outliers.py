"""Is it music at all? A score that becomes the output ``outlier`` of the exported graph.

``python training/outliers.py --data DIR --run RUN [--audio DIR]`` fits it, measures it and
writes RUN/outlier.pt and RUN/outlier.json, both read by export.py.

Two parts, the greater one counts. A detector: a small network on the window's fixed
statistics (model.WindowStatistics), trained to tell the training clips from the sounds
of not_music.py. And a distance: how far the statistics lie from everything in the
training clips, which knows no kind of sound and so has a chance at kinds that nobody
thought of. What else was tried stands in EXPERIMENTS.md.

Each part's threshold is a quantile over training clips that the part had not seen.
Validation clips, real files, and the languages and voices that are held out are only
measured.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
import not_music
import prepare
from model import GenreViT, WindowStatistics, load_network

F32 = npt.NDArray[np.float32]

THRESHOLD: Final = 0.5
"""Of the score; both parts are shifted so that it is theirs."""

DETECTOR_QUANTILE: Final = 0.995
DISTANCE_QUANTILE: Final = 0.997
"""Of training music, unseen by the part: together under 1 % of it is called an outlier."""

_LIMIT: Final = 5.0
"""Standardised statistics are cut at this: a tone's are hundreds of deviations out."""

_MEMBERS: Final = 2
_HIDDEN: Final = 64
_STEPS: Final = 600
_DROPPED: Final = 0.3
_DIRECTIONS: Final = 20
_POINTS: Final = 256
_STEEPNESS: Final = 8.0
"""Of the distance's logarithm: twice the threshold distance scores 0.996."""

_SPEECH_SHARE: Final = 3.0
"""Speech counts as three kinds: it is what people send by mistake."""

# Neighbouring clips may be of one album: whole runs are left out when thresholds are set.
_RUN: Final = 20


class OutlierScore(nn.Module):
    """Statistics of windows float32 [n, size] -> score [n] in 0..1, over 0.5 for what is not
    like the music of the training clips. Plain matrix operations, for any exporter."""

    SHAPES: Final = (
        "centre", "spread", "weight", "bias", "readout", "offset", "basis", "points", "reach",
    )

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        for name in self.SHAPES:
            self.register_buffer(name, parts[name].float())

    def standardised(self, measured: Tensor) -> Tensor:
        return ((measured - self.centre) / self.spread).clamp(-_LIMIT, _LIMIT)

    def detector(self, z: Tensor) -> Tensor:
        """Log-odds of not-music less their threshold: standardised [n, size] -> [n]."""
        return torch.matmul(F.relu(torch.matmul(z, self.weight) + self.bias), self.readout) + self.offset

    def distance(self, z: Tensor) -> Tensor:
        """To the nearest of the music's points, as a multiple of the threshold: [n]."""
        x = torch.matmul(z, self.basis)
        square = (x * x).sum(dim=1, keepdim=True) - 2.0 * torch.matmul(x, self.points.t())
        square = square + (self.points * self.points).sum(dim=1)
        return square.amin(dim=1).clamp(min=1e-6).sqrt() / self.reach

    def forward(self, measured: Tensor) -> Tensor:
        z = self.standardised(measured)
        far = _STEEPNESS * self.distance(z).log()
        return torch.sigmoid(torch.maximum(self.detector(z), far))


def load_score(path: Path) -> OutlierScore:
    """The score that `main` saved."""
    return OutlierScore(torch.load(path, weights_only=True))


# --- windows ----------------------------------------------------------------------


@torch.no_grad()
def measure(common: Tensor) -> Tensor:
    """Statistics float32 [n, size] of windows in the common form, uint8 or 0..1."""
    scale = 1.0 / 255.0 if common.dtype == torch.uint8 else 1.0
    statistics = WindowStatistics()
    return torch.cat([statistics(part.float() * scale) for part in common.split(256)])


def _looped(db: Tensor, r: np.random.Generator) -> Tensor:
    """Windows [n, 128, 128] cut at random to 1.5 to 30 s, shorter ones oftener, and looped
    as the service loops."""
    out = []
    for one in db:
        frames = int(np.exp(r.uniform(np.log(6), np.log(prepare.FRAMES + 1))))
        start = int(r.integers(0, prepare.FRAMES - frames + 1))
        out.append(one[:, start + torch.arange(prepare.FRAMES) % frames])
    return torch.stack(out)


def _views(db: Sequence[npt.NDArray[Any]], seed: int, *, short: bool, changed: bool) -> Tensor:
    """Statistics of one view of each clip ([128, columns] decibels, common form): looped
    where ``short``, with training's augmentation where ``changed``."""
    r, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    out = []
    for i in range(0, len(db), 256):
        x = torch.from_numpy(np.stack([prepare.random_view(one, r, 1.0) for one in db[i : i + 256]]))
        x = _looped(x, r) if short else x
        x = prepare.augment(x, g) if changed else x
        out.append(measure(prepare.quantise(x)))
    return torch.cat(out)


_KINDS_OF_VIEW: Final = tuple((short, changed) for short in (False, True) for changed in (False, True))


def _all_views(db: Sequence[npt.NDArray[Any]], seed: int, rounds: int) -> Tensor:
    """[4 * rounds * n, size]: every clip long and short, as it is and changed."""
    return torch.cat([
        _views(db, seed + 4 * k + i, short=short, changed=changed)
        for k in range(rounds) for i, (short, changed) in enumerate(_KINDS_OF_VIEW)
    ])


@dataclass(frozen=True)
class NotMusic:
    """Sounds of not_music.py through the service's view. ``common``: [n, 128, 128] in 0..1;
    ``kind``, ``held``: [n]."""

    common: Tensor
    kind: npt.NDArray[np.str_]
    held: npt.NDArray[np.bool_]


def to_common(model: GenreViT, windows: npt.NDArray[np.uint8]) -> Tensor:
    with torch.no_grad():
        return model.common(torch.from_numpy(windows))


def not_music_windows(model: GenreViT, profile: dict[str, Any], seed: int, count: int) -> NotMusic:
    """Computed with librosa as evaluate_audio.py does, one window a sound."""
    from evaluate_audio import mel_power, to_windows

    windows, kind, held = [], [], []
    for sound in not_music.make(seed, count):
        windows.append(to_windows(mel_power(sound.samples, profile), profile, "middle")[0])
        kind.append(sound.kind)
        held.append(sound.held)
    return NotMusic(to_common(model, np.stack(windows)), np.array(kind), np.array(held))


# --- fitting ----------------------------------------------------------------------


def _train_member(x: Tensor, y: Tensor, chance: Tensor, seed: int) -> list[Tensor]:
    """One hidden layer told to answer ``y`` [n] for ``x`` [n, size], drawn by ``chance``:
    its weight, bias, readout and offset."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden, out = nn.Linear(x.shape[1], _HIDDEN), nn.Linear(_HIDDEN, 1)
        weights = [*hidden.parameters(), *out.parameters()]
        optimiser = torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, _STEPS)
        for _ in range(_STEPS):
            pick = torch.multinomial(chance, 256, replacement=True)
            # Statistics left out at random: no single one may carry the answer.
            h = F.dropout(F.relu(hidden(F.dropout(x[pick], _DROPPED))), _DROPPED)
            loss = F.binary_cross_entropy_with_logits(out(h)[:, 0], y[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return [hidden.weight.detach().t(), hidden.bias.detach(), out.weight.detach()[0], out.bias.detach()[0]]


def _train_detector(
    music: Tensor, other: Tensor, kind: npt.NDArray[np.str_], members: int
) -> dict[str, Tensor]:
    """Parts of `OutlierScore`: music [m, size] and other sound [n, size] of ``kind`` [n], both
    standardised. Half of what is shown is music; kinds are shown equally often."""
    share = {k: _SPEECH_SHARE if k == "speech" else 1.0 for k in np.unique(kind)}
    chance = torch.cat([
        torch.full((len(music),), 1.0 / len(music)),
        torch.tensor([share[k] / sum(share.values()) / (kind == k).sum() for k in kind]).float(),
    ])
    x = torch.cat([music, other])
    y = torch.cat([torch.full((len(music),), 0.01), torch.full((len(other),), 0.99)])
    nets = [_train_member(x, y, chance, seed) for seed in range(members)]
    weight, bias, readout, offset = zip(*nets)
    # The mean of several answers is one wider layer.
    return {"weight": torch.cat(weight, dim=1), "bias": torch.cat(bias),
            "readout": torch.cat(readout) / members, "offset": torch.stack(offset).mean()}


def _find_points(music: Tensor) -> dict[str, Tensor]:
    """Parts of `OutlierScore`: the directions in which music [m, size] varies most, and
    points among it there."""
    _, directions = torch.linalg.eigh(torch.cov(music.t()))
    basis = directions[:, -_DIRECTIONS:].contiguous()
    some = torch.matmul(music, basis).numpy()
    some = some[:: max(1, len(some) // 10_000)]
    found = KMeans(min(_POINTS, len(some) // 4), n_init=1, max_iter=30, random_state=0).fit(some)
    return {"basis": basis, "points": torch.from_numpy(found.cluster_centers_.astype(np.float32))}


@dataclass(frozen=True)
class Fitted:
    """The score, and what refitting it without one kind needs: its parts, and all that was
    shown, standardised."""

    score: OutlierScore
    parts: dict[str, Tensor]
    music: Tensor
    other: Tensor
    kind: npt.NDArray[np.str_]

    def without(self, kinds: Sequence[str]) -> OutlierScore:
        """A score whose detector never met ``kinds``, with the same thresholds."""
        left = ~np.isin(self.kind, kinds)
        parts = _train_detector(self.music, self.other[torch.from_numpy(left)], self.kind[left], 1)
        shift = self.score.offset - self.parts["offset"]
        return OutlierScore({**self.score.state_dict(), **parts, "offset": parts["offset"] + shift})


def fit(
    music: Tensor, group: npt.NDArray[np.int64], other: Tensor, kind: npt.NDArray[np.str_],
    members: int = _MEMBERS,
) -> Fitted:
    """Fits both parts and sets their thresholds.

    :param music: statistics [m, size] of views of training clips.
    :param group: [m], the same for views that must be on one side when thresholds are set.
    :param other: statistics [n, size] of sound that is not music, of ``kind`` [n].
    """
    neutral = {"centre": music.mean(dim=0), "spread": music.std(dim=0) + 1e-3,
               "offset": torch.zeros(()), "reach": torch.ones(())}

    def standardised(x: Tensor) -> Tensor:
        return ((x - neutral["centre"]) / neutral["spread"]).clamp(-_LIMIT, _LIMIT)

    z, shown = standardised(music), standardised(other)

    def parts_of(rows: Tensor) -> dict[str, Tensor]:
        return {**neutral, **_find_points(z[rows]), **_train_detector(z[rows], shown, kind, members)}

    odds, far = torch.zeros(len(z)), torch.zeros(len(z))
    for side in (0, 1):
        rows = torch.from_numpy(group % 2 == side)
        half = OutlierScore(parts_of(~rows))
        odds[rows], far[rows] = half.detector(z[rows]), half.distance(z[rows])
    parts = parts_of(torch.ones(len(z), dtype=torch.bool))
    score = OutlierScore({
        **parts,
        "offset": parts["offset"] - float(np.quantile(odds.numpy(), DETECTOR_QUANTILE)),
        "reach": torch.tensor(float(np.quantile(far.numpy(), DISTANCE_QUANTILE))),
    })
    return Fitted(score.eval(), parts, z, shown, kind)


# --- measuring --------------------------------------------------------------------


@torch.no_grad()
def confidence(model: GenreViT, common: Tensor, temperature: float) -> F32:
    """Calibrated probability [n] of the best genre of windows in the common form."""
    logits = [model.head(F.gelu(model.features(part).pooled)) for part in common.split(64)]
    return metrics.softmax(torch.cat(logits).numpy(), temperature).max(axis=1).astype(np.float32)


def _share(mask: npt.NDArray[np.bool_]) -> float:
    return round(float(np.mean(mask)), 4)


def measure_kinds(
    score: OutlierScore, unseen: dict[str, OutlierScore], test: NotMusic, sure: npt.NDArray[np.bool_]
) -> dict[str, dict[str, Any]]:
    """Per kind: how many sounds; the share with a confident genre before (``sure`` [n]) and
    after the score; the share that it flags, and that it flags when fitted without that
    kind (``unseen``)."""
    measured = measure(test.common)
    flagged = (score(measured) > THRESHOLD).numpy()
    rows: dict[str, dict[str, Any]] = {}
    for kind in not_music.KINDS:
        of = test.kind == kind
        stranger = (unseen[kind](measured[torch.from_numpy(of)]) > THRESHOLD).numpy()
        rows[kind] = {
            "n": int(of.sum()), "confidentBefore": _share(sure[of]),
            "confidentAfter": _share((sure & ~flagged)[of]), "flagged": _share(flagged[of]),
            "flaggedWhenUnseen": _share(stranger),
        }
    for name, of in (
        ("speech, unseen voices and languages", (test.kind == "speech") & test.held),
        ("all", np.ones(len(test.kind), dtype=bool)),
    ):
        rows[name] = {"n": int(of.sum()), "confidentBefore": _share(sure[of]),
                      "confidentAfter": _share((sure & ~flagged)[of]), "flagged": _share(flagged[of])}
    return rows


def music_rows(data: Path) -> dict[str, Tensor]:
    """Windows of music that no part was fitted on, by what they are."""
    from robustness import KILOHERTZ, low_passed
    from train import load_data

    valid = load_data(data)[1]
    whole = prepare.plain_windows(valid)
    rows = {"validation, 30 s": whole}
    for seconds in (20, 10, 8, 5, 3):
        rows[f"validation, {seconds} s"] = prepare.plain_windows(valid, prepare.frames_in(seconds))
    for khz in KILOHERTZ:
        rows[f"validation, nothing above {khz:g} kHz"] = low_passed(whole, khz * 1000)
    if data.is_dir():
        import labels

        every = prepare.load_split(data, "valid")
        for tag in ("Instrumental", "Experimental"):
            tagged = (every.label < 0) & (every.tags[:, labels.TAGS.index(tag)] > 0)
            rows[f"FMA {tag}, no target genre"] = prepare.plain_windows(every.take(np.flatnonzero(tagged)))
    return rows


def file_rows(model: GenreViT, profile: dict[str, Any], audio: Path) -> dict[str, Tensor]:
    """Windows of real files through librosa: the middle one of each, the same of 5 s cut
    from the middle, and all of the longer ones."""
    from evaluate_audio import EXTENSIONS, mel_power, read_mono, to_windows

    middle, short, every = [], [], []
    for file in sorted(f for f in audio.rglob("*") if f.suffix.lower() in EXTENSIONS):
        samples = read_mono(file, prepare.SAMPLE_RATE)
        begin = max(0, len(samples) // 2 - int(2.5 * prepare.SAMPLE_RATE))
        part = samples[begin : begin + 5 * prepare.SAMPLE_RATE]
        middle.append(to_windows(mel_power(samples, profile), profile, "middle"))
        short.append(to_windows(mel_power(part, profile), profile, "middle"))
        if len(samples) > 60 * prepare.SAMPLE_RATE:
            every.append(to_windows(mel_power(samples, profile), profile, "all"))
    rows = {"real files, middle window": middle, "real files, 5 s": short}
    if every:
        rows[f"all windows of {len(every)} whole songs"] = every
    return {name: to_common(model, np.concatenate(windows)) for name, windows in rows.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--audio", type=Path, help="folder of music files: how many are called outliers")
    p.add_argument("--confident", type=float, default=0.5, help="calibrated probability that counts as confident")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    from train import load_data

    torch.set_num_threads(args.threads)
    begin, spent = time.time(), time.process_time()
    model = load_network(args.run)
    with np.load(args.run / "valid.npz") as z:
        temperature = metrics.fit_temperature(z["logits"], z["label"])
    profile = prepare.profile()

    clips = load_data(args.data)[0].labelled()
    rounds = max(1, round(4_000 / len(clips)))
    music = _all_views(clips.db, 1, rounds)
    group = np.tile(np.arange(len(clips)) // _RUN, len(music) // len(clips))
    shown = not_music_windows(model, profile, seed=1, count=6)
    used = ~shown.held
    decibels = [((x - 1.0) * -prepare.FLOOR_DB).numpy() for x in shown.common[torch.from_numpy(used)]]
    other = _all_views(decibels, 1_000, 3)
    kind = np.tile(shown.kind[used], len(other) // len(decibels))
    fitted = fit(music, group, other, kind)
    score = fitted.score
    # Babble is made of speech: neither may stand in for the other.
    unseen = {
        name: fitted.without(("speech", "babble") if name in ("speech", "babble") else (name,))
        for name in not_music.KINDS
    }

    test = not_music_windows(model, profile, seed=2, count=3)
    sure = confidence(model, test.common, temperature) >= args.confident
    kinds = measure_kinds(score, unseen, test, sure)
    windows = music_rows(args.data)
    if args.audio:
        windows |= file_rows(model, profile, args.audio)
    found = {name: {"n": len(x), "flagged": _share((score(measure(x)) > THRESHOLD).numpy())}
             for name, x in windows.items()}

    torch.save(score.state_dict(), args.run / "outlier.pt")
    (args.run / "outlier.json").write_text(json.dumps({
        "threshold": THRESHOLD, "confident": args.confident, "kinds": kinds, "music": found,
    }, indent=1) + "\n")
    print(f"{'not music':40s}    n  confident before  after  flagged  flagged when unseen")
    for name, row in kinds.items():
        stranger = f"{100 * row['flaggedWhenUnseen']:14.0f}" if "flaggedWhenUnseen" in row else ""
        print(f"{name:40s} {row['n']:4d} {100 * row['confidentBefore']:14.0f} {100 * row['confidentAfter']:8.0f} "
              f"{100 * row['flagged']:8.0f} {stranger}")
    print("music called an outlier, %")
    for name, music_row in found.items():
        print(f"{name:40s} {music_row['n']:4d} {100 * music_row['flagged']:6.1f}")
    print(f"{time.time() - begin:.0f} s, {time.process_time() - spent:.0f} s of CPU")


if __name__ == "__main__":
    main()
