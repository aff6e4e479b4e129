"""Registry: a model's name -> its builder: a registered one, timm's, or a user's own class."""

import difflib
from collections.abc import Callable
from pathlib import Path

from torch import nn

from psla_fast.models import own_net
from psla_fast.models.config import ModelConfig
from psla_fast.models.weights import load_weights

__all__ = ["Builder", "ModelConfig", "build_model", "register"]

Builder = Callable[[ModelConfig, int, int], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Decorate a builder (config, num_classes, num_mels) -> module: `build_model` finds it by these names."""

    def keep(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return keep


def build_model(
    config: ModelConfig,
    num_classes: int,
    num_mels: int = 128,
) -> nn.Module:
    """Build a network that maps normalised log-mels (B, T, F) to scores (B, num_classes), F = num_mels.

    A TaggerNet also takes num_frames (B,), for `mask_padding`; a network from elsewhere needn't.
    Random where `pretrained` is none: seed torch before. Weights at a path must be this
    model's. Raises ValueError for an unknown name, and where pretrained weights can't be had or don't fit.
    """
    if num_classes < 1:
        raise ValueError(f"a model for {num_classes} classes can't be built; give 1 or more.")
    model = _find_builder(config.name)(config, num_classes, num_mels)
    if config.pretrained not in ("none", "imagenet"):
        load_weights(model, Path(config.pretrained))
    return model


def _find_builder(name: str) -> Builder:
    import psla_fast.models.efficientnet
    import psla_fast.models.torchvision_net  # noqa: F401 - registers its names, as the one above
    from psla_fast.models import timm_net

    if name.startswith(timm_net.PREFIX):
        return timm_net.build_timm
    if ":" in name:
        return own_net.build_own
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1, cutoff=0.3)
        raise ValueError(f"model {name!r} is unknown. Did you mean {(close or sorted(_BUILDERS))[0]!r}?")
    return _BUILDERS[name]
