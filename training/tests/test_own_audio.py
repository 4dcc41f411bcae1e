"""Run from anywhere: ``python -m unittest discover training/tests``."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path

import librosa
import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import labels  # noqa: E402
import own_audio  # noqa: E402
import prepare  # noqa: E402

RATE = 22_050


def music(seconds: float, seed: int) -> np.ndarray:
    """Decaying chords over noise, float32 at 22,050 Hz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    root = 110 * 2 ** (rng.integers(0, 12) / 12)
    tone = sum(np.sin(2 * np.pi * root * k * time) / k for k in range(1, 7))
    return (0.2 * tone * np.exp(-4 * (time * 2 % 1)) + 0.01 * rng.normal(size=len(time))).astype("f4")


class Folder(unittest.TestCase):
    """A folder with a few files of music, shared by all tests of a class."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.enterClassContext(contextlib.redirect_stderr(io.StringIO()))
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        for i in range(14):
            soundfile.write(cls.root / f"{i}.wav", music(4, i), RATE)

    def manifest(self, text: str) -> Path:
        path = self.root / "data.csv"
        path.write_text(text, encoding="utf-8")
        return path

    def rows(self, count: int, label: str, first: int = 0) -> str:
        return "".join(f"{i}.wav,{label}\n" for i in range(first, first + count))


class Reading(Folder):
    def causes(self, text: str, **more: object) -> list[str]:
        with self.assertRaises(own_audio.ManifestError) as caught:
            own_audio.read_rows(self.manifest(text), **more)  # type: ignore[arg-type]
        self.assertIn("data.csv: ", str(caught.exception))
        return caught.exception.causes

    def test_every_fault_is_named_with_its_line(self) -> None:
        good = self.rows(5, "Tango") + self.rows(5, "Waltz", 5)
        told = self.causes(
            "path,label\n" + good + "nowhere.wav,Tango\n3.wav,Tango\n./4.wav,Waltz\n"
            "12.wav,\n,Tango\n13.wav,tango\na,b,c\n11.wav,Rare\n"
        )
        for sentence in (
            f"line 12: there is no file {self.root}/nowhere.wav",
            f"line 13: {self.root}/3.wav is the file of line 5 again",
            f"line 14: {self.root}/4.wav is the file of line 6 again",
            "line 15: there is no label",
            "line 16: there is no path",
            "line 17: the label tango is Tango (line 2) in other letters",
            "line 18: 3 cells under 2 column names (a comma in a name must stand in quotes)",
            "the label Rare has 1 clip (line 19): at least 5 are needed to learn and to check it",
        ):
            self.assertIn(sentence, told)

    def test_a_file_without_rows_or_header_is_told_from_one_with_other_columns(self) -> None:
        self.assertIn("empty", self.causes("")[0])
        self.assertIn("empty", self.causes("\n\n")[0])
        self.assertIn("names no file", self.causes("path,label\n\n")[0])
        self.assertIn("line 1: the header is file,genre", self.causes("file,genre\n1.wav,Tango\n")[0])
        self.assertIn("line 1", self.causes("path,label,label\n1.wav,a,b\n")[0])
        with self.assertRaisesRegex(own_audio.ManifestError, "cannot be read"):
            own_audio.read_rows(self.root / "none.csv")

    def test_a_label_that_a_model_does_not_have(self) -> None:
        text = "path,label\n" + self.rows(5, "rock") + self.rows(5, "Tango", 5)
        self.assertEqual(len(own_audio.read_rows(self.manifest(text))), 10)
        told = self.causes(text, known=("Rock", "Jazz"))
        self.assertEqual(told[0], "line 7: the label Tango is none of Rock, Jazz")
        self.assertEqual(len(told), 5)

    def test_one_label_is_nothing_to_tell_apart(self) -> None:
        self.assertIn("at least two labels", self.causes("path,label\n" + self.rows(9, "Tango"))[0])

    def test_what_a_split_must_hold(self) -> None:
        rows = [f"{i}.wav,{'Tango' if i < 5 else 'Waltz'},train,{i}" for i in range(10)]
        head = "path,label,split,group\n"
        self.assertIn("no row has split valid", self.causes(head + "\n".join(rows)))
        rows[0] = "0.wav,Tango,test,0"
        rows[9] = "9.wav,Waltz,valid,8"
        told = self.causes(head + "\n".join(rows))
        self.assertIn("line 2: split is test: it must be train or valid", told)
        self.assertTrue(any(c.startswith("line 11: the group 8 is in valid") for c in told), told)
        only = "".join(f"{i}.wav,{'Tango,train' if i < 5 else 'Waltz,valid'}\n" for i in range(10))
        self.assertIn("no row with the label Waltz has split train",
                      self.causes("path,label,split\n" + only))


class Splitting(unittest.TestCase):
    @staticmethod
    def row(i: int, label: str, group: str = "", folder: str = "/a") -> own_audio.Row:
        return own_audio.Row(i + 2, f"{folder}/{i}.wav", label, "", group)

    def test_about_fifteen_percent_of_each_label_always_the_same(self) -> None:
        rows = [self.row(i, "Tango" if i < 100 else "Waltz") for i in range(120)]
        train, valid = own_audio.split_rows(rows)
        self.assertEqual(len(train) + len(valid), 120)
        self.assertEqual(sum(r.label == "Tango" for r in valid), 15)
        self.assertEqual(sum(r.label == "Waltz" for r in valid), 3)
        self.assertEqual(own_audio.split_rows(list(reversed(rows)))[1], list(reversed(valid)))
        moved = [own_audio.Row(r.line, "/b" + r.path, r.label, "", "") for r in rows]
        self.assertEqual([r.line for r in own_audio.split_rows(moved)[1]], [r.line for r in valid])

    def test_an_artist_stays_on_one_side(self) -> None:
        rows = [self.row(i, "Tango" if i % 2 else "Waltz", f"artist {i // 6}") for i in range(120)]
        train, valid = own_audio.split_rows(rows)
        self.assertFalse({r.group for r in train} & {r.group for r in valid})
        self.assertTrue(12 <= len(valid) <= 30, len(valid))

    def test_folders_count_as_artists_only_where_a_label_has_several(self) -> None:
        albums = [self.row(i, "Tango" if i % 2 else "Waltz", folder=f"/m/{i % 2}{i // 10}")
                  for i in range(100)]
        train, valid = own_audio.split_rows(albums)
        folder = lambda rows: {Path(r.path).parent for r in rows}  # noqa: E731
        self.assertFalse(folder(train) & folder(valid))
        genres = [self.row(i, "Tango" if i % 2 else "Waltz", folder=f"/m/{i % 2}") for i in range(100)]
        train, valid = own_audio.split_rows(genres)
        self.assertEqual(folder(train), folder(valid))
        self.assertEqual(len(valid), 16)

    def test_a_label_of_one_artist_is_never_without_training(self) -> None:
        rows = [self.row(i, "Tango" if i < 20 else "Waltz", "one" if i < 20 else f"g{i}")
                for i in range(40)]
        train, valid = own_audio.split_rows(rows)
        self.assertEqual({r.label for r in train}, {"Tango", "Waltz"})
        self.assertEqual({r.label for r in valid}, {"Waltz"})


class Loading(Folder):
    def test_windows_are_the_services_in_the_form_that_training_takes(self) -> None:
        long = music(75, 99)
        soundfile.write(self.root / "long.wav", long, RATE, subtype="FLOAT")
        text = "path,label,split\n" + "".join(
            f"{i}.wav,{'tango' if i < 6 else 'waltz'},{'valid' if i in (0, 6) else 'train'}\n"
            for i in range(12)
        )
        train, valid = own_audio.load_manifest(self.manifest(text + "long.wav,waltz,train\n"))
        self.assertEqual(train.names, ("tango", "waltz"))
        self.assertEqual(valid.names, train.names)
        self.assertEqual(len(valid), 2)
        self.assertEqual(valid.label.tolist(), [0, 1])
        # 75 s are windows at 0, 15, 30 s and one anchored to the end.
        self.assertEqual(train.label.tolist(), [0] * 5 + [1] * 5 + [1] * 4)
        self.assertTrue((train.source == prepare.OWN).all())
        self.assertEqual(train.tags.shape, (14, 0))
        for db in [*train.db, *valid.db]:
            self.assertEqual((db.shape, db.dtype), ((128, 128), np.float16))

        mel = librosa.feature.melspectrogram(
            y=long[: 127 * prepare.HOP + prepare.FFT_SIZE], sr=RATE, n_fft=prepare.FFT_SIZE,
            hop_length=prepare.HOP, center=False, n_mels=128)
        own = np.clip(10 * np.log10(mel / mel.max()), prepare.FLOOR_DB, 0).astype("f4")
        apart = np.abs(prepare.smear(own) - train.db[10].astype("f4"))
        self.assertLess(float(apart.max()), 0.3)

        batch = next(iter(prepare.training_batches(
            train, np.eye(2, dtype=np.float32)[train.label], 4, 1, 1, 0.25, 0.5, 0.0)))
        self.assertEqual(tuple(batch.windows.shape), (4, 128, 128))
        self.assertEqual(tuple(batch.genre.shape), (4, 2))

    def test_labels_of_the_default_model_keep_its_order_and_its_letters(self) -> None:
        text = "path,label\n" + self.rows(6, "hip-hop") + self.rows(6, "Jazz", 6)
        train, valid = own_audio.load_manifest(self.manifest(text))
        self.assertEqual(train.names, labels.LABELS)
        index = {labels.INDEX["Hip-Hop"], labels.INDEX["Jazz"]}
        self.assertEqual(set(train.label.tolist()), index)
        self.assertEqual(set(valid.label.tolist()), index)

    def test_a_file_that_is_no_music_is_left_out_until_too_few_remain(self) -> None:
        (self.root / "text.wav").write_text("la la la " * 999)
        soundfile.write(self.root / "silence.wav", np.zeros(4 * RATE), RATE)
        text = "path,label\n" + self.rows(5, "a") + self.rows(5, "b", 5)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            train, _ = own_audio.load_manifest(
                self.manifest(text + "text.wav,a\nsilence.wav,b\n"))
        self.assertIn("line 12: left out. ", told.getvalue())
        self.assertIn("line 13: left out. The file is silent.", told.getvalue())
        self.assertEqual(len(train), 8)
        with self.assertRaisesRegex(own_audio.ManifestError, "the label a has 4 clips"):
            own_audio.load_manifest(self.manifest(
                "path,label\n" + self.rows(4, "a", 1) + self.rows(5, "b", 5) + "text.wav,a\n"))


if __name__ == "__main__":
    unittest.main()
