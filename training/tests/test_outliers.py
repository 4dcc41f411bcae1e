"""The outlier score: fitted on a little synthetic music, exported, asked about noise."""

from __future__ import annotations

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import not_music  # noqa: E402
import outliers  # noqa: E402

ROWS, COLUMNS = 128, 128


def made_music(count: int, seed: int) -> torch.Tensor:
    """Windows [n, 128, 128] in 0..1: chords that change with the bar over a falling
    spectrum, and a drum on the beat."""
    r = np.random.default_rng(seed)
    row, column = np.arange(ROWS)[:, None], np.arange(COLUMNS)[None, :]
    out = []
    for _ in range(count):
        bar, beat = int(r.integers(6, 14)), int(r.integers(2, 5))
        x = 0.75 - r.uniform(0.002, 0.005) * row + 0.02 * r.standard_normal((ROWS, COLUMNS))
        for note in r.integers(5, 60, (COLUMNS // bar + 1, 3)).repeat(bar, axis=0)[:COLUMNS].T:
            for k in (1, 2, 3):
                x = x + 0.3 / k * np.exp(-0.5 * ((row - np.minimum(note + 18 * k, 127)[None, :]) / 1.2) ** 2)
        out.append(x + r.uniform(0.05, 0.2) * (column % beat == 0))
    x = np.stack(out)
    return torch.from_numpy((x - x.max(axis=(1, 2), keepdims=True) + 1).clip(0, 1)).float()


def made_noise(count: int, seed: int) -> torch.Tensor:
    """Windows of stationary noise with a straight spectrum."""
    r = np.random.default_rng(seed)
    slope = r.uniform(-0.004, 0.004, (count, 1, 1))
    x = 0.8 + slope * np.arange(ROWS)[None, :, None] + 0.06 * r.standard_normal((count, ROWS, COLUMNS))
    return torch.from_numpy(x.clip(0, 1)).float()


class OutlierScoreTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.score = outliers.fit(
            outliers.measure(made_music(400, 1)), np.arange(400) // 20,
            outliers.measure(made_noise(200, 1)), np.array(["noise"] * 200), members=1,
        ).score

    def flagged(self, windows: torch.Tensor) -> float:
        score = self.score(outliers.measure(windows))
        self.assertTrue(((score >= 0) & (score <= 1)).all())
        return float((score > outliers.THRESHOLD).float().mean())

    def test_unseen_music_passes(self) -> None:
        self.assertLessEqual(self.flagged(made_music(200, 2)), 0.05)

    def test_unseen_noise_is_flagged(self) -> None:
        self.assertGreaterEqual(self.flagged(made_noise(100, 2)), 0.99)

    def test_silence_and_a_tone_are_flagged_though_no_silence_and_no_tone_was_shown(self) -> None:
        # Digital silence has no loudest cell: the whole window is at the reference.
        tone = torch.zeros(1, ROWS, COLUMNS)
        tone[:, 40] = 1.0
        self.assertEqual(self.flagged(torch.cat([torch.ones(1, ROWS, COLUMNS), tone])), 1.0)

    def test_the_exported_graph_gives_the_same_scores_for_any_batch(self) -> None:
        measured = outliers.measure(torch.cat([made_music(3, 3), made_noise(2, 3)]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "score.onnx"
            batch = torch.export.Dim("batch", min=1, max=4096)
            program = torch.onnx.export(
                self.score, (measured,), input_names=["measured"], output_names=["outlier"],
                dynamic_shapes={"measured": {0: batch}}, opset_version=18, dynamo=True, verbose=False,
            )
            assert program is not None
            program.save(str(path))
            network = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            together = network.run(None, {"measured": measured.numpy()})[0]
            alone = network.run(None, {"measured": measured[4:].numpy()})[0]
        with torch.no_grad():
            expected = self.score(measured).numpy()
        np.testing.assert_allclose(together, expected, atol=1e-4)
        np.testing.assert_allclose(alone, expected[4:], atol=1e-4)

    def test_a_saved_score_is_the_same_when_loaded(self) -> None:
        measured = outliers.measure(made_music(4, 4))
        with tempfile.TemporaryDirectory() as folder:
            torch.save(self.score.state_dict(), Path(folder) / "outlier.pt")
            again = outliers.load_score(Path(folder) / "outlier.pt")
        self.assertTrue(torch.equal(again(measured), self.score(measured)))


@unittest.skipUnless(shutil.which("espeak-ng"), "espeak-ng is not installed")
class NotMusicTest(unittest.TestCase):
    def test_one_seed_gives_the_same_30_s(self) -> None:
        kinds = ("weather", "signals", "babble")
        for first, second in zip(not_music.make(5, kinds=kinds), not_music.make(5, kinds=kinds)):
            self.assertEqual(first.samples.shape, (30 * 22_050,))
            self.assertLessEqual(float(np.abs(first.samples).max()), 1.0)
            np.testing.assert_array_equal(first.samples, second.samples, first.name)

    def test_another_seed_gives_other_sounds(self) -> None:
        for first, second in zip(not_music.make(5, kinds=("clicks",)), not_music.make(6, kinds=("clicks",))):
            self.assertGreater(float(np.abs(first.samples - second.samples).max()), 0.01)


if __name__ == "__main__":
    unittest.main()
