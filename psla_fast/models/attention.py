"""Attention pooling: features over time -> clip-wise scores in float32, with PSLA's state-dict names."""

# B clips, D feature channels, T' time steps of the features, C classes, H heads

import torch
from torch import Tensor, nn

from psla_fast.models.pooling import EPSILON, Pooling, activate, pointwise


class AttentionPooling(Pooling):
    """PSLA's pooling with H heads: Σ_t att(t)·cla(t) of each, att normalised over time; heads are summed.

    Heads are weighted by `head_weight` (learnt, starts at 1/H) where H > 1; H = 1 has none. So with several
    heads a score can pass 1 slightly. All heads' 1×1 convolutions run as one product.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        """Build 1×1 convolutions under PSLA's names: att.{i} and cla.{i}, or att and cla of one head."""
        super().__init__()
        assert num_heads >= 1
        self.num_heads, self.num_classes = num_heads, num_classes
        if num_heads > 1:
            self.att: nn.Module = nn.ModuleList(
                [pointwise(num_features, num_classes) for _ in range(num_heads)]
            )
            self.cla: nn.Module = nn.ModuleList(
                [pointwise(num_features, num_classes) for _ in range(num_heads)]
            )
            self.head_weight = nn.Parameter(torch.full((num_heads,), 1.0 / num_heads))
        else:
            self.att = pointwise(num_features, num_classes)
            self.cla = pointwise(num_features, num_classes)

    def activity(self, features: Tensor) -> Tensor:
        """Class activity (B, C, T') over time of features (B, D, T'): cla, heads weighted by head_weight."""
        with torch.autocast(features.device.type, enabled=False):
            weights = self.head_weight if self.num_heads > 1 else features.new_ones(1)
            active = [activate(head, features.float()) for head in _heads(self.cla)]
            return torch.stack(active, dim=3) @ weights.float()

    def _pool(self, features: Tensor, is_valid: Tensor | None) -> Tensor:
        convolutions = [*_heads(self.att), *_heads(self.cla)]
        weight = torch.cat([conv.weight[:, :, 0, 0] for conv in convolutions])  # (2·H·C, D)
        bias = torch.cat([conv.bias for conv in convolutions if conv.bias is not None])
        activity = torch.sigmoid(weight @ features + bias[:, None])  # (B, 2·H·C, T')
        attention, activity = activity.view(len(activity), 2, -1, self.num_classes, features.shape[2]).unbind(
            1
        )  # (B, H, C, T') each
        attention = attention.clamp(EPSILON, 1 - EPSILON)
        if is_valid is not None:
            attention = torch.where(is_valid[:, None, None], attention, 0.0)
        pooled: Tensor = (attention * activity).sum(dim=3) / attention.sum(dim=3)  # (B, H, C)
        if self.num_heads == 1:
            return pooled.squeeze(1)
        return (pooled * self.head_weight[:, None]).sum(dim=1)


def _heads(part: nn.Module) -> list[nn.Conv2d]:
    return [*part] if isinstance(part, nn.ModuleList) else [part]  # type: ignore[list-item]
