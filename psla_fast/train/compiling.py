"""Compiling: model and augmentation -> one compiled graph each for every shape a batch may have."""

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.utils import counters

CompileMode = Literal["none", "default", "max", "graphs"]
MODES = {"default": "default", "max": "max-autotune-no-cudagraphs", "graphs": "reduce-overhead"}
BACKEND = "inductor"

P = ParamSpec("P")
R = TypeVar("R")


def compile_parts(
    model: nn.Module, function: Callable[P, R], mode: CompileMode, num_shapes: int
) -> Callable[P, R]:
    """Compile a model in place, and a function beside it, which is returned; `none` leaves both.

    Shapes are static: kernels of a known shape are faster, and there are only the buckets'. Without this,
    torch would take the second shape for a sign that all vary, and give up after eight.
    """
    if mode == "none":
        return function
    # up to two batch sizes a bucket for training, and one for scoring; the rest is for torch's own guards
    limit = 3 * num_shapes + 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    named = MODES[mode] if BACKEND == "inductor" else None
    # DDP would have the graph cut into pieces, to reduce one's gradients while the next is computed; whole,
    # the all-reduces wait for the backward pass: 34 MB, which NVLink moves in a moment
    torch._dynamo.config.optimize_ddp = False
    model.compile(backend=BACKEND, dynamic=False, mode=named)
    return torch.compile(function, backend=BACKEND, dynamic=False, mode=named)


def count_graphs() -> int:
    """Give how many graphs this process has compiled; one more than before means it stopped to compile."""
    return int(counters["stats"]["unique_graphs"])
