"""Sound that is not music, made from seeds: what the model must not name a genre for.

``python training/not_music.py --out DIR`` writes every clip as a FLAC file, to listen
to or to send through a running service. outliers.py calls `make` and keeps nothing.

Ten kinds, so that a detector can be tested on a kind it has never met. Speech comes
from espeak-ng, which has to be installed; everything else is arithmetic.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import soundfile
from scipy import signal

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Random = np.random.Generator

RATE: Final = 22_050
SECONDS: Final = 30
SIZE: Final = RATE * SECONDS

KINDS: Final = (
    "silence", "noise", "weather", "tones", "sweeps", "hum", "clicks", "signals", "babble", "speech",
)

SENTENCES: Final[dict[str, tuple[str, ...]]] = {
    "en-gb": (
        "The council will meet again on Thursday to talk about the new bridge.",
        "Please leave your coat by the door and take a seat near the window.",
        "I told her that the train was late, but she did not believe me.",
        "Most of the water in this valley comes from melting snow.",
    ),
    "en-us": (
        "Good evening, here are the main stories of the day.",
        "We measured the length of every leaf and wrote it down in a table.",
        "Could you send me the report before lunch, if that is not too early?",
        "He walked slowly up the hill, counting the houses on the left side.",
    ),
    "de": (
        "Der Bus fährt heute eine andere Strecke, weil die Straße gesperrt ist.",
        "Wir haben gestern lange über den Garten und die alten Bäume gesprochen.",
        "Können Sie mir bitte sagen, wo hier die nächste Apotheke ist?",
        "Am Abend wird es kühler, und im Norden fällt etwas Regen.",
    ),
    "fr-fr": (
        "Le marché ouvre à huit heures et ferme au début de l'après-midi.",
        "Nous avons trouvé une petite maison avec un jardin derrière l'église.",
        "Pouvez-vous répéter la question, je n'ai pas bien entendu.",
        "Demain, le ciel sera couvert sur toute la moitié nord du pays.",
    ),
    "es": (
        "La biblioteca estará cerrada hasta el lunes por obras en el tejado.",
        "Mi hermano trabaja en una fábrica de muebles cerca del puerto.",
        "¿Sabe usted a qué hora sale el próximo autobús para el centro?",
        "Hoy hemos aprendido cómo crecen las plantas en el desierto.",
    ),
    "it": (
        "La riunione comincia alle nove e dura circa due ore.",
        "Ho lasciato le chiavi sul tavolo della cucina, vicino al pane.",
        "Il fiume attraversa la città e poi scende verso il mare.",
        "Mi scusi, questa strada porta alla stazione?",
    ),
    "pt": (
        "A escola fica do outro lado da praça, ao lado da farmácia.",
        "Ontem choveu muito e a estrada ficou fechada durante a noite.",
        "Gostaria de saber se ainda há lugares para amanhã.",
        "Os pescadores voltam ao porto antes do nascer do sol.",
    ),
    "nl": (
        "De winkel op de hoek verkoopt brood, kaas en verse groente.",
        "Morgen gaan we met de fiets naar het strand, als het droog blijft.",
        "Kunt u mij uitleggen hoe dit apparaat werkt?",
    ),
    "pl": (
        "W sobotę pojedziemy do lasu, jeśli będzie ładna pogoda.",
        "Proszę podać numer zamówienia i nazwisko.",
        "Stary most został naprawiony dopiero w zeszłym roku.",
    ),
    "ru": (
        "Завтра утром поезд отправится с третьей платформы.",
        "Мы долго гуляли по берегу реки и говорили о работе.",
        "Скажите, пожалуйста, где находится ближайшая аптека?",
        "В этом году зима наступила раньше обычного.",
    ),
    "tr": (
        "Toplantı yarın sabah saat onda başlayacak.",
        "Köyün yanındaki nehir bu yaz çok az su taşıyor.",
        "Bu kitabı daha önce okudunuz mu?",
    ),
    "sv": (
        "Båten går klockan sju och kommer fram sent på kvällen.",
        "Vi har bott i det här huset i mer än tjugo år.",
        "Kan du hjälpa mig att bära lådorna till bilen?",
    ),
    "fi": (
        "Huomenna sataa lunta lähes koko maassa.",
        "Kirjasto sijaitsee torin laidalla vanhassa talossa.",
        "Voisitteko toistaa kysymyksen hieman hitaammin?",
    ),
    "hu": (
        "A vonat tíz percet késik a hóesés miatt.",
        "Tegnap a piacon almát és friss kenyeret vettünk.",
        "Meg tudná mondani, merre van a múzeum?",
    ),
    "el": (
        "Το πλοίο φεύγει το πρωί και φτάνει αργά το βράδυ.",
        "Μένουμε σε ένα μικρό σπίτι κοντά στη θάλασσα.",
        "Μπορείτε να μου πείτε τι ώρα είναι;",
    ),
    "hi": (
        "कल सुबह हम सब बाज़ार जाएँगे और सब्ज़ियाँ खरीदेंगे।",
        "यह पुल बहुत पुराना है और अब बंद कर दिया गया है।",
        "क्या आप मुझे रास्ता बता सकते हैं?",
    ),
    "cmn": (
        "明天早上我们坐火车去北京开会。",
        "这家商店每天九点开门,晚上八点关门。",
        "请问附近有没有药店?",
        "今年冬天比去年冷得多。",
    ),
    "id": (
        "Besok pagi kami akan pergi ke pasar untuk membeli ikan.",
        "Jalan di depan sekolah sedang diperbaiki sejak minggu lalu.",
        "Apakah Anda tahu di mana kantor pos terdekat?",
    ),
    "sw": (
        "Kesho asubuhi tutakwenda sokoni kununua matunda.",
        "Mvua ilinyesha usiku kucha na barabara imefungwa.",
        "Tafadhali niambie duka la dawa liko wapi.",
    ),
    "ar": (
        "سوف يصل القطار غدا في الساعة الثامنة صباحا.",
        "نسكن في بيت صغير قريب من البحر.",
        "هل يمكنك أن تشرح لي هذه المسألة من فضلك؟",
    ),
}
"""Plain sentences by espeak-ng language."""

VARIANTS: Final = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5",
    "klatt", "klatt2", "klatt4", "croak", "whisper", "grandma", "boris", "steph",
)
"""espeak-ng's voice variants: formants, breath and glottal source of one speaker."""

