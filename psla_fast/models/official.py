"""PSLA's official weights: what a state dict's names and shapes say about its model."""

import re
from collections.abc import Mapping

from torch import Tensor

from psla_fast.models.config import ModelConfig

# Blocks and channels put out of EfficientNet b0 … b7. Source: Tan and Le 2019, widths and depths.
SIZES = ((16, 1280), (23, 1280), (23, 1408), (26, 1536), (32, 1792), (39, 2048), (45, 2304), (55, 2560))

NUMBERED = re.compile(r"(effnet\._blocks|attention\.att)\.(\d+)\.")


def infer_official(state: Mapping[str, Tensor], source: str) -> tuple[ModelConfig, int]:
    """Read size, heads and number of classes C off a cleaned state dict: (config, C).

    The padding is symmetric, with which the official weights were trained. Raises ValueError that names
    `source` where these aren't the names of PSLA's model.
    """
    numbered = {match.groups() for name in state if (match := NUMBERED.match(name))}
    blocks, several = (
        sum(part == kind for part, _ in numbered) for kind in ("effnet._blocks", "attention.att")
    )
    convolution, stem = state.get("effnet._conv_head.weight"), state.get("effnet._conv_stem.weight")
    num_heads = several or int("attention.att.weight" in state)
    classifier = state.get(f"attention.cla.{'0.' if several else ''}weight")
    size = (blocks, convolution.shape[0] if convolution is not None and convolution.ndim == 4 else 0)
    squeezes = any("._se_reduce." in name for name in state)  # EfficientNet-Lite doesn't
    if size not in SIZES or not squeezes or classifier is None or classifier.ndim != 4 or stem is None:
        found = f"{len(state)} tensors, the first {next(iter(state), 'none')}"
        raise ValueError(
            f"{source} isn't PSLA's model ({found}): no EfficientNet b0 to b7 with attention pooling. "
            "Pass one of its released .pth files."
        )
    name = f"efficientnet_b{SIZES.index(size)}"
    return ModelConfig(name=name, num_heads=num_heads, same_padding="symmetric"), len(classifier)
