"""From the stored arrays to the view that the service computes from audio.

The service's view ("window") is ``uint8 [128, 128]``: rows are Slaney mel bands
from 0 to 11,025 Hz (row 0 lowest), columns are STFT frames every 5,168 samples
at 22,050 Hz (234.4 ms), values are decibels relative to the window's own loudest
cell, from -70 dB (0) to 0 dB (255).

The arrays of the two sources are brought to one common form ("as FMA's arrays were
cut"), into which the graph also turns the service's windows: see `to_fma_bands`.

The stored arrays differ from it in ways that tell the source, and so the label,
apart. Every function here exists to undo, or to randomise, one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import labels

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

# The front end of the service. export.py writes these same numbers to model.json.
SAMPLE_RATE: Final = 22_050
FFT_SIZE: Final = 2_048
HOP: Final = 5_168
BANDS: Final = 128
FRAMES: Final = 128
FLOOR_DB: Final = -70.0

GTZAN, FMA, OWN = 0, 1, 2
SOURCE_NAMES: Final = ("gtzan", "fma", "own")

# The arrays: what their 0..255 spans in decibels when the clip was clipped at
# `top_db`, and what it is taken for when it was not (see `_undo_stretch`).
_TOP_DB: Final = 80.0
_UNCLIPPED_SPAN_DB: Final = 72.0
_PLATEAU_CELLS: Final = 8

# GTZAN arrays: 387 columns taken from the 1,293 frames (hop 512) of 30 s.
_GTZAN_COLUMNS: Final = 387
_GTZAN_STEP: Final = HOP / 512 * 387.5 / 1293
"""Columns of a GTZAN array for one column of the view: 3.025."""

_FMA_NYQUIST: Final = 22_050.0


def profile() -> dict[str, Any]:
    """What the service's decoder has to do: model.json's ``profile``."""
    return {
        "sampleRate": SAMPLE_RATE, "channels": "mean", "resampler": "soxr",
        "window": "hann", "fftSize": FFT_SIZE, "hopLength": HOP,
        "centered": False, "padMode": "none", "power": 2,
        "melScale": "slaney", "melNorm": "slaney", "melBands": BANDS,
        "minHz": 0, "maxHz": SAMPLE_RATE // 2,
        "reference": "max", "scope": "window", "floorDb": int(FLOOR_DB),
        "stretch": "none", "quantisation": "linear-uint8",
        "windowFrames": FRAMES, "stepFrames": FRAMES // 2,
        "placement": "anchored", "shortInput": "loop",
    }


@dataclass(frozen=True)
class Clips:
    """Clips of one split, in decibels below the clip's own reference.

    ``db``: one float16 array [128, columns] per clip, rows already on the view's
    mel axis; GTZAN has 387 columns (77.5 ms), FMA 128 (234 ms).
    ``label``: int64 [n], -1 where the clip has no target genre.
    ``source``: int64 [n], ``GTZAN``, ``FMA`` or ``OWN`` (a user's own audio).
    ``tags``: float32 [n, len(labels.TAGS)], 1 where an FMA clip carries the tag; GTZAN
    clips carry none, which says nothing about them. ``names``: what the labels count.
    """

    db: list[npt.NDArray[np.float16]]
    label: I64
    source: I64
    tags: F32
    names: tuple[str, ...] = labels.LABELS

    def __len__(self) -> int:
        return len(self.db)

    def labelled(self) -> "Clips":
        """Only the clips with a target genre."""
        keep = np.flatnonzero(self.label >= 0)
        return self.take(keep)

    def take(self, index: I64) -> "Clips":
        """The clips at ``index``."""
        return Clips(
            [self.db[i] for i in index], self.label[index], self.source[index], self.tags[index],
            self.names,
        )


def slaney_mel(hz: F32) -> F32:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above."""
    hz = np.asarray(hz, dtype=np.float64)
    log = 15.0 + 27.0 * np.log(np.maximum(hz, 1e-9) / 1000.0) / np.log(6.4)
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, log).astype(np.float32)