HELD_OUT_LANGUAGES: Final = ("fr-fr", "it", "ru", "fi", "cmn", "sw")
HELD_OUT_VARIANTS: Final = ("m3", "m7", "f2", "f5", "klatt2", "steph")


@dataclass(frozen=True)
class Sound:
    """``samples``: float32 [661500] at 22,050 Hz, within -1..1. ``kind``: one of `KINDS`;
    ``style``: what within it. ``held``: speech of a language or voice that a detector
    meets only in the test."""

    kind: str
    style: str
    name: str
    samples: F32
    held: bool = False


# --- parts ------------------------------------------------------------------------


def _time() -> F64:
    return np.arange(SIZE) / RATE


def _coloured(r: Random, exponent: float, size: int = SIZE) -> F64:
    """Gaussian noise whose power falls as frequency to the power ``-exponent``, of
    deviation 1: 0 white, 1 pink, 2 brown, -1 blue."""
    spectrum = np.fft.rfft(r.standard_normal(size))
    hz = np.fft.rfftfreq(size, 1 / RATE)
    spectrum *= np.maximum(hz, 20.0) ** (-exponent / 2)
    x = np.fft.irfft(spectrum, size)
    return x / x.std()


def _band(x: F64, low: float, high: float, order: int = 4) -> F64:
    """Butterworth band-pass, or one-sided where an edge lies outside 20 Hz to 10.9 kHz."""
    if low <= 20.0:
        sos = signal.butter(order, min(high, 10_900.0), "low", fs=RATE, output="sos")
    elif high >= 10_900.0:
        sos = signal.butter(order, low, "high", fs=RATE, output="sos")
    else:
        sos = signal.butter(order, (low, high), "band", fs=RATE, output="sos")
    return signal.sosfilt(sos, x)


