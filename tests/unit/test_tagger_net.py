from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psla_fast.models import ModelConfig, TaggerNet, build_model, use_channels_last

# convolutions alone: squeeze-and-excite and attention see a whole clip, its padding with it
MODELS = ["efficientnet_lite0", "mobilenet_v2", "timm:test_resnet"]
POOLINGS = ["attention", "mean", "max", "linear_softmax"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def build(name: str, **config: Any) -> TaggerNet:
    """Build with weights that let the input through: a fresh network's scores hardly vary."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, **config), num_classes=4, num_mels=32)
    assert isinstance(model, TaggerNet)
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_each_model_scores_learns_and_masks_with_each_pooling(
    name: str, pooling: Any, mask_padding: bool
) -> None:
    model = build(name, pooling=pooling, mask_padding=mask_padding)
    use_channels_last(model)
    fbank, num_frames = normal(2, 96, 32), torch.tensor([96, 40])
    scores = model(fbank, num_frames)
    assert scores.shape == (2, 4)
    assert ((scores > 0) & (scores < 1)).all()
    scores.square().sum().backward()
    stem = next(model.backbone.parameters())
    assert stem.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in model.attention.parameters())
    model.eval()
    with torch.no_grad():
        if pooling != "max":  # whose largest step may be in either part
            assert model(fbank, num_frames).equal(model(fbank)) == (not mask_padding)
        # half the widest receptive field is 430 frames: beyond, more padding must change nothing
        padded = [torch.nn.functional.pad(fbank, (0, 0, 0, extra)) for extra in (448, 896)]
        few, many = (model(longer, torch.tensor([96, 96])) for longer in padded)
    if mask_padding:
        assert torch.allclose(few, many, atol=1e-5)
    elif pooling != "max":
        assert (few - many).abs().max() > 1e-3, "all steps count where padding isn't masked"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_activity_comes_with_the_scores_that_forward_gives(pooling: Any) -> None:
    model = build("timm:test_resnet", pooling=pooling, mask_padding=True, dropout=0.5).eval()
    fbank, num_frames = normal(2, 100, 32), torch.tensor([100, 60])
    with torch.no_grad():
        scores, activity = model.forward_with_activity(fbank, num_frames)
        assert torch.equal(scores, model(fbank, num_frames))
    assert activity.shape == (2, 4, model.time_grid.count_steps(100))
    steps = model.time_grid.count_steps(60)
    if pooling == "max":
        assert torch.equal(scores[1], activity[1, :, :steps].amax(dim=1))


def test_the_backbone_goes_by_pslas_name_in_efficientnets_alone() -> None:
    for name, prefix in {"efficientnet_lite0": "effnet.", "mobilenet_v2": "backbone."}.items():
        model = build(name)
        parts = {key.split(".")[0] + "." for key in model.state_dict()}
        assert parts == {prefix, "attention."}
        assert len(list(model.backbone.parameters())) + len(list(model.attention.parameters())) == len(
            list(model.parameters())
        )
