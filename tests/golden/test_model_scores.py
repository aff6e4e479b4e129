import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.models import ModelConfig, TaggerNet, build_model

FOLDER = Path(__file__).parent / "model"


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


@pytest.mark.parametrize("num_heads", [4, 1, 0])
def test_scores_and_features_are_the_official_models(num_heads: int) -> None:
    expected = np.load(FOLDER / f"effnet_b0_heads{num_heads}.npz")
    model = build_model(ModelConfig(name="efficientnet_b0", num_heads=num_heads), num_classes=10)
    assert isinstance(model, TaggerNet)
    state = model.state_dict()
    model.load_state_dict({k: weight_by_name(k, value.shape, num_heads) for k, value in state.items()})
    model.eval()
    fbank = torch.randn(3, 208, 128, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        scores, features = model(fbank).numpy(), model.features(fbank).mean(dim=2).numpy()
    assert np.ptp(expected["scores"]) > 0.1, "scores that are all alike would test nothing"
    assert np.abs(scores - expected["scores"]).max() <= 1e-5
    assert np.abs(features - expected["features_mean"]).max() <= 1e-4 * np.abs(features).max()
