"""The ceiling of a training step: what memory bandwidth allows, whatever the arithmetic.

A step moves 13 passes over all convolution outputs (forward: write, statistics, normalise and activate read
and write, next read; backward: eight), at the bandwidth of a large copy.
"""

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from psla_fast.models import ModelConfig, build_model

NUM_CLASSES = 527
NUM_PASSES = 13


def compute_roofline(bandwidth: float, num_outputs: int, bytes_per_value: int) -> float:
    """Clips a second at `bandwidth` bytes a second, for `num_outputs` convolution outputs a clip."""
    return bandwidth / (NUM_PASSES * num_outputs * bytes_per_value)


def count_convolution_outputs(name: str, frames: int) -> int:
    """Values that all convolutions put out for one clip."""
    counted = 0

    def count(_: nn.Module, __: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    model = build_model(ModelConfig(name=f"efficientnet_{name}"), NUM_CLASSES).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, frames, 128))
    return counted


def count_forward_flops(name: str, frames: int) -> int:
    """Floating-point operations of a forward pass of one clip, two for each multiplication with addition."""
    model = build_model(ModelConfig(name=f"efficientnet_{name}"), NUM_CLASSES).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, frames, 128))
    return int(counter.get_total_flops())


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product: the best of 5."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure_copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes: the best of 5."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best