def _log_uniform(r: Random, low: float, high: float) -> float:
    return float(np.exp(r.uniform(np.log(low), np.log(high))))


def _slow(r: Random, seconds: float) -> F64:
    """A smooth random curve 0..1 that changes over about ``seconds``."""
    knots = r.uniform(0, 1, int(SECONDS / seconds) + 3)
    at = np.linspace(0, len(knots) - 1, SIZE)
    part = (1 - np.cos(np.pi * (at % 1))) / 2
    low = np.minimum(at.astype(int), len(knots) - 2)
    return knots[low] * (1 - part) + knots[low + 1] * part


def _oscillator(shape: str, phase: F64) -> F64:
    """One of four wave shapes of ``phase`` in turns."""
    if shape == "sine":
        return np.sin(2 * np.pi * phase)
    if shape == "square":
        return np.sign(np.sin(2 * np.pi * phase))
    if shape == "saw":
        return 2 * (phase % 1) - 1
    return 2 * np.abs(2 * (phase % 1) - 1) - 1


def _gate(r: Random, on: float, off: float) -> F64:
    """1 for ``on`` seconds, 0 for ``off``, over and over from a random point, with
    edges of 3 ms."""
    period = on + off
    at = (_time() + r.uniform(0, period)) % period
    return np.clip(np.minimum(at, on - at) / 0.003, 0, 1)


def _at(times: F64, event: Callable[[int], F64]) -> F64:
    """``event(i)`` added at ``times[i]`` seconds."""
    out = np.zeros(SIZE)
    for i, t in enumerate(times):
        start = int(t * RATE)
        if 0 <= start < SIZE:
            x = event(i)[: SIZE - start]
            out[start : start + len(x)] += x
    return out


def _room(r: Random, x: F64, seconds: float) -> F64:
    """``x`` in a room whose sound falls by 60 dB in ``seconds``: exponentially decaying
    noise, duller with time, behind the direct sound."""
    n = int(seconds * RATE)
    tail = r.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    tail = _band(tail, 80, r.uniform(3000, 9000), 1)
    tail /= np.sqrt((tail**2).sum())
    return x + r.uniform(0.2, 1.0) * signal.fftconvolve(x, tail)[: len(x)]


def _finish(r: Random, x: F64) -> F32:
    """A random level, 16-bit dither; sometimes the band limit of a codec."""
    if r.random() < 0.3:
        x = _band(x, 0, float(r.choice([3_400, 5_500, 7_800, 10_000])), 8)
    peak = np.abs(x).max()
    if peak > 0:
        x = x / peak * 10 ** (r.uniform(-30, -0.5) / 20)
    x = x + (r.random(SIZE) + r.random(SIZE) - 1) / 32768
    return np.asarray(np.clip(x, -1, 1), dtype=np.float32)


# --- kinds ------------------------------------------------------------------------


def _silence(r: Random, style: str) -> F64:
    """The only kind that is not brought to a level."""
    step = 1 / 32768
    if style == "zero":
        return np.zeros(SIZE)
    if style == "offset":
        return np.full(SIZE, r.uniform(-0.2, 0.2)) + (r.random(SIZE) - 0.5) * step
    if style == "dither":
        return (r.random(SIZE) + r.random(SIZE) - 1) * step
    x = _coloured(r, r.uniform(0, 2)) * 10 ** (r.uniform(-95, -70) / 20)
    return x + (r.random(SIZE) - 0.5) * step


