"""The label set of the default model and how the two sources map onto it.

GTZAN names one genre per clip. FMA-small names one top genre and a list of
sub-genres per track; four of our labels (Rap, Latin, Metal, Reggae) exist in FMA
only as sub-genres.
"""

from __future__ import annotations

import ast
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

LABELS: Final[tuple[str, ...]] = (
    "Blues",
    "Classical",
    "Country",
    "Disco",
    "Electronic",
    "Folk",
    "Hip-Hop",
    "Jazz",
    "Latin",
    "Metal",
    "Pop",
    "Rap",
    "Reggae",
    "Rock",
    "World",
)
"""Output order of the network. R&B is missing on purpose: no recording of it is
in either source, and a label that was never trained would be an invention."""

INDEX: Final[dict[str, int]] = {label: i for i, label in enumerate(LABELS)}

SHARED_LABELS: Final[tuple[str, ...]] = ("Hip-Hop", "Metal", "Pop", "Reggae", "Rock")
"""Labels that both sources contain: the only ones on which the sources can be
compared without comparing genres at the same time."""

_GTZAN: Final[dict[str, str]] = {
    "blues": "Blues",
    "classical": "Classical",
    "country": "Country",
    "disco": "Disco",
    "hiphop": "Hip-Hop",
    "jazz": "Jazz",
    "metal": "Metal",
    "pop": "Pop",
    "reggae": "Reggae",
    "rock": "Rock",
}

_LATIN: Final[frozenset[str]] = frozenset(
    {"Latin America", "Latin", "Brazilian", "Flamenco", "Spanish", "Cumbia", "Salsa", "Tango"}
)


TAGS: Final[tuple[str, ...]] = (
    "Instrumental", "International", "Experimental", "Pop", "Rock", "Folk", "Electronic",
    "Hip-Hop", "Soundtrack", "Experimental Pop", "Punk", "Singer-Songwriter", "Reggae - Dub",
    "House", "Balkan", "Ambient", "Indie-Rock", "Avant-Garde", "Garage", "Rap", "Noise",
    "Chip Music", "Europe", "Dubstep", "Ambient Electronic", "Synth Pop", "Techno", "Dance",
    "Chill-out", "Chiptune", "Metal", "Alternative Hip-Hop", "Power-Pop", "Electroacoustic",
    "Unclassifiable", "Hip-Hop Beats", "Middle East", "Surf", "Field Recordings",
    "Sound Collage", "Post-Rock", "New Age", "Hardcore", "Drum & Bass", "Post-Punk", "Drone",
    "Novelty", "African", "Audio Collage", "Latin America", "Minimalism", "Trip-Hop",
    "Psych-Folk", "Improv",
)
"""FMA's tags that 50 training clips or more carry, commonest first. The network learns
to name them beside the genre, and only while training: a clip tagged ``Balkan`` says
more than ``World``, and the clips without a target genre have tags too."""


def tags_of(subgenres: str) -> npt.NDArray[np.float32]:
    """float32 [len(TAGS)], 1 for each tag in FMA's list (written as a Python literal)."""
    names = {str(name) for name in ast.literal_eval(subgenres)}
    return np.array([tag in names for tag in TAGS], dtype=np.float32)


def from_gtzan(genre: str) -> str:
    """Label of a GTZAN genre name such as ``hiphop``."""
    return _GTZAN[genre]


def from_fma(genre: str, subgenres: str) -> Optional[str]:
    """Label of an FMA track, or None when its top genre is no genre of ours.

    ``subgenres`` is the list of sub-genre names written as a Python literal.
    """
    names = [str(name) for name in ast.literal_eval(subgenres)]
    if genre == "Hip-Hop":
        return "Rap" if "Rap" in names else "Hip-Hop"
    if genre == "International":
        # Reggae first: a few tracks carry a Latin and a Reggae tag, and the
        # Reggae tags of FMA are the more specific ones (Dub, Dancehall).
        if any(name.startswith("Reggae") for name in names):
            return "Reggae"
        if any(name in _LATIN for name in names):
            return "Latin"
        return "World"
    if genre == "Rock":
        heavy = any("Metal" in n or n in ("Thrash", "Grindcore") for n in names)
        return "Metal" if heavy else "Rock"
    if genre in ("Electronic", "Folk", "Pop"):
        return genre
    return None  # Experimental, Instrumental: a manner, not a genre


def from_file_name(name: str) -> Optional[str]:
    """Label named by the first part of an audio file's name (``jazz.00003.flac``,
    ``Folk_Somebody.mp3``), or None when that part is no label."""
    head = name.replace("_", ".").split(".")[0]
    if head in _GTZAN:
        return _GTZAN[head]
    by_lower = {label.lower(): label for label in LABELS}
    # An FMA name says only the top genre; International is World unless a
    # sub-genre says otherwise, and the name does not carry one.
    if head.lower() == "international":
        return "World"
    return by_lower.get(head.lower())
