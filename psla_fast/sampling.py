"""Sampling: label counts -> sample weights -> the draws of an epoch.

Draws are data: a pure function of (seed, epoch), the same for any number of ranks, workers and executors.
"""

# N clips, C classes, D draws

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SamplingConfig:
    """Which clips an epoch sees, and how they are mixed."""

    kind: Literal["balanced", "shuffle"] = "balanced"
    """balanced: PSLA's, with replacement, a clip's weight is Σ over its labels of 1000/(count + 0.01).
    shuffle: every clip once."""
    num_draws: int = 0
    """Draws of an epoch; 0: as many as there are clips."""
    mixup_rate: float = 0.5
    """Probability that a clip is mixed with a partner, drawn uniformly from the whole training set."""
    mixup_alpha: float = 10.0
    """λ ~ Beta(alpha, alpha)."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.mixup_rate <= 1:
            raise ValueError(f"sampling.mixup_rate is {self.mixup_rate}; give a probability from 0 to 1.")
        if self.mixup_alpha <= 0:
            raise ValueError(f"sampling.mixup_alpha is {self.mixup_alpha}; give a number above 0.")
        if self.num_draws < 0:
            raise ValueError(f"sampling.num_draws is {self.num_draws}; give 0 (all clips) or more.")


@dataclass(frozen=True)
class Draws:
    """One epoch's draws: clip ids (D,), partner ids (D,), -1 where a clip isn't mixed, λ (D,), there 1."""

    clip_ids: npt.NDArray[np.int64]
    partner_ids: npt.NDArray[np.int64]
    lam: npt.NDArray[np.float32]


def compute_class_counts(indices: npt.NDArray[np.integer], num_classes: int) -> npt.NDArray[np.int64]:
    """Count the clips of each class (C,) from all clips' labels, concatenated."""
    return np.bincount(indices, minlength=num_classes).astype(np.int64)


def compute_sample_weights(
    indptr: npt.NDArray[np.integer], indices: npt.NDArray[np.integer], num_classes: int
) -> npt.NDArray[np.float64]:
    """PSLA's sample weights (N,): Σ over a clip's labels of 1000/(count + 0.01); 0 for a clip without labels.

    indptr (N+1,) and indices are the clips' labels in CSR form. Source: gen_weight_file.py of PSLA.
    """
    per_class = 1000.0 / (compute_class_counts(indices, num_classes) + 0.01)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    summed = np.bincount(rows, weights=per_class[indices], minlength=len(indptr) - 1)
    return summed.astype(np.float64, copy=False)


def compute_draws(config: SamplingConfig, weights: npt.NDArray[np.float64], seed: int, epoch: int) -> Draws:
    """Draw the clips, partners and λ of an epoch from the sample weights (N,).

    Deterministic in (config, weights, seed, epoch). Raises ValueError where there is no clip to draw.
    """
    num_clips = len(weights)
    if not num_clips:
        raise ValueError("there is no clip to draw. See the split's rejected.jsonl.")
    num_draws = config.num_draws or num_clips
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    if config.kind == "balanced":
        cumulative = np.cumsum(weights)
        if not cumulative[-1] > 0:
            raise ValueError(
                f"none of the {num_clips} clips has a label to balance by. Use --sampling.kind shuffle."
            )
        position = rng.random(num_draws) * cumulative[-1]
        ascending = np.argsort(position)  # searched in order, 2M take a third of the time
        clip_ids = np.empty(num_draws, dtype=np.int64)
        clip_ids[ascending] = np.searchsorted(cumulative, position[ascending], side="right")
        clip_ids = np.minimum(clip_ids, np.flatnonzero(weights)[-1])  # rounding at the upper end
    else:
        rounds = -(-num_draws // num_clips)
        clip_ids = np.concatenate([rng.permutation(num_clips) for _ in range(rounds)])[:num_draws]
    mixed = rng.random(num_draws) < config.mixup_rate
    partner_ids = rng.integers(num_clips, size=num_draws)
    lam = rng.beta(config.mixup_alpha, config.mixup_alpha, size=num_draws)
    return Draws(
        clip_ids.astype(np.int64),
        np.where(mixed, partner_ids, -1).astype(np.int64),
        np.where(mixed, lam, 1.0).astype(np.float32),
    )