def _noise(r: Random, style: str) -> F64:
    if style == "band":
        low = _log_uniform(r, 60, 5_000)
        return _band(r.standard_normal(SIZE), low, low * r.uniform(1.3, 6))
    if style == "low-pass":
        return _band(r.standard_normal(SIZE), 0, _log_uniform(r, 300, 8_000))
    if style == "uniform":
        return r.uniform(-1, 1, SIZE)
    if style == "clipped":
        return np.clip(_coloured(r, r.uniform(0, 2)), -0.7, 0.7)
    exponent = {"white": 0.0, "pink": 1.0, "brown": 2.0, "blue": -1.0}[style]
    return _coloured(r, exponent + r.uniform(-0.2, 0.2))


def _weather(r: Random, style: str) -> F64:
    """Noise that moves: rain, sea, wind, engines, rotors, applause."""
    t = _time()
    if style == "sea":
        swell = _slow(r, r.uniform(1.5, 4))
        return _coloured(r, r.uniform(0.5, 1.5)) * (0.05 + swell**2)
    if style == "wind":
        gust = _slow(r, r.uniform(0.5, 2))
        low, high = (_band(_coloured(r, 1.5), a, b, 2) for a, b in ((40, 300), (200, 1_200)))
        return low * (0.3 + gust) + high * gust**2
    if style == "rain":
        drops = _at(r.uniform(0, SECONDS, int(r.uniform(300, 3_000))), lambda i: r.uniform(0.1, 1)
                    * r.standard_normal(400) * np.exp(-np.arange(400) / r.uniform(20, 120)))
        return _coloured(r, 0.5) * r.uniform(0.05, 0.3) + drops
    if style == "engine":
        turn = np.cumsum(r.uniform(15, 60) * (0.8 + 0.5 * _slow(r, r.uniform(2, 8)))) / RATE
        firing = (0.5 + 0.5 * np.cos(2 * np.pi * turn)) ** 4
        harmonics = sum(np.cos(2 * np.pi * turn * k + r.uniform(0, 6)) / k**1.3 for k in range(1, 9))
        return firing * _band(_coloured(r, 1), 50, 3_000, 2) + r.uniform(0.2, 1.5) * harmonics
    if style == "rotor":
        rate = r.uniform(6, 25)
        return _coloured(r, 1) * (0.1 + np.maximum(0, np.cos(2 * np.pi * rate * t)) ** 6)
    claps = _at(r.uniform(0, SECONDS, int(r.uniform(800, 4_000))), lambda i: r.uniform(0.2, 1)
                * r.standard_normal(500) * np.exp(-np.arange(500) / 60))
    return _room(r, _band(claps, 400, 6_000, 2), 0.5)


def _tones(r: Random, style: str) -> F64:
    t = _time()
    hz = _log_uniform(r, 60, 6_000)
    if style == "two":
        return np.sin(2 * np.pi * hz * t) + r.uniform(0.3, 1) * np.sin(2 * np.pi * hz * r.uniform(1.05, 4) * t)
    if style == "cluster":
        return sum(np.sin(2 * np.pi * _log_uniform(r, 60, 8_000) * t + i) for i in range(int(r.integers(3, 9))))
    if style == "beating":
        return np.sin(2 * np.pi * hz * t) + np.sin(2 * np.pi * (hz + r.uniform(0.2, 6)) * t)
    if style == "gated":
        return np.sin(2 * np.pi * hz * t) * _gate(r, r.uniform(0.1, 2), r.uniform(0.1, 2))
    if style == "noisy":
        return np.sin(2 * np.pi * hz * t) + r.uniform(0.02, 0.5) * _coloured(r, r.uniform(0, 1.5))
    return _oscillator(style, min(hz, 2_000) * t)


