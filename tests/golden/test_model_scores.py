import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.models import ModelConfig, TaggerNet, build_model

FOLDER = Path(__file__).parent / "model"
FEATURES = {0: 1280, 2: 1408}  # channels that a backbone puts out


def weight_by_name(name: str, shape: torch.Size, num_heads: int) -> Tensor:
    """The rule by which the official model's weights were made, each from its own name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    one_dimensional = len(shape) == 1
    if name.endswith("running_var") or (one_dimensional and "_bn" in name and name.endswith("weight")):
        return torch.rand(shape, generator=generator) + 0.5
    normal = torch.randn(shape, generator=generator)
    if name.endswith("head_weight"):
        return 1 / num_heads + 0.02 * normal
    if one_dimensional:
        return 0.1 * normal
    return normal * math.sqrt(2 / shape[1:].numel())


def golden_state(shapes: dict[str, torch.Size], size: int, num_heads: int) -> dict[str, Tensor]:
    """All weights by that rule; in b2, whose 23 blocks would multiply rounding, `_bn2` is damped by 0.85."""
    state = {name: weight_by_name(name, shape, num_heads) for name, shape in shapes.items()}
    for name in state:
        if size == 2 and name.endswith("_bn2.weight"):
            state[name] *= 0.85
    return state


def golden_fbank() -> Tensor:
    """The input (3, 208, 128) of the golden scores."""
    return torch.randn(3, 208, 128, generator=torch.Generator().manual_seed(7))


def build_golden(size: int, num_heads: int, num_classes: int) -> TaggerNet:
    """Our model with the golden weights, in eval mode."""
    model = build_model(ModelConfig(name=f"efficientnet_b{size}", num_heads=num_heads), num_classes)
    assert isinstance(model, TaggerNet)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(golden_state(shapes, size, num_heads))
    return model.eval()


@pytest.mark.parametrize("num_heads", [4, 1, 0])
def test_scores_and_features_are_the_official_models(num_heads: int) -> None:
    expected = np.load(FOLDER / f"effnet_b0_heads{num_heads}.npz")
    model = build_golden(0, num_heads, num_classes=10)
    fbank = golden_fbank()
    with torch.no_grad():
        scores, features = model(fbank).numpy(), model.features(fbank).mean(dim=2).numpy()
    assert np.ptp(expected["scores"]) > 0.1, "scores that are all alike would test nothing"
    assert np.abs(scores - expected["scores"]).max() <= 1e-5
    assert np.abs(features - expected["features_mean"]).max() <= 1e-4 * np.abs(features).max()
