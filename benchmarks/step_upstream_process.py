"""Upstream's step in a process of its own, so that what ours sets up for itself doesn't help or hinder it.

What it sets is torch's default: malloc gives freed memory back, cuDNN chooses kernels by its heuristics.
"""

import multiprocessing
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch
from roofline import NUM_CLASSES
from step_ours import timed
from step_upstream import build_upstream_step


class UpstreamProcess:
    """Times steps of upstream's way on demand."""

    def __init__(self, name: str, batch: int, frames: int) -> None:
        """Start with an EfficientNet ("efficientnet-b0") and a batch's shape."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, batch, frames), daemon=True)
        self._process.start()
        other.close()

    def __call__(self) -> float:
        """Take a step; returns its seconds."""
        self._connection.send(True)
        return float(self._connection.recv())

    def __enter__(self) -> Self:
        """Close it at the end of a with statement."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, name: str, batch: int, frames: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fbank = torch.randn(batch, frames, 128, device=device)
    targets = torch.rand(batch, NUM_CLASSES, device=device).round()
    step = build_upstream_step(name, NUM_CLASSES, fbank, targets)
    run = partial(timed, step, device)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        if device.type == "cuda":
            step()  # untimed: it takes the memory again that was given back
        connection.send(run())
        if device.type == "cuda":
            torch.cuda.empty_cache()  # both ways needn't fit at once