def _sweeps(r: Random, style: str) -> F64:
    t = _time()
    low, high = _log_uniform(r, 40, 400), _log_uniform(r, 1_500, 10_000)
    if style == "linear":
        hz = low + (high - low) * t / SECONDS
    elif style == "logarithmic":
        hz = low * (high / low) ** (t / SECONDS)
    elif style == "chirps":
        hz = low * (high / low) ** ((t / r.uniform(0.3, 4)) % 1)
    elif style == "siren":
        hz = r.uniform(500, 900) * 2 ** (r.uniform(0.3, 1) * np.sin(2 * np.pi * t / r.uniform(0.4, 6)))
    else:  # wandering
        hz = low * (high / low) ** _slow(r, r.uniform(0.3, 3))
    if r.random() < 0.3:
        hz = hz[::-1]
    shape = str(r.choice(["sine", "sine", "square", "saw", "triangle"]))
    return _oscillator(shape, np.cumsum(hz) / RATE) + r.uniform(0, 0.02) * r.standard_normal(SIZE)


def _hum(r: Random, style: str) -> F64:
    """Mains hum, transformers, fans, refrigerators."""
    t = _time()
    mains = float(r.choice([50, 60])) * r.uniform(0.999, 1.001)
    slope = r.uniform(0.8, 2.5)
    x = sum(r.uniform(0.2, 1) * np.sin(2 * np.pi * mains * k * t + r.uniform(0, 6)) / k**slope
            for k in range(1, int(r.integers(4, 40))))
    if style == "buzz":
        return np.clip(x * r.uniform(1, 5), -1, 1)
    if style == "fan":
        blade = 1 + 0.3 * np.sin(2 * np.pi * r.uniform(5, 30) * t)
        return x * r.uniform(0, 0.5) + _band(_coloured(r, 1), 60, 4_000, 2) * blade
    if style == "hiss":
        return x + r.uniform(0.02, 0.5) * _coloured(r, 0)
    return x


def _clicks(r: Random, style: str) -> F64:
    def click(i: int) -> F64:
        n = np.arange(int(r.uniform(0.002, 0.05) * RATE))
        decay = np.exp(-n / (len(n) / 5))
        ring = np.sin(2 * np.pi * pitch * n / RATE) if ringing else r.standard_normal(len(n))
        return (1 if steady else r.uniform(0.2, 1)) * decay * ring

    pitch, ringing, steady = _log_uniform(r, 400, 6_000), r.random() < 0.5, style == "metronome"
    if style == "metronome":
        times = np.arange(r.uniform(0, 0.5), SECONDS, 60 / r.uniform(35, 220))
    elif style == "clock":
        times = np.arange(0, SECONDS, float(r.choice([0.5, 1.0, 0.25])))
    elif style == "typing":
        times = np.cumsum(r.gamma(2, 0.08, 400))
    else:  # geiger
        times = np.cumsum(r.exponential(_log_uniform(r, 0.01, 1.5), 3_000))
    x = _at(times[times < SECONDS], click)
    if r.random() < 0.4:
        x = _room(r, x, r.uniform(0.1, 0.8))
    return x + r.uniform(0, 0.01) * _coloured(r, 1)


_DTMF: Final = ((697, 770, 852, 941), (1_209, 1_336, 1_477, 1_633))


