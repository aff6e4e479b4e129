"""Scores and targets of a batch -> its loss: binary cross-entropy, focal loss or cross-entropy."""

# B clips, C classes

from dataclasses import dataclass
from math import inf
from typing import Literal

from torch import Tensor

EPSILON = 1e-7


@dataclass(frozen=True)
class LossConfig:
    """What training minimises. The defaults are PSLA's."""

    kind: Literal["bce", "focal", "cross_entropy"] = "bce"
    """bce: binary cross-entropy of each class. focal: the same, with less weight on what is already right.
    cross_entropy: softmax over the scores' log-odds, for sets with one label a clip, such as ESC-50; scores
    then rank a clip's classes, each alone is no probability."""
    focal_gamma: float = 2.0
    """focal: power of a class's error that weighs its loss; 0 is bce."""
    label_smoothing: float = 0.0
    """Share of a target that is spread evenly: over yes and no (bce, focal), over all classes
    (cross_entropy)."""

    def __post_init__(self) -> None:
        """Refuse values out of range and settings without effect."""
        if not 0 <= self.focal_gamma < inf:
            raise ValueError(f"loss.focal_gamma is {self.focal_gamma}; give 0 or more.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}; give 0 or more, below 1.")
        if self.kind != "focal" and self.focal_gamma != LossConfig.focal_gamma:
            raise ValueError(f"loss.focal_gamma is for --loss.kind focal, not {self.kind}. Leave it out.")


PSLA_LOSS = LossConfig()


def compute_loss(scores: Tensor, targets: Tensor, config: LossConfig = PSLA_LOSS) -> Tensor:
    """Loss of scores (B, C) against soft targets (B, C) in [0, 1]; a float32 scalar.

    Scores are clamped to [1e-7, 1-1e-7] as in PSLA, because several heads can sum to a little above 1; beyond
    that the gradient is 0. Mean over clips and classes (bce, focal) or over clips (cross_entropy). NaN gives
    NaN, where torch's own binary cross-entropy would stop the device. Focal: Lin et al. 2017, eq. 4,
    -(1-p_t)^γ log p_t; for a soft target the mean over its outcomes.
    """
    scores, targets = scores.float().clamp(EPSILON, 1 - EPSILON), targets.float()
    if config.kind == "cross_entropy":
        return _compute_cross_entropy(scores, targets, config.label_smoothing)
    if config.label_smoothing:
        targets = targets * (1 - config.label_smoothing) + config.label_smoothing / 2
    positive, negative = scores.log(), (-scores).log1p()
    if config.kind == "focal":
        positive = (1 - scores) ** config.focal_gamma * positive
        negative = scores**config.focal_gamma * negative
    return -(targets * positive + (1 - targets) * negative).mean()


def _compute_cross_entropy(scores: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of softmax(log(s / (1-s))), which is each score's odds over the sum of all odds.

    Targets are divided by their sum; a clip without a label adds nothing. Smoothing: Szegedy et al. 2016,
    section 7. Why odds and not s / Σs: where attention rests on one frame, s is that frame's sigmoid and this
    is the usual cross-entropy of its logits, with gradient p - y. s / Σs, bounded by s ≤ 1, gets sure of a
    class only by driving all others to 0.
    """
    log_shares = (scores.log() - (-scores).log1p()).log_softmax(dim=1)
    shares = targets / targets.sum(dim=1, keepdim=True).clamp(min=EPSILON)
    if smoothing:
        shares = shares * (1 - smoothing) + shares.sum(dim=1, keepdim=True) * (smoothing / shares.shape[1])
    return -(shares * log_shares).sum(dim=1).mean()
