"""The tagging network: a convolutional backbone, pooled over frequency, then attention pooling over time."""

import torch
from torch import Tensor, nn

from psla_fast.models.attention import AttentionPooling


class TaggerNet(nn.Module):
    """EfficientNet features with attention pooling; state-dict names are PSLA's: effnet.*, attention.*."""

    def __init__(self, effnet: nn.Module, num_features: int, num_classes: int, num_heads: int) -> None:
        """Take a backbone whose `extract_features` maps (B, 1, F, T) to (B, D, F', T')."""
        super().__init__()
        self.effnet = effnet
        self.attention = AttentionPooling(num_features, num_classes, num_heads)

    def features(self, fbank: Tensor) -> Tensor:
        """Backbone features (B, D, T') of normalised log-mels (B, T, F), float32, averaged over frequency."""
        picture = fbank.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T)
        maps: Tensor = self.effnet.extract_features(picture)  # type: ignore[operator]
        with torch.autocast(maps.device.type, enabled=False):
            return maps.float().mean(dim=2)

    def forward(self, fbank: Tensor) -> Tensor:
        """Score normalised log-mels (B, T, F): (B, C) in [0, 1]; several heads can sum to just above 1."""
        scores: Tensor = self.attention(self.features(fbank))
        return scores


def use_channels_last(model: nn.Module) -> None:
    """Lay out convolutions channels-last, in place; the heads' 1×1 ones stay as their products want them."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, AttentionPooling):
            for parameter in module.parameters():  # of size 1 × 1, so only the strides change
                parameter.data = parameter.data.flatten().view(parameter.shape)