def _signals(r: Random, style: str) -> F64:
    t = _time()
    if style == "dtmf":
        on, off = r.uniform(0.06, 0.3), r.uniform(0.05, 0.4)
        n = np.arange(int(on * RATE)) / RATE

        def key(i: int) -> F64:
            low, high = float(r.choice(_DTMF[0])), float(r.choice(_DTMF[1]))
            return np.sin(2 * np.pi * low * n) + np.sin(2 * np.pi * high * n)

        return _at(np.arange(0, SECONDS, on + off), key)
    if style == "ringing":
        a, b = ((440, 480), (425, 425), (400, 450))[int(r.integers(3))]
        tone = np.sin(2 * np.pi * a * t) + np.sin(2 * np.pi * b * t)
        return tone * _gate(r, r.uniform(0.4, 2), r.uniform(1, 4))
    if style == "busy":
        return np.sin(2 * np.pi * r.choice([425, 480, 620]) * t) * _gate(r, *([r.uniform(0.2, 0.5)] * 2))
    if style == "bell":
        rate, hz = r.uniform(15, 30), r.uniform(500, 1_500)
        bell = sum(np.sin(2 * np.pi * hz * k * t) / k for k in (1, 2.76, 5.4))
        return bell * (0.5 + 0.5 * np.sin(2 * np.pi * rate * t)) * _gate(r, r.uniform(0.4, 2), r.uniform(0.5, 4))
    if style == "alarm":
        hz = np.where(_gate(r, p := r.uniform(0.1, 0.6), p) > 0.5, r.uniform(600, 1_200), r.uniform(1_200, 3_500))
        return _oscillator(str(r.choice(["sine", "square"])), np.cumsum(hz) / RATE)
    if style == "morse":
        unit = r.uniform(0.04, 0.12)
        steps = np.concatenate([[1] * int(r.choice([1, 3])) + [0] * int(r.choice([1, 1, 3, 7])) for _ in range(400)])
        keyed = steps[np.minimum((t / unit).astype(int), len(steps) - 1)]
        return np.sin(2 * np.pi * r.uniform(400, 1_000) * t) * keyed
    bits = r.integers(0, 2, int(SECONDS * 1_200) + 1)  # modem
    hz = np.where(bits[(t * r.choice([300, 1_200])).astype(int)] == 1, 1_200, 2_200)
    return np.sin(2 * np.pi * np.cumsum(hz) / RATE)


def _say(text: str, voice: str, speed: int, pitch: int) -> F64:
    """What espeak-ng says: samples at 22,050 Hz."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(
            ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, text],
            check=True, stdin=subprocess.DEVNULL,
        )
        x, rate = soundfile.read(file.name)
    return x if rate == RATE else signal.resample_poly(x, RATE, rate)


def _talk(r: Random, language: str, variant: str, pause: tuple[float, float]) -> F64:
    """30 s of one speaker: sentences and numbers, ``pause`` seconds apart."""
    speed, pitch = int(r.uniform(110, 230)), int(r.uniform(10, 90))
    parts: list[F64] = [np.zeros(int(r.uniform(0, pause[0] + 0.1) * RATE))]
    while sum(map(len, parts)) < SIZE:
        text = str(r.choice(SENTENCES[language]))
        if r.random() < 0.3:
            text = f"{text} {int(r.integers(2, 3_000))}."
        parts.append(_say(text, f"{language}+{variant}", speed, pitch))
        parts.append(np.zeros(int(r.uniform(*pause) * RATE)))
    return np.concatenate(parts)[:SIZE]


def _speech(r: Random, style: str, language: str, variant: str, other: str) -> F64:
    """``other`` is the second speaker's variant, where there is one."""
    x = _talk(r, language, variant, (1.5, 6.0) if style == "pauses" else (0.05, 0.8))
    if style == "room":
        return _room(r, x, r.uniform(0.3, 2.0))
    if style == "noise":
        x = x / x.std() + _coloured(r, r.uniform(0, 2)) * 10 ** (-r.uniform(3, 30) / 20)
    elif style == "telephone":
        x = _band(x, 300, 3_400, 6)
        x = np.clip(x / np.abs(x).max() * r.uniform(1, 3), -1, 1) + 0.003 * r.standard_normal(SIZE)
    elif style == "two":
        y = _talk(r, language, other, (0.05, 0.8))
        turn = _slow(r, 4) > 0.5 if r.random() < 0.5 else np.full(SIZE, 0.5)
        x = x * turn + y * (1 - turn)
    elif style == "room and noise":
        x = _room(r, x / x.std(), r.uniform(0.2, 1.0)) + _coloured(r, 1) * 10 ** (-r.uniform(10, 35) / 20)
    return x


