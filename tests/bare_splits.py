"""Splits without tars, and score files, for the tests of ensembles, which read keys and labels alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes, format_classes
from psla_fast.fbank import FbankConfig
from psla_fast.scores import write_scores
from psla_fast.shards import Storage
from psla_fast.shards.index import write_index
from psla_fast.shards.sums import CLASSES_NAME, format_sums, hash_file
from psla_fast.shards.writer import Member, ShardStatistics

Targets = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]


def draw_targets(num_clips: int, num_classes: int, seed: int = 0) -> Targets:
    """Targets of which every class has positives and negatives."""
    targets = np.random.default_rng(seed).random((num_clips, num_classes)) < 0.2
    targets[0], targets[1] = True, False
    return targets


def draw_scores(targets: Targets, skill: float, seed: int) -> Scores:
    """Scores in (0, 1) that tell positives apart the better the larger the skill."""
    noise = np.random.default_rng(seed).standard_normal(targets.shape)
    return (1 / (1 + np.exp(-(skill * (targets - 0.5) + noise)))).astype(np.float32)


def make_classes(num_classes: int) -> Classes:
    numbers = range(num_classes)
    return Classes(tuple(f"/m/{n}" for n in numbers), tuple(f"class {n}" for n in numbers))


def make_keys(split: str, num_clips: int) -> list[str]:
    return [f"{split}{number}" for number in range(num_clips)]


def write_bare_split(split: Path, targets: Targets) -> Path:
    """An index over clips `<split's name><number>` with these labels (N, C)."""
    split.mkdir(parents=True)
    classes = make_classes(targets.shape[1])
    (split.parent / "classes.csv").write_text(format_classes(classes))
    clips = [
        Member(key, key, f"{key}.wav", 16_000, 512 + 1024 * row, 512, 2, 0, np.flatnonzero(labels).tolist())
        for row, (key, labels) in enumerate(zip(make_keys(split.name, len(targets)), targets, strict=True))
    ]
    statistics = ShardStatistics(tar_bytes=1024 * len(clips), num_frames=2 * len(clips), clips=clips)
    write_index(split, [statistics], FbankConfig(), Storage.of("float16"), classes)
    sums = {name: hash_file(split / name) for name in ("index.h5", CLASSES_NAME)}
    (split / "SHA256SUMS").write_text(format_sums(sums))
    return split


def write_permuted(
    path: Path, keys: Sequence[str], scores: Scores, seed: int = 0, mids: Sequence[str] = ()
) -> Path:
    """A score file of these clips in an order of its own."""
    order = np.random.default_rng(seed).permutation(len(keys))
    write_scores(path, [keys[row] for row in order], scores[order], np.zeros_like(scores), mids)
    return path
