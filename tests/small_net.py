"""A checkpoint of a small network with all that exports must handle: for the tests of exports."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, Checkpoint, save_checkpoint
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.models import Backbone, ModelConfig, Pooling, TaggerNet, build_model, register
from tests.makers import CLASSES

SPEC = InputSpec(clip_frames=64, num_mels=128, pad_value=-15.94, mean=-7.5, std=5.0)
NUM_CHANNELS = 640  # its 1×1 convolution has enough weights for int8


class SmallBackbone(nn.Module):
    """A strided, a depthwise and a 1×1 convolution with BatchNorm: one of each kind in an EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=4, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, NUM_CHANNELS, 1)

    def extract_features(self, picture: Tensor) -> Tensor:
        return torch.relu(self.pointwise(torch.relu(self.depthwise(self.norm(self.stem(picture))))))


@register("small")
def build_small(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    return TaggerNet(Backbone(SmallBackbone(), NUM_CHANNELS, num_mels), num_classes, config)


def shake(model: nn.Module, num_mels: int) -> nn.Module:
    """Fit a fresh network's BatchNorms to the range of its maps, as training does, and widen its scores.

    Without, its scores hardly vary; and with random weights that let more through, rounding grows on its way.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, Pooling):
            for parameter in module.parameters():
                parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 96, num_mels))
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(7)
    return model.eval()


def make_checkpoint(
    config: ModelConfig | None = None, spec: InputSpec = SPEC, classes: Classes = CLASSES
) -> Checkpoint:
    """A network with random weights that are the same each time; `small` unless the config says another."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = config or ModelConfig(name="small")
        model = shake(build_model(config, len(classes), spec.num_mels), spec.num_mels)
    return Checkpoint(Card(config, classes, spec, FbankConfig()), model.state_dict(), 5, {})


def write_checkpoint(path: Path, **of: object) -> Path:
    """The file of `make_checkpoint`."""
    made = make_checkpoint(**of)  # type: ignore[arg-type]
    save_checkpoint(path, made.card, made.state, made.epoch)
    return path


def with_buckets(*buckets: int) -> InputSpec:
    return replace(SPEC, buckets=buckets, clip_frames=buckets[-1])
