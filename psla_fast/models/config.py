"""ModelConfig: which network is built, how it pools, and what it starts from."""

from dataclasses import dataclass
from typing import Literal

PoolingName = Literal["attention", "mean", "max", "linear_softmax"]


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained, and from what it starts."""

    name: str = "efficientnet_b2"
    """efficientnet_b0 … efficientnet_b7, efficientnet_lite0 … efficientnet_lite4, resnet50, mobilenet_v2;
    timm:NAME for any of timm's; or a class of your own, PACKAGE.MODULE:CLASS."""
    num_heads: int = 4
    """Attention heads: PSLA uses 4; 1 or 0 (mean pooling) by choice."""
    same_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    """EfficientNets b0 to b7 and lite: how stride-2 convolutions pad an odd total, symmetric as
    efficientnet_pytorch 0.7.0, with which PSLA's official weights were trained; asymmetric as 0.7.1 and
    TensorFlow. Other networks pad as they were made to."""
    mask_padding: bool = False
    """Pooling ignores the frames behind a clip's end; False is PSLA's, which pools over padding too."""
    pretrained: str = "none"
    """none; imagenet (the RGB stem is summed to one channel); or the path of a checkpoint or state dict."""
    drop_connect: float = 0.2
    """Stochastic depth of the last block; earlier blocks less, linearly. Networks without blocks that can be
    left out have none."""
    batch_norm_momentum: float = 0.01
    """Share of a batch in BatchNorm's running statistics. EfficientNet's 0.01 needs many hundred steps to
    settle."""
    pooling: PoolingName = "attention"
    """How features over time become a clip's scores: attention, PSLA's; or of the classes' activity the mean,
    the max, or the mean weighted by itself (linear_softmax)."""
    dropout: float = 0.0
    """Share of the features that is zeroed in training, before the pooling's convolutions; PSLA: none."""

    def __post_init__(self) -> None:
        """Refuse values out of range and settings without effect."""
        if self.num_heads < 0:
            raise ValueError(f"model.num_heads is {self.num_heads}; give 0 (mean pooling) or more.")
        if self.pooling != "attention" and self.num_heads != ModelConfig.num_heads:
            raise ValueError(
                f"model.num_heads is for --model.pooling attention, not {self.pooling}. Leave it out."
            )
        for name in ("drop_connect", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; give a rate from 0 to below 1.")
        if not 0 < self.batch_norm_momentum <= 1:
            raise ValueError(
                f"model.batch_norm_momentum is {self.batch_norm_momentum}; give a share above 0, up to 1."
            )