def _undo_stretch(mel: npt.NDArray[np.uint8]) -> F32:
    """Array values [128, T] -> decibels [128, T] relative to the clip's maximum.

    Each clip was stretched to 0..255 from its own minimum to its maximum. Where
    the minimum was the `top_db` clip, many cells sit on it and the span is 80 dB
    (measured against real audio: 79.6 to 79.8 for every such clip). Where only a
    stray cell or none sits there, the span was 63 to 78 dB and cannot be known:
    the middle is taken, and training varies contrast by more than the error.
    GTZAN's lowest stored level is 1, FMA's 0, so both count as the plateau.
    """
    clipped = int(np.count_nonzero(mel <= 1)) >= _PLATEAU_CELLS
    span = _TOP_DB if clipped else _UNCLIPPED_SPAN_DB
    return (mel.astype(np.float32) / 255.0 - 1.0) * span


def fma_row_weights() -> F32:
    """[128, 128] matrix: FMA's bands (0-22,050 Hz) -> the view's (0-11,025 Hz).

    Linear interpolation in mel at the band centres. FMA's arrays were computed at
    44.1 kHz: without this, the same note would lie on other rows in the two
    sources. The few tracks of another native rate are off by that ratio, and the
    row shifts of the augmentation are larger than most of them.
    """
    top_view = float(slaney_mel(np.float32(SAMPLE_RATE / 2)))
    top_fma = float(slaney_mel(np.float32(_FMA_NYQUIST)))
    centres_view = np.arange(1, BANDS + 1) / (BANDS + 1) * top_view
    position = centres_view / top_fma * (BANDS + 1) - 1.0
    position = np.clip(position, 0, BANDS - 1)
    low = np.minimum(position.astype(np.int64), BANDS - 2)
    weights = np.zeros((BANDS, BANDS), dtype=np.float32)
    rows = np.arange(BANDS)
    weights[rows, low] = 1.0 - (position - low)
    weights[rows, low + 1] = position - low
    return weights


