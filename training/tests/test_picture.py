"""The picture against matplotlib and Pillow themselves, and what the shipped profiles say."""

from __future__ import annotations

import io
import os
import sys
import unittest
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import import_profile
from picture import CCMUSIC, Picture, PictureForm, antialiased_bilinear, nearest_drawing


def drawn_by_matplotlib(windows: np.ndarray) -> np.ndarray:
    """A window uint8 [bands, frames] as the seed's recipe draws it, without the JPEG:
    float [3, 224, 224] in levels 0..255."""
    import librosa.display
    import matplotlib.pyplot as plt
    from PIL import Image

    # The middle of each of 256 steps, so that matplotlib's own quantisation gives the level back.
    decibels = (windows + 0.5) / 256 * 80 - 80
    decibels[0, 0], decibels[1, 0] = -80, 0
    librosa.display.specshow(decibels)
    plt.axis("off")
    file = io.BytesIO()
    plt.savefig(file, format="png", bbox_inches="tight", pad_inches=0.0)
    plt.close()
    picture = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1).astype(np.float64)


class AgainstMatplotlib(unittest.TestCase):
    def test_every_pixel_is_within_a_level_of_the_drawing(self) -> None:
        draw = np.random.default_rng(1)
        for frames in (490, 491):
            window = draw.integers(0, 256, (128, frames)).astype(np.uint8)
            window[0, 0], window[1, 0] = 0, 255
            theirs = drawn_by_matplotlib(window.astype(np.float64))
            ours = Picture(CCMUSIC, 128, frames).levels(torch.from_numpy(window[None]))[0].numpy() * 255
            self.assertLess(np.abs(ours - theirs).max(), 1.01)
            # The same comparison can fail: the other way up it is another picture.
            self.assertGreater(np.abs(ours[:, ::-1] - theirs).max(), 50)

    def test_mean_and_deviation_bring_levels_to_minus_one_to_one(self) -> None:
        window = torch.tensor([[[0, 255]] * 16], dtype=torch.uint8)
        form = PictureForm("grey", "bottom", None, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        picture = Picture(form, 16, 2)(window)
        self.assertEqual(list(picture.shape), [1, 3, 32, 32])
        self.assertAlmostEqual(float(picture[0, 0, 0, 0]), -1.0, places=5)
        self.assertAlmostEqual(float(picture[0, 2, 31, 31]), 1.0, places=5)


class Axes(unittest.TestCase):
    def test_the_lowest_band_lies_where_the_profile_says(self) -> None:
        window = torch.zeros(1, 16, 16, dtype=torch.uint8)
        window[0, 0] = 255
        for lowest, row in (("bottom", 15), ("top", 0)):
            form = PictureForm("grey", lowest, None, 16, (0, 0, 0), (1, 1, 1))
            brightness = Picture(form, 16, 16)(window)[0, 0].mean(dim=1)
            self.assertEqual(int(brightness.argmax()), row)

    def test_resizing_to_the_same_size_changes_nothing_and_rows_sum_to_one(self) -> None:
        np.testing.assert_allclose(antialiased_bilinear(7, 7), np.eye(7), atol=1e-12)
        for source, target in ((496, 224), (128, 224), (369, 224), (3, 5)):
            np.testing.assert_allclose(antialiased_bilinear(source, target).sum(axis=1), 1, atol=1e-12)

    def test_every_cell_is_drawn(self) -> None:
        drawing = nearest_drawing(491, 496)
        self.assertEqual(set(drawing.sum(axis=0)), {1.0, 2.0})
        self.assertEqual(drawing.shape, (496, 491))


class ShippedProfiles(unittest.TestCase):
    def test_ccmusic_is_drawn_as_the_seed_drew(self) -> None:
        self.assertEqual(import_profile.picture_form(import_profile.load("ccmusic-mel")), CCMUSIC)

    def test_ccmusic_has_the_checkpoints_labels_and_not_the_articles(self) -> None:
        profile = import_profile.load("ccmusic-mel")
        self.assertEqual((len(profile["labels"]), profile["labels"][0], profile["labels"][11]),
                         (16, "Symphony", "Soul_or_RnB"))
        with self.assertRaisesRegex(import_profile.ImportFault, "refused for ccmusic-mel.*Symphony"):
            import_profile.check_labels(list(reversed(profile["refusedLabels"]["labels"])), 16, profile)
        spelt = [{"R&B": "RnB", "Hip-Hop": "hip hop"}.get(n, n.upper()) for n in profile["refusedLabels"]["labels"]]
        with self.assertRaisesRegex(import_profile.ImportFault, "refused"):
            import_profile.check_labels(spelt, 16, profile)

    def test_default_mel_is_the_default_bundles_front_end(self) -> None:
        import json

        manifest = json.loads((import_profile.SHIPPED.parent / "default" / "model.json").read_text())
        self.assertEqual(import_profile.load("default-mel")["profile"], manifest["profile"])


if __name__ == "__main__":
    unittest.main()
