"""From the decoder's windows to the picture that an imported network was trained on.

`Picture` is the first part of every imported graph, so that the service sends one byte
a cell and needs no code for a model's colours and sizes.

The seed's recipe draws each slice with matplotlib, saves the drawing and resizes it with
Pillow. Looking a colour up is one gather; drawing (nearest cell) and resizing
(antialiased triangle filter) are linear and act on each axis alone, so each axis is one
constant matrix. Left out: the JPEG between them, and Pillow's rounding to whole levels
after each axis (at most one level of 255).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

F64 = npt.NDArray[np.float64]

LEVELS: Final = 256
# A pixel's centre may fall exactly on the edge of two cells; matplotlib gives it to the
# upper one, while binary fractions of the axes' height can land a hair below.
_EDGE: Final = 1e-9


@dataclass(frozen=True)
class PictureForm:
    """How a window becomes a picture; the fields of a profile's ``picture``."""

    colour: str
    """A matplotlib colour map, or ``grey``: the same value in all three channels."""
    lowest: str
    """``bottom`` or ``top``: the picture's edge where the lowest band lies."""
    drawn: tuple[float, float] | None
    """Height and width in pixels of the drawing (its axes; a broken pixel at the top is
    cut off); None: the window's cells are the pixels."""
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def colour_table(colour: str) -> F64:
    """Red, green and blue in 0..1 of each level: float64 [256, 3], in whole 255ths as
    matplotlib's drawings store them."""
    if colour == "grey":
        return np.repeat(np.arange(LEVELS, dtype=np.float64)[:, None] / 255.0, 3, axis=1)
    import matplotlib

    table = matplotlib.colormaps[colour](np.arange(LEVELS))[:, :3]
    return np.rint(np.asarray(table, dtype=np.float64) * 255.0) / 255.0


def nearest_drawing(cells: int, pixels: float) -> F64:
    """Which cell each pixel of a drawn axis shows: float64 [floor(pixels), cells], one
    1 a row, pixel 0 and cell 0 both at the lower or left end.

    Follows ``pcolormesh`` on matplotlib's Agg canvas without antialiasing: a pixel has
    the colour of the cell under its centre (checked pixel by pixel against matplotlib
    3.11 for 128 rows, and for 490 and 491 columns).
    """
    whole = math.floor(pixels)
    centre = (np.arange(whole) + 0.5) * cells / pixels
    matrix = np.zeros((whole, cells))
    matrix[np.arange(whole), np.floor(centre + _EDGE).astype(np.int64)] = 1.0
    return matrix


def antialiased_bilinear(source: int, target: int) -> F64:
    """Pillow's BILINEAR resize of one axis: float64 [target, source], rows sum to 1.

    A triangle as wide as the step when it shrinks, two pixels wide when it grows
    (``precompute_coeffs`` in Pillow's Resample.c).
    """
    step = source / target
    support = max(step, 1.0)
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * step
        first = max(0, int(centre - support + 0.5))
        last = min(source, int(centre + support + 0.5))
        x = np.arange(first, last)
        weight = np.maximum(0.0, 1.0 - np.abs((x - centre + 0.5) / support))
        matrix[i, first:last] = weight / weight.sum()
    return matrix


class Picture(nn.Module):
    """windows uint8 [n, bands, frames], row 0 the lowest band -> float32
    [n, 3, size, size], normalised, row 0 the picture's top edge."""

    def __init__(self, form: PictureForm, bands: int, frames: int) -> None:
        super().__init__()
        self.form = form
        size = form.image_size
        height, width = form.drawn or (float(bands), float(frames))
        # A broken pixel is cut off at the top edge, wherever the lowest band lies.
        rows = nearest_drawing(bands, height)
        if form.lowest == "top":
            rows = rows[:, ::-1]
        rows = rows[::-1]
        columns = nearest_drawing(frames, width)
        table = colour_table(form.colour)
        self.grey = form.colour == "grey"
        self.register_buffer("table", _float(table[:, :1] if self.grey else table), persistent=False)
        self.register_buffer(
            "rows", _float(antialiased_bilinear(len(rows), size) @ rows), persistent=False
        )
        self.register_buffer(
            "columns", _float((antialiased_bilinear(len(columns), size) @ columns).T), persistent=False
        )
        self.register_buffer("mean", _float(np.array(form.mean)).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", _float(np.array(form.std)).reshape(3, 1, 1), persistent=False)

    table: Tensor
    rows: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def levels(self, windows: Tensor) -> Tensor:
        """The picture before mean and deviation, 0..1: [n, 3 (1 if grey), size, size]."""
        colours = self.table[windows.long()].permute(0, 3, 1, 2)
        return self.rows @ (colours @ self.columns)

    def forward(self, windows: Tensor) -> Tensor:
        return (self.levels(windows) - self.mean) / self.std


def _float(values: F64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


CCMUSIC: Final = PictureForm(
    colour="magma", lowest="bottom", drawn=(369.6, 496.0), image_size=224,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)
"""The seed's picture; models/profiles/ccmusic-mel.json says the same (a test holds them together)."""
