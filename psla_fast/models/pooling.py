"""Pooling over time without attention: features -> clip-wise scores in float32; the base of all poolings."""

# B clips, D feature channels, T' time steps of the features, C classes

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

EPSILON = 1e-7


class Pooling(nn.Module, ABC):
    """Features over time -> scores of a clip; what they share is float32, and steps that are left out."""

    def forward(self, features: Tensor, num_steps: Tensor | None = None) -> Tensor:
        """Pool features (B, D, T') to scores (B, C).

        num_steps (B,) integers: a clip's steps from its count on are left out, its first never. None: none.
        """
        with torch.autocast(features.device.type, enabled=False):
            if num_steps is None:
                return self._pool(features.float(), None)
            at = torch.arange(features.shape[2], device=features.device)
            is_valid = at < num_steps.clamp(min=1)[:, None]  # (B, T')
            # a huge feature could overflow to NaN, and 0·NaN is NaN: so its weight isn't all that is zeroed
            return self._pool(torch.where(is_valid[:, None], features.float(), 0.0), is_valid)

    @abstractmethod
    def activity(self, features: Tensor) -> Tensor:
        """Class activity (B, C, T') over time of features (B, D, T'), of which pooling makes scores."""

    @abstractmethod
    def _pool(self, features: Tensor, is_valid: Tensor | None) -> Tensor:
        """Pool the steps (B, T') that are valid; None: all."""


class ActivityPooling(Pooling):
    """One 1×1 convolution `cla` and a sigmoid give each class's activity, which a fixed formula pools."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        """Build the convolution D -> C."""
        super().__init__()
        self.num_classes = num_classes
        self.cla = pointwise(num_features, num_classes)

    def activity(self, features: Tensor) -> Tensor:
        """Class activity (B, C, T') in [0, 1] over time of features (B, D, T')."""
        with torch.autocast(features.device.type, enabled=False):
            return activate(self.cla, features.float())

    def _pool(self, features: Tensor, is_valid: Tensor | None) -> Tensor:
        return self._reduce(activate(self.cla, features), is_valid)

    @abstractmethod
    def _reduce(self, activity: Tensor, is_valid: Tensor | None) -> Tensor:
        """Pool activity (B, C, T') over its valid steps (B, T') to (B, C)."""


class MeanPooling(ActivityPooling):
    """The mean of the activity over time: PSLA's pooling without attention."""

    def _reduce(self, activity: Tensor, is_valid: Tensor | None) -> Tensor:
        if is_valid is None:
            return activity.mean(dim=2)
        mean = torch.where(is_valid[:, None], activity, 0.0).mean(dim=2)
        return mean * (activity.shape[2] / is_valid.sum(dim=1, keepdim=True))


class MaxPooling(ActivityPooling):
    """The largest activity over time: a class sounds in a clip where it does at any moment."""

    def _reduce(self, activity: Tensor, is_valid: Tensor | None) -> Tensor:
        return (activity if is_valid is None else torch.where(is_valid[:, None], activity, 0.0)).amax(dim=2)


class LinearSoftmaxPooling(ActivityPooling):
    """Σ p² / Σ p of the activity p over time: its mean, weighted by itself.

    Source: Wang, Li, Metze 2019, A comparison of five multiple instance learning pooling functions, table 1.
    """

    def _reduce(self, activity: Tensor, is_valid: Tensor | None) -> Tensor:
        if is_valid is not None:
            activity = torch.where(is_valid[:, None], activity, 0.0)
        # far below what a loss tells apart, and keeps 0/0 away where all activity underflows
        return activity.square().sum(dim=2) / activity.sum(dim=2).clamp(min=EPSILON**2)


def pointwise(num_features: int, num_classes: int) -> nn.Conv2d:
    """Make a 1×1 convolution as PSLA initialises it: Xavier-uniform weights, zero bias."""
    convolution = nn.Conv2d(num_features, num_classes, kernel_size=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def activate(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """Apply a 1×1 convolution and a sigmoid to features (B, D, T'): (B, C, T')."""
    assert convolution.bias is not None
    return torch.sigmoid(convolution.weight[:, :, 0, 0] @ features + convolution.bias[:, None])
