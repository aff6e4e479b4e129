"""Registry: a model's name -> its builder; ModelConfig names what is built."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained, and from what it starts."""

    name: str = "efficientnet_b2"
    """efficientnet_b0 … efficientnet_b7 or efficientnet_lite0."""
    num_heads: int = 4
    """Attention heads: PSLA uses 4; 1 or 0 (mean pooling) by choice."""
    same_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    """How stride-2 convolutions pad an odd total: symmetric as efficientnet_pytorch 0.7.0, with which PSLA's
    official weights were trained; asymmetric as 0.7.1 and TensorFlow."""
    mask_padding: bool = False
    """Attention ignores the frames behind a clip's end; False is PSLA's, which pools over padding too."""
    pretrained: str = "none"
    """none; imagenet (the RGB stem is summed to one channel); or the path of a checkpoint or state dict."""
    drop_connect: float = 0.2
    """Stochastic depth of the last block; earlier blocks less, linearly."""
    batch_norm_momentum: float = 0.01
    """Share of a batch in BatchNorm's running statistics. EfficientNet's 0.01 needs many hundred steps to
    settle."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.num_heads < 0:
            raise ValueError(f"model.num_heads is {self.num_heads}; give 0 (mean pooling) or more.")
        if not 0 <= self.drop_connect < 1:
            raise ValueError(f"model.drop_connect is {self.drop_connect}; give a rate from 0 to below 1.")
        if not 0 < self.batch_norm_momentum <= 1:
            raise ValueError(
                f"model.batch_norm_momentum is {self.batch_norm_momentum}; give a share above 0, up to 1."
            )


Builder = Callable[[ModelConfig, int], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Decorate a builder `(config, num_classes) -> module` so that `build_model` finds it by these names."""

    def keep(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return keep


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build a network that maps normalised log-mels (B, T, F) to scores (B, num_classes).

    A TaggerNet also takes num_frames (B,), for `mask_padding`; a network registered elsewhere needn't.
    Random where `pretrained` is none: seed torch before. Raises ValueError for an unknown name, and where
    pretrained weights can't be had or don't fit.
    """
    import psla_fast.models.efficientnet  # noqa: F401 - registers its names

    if config.name not in _BUILDERS:
        close = difflib.get_close_matches(config.name, _BUILDERS, n=1, cutoff=0.3)
        raise ValueError(
            f"model {config.name!r} is unknown. Did you mean {(close or sorted(_BUILDERS))[0]!r}?"
        )
    if num_classes < 1:
        raise ValueError(f"a model for {num_classes} classes can't be built; give 1 or more.")
    return _BUILDERS[config.name](config, num_classes)
