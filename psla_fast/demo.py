"""Demo data: a small synthetic FSD50K in FSD50K's own layout, of tones, chirps, noises and clicks.

Sounds of one or two leaf classes are mixed into each clip; like FSD50K's, its labels hold every ancestor.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

SAMPLE_RATE = 44100
Waveform = npt.NDArray[np.float64]
# class -> parent; leaves are those with a sound below
PARENTS = {
    "Pitched": None,
    "Unpitched": None,
    "Tone": "Pitched",
    "Chirp": "Pitched",
    "Noise": "Unpitched",
    "Clicks": "Unpitched",
    "Low_tone": "Tone",
    "High_tone": "Tone",
    "Rising_chirp": "Chirp",
    "Falling_chirp": "Chirp",
    "Hiss": "Noise",
    "Rumble": "Noise",
    "Slow_clicks": "Clicks",
    "Fast_clicks": "Clicks",
}


def _tone(low: float, high: float) -> Callable[[np.random.Generator, Waveform], Waveform]:
    """Three partials on a fundamental between low and high Hz."""

    def sound(rng: np.random.Generator, time: Waveform) -> Waveform:
        fundamental = rng.uniform(low, high)
        partials = [np.sin(2 * np.pi * n * fundamental * time) / n for n in (1, 2, 3)]
        return np.asarray(sum(partials))

    return sound


def _chirp(rising: bool) -> Callable[[np.random.Generator, Waveform], Waveform]:
    def sound(rng: np.random.Generator, time: Waveform) -> Waveform:
        low, high = rng.uniform(200, 600), rng.uniform(2500, 6000)
        first, last = (low, high) if rising else (high, low)
        return np.asarray(np.sin(2 * np.pi * (first * time + (last - first) * time**2 / (2 * time[-1]))))

    return sound


def _noise(exponent: float) -> Callable[[np.random.Generator, Waveform], Waveform]:
    """Noise whose amplitude goes with frequency to the exponent."""

    def sound(rng: np.random.Generator, time: Waveform) -> Waveform:
        spectrum = np.fft.rfft(rng.standard_normal(len(time)))
        frequency = np.maximum(np.fft.rfftfreq(len(time), 1 / SAMPLE_RATE), 30.0)
        shaped = np.fft.irfft(spectrum * frequency**exponent, n=len(time))
        return np.asarray(shaped / np.abs(shaped).max())

    return sound


def _clicks(low: float, high: float) -> Callable[[np.random.Generator, Waveform], Waveform]:
    """Decaying bursts at a rate between low and high a second."""

    def sound(rng: np.random.Generator, time: Waveform) -> Waveform:
        rate = rng.uniform(low, high)
        since = (time * rate + rng.uniform()) % 1 / rate
        return np.asarray(np.exp(-since * 400) * rng.standard_normal(len(time)))

    return sound


SOUNDS: dict[str, Callable[[np.random.Generator, Waveform], Waveform]] = {
    "Low_tone": _tone(80, 250),
    "High_tone": _tone(900, 2200),
    "Rising_chirp": _chirp(rising=True),
    "Falling_chirp": _chirp(rising=False),
    "Hiss": _noise(0.5),
    "Rumble": _noise(-1.5),
    "Slow_clicks": _clicks(2, 5),
    "Fast_clicks": _clicks(15, 40),
}


def with_ancestors(leaves: list[str]) -> list[str]:
    """Give classes and all above them, in class order."""
    found: set[str] = set()
    for leaf in leaves:
        name: str | None = leaf
        while name is not None:
            found.add(name)
            name = PARENTS[name]
    return [name for name in PARENTS if name in found]


def make_waveform(leaves: list[str], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Make a clip of 0.6 to 2.4 s in which each leaf class sounds in a span of its own, over faint noise."""
    num_samples = int(rng.uniform(0.6, 2.4) * SAMPLE_RATE)
    clip = 1e-3 * rng.standard_normal(num_samples)
    for leaf in leaves:
        length = int(rng.uniform(0.5, 1.0) * num_samples)
        start = rng.integers(num_samples - length + 1)
        sound = SOUNDS[leaf](rng, np.arange(length) / SAMPLE_RATE)
        fade = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.01 * SAMPLE_RATE))
        clip[start : start + length] += (
            10 ** rng.uniform(-1.5, 0) * fade * sound / (np.abs(sound).max() + 1e-9)
        )
    return np.asarray(0.9 * clip / max(1.0, np.abs(clip).max()), dtype=np.float32)


def write_synthetic_fsd50k(root: Path, num_clips: int, seed: int) -> None:
    """Write the data set, two thirds train, a sixth val, a sixth eval; equal arguments give equal files.

    A folder that already holds it is left as it is. Raises ValueError for fewer than 60 clips (too few for
    each split to have every class), and for a folder that holds another data set.
    """
    if num_clips < 60:
        raise ValueError(f"--clips is {num_clips}; give 60 or more, so that every split has every class.")
    made = {"num_clips": num_clips, "seed": seed}
    marker = root / "synthetic.json"
    if marker.is_file():
        if json.loads(marker.read_bytes()) == made:
            return
        raise ValueError(f"{root} holds a synthetic data set of {marker.read_text()}. Choose another folder.")
    rng = np.random.Generator(np.random.PCG64(seed))
    truth = root / "FSD50K.ground_truth"
    for folder in ("FSD50K.dev_audio", "FSD50K.eval_audio", "FSD50K.ground_truth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mids = {name: f"/demo/{name.lower()}" for name in PARENTS}
    with open(truth / "vocabulary.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows((i, c, mids[c]) for i, c in enumerate(PARENTS))
    nodes = [
        {
            "id": mids[c],
            "name": c,
            "child_ids": [mids[d] for d in PARENTS if PARENTS[d] == c],
            "restrictions": [],
        }
        for c in PARENTS
    ]
    (root / "ontology.json").write_text(json.dumps(nodes, indent=1))
    rows: dict[str, list[list[str]]] = {"dev": [], "eval": []}
    for number in range(num_clips):
        first = list(SOUNDS)[number % len(SOUNDS)]  # every class alike
        others = [str(name) for name in rng.permutation(list(SOUNDS)) if name != first]
        leaves = [first, *others[: int(rng.integers(2))]]
        split = ("train", "train", "train", "train", "val", "eval")[number // len(SOUNDS) % 6]
        part = "eval" if split == "eval" else "dev"
        name, labels = str(1000 + number), with_ancestors(leaves)
        path = root / f"FSD50K.{part}_audio" / f"{name}.wav"
        soundfile.write(path, make_waveform(leaves, rng), SAMPLE_RATE, subtype="PCM_16")
        row = [name, ",".join(labels), ",".join(mids[label] for label in labels)]
        rows[part].append(row if part == "eval" else [*row, split])
    for part, header in (
        ("dev", ["fname", "labels", "mids", "split"]),
        ("eval", ["fname", "labels", "mids"]),
    ):
        with open(truth / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows[part]])
    marker.write_text(json.dumps(made))
