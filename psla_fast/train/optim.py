"""Optimiser and learning-rate schedule of a run; the defaults are the PSLA recipe's."""

import itertools
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated. The defaults are PSLA's for balanced AudioSet."""

    batch_size: int = 100
    """Clips of a global batch, over all ranks."""
    accumulate: int = 1
    """Batches whose gradients are added up before an update; optim.batch_size is what one of them holds."""
    epochs: int = 60
    """Epochs to train."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam, PSLA's; adamw: weight decay apart from the gradient; sgd: Nesterov momentum."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.95, 0.999)
    """adam, adamw: decay of the running means of gradient and squared gradient."""
    momentum: float = 0.9
    """sgd: Nesterov momentum; 0: none."""
    weight_decay: float = 5e-7
    """adam, sgd: L2 penalty, added to the gradient. adamw: share, times the rate, taken off the weights at
    each update; there PSLA's value does next to nothing and 0.01 is usual."""
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    """step: PSLA's, halved every few epochs. cosine: after the same warm-up half a cosine down to the last
    update. one_cycle: as cosine, with a straight warm-up."""
    warmup_steps: int = 1000
    """Updates of the warm-up; 0: none."""
    warmup_every_steps: int = 50
    """step, cosine: the warm-up raises the rate every so many updates; PSLA's first 50 run at 0."""
    halve_after_epoch: int = 35
    """step: epochs at the full rate; the next one runs at half of it."""
    halve_every_epochs: int = 5
    """step: from then on the rate is halved every so many epochs."""
    final_lr_fraction: float = 0.01
    """cosine, one_cycle: the last update runs at this share of optim.lr."""
    backbone_lr_factor: float = 1.0
    """The backbone learns at this share of optim.lr, the head at all of it."""
    freeze_epochs: int = 0
    """First epochs in which the backbone stays as it is, its BatchNorm's statistics too; only the head
    learns."""

    def __post_init__(self) -> None:
        """Refuse values out of range and settings without effect."""
        for name in ("batch_size", "accumulate", "epochs", "warmup_every_steps", "halve_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; give 1 or more.")
        for name in (
            "warmup_steps",
            "halve_after_epoch",
            "weight_decay",
            "backbone_lr_factor",
            "freeze_epochs",
        ):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; give 0 or more.")
        if not 0 < self.lr < inf:
            raise ValueError(f"optim.lr is {self.lr}; give a number above 0.")
        if not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            raise ValueError(
                f"optim.betas is {self.betas}, momentum {self.momentum}; give 0 or more, below 1."
            )
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction is {self.final_lr_fraction}; give 0 to 1.")
        if self.backbone_lr_factor == 0:
            raise ValueError(
                "optim.backbone_lr_factor is 0; give a share above 0, or --optim.freeze-epochs "
                f"{self.epochs} to keep the backbone as it is."
            )
        if self.optimizer == "sgd" and self.betas != OptimConfig.betas:
            raise ValueError("optim.betas is for --optim.optimizer adam or adamw, not sgd. Leave it out.")
        if self.optimizer != "sgd" and self.momentum != OptimConfig.momentum:
            raise ValueError(
                f"optim.momentum is for --optim.optimizer sgd, not {self.optimizer}. Leave it out."
            )
        if self.schedule == "step" and self.final_lr_fraction != OptimConfig.final_lr_fraction:
            raise ValueError(
                "optim.final_lr_fraction is for --optim.schedule cosine or one_cycle, not step. Leave it out."
            )


def compute_lr(config: OptimConfig, epoch: int, global_step: int, total_steps: int = 0) -> float:
    """Learning rate of an update: global_step counts updates from 0 over the run, epoch from 1.

    total_steps, the updates that the run plans, is needed by cosine and one_cycle. While global_step <
    warmup_steps the rate is lr·s/warmup_steps, s being the last multiple of warmup_every_steps (one_cycle:
    global_step itself). step halves it for each completed halve_every_epochs from halve_after_epoch on. The
    others have lr at global_step = warmup_steps, final_lr_fraction·lr at total_steps - 1, and half a cosine
    between. Sources: step, PSLA's traintest.py; cosine, Loshchilov and Hutter 2017 (SGDR), eq. 5, one period;
    one_cycle, Smith and Topin 2017 (Super-Convergence), with a constant momentum.
    """
    warm = 1.0
    if global_step < config.warmup_steps:
        every = 1 if config.schedule == "one_cycle" else config.warmup_every_steps
        warm = global_step // every * every / config.warmup_steps
    if config.schedule == "step":
        past = epoch - 1 - config.halve_after_epoch
        halvings = 0 if past < 0 else past // config.halve_every_epochs + 1
        return float(config.lr * 0.5**halvings * warm)
    assert total_steps > 0
    if global_step < config.warmup_steps:
        return config.lr * warm
    last = total_steps - 1
    left = max(last - global_step, 0) / max(last - config.warmup_steps, 1)
    height = (1 - cos(pi * left)) / 2  # 1 at the peak, 0 at the end
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the fused optimiser of the parameters that train; the learning rate is set before each update.

    Each group has an `lr_factor`, its share of that rate. Raises ValueError where the backbone shall learn
    otherwise than the head, and the model has no part called attention.
    """
    factor, decay = config.backbone_lr_factor, config.weight_decay
    groups = [([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)]
    if factor != 1:
        backbone, head = split_parameters(model)
        groups = [(backbone, factor), (head, 1.0)]
    parameters = [{"params": members, "lr_factor": share} for members, share in groups]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        optimizer = torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=decay, nesterov=nesterov, fused=True
        )
        if nesterov:  # torch would take them from memory as it is, if a scaler left out the first update
            for parameter in itertools.chain(*(members for members, _ in groups)):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, betas=config.betas, weight_decay=decay, fused=True)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Part the parameters that train into the backbone's and the head's, which is the part called attention.

    Raises ValueError for a model without such a part.
    """
    head = dict(model.named_children()).get("attention")
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no part called attention, so its head isn't known. Name it so, or "
            "leave optim.backbone_lr_factor at 1 and optim.freeze_epochs at 0."
        )
    of_head = {id(parameter) for parameter in head.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = [parameter for parameter in trained if id(parameter) not in of_head]
    return backbone, [parameter for parameter in trained if id(parameter) in of_head]
