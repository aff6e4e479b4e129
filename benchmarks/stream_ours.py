"""Our streams in benchmarks/stream.py, and the ceiling: each builds a function that reads clips."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from psla_fast.sampling import SamplingConfig
from psla_fast.shards import Shards
from psla_fast.stream import BatchPlan, DrawPlan, PlanConfig, StreamConfig, open_stream

Read = Callable[[], int]


def make_plan(
    shards: Shards, stream: StreamConfig, mixup_rate: float, num_epochs: int, batch_size: int, num_frames: int
) -> tuple[DrawPlan, list[BatchPlan]]:
    """Plan some epochs of balanced draws."""
    plan = DrawPlan(
        shards, PlanConfig(SamplingConfig(mixup_rate=mixup_rate), stream, 0, batch_size, num_frames)
    )
    return plan, [batch for epoch in range(num_epochs) for batch in plan.batches(epoch)]


def ours(
    shards: Shards, config: StreamConfig, mixup_rate: float, num_epochs: int, batch_size: int, num_frames: int
) -> Read:
    """Our stream of a kind, from its second pass on."""
    plan, batches = make_plan(shards, config, mixup_rate, num_epochs, batch_size, num_frames)
    stream = open_stream(shards, config, plan.shapes, torch.device("cpu"))
    return lambda: sum(len(batch.clip_ids) for batch in stream.batches(iter(batches)))


def first_pass(
    shards: Shards, config: StreamConfig, mixup_rate: float, batch_size: int, num_frames: int
) -> Read:
    """Our stream of a kind, each time a fresh one."""
    plan, batches = make_plan(shards, config, mixup_rate, 1, batch_size, num_frames)

    def read() -> int:
        stream = open_stream(shards, config, plan.shapes, torch.device("cpu"))
        num_clips = sum(len(batch.clip_ids) for batch in stream.batches(iter(batches)))
        stream.close()
        return num_clips

    return read


def bare_pread(shards: Shards, plans: Sequence[BatchPlan], num_buffers: int, num_threads: int) -> Read:
    """The ceiling: indexed's members in its order, all arguments known beforehand, no batch handed over."""
    rows, num_frames = [plan.row_ids for plan in plans], plans[0].shape.num_frames
    shape = (num_buffers, max(map(len, rows)), num_frames, shards.fbank_config.num_mels)
    buffers = np.zeros(shape, dtype=shards.storage.numpy)
    index, targets = shards.index, [[memoryview(row).cast("B") for row in buffer] for buffer in buffers]
    batches = [
        [
            (
                shards.descriptor(int(index.shard[clip_id])),
                [target[: min(num_frames, int(index.num_frames[clip_id])) * shards.frame_bytes]],
                int(index.offset[clip_id]),
            )
            for clip_id, target in zip(ids.tolist(), targets[number % num_buffers], strict=False)
        ]
        for number, ids in enumerate(rows)
    ]

    def read_part(first: int) -> None:
        for batch in batches:
            for descriptor, target, offset in batch[first::num_threads]:
                os.preadv(descriptor, target, offset)

    pool = ThreadPoolExecutor(num_threads)

    def read() -> int:
        list(pool.map(read_part, range(num_threads)))
        return sum(len(plan.clip_ids) for plan in plans)

    return read


def best_of(rates: dict[str, list[float]], mark: str) -> dict[str, list[float]]:
    """Of contestants that differ behind a mark only, keep the one of the highest median, without the mark."""
    best: dict[str, list[float]] = {}
    for name, values in rates.items():
        known = best.get(stem := name.split(mark)[0])
        if known is None or np.median(values) > np.median(known):
            best[stem] = values
    return best


def drop_cached(shards: Shards) -> None:
    """Have the kernel forget the shards' pages, so that they come from the disk."""
    for number in range(len(shards.index.shard_bytes)):
        descriptor = shards.descriptor(number)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
