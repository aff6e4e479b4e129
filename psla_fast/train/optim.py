"""Optimiser, learning-rate schedule and loss of the PSLA recipe."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPSILON = 1e-7


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated. The defaults are PSLA's for balanced AudioSet."""

    batch_size: int = 100
    """Clips of a global batch, over all ranks."""
    epochs: int = 60
    """Epochs to train."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Adam's betas."""
    weight_decay: float = 5e-7
    """Adam's L2 penalty."""
    warmup_steps: int = 1000
    """Steps of the warm-up; 0: none."""
    warmup_every_steps: int = 50
    """The warm-up raises the rate every so many steps; PSLA's first 50 steps run at 0."""
    halve_after_epoch: int = 35
    """Epochs at the full rate; the next one runs at half of it."""
    halve_every_epochs: int = 5
    """From then on the rate is halved every so many epochs."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("batch_size", "epochs", "warmup_every_steps", "halve_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; give 1 or more.")
        if self.lr <= 0 or self.warmup_steps < 0 or self.halve_after_epoch < 0 or self.weight_decay < 0:
            raise ValueError(
                "optim.lr must be above 0; warmup_steps, halve_after_epoch, weight_decay 0 or more."
            )


def compute_lr(config: OptimConfig, epoch: int, global_step: int) -> float:
    """Learning rate of a step: global_step counts from 0 over the run, epoch from 1.

    While global_step < warmup_steps it is lr·s/warmup_steps, s being the last multiple of warmup_every_steps.
    It halves for each completed halve_every_epochs from halve_after_epoch on. Source: PSLA's traintest.py.
    """
    past = epoch - 1 - config.halve_after_epoch
    halvings = 0 if past < 0 else past // config.halve_every_epochs + 1
    warm = 1.0
    if global_step < config.warmup_steps:
        warm = global_step // config.warmup_every_steps * config.warmup_every_steps / config.warmup_steps
    return float(config.lr * 0.5**halvings * warm)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Adam:
    """Build PSLA's Adam, fused; the learning rate is set before each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def compute_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of scores (B, C) against soft targets (B, C), mean over both, in float32.

    Scores are clamped to [1e-7, 1-1e-7] as in PSLA, because several heads can sum to a little above 1. NaN
    gives NaN, where torch's own function would stop the device.
    """
    scores = scores.float().clamp(EPSILON, 1 - EPSILON)
    return -(targets * scores.log() + (1 - targets) * torch.log1p(-scores)).mean()
