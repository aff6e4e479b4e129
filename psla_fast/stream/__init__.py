"""Streams: the draws of an epoch -> batches of stored fbanks, in draw order, on the device."""

from collections.abc import Iterator
from typing import Protocol

import torch

from psla_fast.shards import Shards
from psla_fast.stream.batch import Batch, BatchShape, StreamConfig
from psla_fast.stream.indexed import IndexedStream
from psla_fast.stream.plan import BatchPlan, DrawPlan, SequentialPlan

__all__ = [
    "Batch",
    "BatchPlan",
    "BatchShape",
    "DrawPlan",
    "SequentialPlan",
    "Stream",
    "StreamConfig",
    "open_stream",
]


class Stream(Protocol):
    """An executor: reads what plans name, in their order."""

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield a batch for each plan; a batch's tensors may be reused once the next one is asked for."""

    def close(self) -> None:
        """Release threads and memory; open files belong to the shards."""


EXECUTORS = {"indexed": IndexedStream}


def open_stream(shards: Shards, config: StreamConfig, shape: BatchShape, device: torch.device) -> Stream:
    """Open the executor that `config.kind` names, for batches of one shape."""
    return EXECUTORS[config.kind](shards, config, shape, device)
