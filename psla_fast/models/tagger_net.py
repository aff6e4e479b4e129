"""The tagging network: a convolutional backbone, pooled over frequency, then attention pooling over time."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psla_fast.models.attention import AttentionPooling


class TimeGrid(NamedTuple):
    """How many time steps a backbone makes of T frames: T' = ⌊(T + rounding) / stride⌋."""

    stride: int
    rounding: int


CEIL_32 = TimeGrid(32, 31)  # T' = ⌈T/32⌉


class TaggerNet(nn.Module):
    """EfficientNet features with attention pooling; state-dict names are PSLA's: effnet.*, attention.*."""

    def __init__(
        self,
        effnet: nn.Module,
        num_features: int,
        num_classes: int,
        num_heads: int,
        mask_padding: bool = False,
        time_grid: TimeGrid = CEIL_32,
    ) -> None:
        """Take a backbone whose `extract_features` maps (B, 1, F, T) to (B, D, F', T'), T' by `time_grid`."""
        super().__init__()
        self.effnet = effnet
        self.attention = AttentionPooling(num_features, num_classes, num_heads)
        self.mask_padding, self.time_grid = mask_padding, time_grid

    def features(self, fbank: Tensor) -> Tensor:
        """Backbone features (B, D, T') of normalised log-mels (B, T, F), float32, averaged over frequency."""
        picture = fbank.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T)
        maps: Tensor = self.effnet.extract_features(picture)  # type: ignore[operator]
        with torch.autocast(maps.device.type, enabled=False):
            return maps.float().mean(dim=2)

    def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score normalised log-mels (B, T, F): (B, C) in [0, 1]; several heads can sum to just above 1.

        num_frames (B,) integers in 0 … T: with `mask_padding`, a clip is pooled over the steps it has without
        its padding, at least one. Without, or with None, over all.
        """
        scores: Tensor = self.attention(self.features(fbank), self._count_steps(num_frames))
        return scores

    def forward_with_activity(self, fbank: Tensor, num_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score as `forward` does, and give the classes' activity over time besides: (B, C), (B, C, T')."""
        features = self.features(fbank)
        return self.attention(features, self._count_steps(num_frames)), self.attention.activity(features)

    def _count_steps(self, num_frames: Tensor | None) -> Tensor | None:
        if not self.mask_padding or num_frames is None:
            return None
        return (num_frames + self.time_grid.rounding) // self.time_grid.stride


def use_channels_last(model: nn.Module) -> None:
    """Lay out convolutions channels-last, in place; the heads' 1×1 ones stay as their products want them."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, AttentionPooling):
            for parameter in module.parameters():  # of size 1 × 1, so only the strides change
                parameter.data = parameter.data.flatten().view(parameter.shape)
