"""Streams: the draws of an epoch -> batches of stored fbanks, in draw order, on the device."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from psla_fast.shards import Shards
from psla_fast.stream.batch import Batch, BatchShape, StreamConfig
from psla_fast.stream.dali import DaliStream
from psla_fast.stream.indexed import IndexedSource
from psla_fast.stream.plan import BatchPlan, DrawPlan, PlanConfig, SequentialPlan, explain_difference
from psla_fast.stream.resident import DeviceStream, HostSource
from psla_fast.stream.slabs import SlabStream
from psla_fast.stream.webdataset import BlockSource

__all__ = [
    "Batch",
    "BatchPlan",
    "BatchShape",
    "DrawPlan",
    "PlanConfig",
    "SequentialPlan",
    "Stream",
    "StreamConfig",
    "explain_difference",
    "open_stream",
]


class Stream(Protocol):
    """An executor: reads what plans name, in their order."""

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield a batch for each plan; a batch's tensors may be reused once the next one is asked for."""

    def close(self) -> None:
        """Release threads and memory; open files belong to the shards."""


def open_stream(
    shards: Shards, config: StreamConfig, shapes: Sequence[BatchShape], device: torch.device
) -> Stream:
    """Open the executor that `config.kind` names, for batches of these shapes."""
    if config.kind == "dali":
        return DaliStream(shards, config, shapes, device)
    if config.kind == "webdataset":
        return SlabStream(shards, config, shapes, device, BlockSource(shards, config))
    if config.kind == "resident":
        if config.place == "device" and device.type == "cuda":
            return DeviceStream(shards, config, device)
        return SlabStream(shards, config, shapes, device, HostSource(shards, config))
    return SlabStream(shards, config, shapes, device, IndexedSource(shards, config.check_crc))
