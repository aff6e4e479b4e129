"""ResNet-50 and MobileNetV2 (torchvision), upstream's baselines, as one-channel backbones of TaggerNet."""

from torch import Tensor, nn

from psla_fast.models.config import ModelConfig
from psla_fast.models.depthwise import DepthwiseConv2d
from psla_fast.models.download import fetch_weights
from psla_fast.models.probing import TimeGrid
from psla_fast.models.registry import register
from psla_fast.models.tagger_net import Backbone, TaggerNet
from psla_fast.models.weights import read_state_dict, sum_rgb_stem

FEATURES = {"resnet50": 2048, "mobilenet_v2": 1280}
CEIL_32 = TimeGrid(32, 31)  # five halvings of kernels 3 and 7, padded by 1 and 3
STEMS = {"resnet50": "conv1.weight", "mobilenet_v2": "features.0.0.weight"}


class _Stages(nn.Sequential):
    """A network's stages one after the other, under the names that torchvision gives them."""

    def extract_features(self, picture: Tensor) -> Tensor:
        maps: Tensor = self(picture)
        return maps


@register(*FEATURES)
def build_torchvision(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    """Build a network of torchvision's; pretrained imagenet takes its IMAGENET1K_V1 weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(f"{config.name} needs the extra timm: pip install 'psla-fast[timm]'.") from error
    net = getattr(models, config.name)(weights=None)
    if config.pretrained == "imagenet":
        weights = models.get_model_weights(config.name)["IMAGENET1K_V1"]
        _load_official(net, config.name, weights.url)
    summed = sum_rgb_stem(net.state_dict()[STEMS[config.name]])
    stem = net.get_submodule(STEMS[config.name].removesuffix(".weight"))
    stem.weight, stem.in_channels = nn.Parameter(summed), 1
    stages = _Stages()
    for name, stage in net.named_children():
        if name not in ("avgpool", "fc", "classifier"):
            stages.add_module(name, stage)
    _prepare(stages, config.batch_norm_momentum)
    backbone = Backbone(stages, FEATURES[config.name], num_mels, time_grid=CEIL_32)
    return TaggerNet(backbone, num_classes, config)


def _load_official(net: nn.Module, name: str, url: str) -> None:
    path = fetch_weights(name, url)
    try:
        net.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another network than {name}. Delete it: it is fetched again."
        ) from error


def _prepare(stages: nn.Module, momentum: float) -> None:
    """Set BatchNorm's momentum, and give depthwise convolutions their fast gradients on CPUs."""
    for module in list(stages.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.groups == child.in_channels > 1:
                setattr(module, name, DepthwiseConv2d.of(child))