def to_fma_bands() -> F32:
    """[128, 128] matrix on mel power: the view's bands -> FMA's.

    FMA's arrays were cut with a window of 46 ms and bands 1.2 times as wide; the
    service cuts 93 ms for everything, as GTZAN's arrays did. A network trained on the
    arrays as they are learns that fine rows mean GTZAN, and then takes every real file
    for GTZAN: on seven songs of the Free Music Archive half of all answers were genres
    that only GTZAN has, against none of a hundred for the same songs prepared as the
    arrays were. So everything of 93 ms is smeared to FMA's bands, here while training
    and inside the graph for the service. The widths were fitted on real audio cut both
    ways (unlabelled: 42 windows of those songs, 30 GTZAN clips) so that the mean
    difference between neighbouring rows agrees.
    """
    top_view = float(slaney_mel(np.float32(SAMPLE_RATE / 2)))
    top_fma = float(slaney_mel(np.float32(_FMA_NYQUIST)))
    centre = np.arange(1, BANDS + 1) * top_fma / top_view - 1.0
    # Below 1 kHz a band is as wide as the window's main lobe: more smear there.
    width = np.where(centre < 40, 0.38, 0.28)
    distance = np.minimum(centre, BANDS - 1)[:, None] - np.arange(BANDS)[None, :]
    weights = np.exp(-0.5 * (distance / width[:, None]) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def smear(db: F32) -> F32:
    """Decibels [128, T] of 93 ms frames as if of FMA's 46 ms frames and bands."""
    power = to_fma_bands() @ np.exp(db * np.float32(np.log(10) / 10))
    return fma_row_weights() @ (10.0 * np.log10(np.maximum(power, 1e-12)))


def fma_array_view(mel: npt.NDArray[np.uint8]) -> F32:
    """A stored FMA array [128, T] -> decibels [128, T] on the view's mel axis."""
    # The stretch is undone first: the plateau that tells the span lies above 11,025 Hz.
    return fma_row_weights() @ _undo_stretch(mel)


def load_split(data_dir: Path, split: str) -> Clips:
    """Both sources of ``split`` (``train`` or ``valid``)."""
    db: list[npt.NDArray[np.float16]] = []
    label: list[int] = []
    source: list[int] = []
    tags: list[F32] = []

    with np.load(data_dir / f"gtzan-{split}.npz") as z:
        for genre, mel in zip(z["genre"], z["mel"]):
            db.append(smear(_undo_stretch(mel)).astype(np.float16))
            label.append(labels.INDEX[labels.from_gtzan(str(genre))])
            source.append(GTZAN)
            tags.append(np.zeros(len(labels.TAGS), dtype=np.float32))

    with np.load(data_dir / f"fma-{split}.npz") as z:
        for genre, subgenres, mel in zip(z["genre"], z["subgenres"], z["mel"]):
            if mel.max() == 0:
                continue  # one training clip is all zeros: no level, no content
            name = labels.from_fma(str(genre), str(subgenres))
            db.append(fma_array_view(mel).astype(np.float16))
            label.append(-1 if name is None else labels.INDEX[name])
            source.append(FMA)
            tags.append(labels.tags_of(str(subgenres)))

    return Clips(
        db, np.array(label, dtype=np.int64), np.array(source, dtype=np.int64), np.stack(tags)
    )


def frames_in(seconds: float) -> int:
    """Whole, uncentred STFT frames in ``seconds`` of audio, at most one window."""
    n = int((seconds * SAMPLE_RATE - FFT_SIZE) // HOP) + 1
    return max(1, min(FRAMES, n))


def _gtzan_columns(start: float, frames: int) -> I64:
    """Array columns for ``frames`` view columns from fractional column ``start``."""
    index = np.rint(start + _GTZAN_STEP * np.arange(frames)).astype(np.int64)
    return np.minimum(index, _GTZAN_COLUMNS - 1)


def plain_view(db: npt.NDArray[np.float16], frames: int = FRAMES) -> F32:
    """The first ``frames`` columns as the service sees them: float32 [128, 128] dB,
    looped to the window's length, in the common form, not yet re-referenced."""
    if db.shape[1] == _GTZAN_COLUMNS:
        # View frame 0 is centred on sample 1,024; array column 0 on frame 1 (512).
        first = 1024 / 512 * 387.5 / 1293 - 0.5
        columns = _gtzan_columns(max(0.0, first), frames)
    else:
        columns = np.arange(frames)
    return db[:, columns[np.arange(FRAMES) % frames]].astype(np.float32)


def random_view(
    db: npt.NDArray[np.float16], rng: np.random.Generator, full_share: float
) -> F32:
    """A random crop of 3 to 30 s, looped: float32 [128, 128] dB, not re-referenced.

    ``full_share`` of the crops keep 30 s, so that short input costs the normal
    case little. GTZAN's finer columns are entered at a random phase, which gives
    three nearly independent views of each clip.
    """
    frames = FRAMES
    if rng.random() >= full_share:
        frames = frames_in(float(rng.uniform(3.0, 30.0)))
    if db.shape[1] == _GTZAN_COLUMNS:
        room = _GTZAN_COLUMNS - 1 - _GTZAN_STEP * (frames - 1)
        columns = _gtzan_columns(float(rng.uniform(0.0, max(room, 1.0))), frames)
    else:
        columns = np.arange(frames) + int(rng.integers(0, FRAMES - frames + 1))
    # A loop has no first column: any rotation of it is as likely as another.
    turn = int(rng.integers(0, frames))
    order = (np.arange(FRAMES) + turn) % frames
    return db[:, columns[order]].astype(np.float32)


def quantise(db: Tensor, dither: bool = False) -> Tensor:
    """Decibels [n, 128, 128] -> levels 0..255 (uint8), each window re-referenced.

    The arrays' own reference was the maximum over all frames of 30 s, before
    columns were dropped, so it is not in them: the rule of the service (maximum
    over exactly the window's cells, fixed floor) is applied to both alike.
    ``dither`` moves values by up to one level first: the arrays' empty histogram
    bins differ by source and would give it away.
    """
    db = db - db.amax(dim=(1, 2), keepdim=True)
    level = (db - FLOOR_DB) / -FLOOR_DB * 255.0
    if dither:
        level = level + torch.rand_like(level) * 2.0 - 1.0
    return level.round().clamp(0, 255).to(torch.uint8)


def plain_windows(clips: Clips, frames: int = FRAMES) -> Tensor:
    """Every clip's fixed view, uint8 [n, 128, 128]: what validation uses."""
    out = [torch.from_numpy(plain_view(db, frames)) for db in clips.db]
    return quantise(torch.stack(out))


# --- augmentation -----------------------------------------------------------------


def _coin(n: int, p: float, g: torch.Generator) -> Tensor:
    """0/1 mask float32 [n, 1, 1], one with probability ``p``."""
    return (torch.rand(n, 1, 1, generator=g) < p).float()


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """float32 [n, 1, 1] uniform in [low, high)."""
    return low + (high - low) * torch.rand(n, 1, 1, generator=g)


def _shift_rows(db: Tensor, s: Tensor, g: torch.Generator) -> Tensor:
    """Pitch-like shift: rows move by up to 4 and stretch by up to 5 %. It also
    smears the row interpolation that only FMA clips went through."""
    n = db.shape[0]
    rows = torch.arange(BANDS, dtype=torch.float32).view(1, BANDS)
    shift = (s * _uniform(n, -4.0, 4.0, g)).view(n, 1)
    scale = (1.0 + s * _uniform(n, -0.05, 0.05, g)).view(n, 1)
    position = (rows * scale + shift).clamp(0, BANDS - 1)
    low = position.floor().clamp(max=BANDS - 2)
    part = (position - low).unsqueeze(2)
    index = low.long().unsqueeze(2).expand(-1, -1, FRAMES)
    return torch.lerp(db.gather(1, index), db.gather(1, index + 1), part)


def _equaliser(n: int, spread_db: float, g: torch.Generator) -> Tensor:
    """Smooth random gain curves [n, 128, 1]: rooms, masters and codecs differ."""
    knots = torch.randn(n, 1, 7, generator=g) * spread_db
    curve = torch.nn.functional.interpolate(
        knots, size=BANDS, mode="linear", align_corners=True
    )
    return curve.transpose(1, 2)


def _blur(db: Tensor, amount: Tensor, axis: int) -> Tensor:
    """Three-tap smoothing, ``amount`` [n, 1, 1] being the weight of each neighbour."""
    before = torch.cat([db.narrow(axis, 0, 1), db.narrow(axis, 0, 127)], dim=axis)
    after = torch.cat([db.narrow(axis, 1, 127), db.narrow(axis, 127, 1)], dim=axis)
    return db * (1 - 2 * amount) + (before + after) * amount


def _mask(db: Tensor, axis: int, widest: int, p: float, g: torch.Generator) -> Tensor:
    """SpecAugment: one band of up to ``widest`` rows or columns is replaced by the
    mean over the other axis, which hides its content and keeps the rest's levels
    (a band at the floor would be a far louder event than anything in music)."""
    n = db.shape[0]
    width = _uniform(n, 0, widest, g) * _coin(n, p, g)
    start = torch.rand(n, 1, 1, generator=g) * (128 - width)
    shape = (1, BANDS, 1) if axis == 1 else (1, 1, FRAMES)
    at = torch.arange(128, dtype=torch.float32).view(shape)
    hidden = (at >= start) & (at < start + width)
    return torch.where(hidden, db.mean(dim=axis, keepdim=True).expand_as(db), db)


def augment(db: Tensor, g: torch.Generator) -> Tensor:
    """Random, label-keeping changes of windows: decibels [n, 128, 128] in and out.

    The ranges are wider than the differences between the sources (window length,
    codec low-pass, row sampling, level), so that these cannot stand for a genre.
    Each window draws its own overall strength: with full strength for all, the
    network rarely sees a window like the ones it is asked about.
    """
    n = db.shape[0]
    s = _uniform(n, 0.0, 1.0, g)
    rows = torch.arange(BANDS, dtype=torch.float32).view(1, BANDS, 1)

    # At 234 ms a column there is next to no attack or decay left to reverse.
    backwards = _coin(n, 0.5, g).bool()
    db = torch.where(backwards, db.flip(2), db)
    db = _shift_rows(db, s, g)

    db = db - db.amax(dim=(1, 2), keepdim=True)
    db = db * (1.0 + s * _uniform(n, -0.25, 0.25, g))
    db = db + s * _equaliser(n, 4.0, g)
    db = _blur(db, _uniform(n, 0.0, 0.3, g) * _coin(n, 0.5, g), 1)
    db = _blur(db, s * _uniform(n, 0.0, 0.2, g) * _coin(n, 0.25, g), 2)

    # Codec and resampler low-pass. A 44.1 kHz file resampled to 22,050 Hz always
    # loses the last few rows; no array shows that, so it is drawn separately.
    for p, lowest in ((0.25, 80.0), (0.5, 121.0)):
        edge = _uniform(n, lowest, 128.0, g)
        slope = _uniform(n, 1.0, 12.0, g) * _coin(n, p, g)
        db = db - slope * (rows - edge).clamp(min=0)
    edge = _uniform(n, 0.0, 8.0, g)
    slope = s * _uniform(n, 0.5, 6.0, g) * _coin(n, 0.2, g)
    db = db - slope * (edge - rows).clamp(min=0)

    # A floor of noise under the music, tilted; it also hides where each source's
    # decibels were clipped.
    level = _uniform(n, -75.0, -40.0, g) + _uniform(n, -0.1, 0.1, g) * (rows - 64)
    level = level + 200.0 * (_coin(n, 0.25, g) - 1.0)
    db = torch.logaddexp(db * 0.2302585, level * 0.2302585) / 0.2302585
    grain = s * _uniform(n, 0.0, 2.5, g) * _coin(n, 0.5, g)
    db = db + grain * torch.randn(db.shape, generator=g)

    # The reference is one cell, the loudest: a little chance in it moves all others.
    # Capping the peaks lowers it by up to 4 dB.
    db = db - db.amax(dim=(1, 2), keepdim=True)
    cap = _uniform(n, 0.0, 4.0, g) * _coin(n, 0.5, g)
    return torch.minimum(db, -cap)


def mix(
    db: Tensor, target: Tensor, g: torch.Generator, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup in decibels, or two songs one after the other, each for half of the
    ``p`` share. ``db`` [n, 128, 128] referenced to its own maximum; ``target``
    float32 [n, classes]. Third comes the index of each window's partner: its own
    where nothing was mixed in."""
    n = db.shape[0]
    other = torch.randperm(n, generator=g)
    a = torch.rand(n, 1, 1, generator=g)
    # Beta(0.5, 0.5) by its quantile function; exact and cheap.
    lam = torch.sin(a * torch.pi / 2) ** 2
    lam = torch.maximum(lam, 1 - lam)
    at = torch.arange(FRAMES, dtype=torch.float32).view(1, 1, FRAMES)
    start = torch.rand(n, 1, 1, generator=g) * FRAMES
    inside = ((at - start) % FRAMES) < lam * FRAMES
    splice = _coin(n, 0.5, g).bool()
    use = _coin(n, p, g).bool()
    mixed = torch.where(
        splice, torch.where(inside, db, db[other]), lam * db + (1 - lam) * db[other]
    )
    weight = torch.where(use, lam, torch.ones_like(lam)).view(n, 1)
    partner = torch.where(use.view(n), other, torch.arange(n))
    return torch.where(use, mixed, db), weight * target + (1 - weight) * target[other], partner


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    ``windows``: uint8 [n, 128, 128]. ``genre``: soft targets [n, 15], all zero (no
    loss) for clips without a target genre. ``tags``: soft targets [n, tags].
    ``tagged``: [n, 1], 1 where the tags of all that was mixed are known.
    """

    windows: Tensor
    genre: Tensor
    tags: Tensor
    tagged: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def training_batches(
    clips: Clips,
    targets: F32,
    batch: int,
    count: int,
    seed: int,
    balance: float,
    mix_share: float,
    unlabelled_share: float,
    full_share: float = 0.5,
) -> Iterator[Batch]:
    """``count`` batches drawn from ``clips``, whose soft genre targets are ``targets``.

    Clips are drawn with a chance proportional to (clips of the genre)^(balance-1):
    1 keeps the data's imbalance of 15 to 1, 0 makes every genre equally likely. Clips
    without a genre make up ``unlabelled_share`` of a batch: their tags teach too.
    """
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed)
    known = clips.label >= 0
    size = np.bincount(clips.label[known], minlength=targets.shape[1]).astype(np.float64)
    chance = np.where(known, size[clips.label] ** (balance - 1.0), 0.0)
    chance = chance / chance.sum()
    if (~known).any():
        chance = chance * (1.0 - unlabelled_share) + ~known * (unlabelled_share / (~known).sum())
    both = np.concatenate([targets, clips.tags], axis=1)
    classes = targets.shape[1]
    for _ in range(count):
        pick = rng.choice(len(clips), size=batch, p=chance)
        db = np.stack([random_view(clips.db[i], rng, full_share) for i in pick])
        x = augment(torch.from_numpy(db), g)
        x = (x - x.amax(dim=(1, 2), keepdim=True)).clamp(min=FLOOR_DB)
        x, y, partner = mix(x, torch.from_numpy(both[pick]), g, mix_share)
        x = _mask(x, 1, 20, 0.3, g)
        x = _mask(x, 2, 32, 0.3, g)
        fma = torch.from_numpy((clips.source[pick] == FMA).astype(np.float32)).view(-1, 1)
        yield Batch(quantise(x, dither=True), y[:, :classes], y[:, classes:], fma * fma[partner])
