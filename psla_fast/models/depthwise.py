"""Depthwise convolution whose gradients are computed on CPUs in the forms that oneDNN does fast.

Measured on cores with AMX and with AVX512-BF16, channels-last: oneDNN's weight gradient of a 5×5 kernel is 10
to 50 times slower than that of a 3×3 one, and in bfloat16 its input gradient with stride 2 is 3 to 50 times
slower than with stride 1. So 5×5 weight gradients are put together from four 3×3 ones, and strided input
gradients in bfloat16 are those of stride 1 for the output's gradient with zeros between its values (3 to 4
times faster than by float32, the same to the bit). Elsewhere, and without gradients, this is torch's own
convolution.
"""

# B clips, D channels, H × W positions, k × k taps

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[int, int]


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with a padding module before it, as EfficientNet's packages have it."""

    static_padding: nn.Module

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Self:
        """Take over the weight, stride and padding of a depthwise convolution without bias."""
        assert convolution.groups == convolution.in_channels == convolution.out_channels
        assert convolution.bias is None
        kernel, stride = _pair(convolution.kernel_size), _pair(convolution.stride)
        made = cls(
            convolution.in_channels,
            convolution.out_channels,
            kernel,
            stride,
            _pair(convolution.padding),
            groups=convolution.groups,
            bias=False,
        )
        made.weight = convolution.weight
        made.static_padding = getattr(convolution, "static_padding", nn.Identity())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, D, H, W)."""
        x = self.static_padding(x)
        stride, padding = _pair(self.stride), _pair(self.padding)
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return functional.conv2d(x, self.weight, None, stride, padding, 1, self.groups)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        result: Tensor = _DepthwiseOnCpu.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
        return result


class _DepthwiseOnCpu(torch.autograd.Function):
    """conv2d with one filter a channel and the gradients described above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == (1, 1) or x.dtype not in (torch.bfloat16, torch.float16):
                grad_x = _gradients(grad, x, weight, ctx.stride, ctx.padding, of_weight=False)
            else:
                grad_x = _strided_input_gradient(grad, x, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            if weight.shape[2:] == (5, 5):
                grad_weight = _weight_gradient_5x5(grad, x, weight, ctx.stride, ctx.padding)
            else:
                grad_weight = _gradients(grad, x, weight, ctx.stride, ctx.padding, of_weight=True)
        return grad_x, grad_weight, None, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, of_weight: bool
) -> Tensor:
    wanted = [not of_weight, of_weight, False]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), wanted
    )
    result: Tensor = found[1 if of_weight else 0]
    return result


def _strided_input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Spread the output's gradient out as stride 1 would have it, and take the input gradient of that."""
    height, width = (x.shape[axis] + 2 * padding[axis - 2] - weight.shape[axis] + 1 for axis in (2, 3))
    spread = torch.empty(
        (*x.shape[:2], height, width), dtype=grad.dtype, memory_format=torch.channels_last
    ).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = grad
    return _gradients(spread, x, weight, (1, 1), padding, of_weight=False)


def _weight_gradient_5x5(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Put the gradient (D, 1, 5, 5) together from those of its 3×3 corners, each of the part of x it sees."""
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = ((grad.shape[axis] - 1) * stride[axis - 2] + 3 for axis in (2, 3))
    result = torch.empty_like(weight)
    corner = weight[:, :, :3, :3].contiguous()
    for top in (0, 2):
        for left in (0, 2):
            seen = padded[:, :, top : top + height, left : left + width]
            seen = seen.contiguous(memory_format=torch.channels_last)
            part = _gradients(grad, seen, corner, stride, (0, 0), of_weight=True)
            result[:, :, top : top + 3, left : left + 3] = part
    return result


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
