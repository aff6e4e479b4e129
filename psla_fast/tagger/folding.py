"""Folding: BatchNorm's scale and shift in eval mode -> the weights of the convolution before it."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from psla_fast.models.depthwise import DepthwiseConv2d

TOLERANCE = 1e-5  # of scores


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """Give a copy of a model in eval mode without the BatchNorms that follow a convolution.

    Which do is seen on example (B, T, F), whose scores must stay the same to 1e-5; where they don't, as in a
    network that uses a convolution's output twice, the model itself is given back.
    """
    folded = copy.deepcopy(model)
    pairs = _find_pairs(folded, example)
    for convolution, norm in pairs:
        _fold(folded, convolution, norm)
    same = torch.allclose(model(example), folded(example), rtol=0, atol=TOLERANCE)
    return folded if pairs and same else model


def _find_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions, and of the BatchNorms that are given their output; each is called once."""
    last: tuple[str, Tensor | None] = ("", None)
    pairs: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            nonlocal last
            last = (name, output)
            calls[name] += 1

        return hook

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[name] += 1
            if inputs[0] is last[1]:
                pairs.append((last[0], name))

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(remember(name)))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:  # a subclass may do more
            hooks.append(module.register_forward_pre_hook(compare(name)))
    model(example)
    for hook in hooks:
        hook.remove()
    return [(convolution, norm) for convolution, norm in pairs if calls[convolution] == calls[norm] == 1]


def _fold(model: nn.Module, convolution_name: str, norm_name: str) -> None:
    convolution, norm = model.get_submodule(convolution_name), model.get_submodule(norm_name)
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    if isinstance(convolution, DepthwiseConv2d):  # has no bias of its own
        plain = nn.Conv2d(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            groups=convolution.groups,
            device="meta",
        )
        plain.weight, plain.bias = weight, bias
        model.set_submodule(convolution_name, nn.Sequential(convolution.static_padding, plain))
    else:
        convolution.weight, convolution.bias = weight, bias
    model.set_submodule(norm_name, nn.Identity())
