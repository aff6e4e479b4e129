"""The tagging network: a backbone's maps, averaged over frequency, then pooled over time."""

# B clips, T frames, F mels, D feature channels, F' × T' positions of the features, C classes

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from psla_fast.models.attention import AttentionPooling
from psla_fast.models.config import ModelConfig
from psla_fast.models.pooling import LinearSoftmaxPooling, MaxPooling, MeanPooling, Pooling
from psla_fast.models.probing import TimeGrid, probe_time_grid

ACTIVITY_POOLINGS: dict[str, Callable[[int, int], Pooling]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "linear_softmax": LinearSoftmaxPooling,
}


class Backbone(NamedTuple):
    """What a builder knows of its network.

    `module.extract_features` maps (B, 1, F, T) to (B, D, F', T'), D = num_features; F is num_mels. `name` is
    the backbone's in the state dict. Without a time_grid, it is found where it is needed.
    """

    module: nn.Module
    num_features: int
    num_mels: int
    name: str = "backbone"
    time_grid: TimeGrid | None = None


class TaggerNet(nn.Module):
    """A backbone and a pooling over time; its state dict has backbone.*, or PSLA's effnet.*, and attention.*.

    `attention` is the pooling of any kind: all that isn't the backbone's.
    """

    def __init__(self, backbone: Backbone, num_classes: int, config: ModelConfig) -> None:
        """Put the pooling that the config says on a backbone; ValueError where that can't mask padding."""
        super().__init__()
        self._name, self._num_mels, self._time_grid = backbone.name, backbone.num_mels, backbone.time_grid
        setattr(self, backbone.name, backbone.module)
        self.attention = build_pooling(config, backbone.num_features, num_classes)
        self.mask_padding, self.dropout = config.mask_padding, config.dropout
        if config.mask_padding:
            self._time_grid = self.time_grid

    @property
    def backbone(self) -> nn.Module:
        """The network without its pooling, whatever its name in the state dict."""
        module = self._modules[self._name]
        assert module is not None
        return module

    @property
    def time_grid(self) -> TimeGrid:
        """How many time steps the backbone makes of T frames; ValueError where that is no such formula."""
        if self._time_grid is None:
            self._time_grid = probe_time_grid(self.backbone, self._num_mels)
        return self._time_grid

    def features(self, fbank: Tensor) -> Tensor:
        """Backbone features (B, D, T') of normalised log-mels (B, T, F), float32, averaged over frequency."""
        picture = fbank.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T)
        maps: Tensor = self.backbone.extract_features(picture)  # type: ignore[operator]
        with torch.autocast(maps.device.type, enabled=False):
            return maps.float().mean(dim=2)

    def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score normalised log-mels (B, T, F): (B, C) in [0, 1]; several heads can sum to just above 1.

        num_frames (B,) integers in 0 … T: with `mask_padding`, a clip is pooled over the steps it has without
        its padding, at least one. Without, or with None, over all.
        """
        features = self.features(fbank)
        if self.dropout:
            features = functional.dropout(features, self.dropout, self.training)
        scores: Tensor = self.attention(features, self._count_steps(num_frames))
        return scores

    def forward_with_activity(self, fbank: Tensor, num_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score as `forward` does in eval mode, and give the classes' activity: (B, C), (B, C, T')."""
        features = self.features(fbank)
        return self.attention(features, self._count_steps(num_frames)), self.attention.activity(features)

    def _count_steps(self, num_frames: Tensor | None) -> Tensor | None:
        if not self.mask_padding or num_frames is None:
            return None
        return (num_frames + self.time_grid.rounding) // self.time_grid.stride


def build_pooling(config: ModelConfig, num_features: int, num_classes: int) -> Pooling:
    """Build the pooling that a config names; attention of 0 heads is the mean."""
    if config.pooling == "attention" and config.num_heads:
        return AttentionPooling(num_features, num_classes, config.num_heads)
    kind = "mean" if config.pooling == "attention" else config.pooling
    return ACTIVITY_POOLINGS[kind](num_features, num_classes)


def use_channels_last(model: nn.Module) -> None:
    """Lay out convolutions channels-last, in place; the heads' 1×1 ones stay as their products want them."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, Pooling):
            for parameter in module.parameters():  # of size 1 × 1, so only the strides change
                parameter.data = parameter.data.flatten().view(parameter.shape)
