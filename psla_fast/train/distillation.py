"""Distillation: a teacher's scores of the training clips -> soft targets, blended with the labels."""

# N clips, C classes

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.scores import read_pieces
from psla_fast.shards import Shards
from psla_fast.train.losses import EPSILON, LossConfig

ABOVE_ONE = 1e-3  # by which several heads' scores may sum to more than 1


@dataclass(frozen=True)
class DistillConfig:
    """A teacher that is learned from beside the labels."""

    scores: str = ""
    """Score file (tools/evaluate.py CKPT SHARDS/train --out) of the training clips; none: no teacher."""
    weight: float = 0.9
    """Share of the teacher's scores in the targets; the rest is the labels'."""

    def __post_init__(self) -> None:
        """Refuse values out of range and settings without effect."""
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight is {self.weight}; give a share above 0, up to 1.")
        if not self.scores and self.weight != DistillConfig.weight:
            raise ValueError("distill.weight is for a teacher. Give --distill.scores, or leave it out.")


def set_teacher(shards: Shards, config: DistillConfig, loss: LossConfig) -> None:
    """Make a split's targets (1 - weight)·labels + weight·scores, clip by clip, matched by key.

    As binary cross-entropy is linear in the targets, that is (1 - w)·L(s, labels) + w·L(s, teacher), the loss
    of Schmid, Koutini and Widmer 2023, "Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge
    Distillation" (w = 0.9); mixup mixes it like labels. For cross_entropy the scores become the shares that
    this loss makes of them; there the blend is that sum where clips have one label each. The targets are kept
    as float16, (N, C) in memory. Keys that aren't the split's are passed over: a teacher may have scored more
    than what is trained on. Raises ValueError, and changes nothing, for a clip without scores, other classes,
    and scores that aren't in [0, 1].
    """
    path, row = Path(config.scores), {key: number for number, key in enumerate(shards.keys)}
    table = np.zeros((len(shards), len(shards.classes)), dtype=np.float16)
    found = np.zeros(len(shards), dtype=np.bool_)
    for keys, piece in read_pieces(path, shards.classes.mids):
        inside = [number for number, key in enumerate(keys) if key in row]
        scores, rows = piece[inside], [row[keys[number]] for number in inside]
        bad = ~((scores >= 0) & (scores <= 1 + ABOVE_ONE)).all(axis=1)  # NaN as well
        if bad.any():
            key = shards.keys[rows[int(bad.argmax())]]
            raise ValueError(
                f"{path}: the scores of {key} aren't all in [0, 1]. Give them after the sigmoid."
            )
        table[rows] = _compute_shares(scores) if loss.kind == "cross_entropy" else scores.clip(0, 1)
        found[rows] = True
    if not found.all():
        key = shards.keys[int(found.argmin())]
        raise ValueError(
            f"{path}: {(~found).sum()} of {len(shards)} clips of {shards.location} have no scores ({key} is "
            "one). Score the training split with the teacher."
        )
    shards.set_soft_targets(table, config.weight)


def _compute_shares(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each score's odds over the sum of all odds (N, C), as in the cross-entropy of compute_loss."""
    scores = scores.clip(EPSILON, 1 - EPSILON)
    odds = scores / (1 - scores)
    shares: npt.NDArray[np.float32] = odds / odds.sum(axis=1, keepdims=True)
    return shares