def _babble(r: Random, style: str, languages: tuple[str, ...], variants: tuple[str, ...]) -> F64:
    """Many speakers at once; ``hall``: in a large room."""
    x = np.zeros(SIZE)
    for _ in range(int(r.integers(4, 10))):
        one = _talk(r, str(r.choice(languages)), str(r.choice(variants)), (0.05, 0.6))
        x += r.uniform(0.3, 1) * np.roll(one, int(r.integers(SIZE)))
    return _room(r, x, r.uniform(0.8, 2.5)) if style == "hall" else x


_STYLES: Final[dict[str, tuple[str, ...]]] = {
    "silence": ("zero", "offset", "dither", "faint"),
    "noise": ("white", "pink", "brown", "blue", "band", "low-pass", "uniform", "clipped"),
    "weather": ("sea", "wind", "rain", "engine", "rotor", "applause"),
    "tones": ("sine", "square", "saw", "triangle", "two", "cluster", "beating", "gated", "noisy"),
    "sweeps": ("linear", "logarithmic", "chirps", "siren", "wandering"),
    "hum": ("mains", "buzz", "fan", "hiss"),
    "clicks": ("metronome", "clock", "typing", "geiger"),
    "signals": ("dtmf", "ringing", "busy", "bell", "alarm", "morse", "modem"),
    "babble": ("near", "hall"),
    "speech": ("near", "room", "noise", "telephone", "pauses", "two", "room and noise"),
}
_MAKERS: Final = {
    "silence": _silence, "noise": _noise, "weather": _weather, "tones": _tones,
    "sweeps": _sweeps, "hum": _hum, "clicks": _clicks, "signals": _signals,
}


def make(seed: int, count: int = 1, kinds: Sequence[str] = KINDS) -> Iterator[Sound]:
    """Sounds of ``kinds``: ``count`` of every style, but ``4 * count`` of babble and, of
    speech, ``2 * count`` in every language. The same seed gives the same sounds, one
    version of espeak-ng given.

    :raises RuntimeError: espeak-ng is not installed.
    """
    if ({"speech", "babble"} & set(kinds)) and shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is not installed: it speaks (apt-get install espeak-ng).")
    for kind, maker in _MAKERS.items():
        if kind not in kinds:
            continue
        for style in _STYLES[kind]:
            for i in range(count):
                r = np.random.default_rng([seed, KINDS.index(kind), _STYLES[kind].index(style), i])
                x = maker(r, style)
                samples = x.astype(np.float32) if kind == "silence" else _finish(r, x)
                yield Sound(kind, style, f"{kind}-{style}-{i}", samples)

    for i in range(4 * count if "babble" in kinds else 0):
        r = np.random.default_rng([seed, KINDS.index("babble"), i])
        style = _STYLES["babble"][i % 2]
        held = i % 4 == 3
        some = tuple(k for k in SENTENCES if (k in HELD_OUT_LANGUAGES) == held)
        voices = tuple(v for v in VARIANTS if (v in HELD_OUT_VARIANTS) == held)
        yield Sound("babble", style, f"babble-{style}-{i}", _finish(r, _babble(r, style, some, voices)), held)

    styles = _STYLES["speech"]
    for n, language in enumerate(SENTENCES if "speech" in kinds else ()):
        held = language in HELD_OUT_LANGUAGES
        voices = [v for v in VARIANTS if (v in HELD_OUT_VARIANTS) == held]
        for i in range(2 * count):
            r = np.random.default_rng([seed, KINDS.index("speech"), n, i])
            style = styles[(n * 3 + i) % len(styles)]
            variant, other = (str(v) for v in r.choice(voices, 2, replace=False))
            x = _finish(r, _speech(r, style, language, variant, other))
            yield Sound("speech", style, f"speech-{style}-{language}-{variant}-{i}".replace(" ", "-"), x, held)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=2)
    p.add_argument("--count", type=int, default=1, help="sounds of each style")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for sound in make(args.seed, args.count):
        soundfile.write(args.out / f"{sound.name}.flac", sound.samples, RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
