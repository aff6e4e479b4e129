"""Attention pooling: features over time -> clip-wise scores in float32, with PSLA's state-dict names."""

# B clips, D feature channels, T' time steps of the features, C classes, H heads

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-7


class AttentionPooling(nn.Module):
    """PSLA's pooling with H heads: Σ_t att(t)·cla(t) of each, att normalised over time; heads are summed.

    Heads are weighted by `head_weight` (learnt, starts at 1/H) where H > 1; H = 1 has none; H = 0 is the mean
    over time of cla. All heads' 1×1 convolutions run as one product.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        """Build 1×1 convolutions under PSLA's names: att.{i} and cla.{i}, or att and cla, or cla alone."""
        super().__init__()
        self.num_heads, self.num_classes = num_heads, num_classes
        if num_heads > 1:
            self.att: nn.Module = nn.ModuleList(
                [_pointwise(num_features, num_classes) for _ in range(num_heads)]
            )
            self.cla: nn.Module = nn.ModuleList(
                [_pointwise(num_features, num_classes) for _ in range(num_heads)]
            )
            self.head_weight = nn.Parameter(torch.full((num_heads,), 1.0 / num_heads))
        else:
            if num_heads == 1:
                self.att = _pointwise(num_features, num_classes)
            self.cla = _pointwise(num_features, num_classes)

    def forward(self, features: Tensor, num_steps: Tensor | None = None) -> Tensor:
        """Pool features (B, D, T') to scores (B, C); with several heads a score can pass 1 slightly.

        num_steps (B,) integers: a clip's steps from its count on are left out, its first never. None: none.
        """
        with torch.autocast(features.device.type, enabled=False):
            if num_steps is None:
                return self._pool(features.float(), None)
            at = torch.arange(features.shape[2], device=features.device)
            is_valid = at < num_steps.clamp(min=1)[:, None]  # (B, T')
            # a huge feature could overflow to NaN, and 0·NaN is NaN: so not only its att is zeroed
            return self._pool(torch.where(is_valid[:, None], features.float(), 0.0), is_valid)

    def activity(self, features: Tensor) -> Tensor:
        """Class activity (B, C, T') over time of features (B, D, T'): cla, heads weighted by head_weight."""
        with torch.autocast(features.device.type, enabled=False):
            heads = list(self.cla) if isinstance(self.cla, nn.ModuleList) else [self.cla]
            weights = self.head_weight if self.num_heads > 1 else features.new_ones(1)
            active = [
                torch.sigmoid(functional.conv1d(features.float(), h.weight[:, :, 0], h.bias)) for h in heads
            ]
            return torch.stack(active, dim=3) @ weights.float()

    def _pool(self, features: Tensor, is_valid: Tensor | None) -> Tensor:
        convolutions = self._convolutions()
        weight = torch.cat([conv.weight[:, :, 0, 0] for conv in convolutions])  # (2·H·C or C, D)
        bias = torch.cat([conv.bias for conv in convolutions if conv.bias is not None])
        activity = torch.sigmoid(weight @ features + bias[:, None])  # (B, 2·H·C or C, T')
        num_steps = features.shape[2]
        if self.num_heads == 0:
            if is_valid is None:
                return activity.mean(dim=2)
            mean = torch.where(is_valid[:, None], activity, 0.0).mean(dim=2)
            return mean * (num_steps / is_valid.sum(dim=1, keepdim=True))
        attention, activity = activity.view(len(activity), 2, -1, self.num_classes, num_steps).unbind(
            1
        )  # (B, H, C, T') each
        attention = attention.clamp(EPSILON, 1 - EPSILON)
        if is_valid is not None:
            attention = torch.where(is_valid[:, None, None], attention, 0.0)
        pooled: Tensor = (attention * activity).sum(dim=3) / attention.sum(dim=3)  # (B, H, C)
        if self.num_heads == 1:
            return pooled.squeeze(1)
        return (pooled * self.head_weight[:, None]).sum(dim=1)

    def _convolutions(self) -> list[nn.Conv2d]:
        """All heads' convolutions: att of every head first, then cla."""
        groups = [self.cla] if self.num_heads == 0 else [self.att, self.cla]
        found = [list(g) if isinstance(g, nn.ModuleList) else [g] for g in groups]
        return [conv for group in found for conv in group]  # type: ignore[misc]


def _pointwise(num_features: int, num_classes: int) -> nn.Conv2d:
    """Make a 1×1 convolution as PSLA initialises it: Xavier-uniform weights, zero bias."""
    convolution = nn.Conv2d(num_features, num_classes, kernel_size=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution
